"""State dicts: every bit comes back, in place and on its tier; what means something else is refused by name."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import same, small_model, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from collins import Collins
from collins.fingerprint import Fingerprint, unpacked

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


TRIPS = {
    "weights-only file": through_file,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("memory", [None, "device", "host"])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hash", ["block", "universal"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_bit_comes_back_in_every_tier(device, hash, table_dtype, memory, trip):
    if device == "cpu" and memory == "device":
        memory = {"tier": "auto"}  # the CPU is the host
    options = {"hash": hash, "table_dtype": table_dtype, "memory": memory, "lr": 0.01, "min_K": 16}
    net, other = (small_model(seed, torch.bfloat16, device) for seed in (0, 1))
    opt, resumed = (Collins(n.parameters(), **options) for n in (net, other))
    train(net, opt, 3)
    saved = TRIPS[trip](opt.state_dict())
    resumed.load_state_dict(saved)
    assert same(resumed.state_dict()["state"], opt.state_dict()["state"])
    other.load_state_dict(net.state_dict())
    train(net, opt, 3, first=3)
    train(other, resumed, 3, first=3)
    assert same(dict(other.state_dict()), dict(net.state_dict()))
    assert same(resumed.state_dict()["state"], opt.state_dict()["state"])


@pytest.mark.parametrize("memory", [None, "host"])
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_keep_identity_address_and_tier(device, memory):
    net, other = small_model(device=device), small_model(1, device=device)
    opt, target = (Collins(n.parameters(), min_K=16, memory=memory, lr=torch.tensor(0.01)) for n in (net, other))
    train(net, opt, 3)
    train(other, target, 1)
    held = {p: {name: (value, value.data_ptr(), value.device) for name, value in state.items() if name != "layout"}
            for p, state in target.state.items()}  # fmt: skip
    lr = target.param_groups[0]["lr"]
    opt.param_groups[0]["lr"].fill_(0.5)
    target.load_state_dict(opt.state_dict())
    assert target.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5
    for p, tensors in held.items():
        for name, (tensor, address, where) in tensors.items():
            now = target.state[p][name]
            assert now is tensor
            assert (now.data_ptr(), now.device) == (address, where)
            assert memory is None or now.device.type == "cpu"
    assert same(target.state_dict()["state"], opt.state_dict()["state"])
    before = copy.deepcopy(target.state_dict()["state"])
    train(net, opt, 1)
    assert same(target.state_dict()["state"], before)  # nothing is shared with the source


@pytest.mark.cuda
@pytest.mark.parametrize("memory", [None, "host"])
def test_loading_makes_no_second_copy_on_the_device(memory):
    p = torch.nn.Parameter(torch.zeros(2**13, 2**13, device="cuda"))
    opt = Collins([p], memory=memory)
    p.grad = torch.ones_like(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved = {**saved, "state": {0: {k: v.cpu() if k != "layout" else v for k, v in saved["state"][0].items()}}}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.load_state_dict(saved)
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_loading_compiles_nothing_anew():
    torch._dynamo.reset()
    net, other = small_model(), small_model(1)
    opt, source = (Collins(n.parameters(), lr=0.01, min_K=16, compile=True) for n in (net, other))
    train(net, opt, 2)
    train(other, source, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        opt.load_state_dict(copy.deepcopy(source.state_dict()))
        net.load_state_dict(other.state_dict())
        train(net, opt, 2, first=2)
        train(other, source, 2, first=2)
    assert same(dict(net.state_dict()), dict(other.state_dict()))


def test_a_parameter_that_the_state_dict_does_not_know_starts_anew():
    for memory in (None, "host"):
        net = small_model()
        opt = Collins(net.parameters(), min_K=16, memory=memory)
        train(net, opt, 2)
        partial = copy.deepcopy(opt.state_dict())
        del partial["state"][0]
        opt.load_state_dict(partial)
        assert net[0].weight not in opt.state
        other = copy.deepcopy(net)
        new = Collins(other.parameters(), min_K=16)
        train(net, opt, 1)
        train(other, new, 1)
        assert same(opt.state_dict()["state"][0], new.state_dict()["state"][0])
        assert opt.state_dict()["state"][2]["step"] == 3


OTHERS = [
    ({"compress_ratio": 64}, "bucket load c 32 where this optimizer has 64"),
    ({"compress_ratio": 8}, "bucket load c 32 where this optimizer has 8"),
    ({"min_K": 300}, "bucket load c 32 where this optimizer has 16"),
    ({"hash": "universal"}, "hash 'block' where this optimizer has 'universal'"),
    ({"seed": 7}, "seed 0 where this optimizer has 7"),
    ({"seed": -(2**70)}, "signs"),
    ({"rehash_period": 50}, "rehash_period 100 where this optimizer has 50"),
    ({"rehash_period": None}, "rehash_period 100 where this optimizer has None"),
    ({"table_dtype": torch.bfloat16}, "keeps m_table in torch.bfloat16, .* state_dict holds torch.float32"),
    ({"compress_ratio": 1}, "has moments {'exp_avg': .* state_dict holds {'m_table'"),
]


@pytest.mark.parametrize(("options", "text"), OTHERS, ids=str)
@pytest.mark.parametrize("memory", [None, "host"])
def test_other_settings_are_refused_by_name_and_nothing_changes(memory, options, text):
    net, other = small_model(), small_model(1)
    source = Collins(net.named_parameters(), lr=0.5, min_K=16)
    opt = Collins(other.named_parameters(), **{"min_K": 16, "memory": memory, **options})
    train(net, source, 2)
    train(other, opt, 1)
    before = copy.deepcopy(opt.state_dict())
    for attempt in (opt.check_state_dict, opt.load_state_dict):
        with pytest.raises(ValueError, match=f"parameter '0.weight' .*{text}"):
            attempt(copy.deepcopy(source.state_dict()))
        assert same(opt.state_dict()["state"], before["state"])
        assert opt.state_dict()["param_groups"] == before["param_groups"]


def test_coefficients_set_by_hand_are_part_of_what_tables_mean():
    net, other = small_model(), small_model(1)
    source, opt = (Collins(n.parameters(), hash="universal", min_K=16) for n in (net, other))
    train(net, source, 1)
    source.hash_of(net[0].weight).a = 12345
    train(net, source, 1)
    own = opt.hash_of(other[0].weight).a
    with pytest.raises(ValueError, match=f"parameter 0 .* a 12345 where this optimizer has {own}"):
        opt.load_state_dict(source.state_dict())
    opt.hash_of(other[0].weight).a = 12345
    opt.load_state_dict(source.state_dict())
    assert same(opt.state_dict()["state"], source.state_dict()["state"])


def test_another_order_of_parameters_is_refused():
    torch.manual_seed(0)
    a, b, tall = (torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (64, 64), (128, 32)))

    def stepped(params, **options):
        opt = Collins(params, min_K=16, **options)
        for p in (a, b, tall):
            p.grad = torch.ones_like(p)
        opt.step()
        return opt

    saved = stepped([("a", a), ("b", b)]).state_dict()
    with pytest.raises(ValueError, match="parameter 'a' is number 0 in state_dict and number 1 in this optimizer"):
        stepped([("b", b), ("a", a)]).load_state_dict(saved)
    stepped([("module.a", a), ("module.b", b)]).load_state_dict(saved)  # names may change: the places are the same
    stepped([a, b]).load_state_dict(saved)
    # Without names shapes tell, also where tables are as long.
    saved = stepped([a, tall], hash="universal").state_dict()
    with pytest.raises(ValueError, match=r"parameter 0 .* first dimension 64 where this optimizer has 128"):
        stepped([tall, a], hash="universal").load_state_dict(saved)


def test_dense_moments_are_those_of_adamw_and_need_no_fingerprint():
    net, other = small_model(), small_model()
    adamw, opt = torch.optim.AdamW(net.parameters()), Collins(other.parameters(), compress_ratio=1)
    train(net, adamw, 3)
    opt.load_state_dict(adamw.state_dict())
    assert same(opt.state_dict()["state"], adamw.state_dict()["state"])


def test_schedules_come_from_the_state_dict_and_everything_else_stays_as_built():
    net, other = small_model(), small_model()
    source = Collins(net.parameters(), lr=0.5, betas=(0.8, 0.9), min_K=16, decode="sketch", eps=1e-3, weight_decay=0.3)
    torch.optim.lr_scheduler.StepLR(source, 3)
    opt = Collins(other.parameters(), min_K=16, stochastic_rounding=False, nonfinite="skip")
    train(net, source, 1)
    opt.load_state_dict(source.state_dict())
    group = opt.param_groups[0]
    assert [group[name] for name in ("lr", "betas", "eps", "weight_decay", "initial_lr")] == [
        0.5, (0.8, 0.9), 1e-3, 0.3, 0.5
    ]  # fmt: skip
    assert (group["decode"], group["stochastic_rounding"], group["nonfinite"]) == ("residual", False, "skip")


BROKEN = [
    (lambda s: s["state"][0].pop("layout"), "parameter 0 has tables in state_dict without the 'layout'"),
    (lambda s: s["state"][0].update(layout=5), "parameter 0 in state_dict: layout must be a fingerprint of version 1"),
    (lambda s: s["state"][0].update(layout=2**2000 + 1), "parameter 0 in state_dict: layout must be a fingerprint"),
    (lambda s: s["state"][0].update(step=float("nan")), "parameter 0 must have a step that is a number of at least 0"),
    (lambda s: s["state"][0].pop("step"), "parameter 0 must have a step .* state_dict holds None"),
    (lambda s: s["state"][0].update(m_table=3), "parameter 0 has moments .*'m_table': 3"),
    (lambda s: s["param_groups"].clear(), re.escape("has parameter groups of [] parameters; this optimizer has [4]")),
    (
        lambda s: s.pop("state"),
        re.escape("must be a dict with the keys 'state' and 'param_groups', got ['param_groups']"),
    ),
    (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must be finite and at least 0, got -1.0"),
]


@pytest.mark.parametrize(("change", "text"), BROKEN, ids=[text[:40] for _, text in BROKEN])
def test_a_broken_state_dict_is_refused_and_nothing_changes(change, text):
    net = small_model()
    opt = Collins(net.parameters(), min_K=16)
    train(net, opt, 1)
    wrong = copy.deepcopy(opt.state_dict())
    change(wrong)
    train(net, opt, 1)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=text):
        opt.load_state_dict(wrong)
    assert same(opt.state_dict()["state"], before["state"])
    assert opt.state_dict()["param_groups"] == before["param_groups"]


def test_a_fingerprint_packs_and_unpacks():
    mark = Fingerprint(1, *range(2, 13), 2**64 - 3)
    assert unpacked(mark.packed()) == mark
    for wrong in (0, -1, True, mark.packed() + 1, "1", None, 1.0):
        with pytest.raises(ValueError, match="layout must be a fingerprint"):
            unpacked(wrong)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_keep_the_fingerprint(flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net = small_model()
    source = Collins(net.parameters(), min_K=16, lr=0.01)
    train(net, source, 3)
    dcp.save(get_optimizer_state_dict(net, source, options=options), checkpoint_id=tmp_path, no_dist=True)

    def loaded(**settings):
        other = small_model(1)
        opt = Collins(other.parameters(), **{"min_K": 16, "lr": 0.01, **settings})
        state = get_optimizer_state_dict(other, opt, options=options)
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(other, opt, state, options=options)
        return opt

    assert same(loaded().state_dict()["state"], source.state_dict()["state"])
    with pytest.raises(ValueError, match="seed 0 where this optimizer has 3"):
        loaded(seed=3)
    set_optimizer_state_dict(
        other := small_model(1),
        fresh := Collins(other.parameters(), min_K=16),
        get_optimizer_state_dict(net, source, options=options),
        options=options,
    )
    assert same(fresh.state_dict()["state"], source.state_dict()["state"])
