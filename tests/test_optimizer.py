"""`Collins` as a torch optimizer: groups, hooks, copies, reports."""

import copy
import io
import pickle

import pytest
import torch
from helpers import same, small_model, train

from collins import BlockHash, Collins, MemoryReport, UniversalHash


def tensors(state):
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


OPTIONS = [
    {"table_dtype": torch.float32},
    {"hash": "universal"},
    {"decode": "sketch", "table_dtype": torch.bfloat16},
    {"compress_ratio": 1},
    {"rehash_period": None, "table_dtype": torch.float32},
]


def test_is_an_optimizer_with_adamws_leading_arguments():
    net = small_model()
    opt = Collins(net.parameters(), 1e-2, (0.8, 0.9), 1e-6, 0.1)
    assert isinstance(opt, torch.optim.Optimizer)
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 1e-6, 0.1)
    reference = torch.optim.AdamW(net.parameters()).defaults
    for name in ("lr", "betas", "eps", "weight_decay", "maximize"):
        assert Collins(net.parameters()).defaults[name] == reference[name]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_lowers_the_loss(options):
    net = small_model()
    opt = Collins(net.parameters(), lr=1e-2, min_K=16, **options)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(100):
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        opt.step()
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_has_the_documented_names_shapes_and_dtypes(options):
    net = small_model()
    opt = Collins(net.parameters(), min_K=16, **options)
    train(net, opt, 2)
    for p in net.parameters():
        state, hash = opt.state[p], opt.hash_of(p)
        assert state["step"].shape == ()
        assert state["step"].item() == 2
        if hash is None:
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        else:
            assert state.keys() == {"step", "m_table", "v_table", "layout"}
            assert state["m_table"].shape == state["v_table"].shape
            assert state["m_table"].numel() == hash.buckets
            if isinstance(hash, BlockHash) and p[0].numel() % hash.block == 0:  # rows of a table match rows of p
                assert len(state["m_table"]) == len(p)
            assert state["m_table"].dtype == state["v_table"].dtype == options.get("table_dtype", torch.float32)


def test_every_option_but_compile_and_seed_may_be_set_per_group():
    p, q, r = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(3))
    opt = Collins(
        [
            {"params": [p], "lr": 0.0},
            {"params": [q], "hash": "universal", "min_K": 8, "compress_ratio": 8, "table_dtype": torch.bfloat16},
            {"params": [r], "decode": "sketch", "maximize": True, "rehash_period": None, "min_K": 64, "eps": 1e-6},
        ]
    )
    assert isinstance(opt.hash_of(p), BlockHash)
    assert isinstance(opt.hash_of(q), UniversalHash)
    assert opt.hash_of(q).buckets == 512
    assert opt.hash_of(r).period is None
    before = [t.detach().clone() for t in (p, q, r)]
    for t in (p, q, r):
        t.grad = torch.ones_like(t)
    opt.step()
    assert torch.equal(p.detach(), before[0])
    assert not torch.equal(q.detach(), before[1])
    assert (r.detach() - before[2]).mean() > 0  # ascends
    assert opt.state[q]["m_table"].dtype == torch.bfloat16


def test_equal_optimizers_step_equally_and_other_seeds_do_not():
    def train_with(noise, **options):
        net = small_model()
        torch.manual_seed(noise)  # the global generator must not matter
        opt = Collins(net.parameters(), lr=1e-2, min_K=16, **options)
        return train(net, opt, 5)

    for hash in ("block", "universal"):
        assert same(train_with(1, hash=hash), train_with(2, hash=hash))
        assert not same(train_with(1, hash=hash), train_with(1, hash=hash, seed=1))


def test_parameters_of_one_shape_hash_differently():
    p, q = torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(64, 64))
    index = torch.arange(4096)
    for hash in ("block", "universal"):
        opt = Collins([p, q], min_K=16, hash=hash)
        assert not torch.equal(opt.hash_of(p).sign(index), opt.hash_of(q).sign(index))


def test_hash_of_is_one_object_until_settings_change():
    p = torch.nn.Parameter(torch.randn(64, 64))
    opt = Collins([p], hash="universal")
    assert opt.hash_of(p) is opt.hash_of(p)
    opt.param_groups[0]["hash"] = "block"
    assert isinstance(opt.hash_of(p), BlockHash)
    opt.param_groups[0]["compress_ratio"] = 1
    assert opt.hash_of(p) is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_continues_like_the_original(how, options):
    net = small_model()
    opt = Collins(net.parameters(), lr=1e-2, min_K=16, seed=5, **options)
    if options.get("hash") == "universal":
        opt.hash_of(net[0].weight).a = 12345
    train(net, opt, 3)
    copied = copy.deepcopy((net, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, opt)))
    assert copied[1].seed == 5
    assert same(train(net, opt, 3, first=3), train(*copied, 3, first=3))


def test_step_hooks_and_state_dict_hooks_run():
    net = small_model()
    opt = Collins(net.parameters(), min_K=16)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before step"))
    opt.register_step_post_hook(lambda *_: calls.append("after step"))
    opt.register_state_dict_pre_hook(lambda *_: calls.append("before state_dict"))
    opt.register_state_dict_post_hook(lambda *_: calls.append("after state_dict"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("before load"))
    table = []
    opt.register_load_state_dict_post_hook(lambda o: table.append(o.state[net[0].weight]["m_table"].clone()))
    train(net, opt, 1)
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert calls == ["before step", "after step", "before state_dict", "after state_dict", "before load"]
    assert torch.equal(table[0], opt.state[net[0].weight]["m_table"])  # hooks see what was loaded


def test_a_load_hook_may_replace_the_state_dict():
    net, other = small_model(), small_model()
    opt, source = Collins(net.parameters(), min_K=16), Collins(other.parameters(), min_K=16)
    train(other, source, 3)
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: source.state_dict())
    opt.load_state_dict(opt.state_dict())
    assert opt.state[net[0].weight]["step"].item() == 3


def test_repr_shows_the_options():
    text = repr(Collins(small_model().parameters(), lr=0.123, decode="sketch"))
    for part in ("Collins", "lr: 0.123", "decode: sketch", "compress_ratio: 32", "min_K: 1024", "rehash_period: 400"):
        assert part in text


def test_empty_and_scalar_parameters():
    ps = [torch.nn.Parameter(torch.randn(shape)) for shape in ((), (0,), (3, 0))]
    opt = Collins(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    before = ps[0].item()
    opt.step()
    opt.step()
    assert ps[0].item() < before
    assert opt.state[ps[1]]["exp_avg"].shape == (0,)


def test_a_model_can_be_replaced_under_the_optimizer_before_its_first_step():
    """Sharding wrappers swap parameters after the optimizer was built: nothing may be cached in the constructor."""
    net = small_model()
    opt = Collins(net.parameters(), lr=1e-2, min_K=16)
    replacements = [torch.nn.Parameter(p.detach().clone()) for p in net.parameters()]
    opt.param_groups[0]["params"] = replacements
    for p in replacements:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state.keys() == set(replacements)


def test_memory_report_gives_the_bytes_of_the_state():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in OPTIONS:
            net = small_model(dtype=dtype)
            opt = Collins(net.named_parameters(), min_K=16, **options)
            before = opt.memory_report()
            assert isinstance(before, MemoryReport)
            train(net, opt, 1)
            state_bytes = sum(t.nbytes for state in opt.state.values() for t in tensors(state).values())
            assert before == opt.memory_report()
            assert before.state_bytes == sum(row.state_bytes for row in before.rows) == state_bytes
            adamw = torch.optim.AdamW(net.parameters())
            adamw.step()
            assert before.adamw_bytes == sum(t.nbytes for state in adamw.state.values() for t in state.values())
            assert before.ratio == before.adamw_bytes / before.state_bytes


def test_memory_report_is_printed_as_a_table():
    lines = str(Collins(small_model().named_parameters(), min_K=16).memory_report()).splitlines()
    assert lines[0].split() == ["parameter", "shape", "role", "found", "by", "M", "V", "bytes", "AdamW", "bytes"]
    assert lines[2].split() == [
        "parameter",
        "'0.weight'",
        "128x64",
        "matrix",
        "shape",
        *("int4_16", "/", "4", "float32", "/", "64"),
        "2,052",
        "65,540",
    ]
    assert lines[-1].startswith("total")
    assert len(lines) == 3 + 4
    assert lines[3].split()[2:6] == ["128", "exact", "vector", "float32"]


def test_memory_report_of_meta_parameters_and_of_none():
    with torch.device("meta"):
        net = torch.nn.Linear(4096, 4096)
    opt = Collins(net.parameters())
    weight = 2**24 // 4 // 2 + 4 * 2**24 // 4 // 64 + 4 * 2**24 // 128  # int4, its scales, and V
    assert opt.memory_report().state_bytes == weight + 2 * 4 * 2**12 + 8
    empty = Collins([torch.nn.Parameter(torch.zeros(0))]).memory_report()
    assert empty.ratio == 1.0


def test_state_dict_can_be_loaded_with_weights_only():
    net = small_model(dtype=torch.bfloat16)
    opt = Collins(net.parameters(), lr=1e-2, min_K=16)
    train(net, opt, 3)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = small_model(seed=1, dtype=torch.bfloat16)
    resumed = Collins(other.parameters(), min_K=16)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert same(train(net, opt, 10, first=3), train(other, resumed, 10, first=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loading_is_bit_exact(options, dtype):
    net, other = small_model(dtype=dtype), small_model(seed=1, dtype=dtype)
    opt, resumed = (Collins(n.parameters(), lr=1e-2, min_K=16, **options) for n in (net, other))
    train(net, opt, 3)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert resumed.state[q].keys() == opt.state[p].keys()
        for name, value in tensors(opt.state[p]).items():
            assert resumed.state[q][name].dtype == value.dtype
            assert torch.equal(resumed.state[q][name], value)
    assert same(train(net, opt, 10, first=3), train(other, resumed, 10, first=3))


def test_loading_overwrites_moments_in_place_and_shares_none_with_the_source():
    net, other = small_model(), small_model()
    opt, resumed = Collins(net.parameters(), min_K=16), Collins(other.parameters(), min_K=16)
    train(net, opt, 3)
    train(other, resumed, 1)
    weight, other_weight = net[0].weight, other[0].weight
    address = resumed.state[other_weight]["m_table"].data_ptr()
    resumed.load_state_dict(opt.state_dict())
    assert resumed.state[other_weight]["m_table"].data_ptr() == address
    assert opt.state[weight]["m_table"].data_ptr() != address
    train(net, opt, 1)
    assert resumed.state[other_weight]["step"].item() == 3


def test_a_state_dict_that_does_not_match_is_rejected_and_nothing_changes():
    net = small_model()
    opt = Collins(net.named_parameters(), min_K=16, table_dtype=torch.float32)
    train(net, opt, 2)
    before = copy.deepcopy(opt.state_dict())

    coarser = Collins(net.named_parameters(), min_K=16, table_dtype=torch.float32, compress_ratio=64)
    train(net, coarser, 1)
    adamw = torch.optim.AdamW(net.parameters())
    adamw.step()
    fewer = copy.deepcopy(before)
    fewer["param_groups"][0]["params"].pop()
    bad_betas = copy.deepcopy(before)
    bad_betas["param_groups"][0]["betas"] = (0.9, 2.0)
    one_moment = copy.deepcopy(before)
    del one_moment["state"][0]["v_table"]
    for state_dict, text in (
        (one_moment, r"parameter '0.weight' has moments .*v_table.* state_dict holds {'m_table': \(128, 2\)}"),
        (coarser.state_dict(), r"parameter '0.weight' does not fit .* bucket load c 64 where this optimizer has 32"),
        (adamw.state_dict(), r"parameter '0.weight' keeps its moments in tables; state_dict holds dense"),
        (fewer, r"state_dict has parameter groups of \[3\] parameters; this optimizer has \[4\]"),
        (bad_betas, "betas must be two numbers"),
    ):
        with pytest.raises(ValueError, match=text):
            opt.load_state_dict(state_dict)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, state in before["state"].items():
            assert after["state"][key].keys() == state.keys()
            assert all(torch.equal(value, after["state"][key][name]) for name, value in tensors(state).items())


def test_zero_gradients_and_zero_lr_create_state_and_change_nothing():
    """torch.distributed.checkpoint creates an optimizer's state in this way."""
    net = small_model()
    opt = Collins(net.parameters(), lr=torch.tensor(0.0), min_K=16)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert same(before, [p.detach() for p in net.parameters()])
    assert len(opt.state) == 4
    assert all(not t.isnan().any() for state in opt.state.values() for t in tensors(state).values())


@pytest.mark.parametrize(
    ("remedy", "moves"),
    [({}, True), ({"decode": "sketch"}, True), ({"role": "exact"}, False), ({"compress_ratio": 1}, False)],
    ids=str,
)
def test_masked_elements_are_changed_by_their_bucket_unless_moments_are_exact(remedy, moves):
    """The limitation that `Collins` documents, and its remedies, with which pruned weights stay at zero."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(64, 64, generator=generator) < 0.5
    p = torch.nn.Parameter(torch.randn(64, 64, generator=generator) * mask)
    opt = Collins([{"params": [p], **remedy}], lr=0.01, min_K=16, weight_decay=0.1)
    for _ in range(3):
        p.grad = torch.randn(64, 64, generator=generator) * mask
        opt.step()
    pruned = p.detach()[~mask]
    assert (pruned != 0).any() == moves
    assert not moves or (pruned != 0).float().mean() > 0.5
