"""State dicts are loaded bitwise, in place and on their tier; incompatible state is rejected by name."""

import copy
import io
import pickle
import re
import threading

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import same, small_model, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from collins import Collins, convert
from collins.fingerprint import Fingerprint, unpacked

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ROUND_TRIPS = {
    "weights-only file": through_file,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
@pytest.mark.parametrize("memory", [None, "device", "host"])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hash", ["block", "universal"])
@pytest.mark.parametrize("device", DEVICES)
def test_state_is_loaded_bitwise_in_every_tier(device, hash, table_dtype, memory, round_trip):
    if device == "cpu" and memory == "device":
        memory = {"tier": "auto"}  # the CPU is the host
    options = {"hash": hash, "table_dtype": table_dtype, "memory": memory, "lr": 0.01, "min_K": 16}
    dtype = torch.float64 if table_dtype == torch.float64 else torch.bfloat16
    net, other = (small_model(seed, dtype, device) for seed in (0, 1))
    opt, resumed = (Collins(n.parameters(), **options) for n in (net, other))
    train(net, opt, 3)
    saved = ROUND_TRIPS[round_trip](opt.state_dict())
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
    tensors_of = {
        p: {name: (value, value.data_ptr(), value.device) for name, value in state.items() if name != "layout"}
        for p, state in target.state.items()
    }
    lr = target.param_groups[0]["lr"]
    opt.param_groups[0]["lr"].fill_(0.5)
    target.load_state_dict(opt.state_dict())
    assert target.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5
    for p, tensors in tensors_of.items():
        for name, (tensor, address, device_before) in tensors.items():
            current = target.state[p][name]
            assert current is tensor
            assert (current.data_ptr(), current.device) == (address, device_before)
            assert memory is None or current.device.type == "cpu"
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


def test_a_parameter_that_is_not_in_the_state_dict_restarts():
    for memory in (None, "host"):
        net = small_model()
        opt = Collins(net.parameters(), min_K=16, memory=memory)
        train(net, opt, 2)
        partial = copy.deepcopy(opt.state_dict())
        del partial["state"][0]
        opt.load_state_dict(partial)
        assert net[0].weight not in opt.state
        other = copy.deepcopy(net)
        new_opt = Collins(other.parameters(), min_K=16)
        train(net, opt, 1)
        train(other, new_opt, 1)
        assert same(opt.state_dict()["state"][0], new_opt.state_dict()["state"][0])
        assert opt.state_dict()["state"][2]["step"] == 3


OTHERS = [
    ({"compress_ratio": 64}, "bucket load c 4 where this optimizer has 8"),
    ({"compress_ratio": 8}, "has moments {'m_table': .* state_dict holds {.*'m_table_scale'"),
    ({"table_dtype": torch.float32}, "bucket load c 4 where this optimizer has 32"),
    ({"hash": "universal"}, "hash 'block' where this optimizer has 'universal'"),
    ({"seed": 7}, "seed 0 where this optimizer has 7"),
    ({"seed": -(2**70)}, "signs"),
    ({"rehash_period": 50}, "rehash_period 400 where this optimizer has 50"),
    ({"rehash_period": None}, "rehash_period 400 where this optimizer has None"),
    ({"table_dtype": torch.bfloat16, "compress_ratio": 4}, "keeps m_table in torch.bfloat16|has moments"),
    ({"compress_ratio": 1}, "has moments {'exp_avg': .* state_dict holds {'m_table'"),
]


@pytest.mark.parametrize(("options", "text"), OTHERS, ids=str)
@pytest.mark.parametrize("memory", [None, "host"])
def test_other_options_are_rejected_by_name_and_nothing_changes(memory, options, text):
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


def test_custom_coefficients_are_part_of_the_fingerprint():
    net, other = small_model(), small_model(1)
    source, opt = (Collins(n.parameters(), hash="universal", min_K=16) for n in (net, other))
    source.hash_of(net[0].weight).a = 12345
    train(net, source, 2)
    coefficient = opt.hash_of(other[0].weight).a
    with pytest.raises(ValueError, match=f"parameter 0 .* a 12345 where this optimizer has {coefficient}"):
        opt.load_state_dict(source.state_dict())
    opt.hash_of(other[0].weight).a = 12345
    opt.load_state_dict(source.state_dict())
    assert same(opt.state_dict()["state"], source.state_dict()["state"])


def test_another_order_of_parameters_is_rejected():
    torch.manual_seed(0)
    a, b, other_shape = (torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (64, 64), (128, 32)))

    def opt_after_step(params, **options):
        opt = Collins(params, min_K=16, **options)
        for p in (a, b, other_shape):
            p.grad = torch.ones_like(p)
        opt.step()
        return opt

    saved = opt_after_step([("a", a), ("b", b)]).state_dict()
    with pytest.raises(ValueError, match="parameter 'a' is number 0 in state_dict and number 1 in this optimizer"):
        opt_after_step([("b", b), ("a", a)]).load_state_dict(saved)
    opt_after_step([("module.a", a), ("module.b", b)]).load_state_dict(
        saved
    )  # names may change: the positions are the same
    opt_after_step([a, b]).load_state_dict(saved)
    # Without names, shapes are compared, also if tables have the same length.
    saved = opt_after_step([a, other_shape], hash="universal").state_dict()
    with pytest.raises(ValueError, match=r"parameter 0 has the shape \(128, 32\); .* 4096 elements in 64 rows"):
        opt_after_step([other_shape, a], hash="universal").load_state_dict(saved)


def test_dense_moments_have_the_format_of_adamw_without_a_fingerprint():
    net, other = small_model(), small_model()
    adamw, opt = torch.optim.AdamW(net.parameters()), Collins(other.parameters(), compress_ratio=1)
    train(net, adamw, 3)
    opt.load_state_dict(adamw.state_dict())
    assert same(opt.state_dict()["state"], adamw.state_dict()["state"])


def test_scheduled_options_are_loaded_and_all_others_keep_their_values():
    net, other = small_model(), small_model()
    source = Collins(
        net.parameters(),
        lr=0.5,
        betas=(0.8, 0.9),
        min_K=16,
        rehash_period=100,
        decode="sketch",
        eps=1e-3,
        weight_decay=0.3,
    )
    torch.optim.lr_scheduler.StepLR(source, 3)
    opt = Collins(
        other.parameters(),
        min_K=16,
        table_dtype=torch.float32,
        rehash_period=100,
        stochastic_rounding=False,
        nonfinite="skip",
    )
    train(net, source, 1)
    opt.load_state_dict(source.state_dict())
    group = opt.param_groups[0]
    assert [group[name] for name in ("lr", "betas", "eps", "weight_decay", "initial_lr")] == [
        0.5, (0.8, 0.9), 1e-3, 0.3, 0.5
    ]  # fmt: skip
    assert (group["decode"], group["stochastic_rounding"], group["nonfinite"]) == ("least_squares", False, "skip")


INVALID_STATE_DICTS = [
    (lambda s: s["state"][0].pop("layout"), "parameter 0 has tables in state_dict without the 'layout'"),
    (lambda s: s["state"][0].update(layout=5), "parameter 0 in state_dict: layout must be a fingerprint of version 1"),
    (lambda s: s["state"][0].update(layout=2**2000 + 1), "parameter 0 in state_dict: layout must be a fingerprint"),
    (lambda s: s["state"][0].update(step=float("nan")), "parameter 0 must have a step that is a whole number"),
    (lambda s: s["state"][0].pop("step"), "parameter 0 must have a step .* state_dict holds None"),
    (lambda s: s["state"][0].update(m_table=3), "parameter 0 must have a m_table that is a dense .* of type int"),
    (lambda s: s["param_groups"].clear(), re.escape("has parameter groups of [] parameters; this optimizer has [4]")),
    (
        lambda s: s.pop("state"),
        re.escape("must be a dict with the keys 'state' and 'param_groups', got ['param_groups']"),
    ),
    (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must be finite and at least 0, got -1.0"),
]


@pytest.mark.parametrize(("change", "text"), INVALID_STATE_DICTS, ids=[text[:40] for _, text in INVALID_STATE_DICTS])
def test_an_invalid_state_dict_is_rejected_and_nothing_changes(change, text):
    net = small_model()
    opt = Collins(net.parameters(), min_K=16)
    train(net, opt, 1)
    state_dict = copy.deepcopy(opt.state_dict())
    change(state_dict)
    train(net, opt, 1)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=text):
        opt.load_state_dict(state_dict)
    assert same(opt.state_dict()["state"], before["state"])
    assert opt.state_dict()["param_groups"] == before["param_groups"]


def with_parts(**parts):
    return lambda state: {**state, **parts}


def in_group(**parts):
    return lambda state: {**state, "param_groups": [{**state["param_groups"][0], **parts}]}


def in_state(**parts):
    return lambda state: {**state, "state": {**state["state"], 0: {**state["state"][0], **parts}}}


MALFORMED = {
    "no dict": (lambda state: 5, "state_dict must be a dict"),
    "a list": (lambda state: [state], "state_dict must be a dict"),
    "state: list": (with_parts(state=[1]), r"state_dict\['state'\] must be a mapping, got a value of type list"),
    "state: bool": (with_parts(state=True), r"state_dict\['state'\] must be a mapping, got a value of type bool"),
    "one state: list": (with_parts(state={0: [1]}), r"state_dict\['state'\]\[0\] must be a mapping"),
    "one state: tensor": (
        with_parts(state={1: torch.ones(2)}),
        r"state_dict\['state'\]\[1\] must be a mapping, .* Tensor",
    ),
    "one state: None": (with_parts(state={0: None}), r"state_dict\['state'\]\[0\] must be a mapping, got None"),
    "groups: dict": (with_parts(param_groups={}), r"state_dict\['param_groups'\] must be a list, got .* dict"),
    "groups: tensor": (with_parts(param_groups=torch.ones(6)), r"state_dict\['param_groups'\] must be a list"),
    "group: no params": (
        with_parts(param_groups=[{}]),
        r"\['param_groups'\]\[0\] must be a dict with the key 'params'",
    ),
    "group: list": (with_parts(param_groups=[[0]]), r"\['param_groups'\]\[0\] must be a dict .* got list"),
    "params: int": (in_group(params=3), r"\[0\]\['params'\] must be a list, got a value of type int"),
    "params: lists": (in_group(params=[[0], [1], [2], [3]]), "each of .* must be a parameter's number, got .* list"),
    "params: twice": (in_group(params=[0, 0, 1, 2]), "must have each parameter in its param_groups once"),
    "names: int": (in_group(param_names=3), r"\['param_names'\] must be a list, got a value of type int"),
    "names: lists": (in_group(param_names=[[]] * 4), r"each of .*\['param_names'\] must be a string"),
    "names: few": (in_group(param_names=["a"]), "must have as many param_names as params, got 1"),
    "betas: string": (in_group(betas="00"), "betas must be two numbers"),
    "lr: None": (in_group(lr=None), "lr must be finite"),
    "lr: meta": (in_group(lr=torch.ones((), device="meta")), "lr must be a number or a tensor of one element"),
    "eps: huge": (in_group(eps=2**70), r"eps must be below 2\*\*63"),
    "step: string": (in_state(step="3"), "parameter 0 must have a step that is a whole number from 0 to 16777216"),
    "step: bool": (in_state(step=True), "parameter 0 must have a step"),
    "step: half": (in_state(step=0.5), "parameter 0 must have a step"),
    "step: meta": (in_state(step=torch.zeros((), device="meta")), "parameter 0 must have a step"),
    "step: vector": (in_state(step=torch.ones(2)), "parameter 0 must have a step"),
    "step: 2**70": (in_state(step=2**70), f"parameter 0 must have a step .* holds {2**70}"),
    "step: 2**24 + 1": (in_state(step=2**24 + 1), "parameter 0 must have a step"),
    "step: 10**5000": (in_state(step=10**5000), "parameter 0 must have a step .* more than 4096 bits"),
    "layout: 10**5000": (in_state(layout=10**5000), "layout must be a fingerprint"),
    "moment: list": (in_state(m_table=[0]), "parameter 0 must have a m_table .* of type list"),
    "moment: its shape": (in_state(m_table=(128, 2)), "parameter 0 must have a m_table .* of type tuple"),
    "others: meta": (in_state(slow=[torch.ones(2, device="meta")]), "slow of parameter 0 must hold data"),
    "group: no copy": (in_group(tag=threading.Lock()), "parameter group 0 in state_dict holds a value that cannot"),
    "others: no copy": (in_state(slow=threading.Lock()), "slow of parameter 0 in state_dict holds a value that cannot"),
}


def assert_rejected(opt, call, state_dict, text):
    """Checks that a call raises an error and changes nothing."""
    before, groups = copy.deepcopy(opt.state_dict()["state"]), str(opt.param_groups)
    with pytest.raises(ValueError, match=text):
        call(state_dict)
    assert same(opt.state_dict()["state"], before)
    assert str(opt.param_groups) == groups


def saved_and_target(**options):
    (net, source), (other, target) = (
        (n, Collins(n.parameters(), **{"min_K": 16, **options})) for n in (small_model(), small_model(1))
    )
    train(net, source, 2)
    train(other, target, 1)
    return source.state_dict(), target


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("method", ["load_state_dict", "check_state_dict", "convert"])
def test_a_malformed_state_dict_is_rejected_by_name_and_nothing_changes(method, case):
    change, text = MALFORMED[case]
    saved, target = saved_and_target()
    call = (lambda state: convert(state, target)) if method == "convert" else getattr(target, method)
    assert_rejected(target, call, change(saved), text)


def without_storage(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def test_a_step_that_requires_a_gradient_is_read():
    saved, target = saved_and_target()
    saved = copy.deepcopy(saved)
    for state in saved["state"].values():
        state["step"] = torch.tensor(7.0, requires_grad=True)
    target.load_state_dict(saved)
    for state in target.state.values():
        assert state["step"].item() == 7
        assert not state["step"].requires_grad


INVALID_MOMENTS = {
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "nested": lambda t: torch.nested.as_nested_tensor([*t]),
    "freed": without_storage,
    "numpy": lambda t: t.numpy(),
    "None": lambda t: None,
    "double": lambda t: t.double(),
    "lazy": lambda t: torch.nn.UninitializedParameter(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("memory", [None, "host"])
@pytest.mark.parametrize("case", INVALID_MOMENTS)
@pytest.mark.parametrize("ratio", [1, 32])
def test_a_moment_that_cannot_be_copied_is_detected_before_any_is_loaded(ratio, case, memory):
    saved, target = saved_and_target(compress_ratio=ratio, memory=memory)
    saved = copy.deepcopy(saved)
    number, state = [*saved["state"].items()][2]  # the last matrix, behind others that fit
    key = "exp_avg_sq" if ratio == 1 else "v_table"
    state[key] = INVALID_MOMENTS[case](state[key])
    for method in (target.load_state_dict, target.check_state_dict):
        assert_rejected(target, method, saved, f"parameter {number} .*{key}")


@pytest.mark.parametrize("case", ["sparse", "meta", "requires grad", "freed", "numpy", "None", "lazy"])
def test_a_moment_here_that_cannot_be_written_to_is_replaced(case):
    saved, target = saved_and_target(compress_ratio=1)
    state = [*target.state.values()][2]
    state["exp_avg_sq"] = INVALID_MOMENTS[case](state["exp_avg_sq"])
    state["step"] = (
        INVALID_MOMENTS["sparse"](state["step"])
        if case == "sparse"
        else INVALID_MOMENTS["requires grad"](state["step"])
    )
    target.load_state_dict(saved)
    assert same(target.state_dict()["state"], saved["state"])


def test_the_steps_of_a_whole_counter_are_loaded():
    saved, target = saved_and_target()
    target.load_state_dict(in_state(step=np.float32(2**24))(saved))
    assert target.state_dict()["state"][0]["step"] == 2**24


def test_options_that_earlier_versions_ignored_in_a_group_are_dropped():
    saved, target = saved_and_target()
    for state_dict in (in_group(seed=5, tag="kept")(saved), convert(in_group(seed=5, tag="kept")(saved), target)):
        target.load_state_dict(state_dict)
        assert "seed" not in target.param_groups[0]
        assert target.param_groups[0]["tag"] == "kept"


@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
@pytest.mark.parametrize("memory", [None, "host"])
@pytest.mark.parametrize("device", DEVICES)
def test_additional_state_of_a_wrapper_is_loaded_bitwise(device, memory, round_trip):
    (net, source), (other, target) = (
        (n, Collins(n.parameters(), min_K=16, memory=memory))
        for n in (small_model(device=device), small_model(1, device=device))
    )
    train(net, source, 2)
    train(other, target, 1)
    slow = torch.randn(128, 64, dtype=torch.float64, device=device)
    extra = {"slow": slow, "turn": 3, "history": [(1, torch.ones(2, dtype=torch.int32))], "mask": torch.eye(2).bool()}
    extra |= {"exp_avg_slow": torch.ones(3), "m_table_age": 2}  # names that begin as those of moments do
    source.state[net[0].weight].update(extra)
    saved = ROUND_TRIPS[round_trip](source.state_dict())
    target.load_state_dict(saved)
    state = target.state[other[0].weight]
    assert same(target.state_dict()["state"], source.state_dict()["state"])
    assert state["slow"].device == other[0].weight.device
    assert torch.equal(state["history"][0][1].cpu(), torch.ones(2, dtype=torch.int32))
    saved["state"][0]["slow"].zero_()
    assert torch.equal(state["slow"], slow)  # nothing is shared with the source
    train(other, target, 1)
    assert torch.equal(target.state[other[0].weight]["slow"], slow)
    del source.state[net[0].weight]["slow"]
    target.load_state_dict(source.state_dict())
    assert "slow" not in target.state[other[0].weight]


@pytest.mark.parametrize("options", [{}, {"hash": "universal"}], ids=str)
def test_the_error_for_moments_of_adamw_names_convert(options):
    net, other = small_model(), small_model(1)
    adamw, opt = torch.optim.AdamW(net.parameters()), Collins(other.parameters(), min_K=16, **options)
    train(net, adamw, 2)
    with pytest.raises(ValueError, match=r"parameter 0 keeps its moments in tables.* collins\.convert\(state_dict"):
        opt.load_state_dict(adamw.state_dict())
    opt.load_state_dict(convert(adamw.state_dict(), opt))


def test_a_fingerprint_packs_and_unpacks():
    fingerprint = Fingerprint(1, 12, *range(3, 13), 2**64 - 3)
    assert unpacked(fingerprint.packed()) == fingerprint
    changes = ({"rows": 5}, {"buckets": 0}, {"hash": 0}, {"hash": 2}, {"hash": 3})
    inconsistent = [fingerprint._replace(**change).packed() for change in changes]
    for value in (0, -1, True, fingerprint.packed() + 1, "1", None, 1.0, 10**5000, *inconsistent):
        with pytest.raises(ValueError, match="layout must be a fingerprint"):
            unpacked(value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_keep_the_fingerprint(flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net = small_model()
    source = Collins(net.parameters(), min_K=16, lr=0.01)
    train(net, source, 3)
    dcp.save(get_optimizer_state_dict(net, source, options=options), checkpoint_id=tmp_path, no_dist=True)

    def load_into_new(**settings):
        other = small_model(1)
        opt = Collins(other.parameters(), **{"min_K": 16, "lr": 0.01, **settings})
        state = get_optimizer_state_dict(other, opt, options=options)
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(other, opt, state, options=options)
        return opt

    assert same(load_into_new().state_dict()["state"], source.state_dict()["state"])
    with pytest.raises(ValueError, match="seed 0 where this optimizer has 3"):
        load_into_new(seed=3)
    set_optimizer_state_dict(
        other := small_model(1),
        new_opt := Collins(other.parameters(), min_K=16),
        get_optimizer_state_dict(net, source, options=options),
        options=options,
    )
    assert same(new_opt.state_dict()["state"], source.state_dict()["state"])
