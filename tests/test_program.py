"""A step is one program: after an exception in it, each parameter is either stepped or bitwise unchanged."""

import pytest
import torch
from helpers import DEVICE, give_gradients, parameters, same_snapshots, snapshot, with_kernel

from collins import Collins
from collins.compile import Engine

SHAPES = [(96, 64), (40,), (33, 37), (64, 64), (64, 32), (32, 64)]
FEW_SIGNATURES = [(64, 32), (40,), (2053,), (32, 64), (2048,), (16, 128)]  # two graphs: of tables, of dense moments
SMALL = [(32, 64), (40,), (33, 37), (32, 64), (24, 64)]  # Triton's interpreter is slow
MEMORY = {
    "resident": None,
    "device": "device",
    "host": {"tier": "host", "transfer_size": 1500, "staging_slots": 2},  # some transfers hold several parameters
    "mixed": {"transfer_size": 300, "staging_slots": 2},  # with a budget of some tables and the ring
}
BUDGETS = {tuple(SHAPES): 3900, tuple(FEW_SIGNATURES): 2100, tuple(SMALL): 1600}


class BrokenError(Exception):
    """An exception such as those of an allocator, a driver or Ctrl-C."""


def made(memory, shapes=SHAPES, **options):
    """With tables of vectors too, as large as those that the budgets above are for."""
    ps = parameters(torch.float32, shapes)
    if memory == MEMORY["mixed"]:
        memory = {**memory, "device_budget": BUDGETS[tuple(shapes)]}
    tables = {"role": "matrix", "table_dtype": torch.float32, "min_K": 16, "rehash_period": 3}
    return ps, Collins(ps, lr=1e-2, memory=memory, **tables, **options)


@pytest.mark.parametrize("shapes", [SHAPES, FEW_SIGNATURES, SMALL])
def test_mixed_memory_uses_both_tiers(shapes):
    ps, opt = made(MEMORY["mixed"], shapes)
    step(ps, opt, 0)
    assert {row.tier for plan in opt.placement for row in plan.rows} == {"device", "host"}


def step(ps, opt, number):
    give_gradients(number, ps)
    if opt.in_backward:
        grads = [p.grad for p in ps]
        opt.zero_grad()
        sum((p * g).sum() for p, g in zip(ps, grads, strict=True)).backward()
    opt.step()


def interrupt(engine, monkeypatch, after):
    """Makes the engine fail after `after` more parameters."""
    left = [after]

    def perform(*args, original=Engine._run_one):
        if not left[0]:
            raise BrokenError
        left[0] -= 1
        original(*args)

    monkeypatch.setattr(Engine, "_run_one", perform)


@pytest.mark.parametrize("after", [0, 1, 3, 5])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_an_engine_that_raises_leaves_each_parameter_stepped_or_unchanged(
    memory, in_backward, first, after, monkeypatch
):
    steps = 0 if first else 4
    ps, opt = made(memory, in_backward=in_backward, compile=False)
    twins, twin = made(memory, in_backward=in_backward, compile=False)
    for number in range(steps):
        step(ps, opt, number)
        step(twins, twin, number)
    before = snapshot(ps, opt)
    with monkeypatch.context() as patched:
        interrupt(opt._stepper.engine, patched, after)
        with pytest.raises(BrokenError):
            step(ps, opt, steps)
    found = snapshot(ps, opt)
    step(twins, twin, steps)
    stepped = snapshot(twins, twin)
    done = [same_snapshots(now, then) for now, then in zip(found, stepped, strict=True)]
    assert sum(done) == after
    assert all(same_snapshots(now, old) for now, old, was in zip(found, before, done, strict=True) if not was)
    # The step can be repeated for the parameters that it skipped, and training continues.
    for p in ps:
        p.grad = None
    opt.step()
    assert all(same_snapshots(now, then) for now, then in zip(snapshot(ps, opt), found, strict=True))
    step(ps, opt, steps + 1)
    counts = [int(state["step"]) for _, state in snapshot(ps, opt)]
    assert counts == [steps + 1 + was for was in done]


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_launches_that_fail_leave_each_parameter_stepped_or_unchanged(memory, monkeypatch):
    pytest.importorskip("triton")
    from collins.compile import kernels

    ps, opt = made(memory, SMALL)
    twins, twin = made(memory, SMALL)
    with_kernel(opt), with_kernel(twin)
    for number in range(2):  # the third step repeats the program of the second one
        step(ps, opt, number)
        step(twins, twin, number)
    before, calls, original = snapshot(ps, opt), [], kernels.step_

    def fail_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise BrokenError
        original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(kernels, "step_", fail_second)
        with pytest.raises(BrokenError):
            step(ps, opt, 2)
    step(twins, twin, 2)
    found, stepped = snapshot(ps, opt), snapshot(twins, twin)
    done = [same_snapshots(now, then) for now, then in zip(found, stepped, strict=True)]
    assert 0 < sum(done) < len(ps)
    assert all(same_snapshots(now, old) for now, old, was in zip(found, before, done, strict=True) if not was)


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_a_state_that_cannot_be_created_leaves_no_entry(memory, monkeypatch):
    ps, opt = made(memory)
    adopt, made_so_far = opt._stepper.store.adopt, []

    def failing(p, specs, given):
        if len(made_so_far) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made_so_far.append(p)
        return adopt(p, specs, given)

    before = [p.detach().clone() for p in ps]
    with monkeypatch.context() as patched:
        patched.setattr(opt._stepper.store, "adopt", failing)
        with pytest.raises(torch.OutOfMemoryError):
            step(ps, opt, 0)
    assert not opt.state
    assert all(map(torch.equal, before, ps))
    twins, twin = made(memory)
    step(ps, opt, 0)
    step(twins, twin, 0)
    assert all(map(same_snapshots, snapshot(ps, opt), snapshot(twins, twin)))


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_every_executor_repeats_its_program(memory, compile, monkeypatch):
    """This holds for every executor and every memory policy."""
    from collins.stepper import Stepper

    built, original = [], Stepper._build
    monkeypatch.setattr(Stepper, "_build", lambda *args, **kw: (built.append(1), original(*args, **kw))[1])
    ps, opt = made(memory, FEW_SIGNATURES, compile=compile)
    for number in range(5):
        step(ps, opt, number)
    assert len(built) == 2  # the first, and the second, which has the parameters of the first
    monkeypatch.undo()
    if compile:  # graphs of other stacks round otherwise
        return
    twins, twin = made(None, FEW_SIGNATURES, compile=compile)
    for number in range(5):
        step(twins, twin, number)
        twin.param_groups[0]["capturable"] = False
        twin._stepper._program = None  # each of them is checked again
    assert all(map(same_snapshots, snapshot(ps, opt), snapshot(twins, twin)))


# Traced by torch.compile.


@pytest.fixture
def nothing_compiled():
    """Resets torch.compile, which stops compiling a function that it has compiled too often."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("compile", [None, True])
def test_a_function_with_a_step_is_compiled_as_one_graph(backend, compile):
    sides = []
    for wrap in (lambda function: function, lambda function: torch.compile(function, fullgraph=True, backend=backend)):
        ps = parameters(torch.float32, FEW_SIGNATURES)
        opt = Collins(ps, lr=torch.tensor(1e-2), min_K=16, rehash_period=3, compile=compile)

        def function(ps=ps, opt=opt):
            opt.step()
            return ps[0] * 2

        function = wrap(function)
        for number in range(4):
            give_gradients(number, ps)
            if number == 2:
                ps[1].grad = None
            twice = function()
            assert torch.equal(twice, ps[0] * 2)  # later operations of the graph use the result of the step
        sides.append((ps, opt))
    (ps, opt), (qs, other) = sides
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
    assert [int(opt.state[p]["step"]) for p in ps] == [int(other.state[q]["step"]) for q in qs] == [4, 3, 4, 4, 4, 4]


def test_the_step_uses_gradients_that_the_graph_computes():
    sides = []
    for wrap in (lambda function: function, torch.compile):
        (p,) = parameters(torch.float32, [(64, 64)])
        opt = Collins([p], lr=1e-2, min_K=16)

        def function(x, p=p, opt=opt):
            p.grad = x * 2
            opt.step()

        function = wrap(function)
        for number in range(3):
            function(torch.full((64, 64), 1.0 + number, device=DEVICE))
        sides.append(p)
    assert torch.equal(*sides)


def test_an_optimizer_is_built_within_compiled_code():
    def train(p):
        opt = Collins([p], lr=1e-2, min_K=16)
        for _ in range(2):
            opt.zero_grad()
            p.square().sum().backward()
            opt.step()
        return opt

    (p,), (q,) = parameters(torch.float32, [(64, 64)]), parameters(torch.float32, [(64, 64)])
    torch.compile(train, backend="eager")(p)
    train(q)
    assert torch.equal(p, q)


def test_a_compiled_step_raises_if_its_optimizer_has_been_freed():
    (p,) = parameters(torch.float32, [(64, 64)])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="the optimizer of this compiled step no longer exists"):
        torch.ops.collins.optimizer_step_([p.detach()], [p.grad], [0], 10**6)
