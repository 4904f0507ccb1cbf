"""A parameter keeps its hash key, and edits of an optimizer's state take effect, in every tier."""

import copy
import gc
import io
import pickle
import weakref
from collections import defaultdict

import pytest
import torch
from helpers import bits, same_snapshots, snapshot

from collins import Collins
from collins.fingerprint import dense_fingerprint, unpacked
from collins.offload.pipeline import Traffic

TIERS = {
    "none": None,
    "device": "device",
    "host": {"tier": "host", "transfer_size": 1500},
    "auto": "auto",
}
in_every_tier = pytest.mark.parametrize("memory", TIERS.values(), ids=TIERS)


def parameter(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def give_gradient(p, step):
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + step))


# Keys.


def frozen(opt, a, c):
    opt.param_groups[0]["params"].remove(a)


def removed_with_its_state(opt, a, c):
    opt.state.pop(a)
    opt.param_groups[0]["params"] = []


def group_gone(opt, a, c):
    del opt.param_groups[0]


def appended(opt, a, c):
    opt.param_groups[0]["params"].append(c)


def inserted(opt, a, c):
    opt.param_groups[0]["params"].insert(0, c)


def reordered(opt, a, c):
    opt.param_groups.reverse()


def moved(opt, a, c):
    opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())


def copied(opt, a, c):
    opt.param_groups.reverse()
    state = copy.copy(opt).__getstate__()
    assert [key for key, _, _ in state["_carried"].entries] == [1, 0]


@in_every_tier
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize(
    "change", [frozen, removed_with_its_state, group_gone, appended, inserted, reordered, moved, copied]
)
def test_other_parameters_are_stepped_as_without_the_change(change, in_backward, memory):
    if in_backward and change is copied:
        pytest.skip("a second optimizer over one parameter is refused")
    results = []
    for changed in (False, True):
        a, b, c = (parameter(64, 144, seed=seed) for seed in range(3))
        groups = [{"params": [a]}, {"params": [b]}]
        opt = Collins(groups, lr=1e-2, rehash_period=3, memory=memory, in_backward=in_backward)
        for step in range(9):
            if step == 5 and changed:
                change(opt, a, c)
            give_gradient(b, step)
            g, b.grad = b.grad, None
            loss = (b * g).sum()
            if step < 5:
                loss = loss + a.sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
        opt._stepper.store.drain()  # torch's own state_dict omits the state of parameters that are in no group
        results.append((b.detach(), *(opt.state[b][name] for name in ("m_table", "v_table", "layout", "step"))))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(*results, strict=True))


def test_a_parameter_that_is_added_again_continues_from_its_state():
    results = []
    for removed in (False, True):
        a, b = parameter(64, 144), parameter(64, 144, seed=1)
        opt = Collins([a, b], lr=1e-2, rehash_period=3)
        for step in range(9):
            if removed and step == 3:
                opt.param_groups[0]["params"].remove(a)
            if removed and step == 6:
                opt.param_groups[0]["params"].append(a)
            for p in (a, b):
                give_gradient(p, step)
            if 3 <= step < 6:
                a.grad = None
            opt.step()
        results.append([a.detach(), *(opt.state[a][name] for name in ("m_table", "v_table", "step"))])
    assert all(map(torch.equal, *results))


def test_optimizers_of_one_named_parameter_each_have_distinct_hashes():
    model = torch.nn.Sequential(*(torch.nn.Linear(96, 96, bias=False) for _ in range(3)))
    named = [Collins([pair]) for pair in model.named_parameters()]
    together = Collins(model.named_parameters())
    index = torch.arange(64 * 64)
    signs = [opt.hash_of(p).sign(index) for opt, p in zip(named, model.parameters(), strict=True)]
    assert not any(torch.equal(signs[i], signs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    for p, sign in zip(model.parameters(), signs, strict=True):
        assert torch.equal(together.hash_of(p).sign(index), sign)  # the key depends on the name only


def test_keys_are_copied_and_loaded_with_state():
    a, b = parameter(64, 144), parameter(64, 144, seed=1)
    opt = Collins([("a", a), ("b", b)], lr=1e-2)
    for step in range(3):
        for p in (a, b):
            give_gradient(p, step)
        opt.step()
    (copied_a, copied_b), copied_opt = copy.deepcopy((opt.param_groups[0]["params"], opt))
    loaded = pickle.loads(pickle.dumps(opt))
    unnamed = Collins([parameter(64, 144), parameter(64, 144)], lr=1e-2)
    unnamed.load_state_dict(opt.state_dict())  # with and without names: keys are loaded with the tables
    for p, q in ((a, copied_a), (b, copied_b)):
        keys = [hash.key for hash in (opt.hash_of(p), copied_opt.hash_of(q))]
        assert keys[0] == keys[1] > 2**62
    for restored in (loaded, unnamed):
        saved, restored_state = opt.state_dict()["state"], restored.state_dict()["state"]
        assert all(torch.equal(bits(saved[i][name]), bits(restored_state[i][name])) for i in saved for name in saved[i])
        assert [restored.hash_of(p).key for p in restored.param_groups[0]["params"]] == [
            opt.hash_of(p).key for p in (a, b)
        ]


ROUNDED_WAYS = [{}, {"hash": "universal"}, {"memory": "host"}, {"in_backward": True}, {"table_dtype": torch.bfloat16}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ROUNDED_WAYS, ids=str)
@pytest.mark.parametrize("names", [(False, False), (True, False), (False, True)], ids=str)
def test_rounding_resumes_bitwise_with_another_order_and_other_names(names, options, dtype):
    """Random bits derive from the key, which is saved with dense moments as well as with tables."""

    def step(ps, opt, number):
        for i, p in enumerate(ps):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + i)).to(dtype)
            if opt.in_backward:
                (p * g).sum().backward()
            else:
                p.grad = g
        opt.step()

    def named(ps, has_names):
        return [(f"p{i}", p) for i, p in enumerate(ps)] if has_names else ps

    shapes = [(40,), (64, 64), (), (33, 7), (64, 48), (5,)]
    ps = [torch.nn.Parameter(parameter(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
    all_options = {"lr": 1e-2, "min_K": 16, "rehash_period": 3, **options}
    opt = Collins(named(ps, names[0]), **all_options)
    step(ps, opt, 0)
    group, order = opt.param_groups[0], [3, 5, 0, 4, 2, 1]
    for key in {"params", "param_names"} & group.keys():
        group[key][:] = [group[key][i] for i in order]
    ps = list(group["params"])
    for number in (1, 2):
        step(ps, opt, number)
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    resumed = Collins(named(qs, names[1]), **all_options)
    if not names[0]:  # no names were saved: an optimizer with names uses its own
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    for number in (3, 4):
        step(ps, opt, number)
        step(qs, resumed, number)
    assert all(map(same_snapshots, snapshot(ps, opt), snapshot(qs, resumed)))


def test_a_cast_parameter_saves_the_key_of_its_rounding():
    """State that another optimizer created is saved with the key that steps use."""
    a, b = parameter(40), parameter(40)
    opt, other = Collins([parameter(3), a]), Collins([b])
    give_gradient(a, 0)
    opt.step()
    assert "layout" not in opt.state[a]
    a.data, b.data = a.data.bfloat16(), b.data.bfloat16()
    other.state[b] = dict(opt.state[a])
    for p, optimizer in ((a, opt), (b, other)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    keys = [unpacked(optimizer.state[p]["layout"]).place for p, optimizer in ((a, opt), (b, other))]
    assert keys == [1, 0]


def test_a_key_of_dense_moments_does_not_apply_to_tables():
    """Tables with the same keys keep them, also if all other saved keys are numbers."""
    ps = [torch.nn.Parameter(parameter(*shape).bfloat16()) for shape in ((5,), (64, 64), (40,))]
    opt = Collins(ps, min_K=16)
    for p in ps:
        p.grad = torch.ones_like(p)
    opt.step()
    del opt.param_groups[0]["params"][0], opt.state[ps[0]]
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1]["layout"] = dense_fingerprint(40, 40, 0, 1).packed()
    opt.load_state_dict(saved)
    assert opt.hash_of(ps[1]).key == 1
    assert unpacked(opt.state[ps[2]]["layout"]).place == 1


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@in_every_tier
def test_a_copy_may_be_reordered_before_it_steps(make_copy, memory):
    ps = [parameter(64, 144), parameter(64, 144, seed=1)]
    opt = Collins([{"params": [p]} for p in ps], lr=1e-2, memory=memory)
    qs, other = make_copy((ps, opt))
    for optimizer in (opt, other):
        optimizer.param_groups.reverse()
    for step in range(3):
        for p in (*ps, *qs):
            give_gradient(p, step)
        opt.step()
        other.step()
    assert all(map(torch.equal, ps, qs))


@in_every_tier
@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("hash", "universal", "hash 'block' where this optimizer has 'universal'"),
        ("rehash_period", 2, "rehash_period 400 where this optimizer has 2"),
        ("rehash_period", None, "rehash_period 400 where this optimizer has None"),
    ],
)
def test_an_option_that_contradicts_existing_tables_is_rejected(option, value, text, memory):
    p = parameter(64, 144)
    opt = Collins([p], min_K=1, memory=memory)
    for step in range(3):
        give_gradient(p, step)
        opt.step()
    opt.param_groups[0][option] = value
    before, saved = p.detach().clone(), copy.deepcopy(opt.state_dict()["state"])
    give_gradient(p, 3)
    with pytest.raises(ValueError, match=f"parameter 0 has tables that the current options cannot decode: .*{text}"):
        opt.step()
    assert torch.equal(p.detach(), before)
    current = opt.state_dict()["state"]
    assert all(torch.equal(bits(current[0][name]), bits(saved[0][name])) for name in saved[0])
    opt.state.clear()  # a restart must be explicit
    opt.step()
    assert opt.state[p]["step"] == 1


def test_coefficients_set_for_existing_tables_are_rejected():
    p = parameter(64, 144)
    opt = Collins([p], hash="universal")
    for step in range(4):
        give_gradient(p, step)
        if step < 3:
            opt.step()
    opt.hash_of(p).a += 1
    with pytest.raises(ValueError, match=r"encoded with a \d+ where this optimizer has"):
        opt.step()


# State.


def reset_by_clear(opt, p):
    opt.state.clear()


def reset_by_del(opt, p):
    del opt.state[p]


def reset_by_replacement(opt, p):
    opt.state = defaultdict(dict)


def emptied(opt, p):
    opt.state[p].clear()


def zeroed(opt, p):
    for name in ("m_table", "v_table"):
        opt.state[p][name].zero_()


def halved(opt, p):
    for name in ("m_table", "v_table"):
        opt.state[p][name].mul_(0.5)


def replaced(opt, p):
    for name in ("m_table", "v_table"):
        opt.state[p][name] = torch.full_like(opt.state[p][name], 0.25)


def one_replaced(opt, p):
    opt.state[p]["m_table"] = torch.full_like(opt.state[p]["m_table"], 0.25)


def counter_set(opt, p):
    opt.state[p]["step"] = torch.tensor(20.0)


def counter_filled(opt, p):
    opt.state[p]["step"].fill_(20)


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize(
    "edit",
    [
        reset_by_clear, reset_by_del, reset_by_replacement, emptied, zeroed, halved, replaced, one_replaced,
        counter_set, counter_filled,
    ],
)  # fmt: skip
def test_edits_of_the_state_take_effect_in_every_tier(edit, in_backward):
    results = []
    for memory in TIERS.values():
        p, q = parameter(64, 64), parameter(32, 64, seed=1)
        opt = Collins([p, q], lr=1e-2, memory=memory, in_backward=in_backward, table_dtype=torch.float32)
        for step in range(7):
            if step == 4:
                opt.state_dict()  # waits for copies to the host
                edit(opt, p)
            give_gradient(p, step), give_gradient(q, 50 + step)
            grads, p.grad, q.grad = (p.grad, q.grad), None, None
            ((p * grads[0]).sum() + (q * grads[1]).sum()).backward()
            opt.step()
            opt.zero_grad()
        state = opt.state_dict()["state"]
        results.append(
            [p.detach(), q.detach(), *(state[i][name] for i in state for name in ("step", "m_table", "v_table"))]
        )
    assert all(torch.equal(bits(a), bits(b)) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("edit", [zeroed, halved, replaced])
@pytest.mark.parametrize(("shape", "ratio"), [((64, 64), 32), ((90, 91), 16), ((64, 128), 64)], ids=str)
def test_tables_of_small_parameters_can_be_edited_under_the_defaults(shape, ratio, edit):
    """Between two steps, without a call of the optimizer that waits for copies or changes the state."""
    results = []
    for memory in (None, "host"):
        p, kept = parameter(*shape), parameter(*shape)
        opt = Collins([p, kept], lr=1e-2, compress_ratio=ratio, memory=memory)
        for step in range(5):
            if step == 3:
                edit(opt, p)
            give_gradient(p, step), give_gradient(kept, step)
            opt.step()
        results.append([p.detach(), *opt.state[p].values()])
        assert not torch.equal(p, kept)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*results, strict=True))


@in_every_tier
@pytest.mark.parametrize("options", [{}, {"hash": "universal"}], ids=str)
def test_replaced_parameters_are_freed(options, memory):
    other, p = parameter(64, 144), parameter(64, 144)
    opt, references = Collins([other, p], memory=memory, **options), []
    for step in range(4):
        give_gradient(other, step), give_gradient(p, step)
        opt.step()
        opt.state.pop(p)
        references.append(weakref.ref(p))
        p = torch.nn.Parameter(p.detach().clone())
        opt.param_groups[0]["params"][1] = p
    give_gradient(p, 5)
    opt.step()
    gc.collect()
    assert not any(ref() is not None for ref in references)
    if memory == TIERS["host"]:
        assert len(opt.placement) == 1  # memory of a removed parameter is reused


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_counters_of_replaced_parameters_are_reused(in_backward):
    """Counters that were handed out keep their values; other counters continue."""
    a, b = parameter(40), parameter(5)
    opt, removed_counters = Collins([a, b], in_backward=in_backward), []
    for step in range(1, 200):
        for p in (a, b):
            (p * step).sum().backward()
        opt.step()
        opt.zero_grad()
        if step % 2:
            removed_counters.append(opt.state.pop(a)["step"])
            a = opt.param_groups[0]["params"][0] = parameter(40)
            if in_backward:
                opt.add_param_group({"params": [parameter(1)]})  # this registers hooks of new parameters
                del opt.param_groups[-1]
        assert opt.state[b]["step"] == step
    assert len(opt._stepper._counters._views) <= 3
    assert [int(count) for count in removed_counters] == [1, *([2] * 99)]


@in_every_tier
def test_a_resized_parameter_restarts_once_its_state_is_removed(memory):
    p, other = parameter(144, 64), parameter(32, 64)
    opt = Collins([p, other], lr=1e-2, memory=memory)
    for step in range(5):
        if step == 3:
            p.data = torch.cat([p.data, torch.ones(16, 64)])
            give_gradient(p, step), give_gradient(other, step)
            with pytest.raises(
                ValueError, match=r"parameter 0 has the shape \(160, 64\); the optimizer holds the tables"
            ):
                opt.step()
            del opt.state[p]
        give_gradient(p, step), give_gradient(other, step)
        opt.step()
    assert opt.state[p]["m_table"].shape == (160, 8)  # two entries a byte
    assert [int(opt.state[q]["step"]) for q in (p, other)] == [2, 5]


# Frozen parameters.


@in_every_tier
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_frozen_parameters_use_no_memory_until_they_are_trained(memory, in_backward):
    base, adapter = parameter(256, 256), parameter(64, 144)
    base.requires_grad_(False)
    opt = Collins([("base", base), ("adapter", adapter)], memory=memory, in_backward=in_backward)
    for _ in range(2):
        adapter.sum().backward()
        opt.step()
        opt.zero_grad()
    assert base not in opt.state
    state_bytes = sum(t.nbytes for t in opt.state[adapter].values() if isinstance(t, torch.Tensor))
    assert opt.memory_report().state_bytes == state_bytes
    assert sum(plan.bytes for plan in opt.placement) in (0, state_bytes - 4)
    base.requires_grad_(True)
    opt.step()  # this detects that it requires gradients now
    (adapter.sum() + base.sum()).backward()
    opt.step()
    assert opt.state[base]["step"] == 1
    assert opt.memory_report().state_bytes > state_bytes


@in_every_tier
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.int64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_frozen_parameters_may_have_any_dtype_and_device(memory, dtype, device):
    zeros = [torch.zeros(shape, dtype=torch.float32).to(dtype).to(device) for shape in ((64, 144), (2048,), (3,))]
    frozen_params = [torch.nn.Parameter(each, requires_grad=False) for each in zeros]
    adapter = parameter(64, 144)
    opt = Collins([*frozen_params, adapter], memory=memory)
    for step in range(2):
        give_gradient(adapter, step)
        opt.step()
    opt.load_state_dict(opt.state_dict())
    assert list(opt.state) == [adapter]
    assert [row.state_bytes for row in opt.memory_report().rows[:3]] == [0, 0, 0]


# Defaults of the process.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"memory": "host"}, {"in_backward": True}], ids=str)
def test_the_default_dtype_of_the_process_has_no_effect(dtype, options):
    def run(default):
        p = parameter(64, 144)
        torch.set_default_dtype(default)
        try:
            opt = Collins([p], lr=1e-3, **options)
            opt.load_state_dict(opt.state_dict())
            g = torch.randn(64, 144, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
            for _ in range(2100 if not options else 300):
                if "in_backward" in options:
                    (p * g).sum().backward()
                else:
                    p.grad = g
                opt.step()
            opt.load_state_dict(opt.state_dict())
        finally:
            torch.set_default_dtype(torch.float32)
        return [p.detach(), *(t for name, t in opt.state[p].items() if name != "layout")]

    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(run(torch.float32), run(dtype), strict=True))


@pytest.mark.parametrize("built_inside", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"memory": "host"}, {"capturable": True}, {"in_backward": True}, {"compile": True}, {"nonfinite": "error"}],
    ids=str,
)
def test_the_default_device_of_the_process_has_no_effect(options, built_inside):
    """The default device is "meta": the contents of tensors that are created there by mistake are lost."""

    def run(device):
        p, small = parameter(64, 144), parameter(12)
        g = torch.randn(64, 144, generator=torch.Generator().manual_seed(1))
        opt = None if built_inside else Collins([p, small], lr=1e-3, **options)
        with torch.device(device):
            opt = opt or Collins([p, small], lr=1e-3, **options)
            for _ in range(3):
                ((p * g).sum() + small.sum()).backward()
                opt.step()
                opt.zero_grad()
            opt.load_state_dict(opt.state_dict())
        return [p.detach(), small.detach(), *(t for name, t in opt.state[p].items() if name != "layout")]

    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(run("cpu"), run("meta"), strict=True))


def test_the_error_after_a_failed_backward_names_the_cause():
    class FailingBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise torch.OutOfMemoryError("CUDA out of memory")

    first, last = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    opt = Collins([*first.parameters(), *last.parameters()], in_backward=True)
    x = torch.ones(4, 64)
    with pytest.raises(torch.OutOfMemoryError):
        last(FailingBackward.apply(first(x))).sum().backward()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"Call step\(\) after every backward pass, including failed ones"):
        last(first(x)).sum().backward()
    opt.step()
    last(first(x)).sum().backward()
    opt.step()
    assert [int(opt.state[p]["step"]) for p in last.parameters()] == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"hash": "universal"}, {"memory": "host"}], ids=str)
def test_a_checkpoint_of_version_0_2_resumes_bitwise_with_names(options, dtype):
    """Its keys are numbers, also with names; they determine the rounding of dense moments in 16 bits."""

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 144), torch.nn.ReLU(), torch.nn.Linear(144, 64)).to(dtype)

    def train(net, opt, steps):
        for step in steps:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()

    net, other = network(), network()
    old = Collins(net.parameters(), lr=1e-2, rehash_period=3, **options)
    train(net, old, range(4))
    saved = copy.deepcopy(old.state_dict())
    saved["param_groups"][0]["param_names"] = [name for name, _ in net.named_parameters()]
    saved["param_groups"][0].pop("with_state")
    for state in saved["state"].values():
        if "exp_avg" in state:
            state.pop("layout", None)
    new = Collins(other.named_parameters(), lr=1e-2, rehash_period=3, **options)
    other.load_state_dict(net.state_dict())
    new.load_state_dict(saved)
    train(net, old, range(4, 8))
    train(other, new, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("memory", [None, "host"])
def test_constants_and_counters_of_replaced_parameters_are_freed(memory):
    """Constants of graphs, by hash key, and the byte counters of host tiers, whose sums are kept."""

    def traffic_objects():
        gc.collect()
        return sum(type(each) is Traffic for each in gc.get_objects())

    kept, before, link_bytes, counts = torch.nn.Parameter(torch.ones(64, 144)), traffic_objects(), 0, []
    opt = Collins([("kept", kept)], memory=memory, compile=True)
    opt.add_param_group({"params": [("0", torch.nn.Parameter(torch.ones(64, 144)))]})
    with torch.compiler.set_stance("force_eager"):
        for number in range(6):
            p = torch.nn.Parameter(torch.ones(64 + 32 * (number % 2), 64))
            opt.param_groups[1].update(params=[p], param_names=[str(number)])
            (p.square().sum() + kept.square().sum()).backward()
            opt.step()
            opt.zero_grad()
            opt.state.pop(p)
            counts.append((len(opt._stepper.engine._graphs._constants), traffic_objects() - before))
            link_bytes, previous = opt.statistics()["link_bytes"], link_bytes
            assert (link_bytes > previous) is (memory == "host")
    assert counts[-1] == counts[1]


@pytest.mark.parametrize("memory", [None, "device", "host"])
def test_replaced_parameters_leave_no_hooks_and_no_plans(memory):
    p, kept = (torch.nn.Parameter(torch.ones(64, 144)) for _ in range(2))
    opt = Collins([p, kept], memory=memory, in_backward=True)
    for _ in range(5):
        (p.square().sum() + kept.square().sum()).backward()
        opt.step()
        opt.state.pop(p)
        p = torch.nn.Parameter(torch.ones(64, 144))
        opt.param_groups[0]["params"][:] = [p, kept]
    assert len(opt._grad_hooks._handles) <= 3
    assert len(opt.placement) <= (0 if memory is None else 2)
