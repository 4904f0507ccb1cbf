"""PyTorch's tests of compiled optimizers with Collins: compiled steps equal eager ones and are compiled once."""

import gc
import weakref

import pytest
import torch
from configurations import CONFIGURATIONS, Regression, over
from helpers import DEVICE, same
from test_conformance_schedulers import CASES, advance
from torch import nn

from collins import Collins

CONFIGURATION_NAMES = (
    "default",
    "capturable",
    "nonfinite error",
    "universal",
    "bf16 tables",
    "memory host",
    "in backward",
)
SCHEDULES = ("lambda_lr", "multiplicative_lr", "step_lr", "multi_step_lr", "exp_lr", "cos_anneal_lr", "constantlr")
SCHEDULES += ("linearlr", "reduce_lr_on_plateau1", "poly_lr", "CosineAnnealingWarmRestarts_lr1")
SCHEDULES += ("cycle_lr_triangular_mode_one_lr", "onecycle_lr_linear_annealing")
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's look at its inputs


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_eager(function):
    return torch.compile(function, backend="eager")


@pytest.mark.parametrize("use_closure", [False, True], ids=["step", "closure"])
@over(*CONFIGURATION_NAMES)
def test_correctness(config, use_closure):
    """State and weights after compiled steps bitwise equal those after eager ones."""
    if use_closure and config.in_backward:
        pytest.skip("in_backward=True refuses closures")
    eager, traced = Regression(config), Regression(config)
    opts = config.build(eager.params), config.build(traced.params)

    @compile_eager
    def step():
        if use_closure:
            opts[1].step(closure)
        else:
            opts[1].step()

    def closure():
        opts[1].zero_grad()
        loss = traced.loss()
        loss.backward()
        return loss

    for _ in range(3):
        eager.step(opts[0])
        if not use_closure:
            opts[1].zero_grad()
            traced.loss().backward()
        step()
    assert same(eager.params, traced.params)
    assert same([opts[0].state[p] for p in eager.params], [opts[1].state[p] for p in traced.params])
    options = ({name: group[name] for name in opts[0].defaults} for opt in opts for group in opt.param_groups)
    assert same(*options)  # tracing changes no option: for AdamW it enables capturable if there is no state yet


@pytest.mark.parametrize("name", SCHEDULES)
def test_correctness_under_schedules(name):
    """Rates of a schedule, floats or tensors, apply to the next compiled step without recompilation."""
    config = CONFIGURATIONS["ratio 8"]
    tasks = Regression(config), Regression(config)
    opts = [
        config.build([{"params": [w]}, {"params": [b], "lr": torch.tensor(0.01)}])
        for w, b in (task.params for task in tasks)
    ]
    schedules = [CASES[name](opt) for opt in opts]
    step = compile_eager(lambda: opts[1].step())
    for number in range(4):
        tasks[0].step(opts[0])
        opts[1].zero_grad()
        tasks[1].loss().backward()
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            step()
        for schedule in schedules:
            advance(schedule, number)
    assert same(tasks[0].params, tasks[1].params)


@over("default", "memory host")
def test_adamw_recompile(config):
    """The next compiled step uses replaced and cleared state without recompilation."""
    eager, traced = Regression(config), Regression(config)
    opts = config.build(eager.params), config.build(traced.params)
    step = compile_eager(lambda: opts[1].step())
    for number in range(6):
        for task, opt in zip((eager, traced), opts, strict=True):
            if number == 3:
                state = opt.state[task.params[1]]
                state.update({name: torch.zeros_like(t) for name, t in state.items() if name not in ("step", "layout")})
            if number == 4:
                opt.state.clear()
            opt.zero_grad()
            task.loss().backward()
        opts[0].step()
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            step()
        assert same(eager.params, traced.params)
    assert all(state["step"] == 2 for state in opts[1].state.values())


@over("default", "memory host")
def test_guard_on_none_grads(config):
    """A compiled loop without one of the backward passes counts the same steps as the eager one."""

    def loop():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 80), nn.Sigmoid(), nn.Linear(80, 1), nn.Sigmoid())
        opt = config.build(model.parameters())
        counts = []
        for step in range(6):
            opt.zero_grad()
            if step != 3:
                model(torch.linspace(0.1, 0.6, 100).reshape(2, 50)).sum().backward()
            opt.step()
            counts.append(float(opt.state[model[0].weight]["step"]))
        return counts, [p.detach().clone() for p in model.parameters()]

    first, second = loop(), torch.compile(loop, backend="eager")()
    assert first[0] == second[0] == [1, 2, 3, 3, 4, 5]
    assert same(first[1], second[1])


@over("default", "memory host")
def test_closure_graph_break(config):
    params = [torch.ones(80, 40, device=DEVICE, dtype=config.dtype, requires_grad=True) for _ in range(2)]
    opts = [config.build([p]) for p in params]

    def closure_of(p):
        def closure():
            p.grad = torch.ones_like(p) * 2
            return p.grad

        return closure

    def loop(opt, closure):
        opt.step(closure)

    loop(opts[0], closure_of(params[0]))
    compile_eager(loop)(opts[1], closure_of(params[1]))
    assert same(*params)
    assert not torch.equal(params[0], torch.ones_like(params[0]))


@over("default", "memory host")
def test_static_address_finalizer(config):
    """Neither a graph nor its guards keep a reference to a parameter."""
    gc.collect()

    def run():
        p = nn.Linear(80, 40, bias=False, device=DEVICE).weight
        p.grad = torch.rand_like(p)
        opt = config.build([p])
        torch.compile(lambda: opt.step(), backend="eager")()
        return weakref.ref(p)

    ref = run()
    torch._dynamo.reset()
    gc.collect()
    assert ref() is None


def test_inductor_steps_a_whole_loop():
    """test_correctness through the default backend: model, backward and step in one compiled function."""
    tasks = [Regression(CONFIGURATIONS["ratio 8"]) for _ in range(2)]
    opts = [Collins(task.params, min_K=16) for task in tasks]

    @torch.compile
    def step():
        opts[1].step()

    for _ in range(2):
        tasks[0].step(opts[0])
        opts[1].zero_grad()
        tasks[1].loss().backward()
        step()
    torch.testing.assert_close(tasks[0].params, tasks[1].params)
