"""PyTorch's TestLRScheduler and TestSWAUtils, case by case: schedules have the same effect on Collins as on AdamW."""

import copy
import gc
import io
import itertools
import math
import pickle
import warnings
import weakref

import pytest
import torch
from configurations import CONFIGURATIONS, Regression, over, uncompiled
from helpers import DEVICE, same
from torch import nn
from torch.optim import AdamW
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from collins import Collins

# A ChainedScheduler in a SequentialLR warns when it is constructed.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

# The schedules of each case, which are all stepped.
CYCLE = {"base_momentum": 0.5, "max_momentum": 0.9}
CYCLE_OF_TWO_GROUPS = {"base_momentum": [0.5, 0.6], "max_momentum": [0.9, 0.95]}


def exponential_then_step(o):
    return [lrs.SequentialLR(o, [lrs.ExponentialLR(o, 0.8), lrs.StepLR(o, 4)], [3])]


def chained_then_constant(o):
    chained = lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, total_iters=5), lrs.ConstantLR(o, 0.1, 5)])
    return [lrs.SequentialLR(o, [chained, lrs.ConstantLR(o, 0.5, 5)], [5])]


def plateau(**options):
    return lambda o: [lrs.ReduceLROnPlateau(o, **options)]


CASES = {
    "step_lr": lambda o: [lrs.StepLR(o, 3)],
    "multi_step_lr": lambda o: [lrs.MultiStepLR(o, [2, 5, 9])],
    "constantlr": lambda o: [lrs.ConstantLR(o, 0.5, 5)],
    "linearlr": lambda o: [lrs.LinearLR(o, 0.5, total_iters=4)],
    "exp_lr": lambda o: [lrs.ExponentialLR(o, 0.9)],
    "poly_lr": lambda o: [lrs.PolynomialLR(o, 5, 0.9)],
    "cos_anneal_lr": lambda o: [lrs.CosineAnnealingLR(o, 10, 1e-10)],
    "lambda_lr": lambda o: [lrs.LambdaLR(o, [lambda t: 0.9**t, lambda t: 0.8**t])],
    "multiplicative_lr": lambda o: [lrs.MultiplicativeLR(o, [lambda _: 0.9, lambda _: 0.8])],
    "CosineAnnealingWarmRestarts_lr1": lambda o: [lrs.CosineAnnealingWarmRestarts(o, 5, 2, 1e-10)],
    "reduce_lr_on_plateau1": plateau(threshold_mode="abs", threshold=0.01, patience=5, cooldown=5),
    "reduce_lr_on_plateau2": plateau(threshold_mode="abs", threshold=0.1, patience=5),
    "reduce_lr_on_plateau3": plateau(mode="max", patience=5, cooldown=5, threshold_mode="abs"),
    "reduce_lr_on_plateau8": plateau(mode="max", min_lr=[4e-4, 3e-3], patience=2, cooldown=2),
    "sequentiallr1": exponential_then_step,
    "sequentiallr2": lambda o: [lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1, 3), lrs.ExponentialLR(o, 0.9)], [3])],
    "sequentiallr3": lambda o: [
        lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1, 3), lrs.ExponentialLR(o, 0.8), lrs.StepLR(o, 2)], [3, 6])
    ],
    "sequentiallr5": chained_then_constant,
    "chained_lr1": lambda o: [lrs.ChainedScheduler([lrs.StepLR(o, 3)])],
    "chained_lr2": lambda o: [lrs.ChainedScheduler([lrs.LinearLR(o, 0.4, total_iters=3)])],
    "chained_lr3": lambda o: [lrs.ChainedScheduler([lrs.StepLR(o, 3), lrs.MultiStepLR(o, [2, 5, 9])])],
    "chained_lr4": lambda o: [
        lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9), lrs.ConstantLR(o, 0.2, 4), lrs.StepLR(o, 3)])
    ],
    "chained_lr5": lambda o: [lrs.ChainedScheduler([lrs.PolynomialLR(o, 4, 0.9), lrs.ConstantLR(o, 0.1, 3)])],
    "compound_step_and_multistep_lr": lambda o: [lrs.StepLR(o, 3), lrs.MultiStepLR(o, [2, 5, 9])],
    "compound_step_and_exp_lr": lambda o: [lrs.StepLR(o, 3), lrs.ExponentialLR(o, 0.9)],
    "compound_exp_and_linearlr": lambda o: [lrs.LinearLR(o, 0.4, 0.9, 4), lrs.ExponentialLR(o, 0.9)],
    "compound_step_and_constantlr": lambda o: [lrs.StepLR(o, 3), lrs.ConstantLR(o, 0.4, 4)],
    "compound_cosanneal_and_exp_lr": lambda o: [lrs.CosineAnnealingLR(o, 10, 1e-10), lrs.ExponentialLR(o, 0.1)],
    "compound_cosanneal_and_linearlr": lambda o: [lrs.LinearLR(o, 0.4, 0.8, 4), lrs.CosineAnnealingLR(o, 10, 1e-10)],
    "compound_reduce_lr_on_plateau1": lambda o: [*plateau(patience=5, cooldown=5)(o), lrs.StepLR(o, 3)],
    "compound_reduce_lr_on_plateau5": lambda o: [*plateau(patience=5)(o), lrs.CosineAnnealingLR(o, 10, 1e-10)],
    "cycle_lr_triangular_mode_one_lr": lambda o: [lrs.CyclicLR(o, 1e-3, 5e-3, 4, **CYCLE)],
    "cycle_lr_triangular_mode_one_lr_no_momentum": lambda o: [lrs.CyclicLR(o, 1e-3, 5e-3, 4, cycle_momentum=False)],
    "cycle_lr_triangular2_mode_one_lr": lambda o: [lrs.CyclicLR(o, 1e-3, 5e-3, 4, mode="triangular2", **CYCLE)],
    "cycle_lr_exp_range_mode_one_lr": lambda o: [lrs.CyclicLR(o, 1e-3, 5e-3, 4, mode="exp_range", gamma=0.9, **CYCLE)],
    "cycle_lr_triangular_mode": lambda o: [lrs.CyclicLR(o, [1e-3, 2e-3], [5e-3, 6e-3], 4, **CYCLE_OF_TWO_GROUPS)],
    "cycle_lr_triangular2_mode_step_size_up_down": lambda o: [
        lrs.CyclicLR(o, [1e-3, 3e-3], [5e-3, 7e-3], 2, 6, mode="triangular2", **CYCLE_OF_TWO_GROUPS)
    ],
    "cycle_lr_exp_range_mode_step_size_up_down": lambda o: [
        lrs.CyclicLR(o, 1e-3, 5e-3, 2, 6, mode="exp_range", gamma=0.9, **CYCLE)
    ],
    "onecycle_lr_linear_annealing": lambda o: [
        lrs.OneCycleLR(o, 2.5e-2, 12, anneal_strategy="linear", final_div_factor=2, **CYCLE)
    ],
    "onecycle_lr_linear_annealing_three_phases": lambda o: [
        lrs.OneCycleLR(o, 2.5e-2, 12, pct_start=0.4, anneal_strategy="linear", three_phase=True, **CYCLE)
    ],
    "onecycle_lr_cosine_annealing": lambda o: [lrs.OneCycleLR(o, 2.5e-2, 12, final_div_factor=2, **CYCLE)],
    "cosine_then_cyclic": lambda o: [lrs.CosineAnnealingLR(o, 20, 1e-3), lrs.CyclicLR(o, 1e-3, 3e-3, 1, 3)],
    "swalr_no_anneal": lambda o: [SWALR(o, anneal_epochs=1, swa_lr=0.01)],
    "swalr_cosine_anneal_after_multiplicative": lambda o: [
        lrs.MultiplicativeLR(o, lambda _: 0.9),
        SWALR(o, anneal_epochs=5, swa_lr=0.01),
    ],
    "swalr_linear_anneal_after_multiplicative": lambda o: [
        lrs.MultiplicativeLR(o, lambda _: 0.9),
        SWALR(o, anneal_epochs=4, swa_lr=[0.01, 0.02], anneal_strategy="linear"),
    ],
}
METRICS = [1.5 * 1.005**step for step in range(12)]
cases = pytest.mark.parametrize("case", CASES.values(), ids=[f"test_{name}" for name in CASES])
CYCLIC_SCHEDULES = ("cycle_lr_triangular_mode", "onecycle_lr_cosine_annealing")
over_cyclic_schedules = pytest.mark.parametrize(
    "case", [CASES[name] for name in CYCLIC_SCHEDULES], ids=CYCLIC_SCHEDULES
)


def two_groups(build, task, rate=0.05):
    """An optimizer of two groups, the second one's rate a tensor."""
    weight, bias = task.params
    return build([{"params": [weight]}, {"params": [bias], "lr": torch.tensor(0.1, dtype=torch.float64)}], lr=rate)


def advance(schedules, step):
    for schedule in schedules:
        schedule.step(METRICS[step]) if isinstance(schedule, lrs.ReduceLROnPlateau) else schedule.step()


def rates(opt):
    """The learning rate and beta1 of each group; some schedules cycle both."""
    return [number for group in opt.param_groups for number in (float(group["lr"]), group["betas"][0])]


@pytest.mark.parametrize(
    ("case", "in_backward"),
    [
        *(pytest.param(case, False, id=f"test_{name}") for name, case in CASES.items()),
        *(pytest.param(CASES[name], True, id=f"test_{name} in backward") for name in CYCLIC_SCHEDULES),
    ],
)
def test_schedules_are_adamws(case, in_backward):
    """Rates, betas and, with exact moments, weights equal those of AdamW; tensor rates stay the same objects."""
    config = CONFIGURATIONS["fp64 tables"]
    tasks = Regression(config), Regression(config)
    opt = two_groups(lambda ps, lr: Collins(ps, lr=lr, compress_ratio=1, in_backward=in_backward), tasks[0])
    adamw = two_groups(lambda ps, lr: AdamW(ps, lr=lr), tasks[1])
    tensor = opt.param_groups[1]["lr"]
    schedules, adamw_schedules = case(opt), case(adamw)
    for step in range(11):
        assert rates(opt) == pytest.approx(rates(adamw), rel=1e-6)
        tasks[0].step(opt)
        tasks[1].step(adamw)
        advance(schedules, step)
        advance(adamw_schedules, step)
    torch.testing.assert_close(tasks[0].params, tasks[1].params, rtol=1e-10, atol=1e-12)
    assert opt.param_groups[1]["lr"] is tensor
    last = [[float(rate) for rate in schedule.get_last_lr()] for schedule in schedules]
    assert last == [pytest.approx([float(rate) for rate in schedule.get_last_lr()]) for schedule in adamw_schedules]


@over_cyclic_schedules
@uncompiled
def test_cycle_lr_cycle_momentum_with_beta1_optimizer(config, case):
    """A beta1 that a schedule sets applies to the next step, as if it had been set directly."""
    tasks = Regression(config), Regression(config)
    opt, manual_opt = (config.build(groups_of(config, task)) for task in tasks)
    schedules = case(opt) if len(opt.param_groups) == 2 else []
    beta1s = set()
    for step in range(11):
        for group, manual_group in zip(opt.param_groups, manual_opt.param_groups, strict=True):
            manual_group["lr"], manual_group["betas"] = float(group["lr"]), (float(group["betas"][0]), 0.999)
        beta1s.add(opt.param_groups[0]["betas"][0])
        tasks[0].step(opt)
        tasks[1].step(manual_opt)
        advance(schedules, step)
    assert len(beta1s) > 4
    torch.testing.assert_close(tasks[0].params, tasks[1].params)


def groups_of(config, task):
    named_params = zip("wb", task.params, strict=True)
    return [{"params": [(name, p) if config.named else p]} for name, p in named_params]


@cases
def test_lr_scheduler_state_dict_load(case):
    """And test_*_state_dict: another schedule and optimizer resume from a file."""
    task, other_task = Regression(CONFIGURATIONS["ratio 8"]), Regression(CONFIGURATIONS["ratio 8"])
    opt, other = (two_groups(lambda ps, lr: CONFIGURATIONS["ratio 8"].build(ps, lr=lr), t) for t in (task, other_task))
    first, second = case(opt), case(other)
    for step in range(4):
        task.step(opt)
        advance(first, step)
    with torch.no_grad():
        for p, q in zip(task.params, other_task.params, strict=True):
            q.copy_(p)
    file = io.BytesIO()
    torch.save([opt.state_dict(), [schedule.state_dict() for schedule in first]], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other.load_state_dict(states[0])
    for schedule, state in zip(second, states[1], strict=True):
        schedule.load_state_dict(state)
    for step in range(4, 9):
        assert rates(opt) == rates(other)
        task.step(opt)
        other_task.step(other)
        advance(first, step)
        advance(second, step)
        assert same(task.params, other_task.params)


@over("default", "memory host", "in backward")
def test_no_cyclic_references(config):
    """Dropping the last reference to an optimizer that was scheduled and stepped frees it, and its parameters."""
    gc.collect()
    gc.disable()
    try:
        task = Regression(config)
        opt = config.build(task.params)
        schedule = lrs.LambdaLR(opt, lambda _: 1.0)
        task.step(opt)
        schedule.step()
        references = [weakref.ref(opt), weakref.ref(schedule), weakref.ref(task.params[0])]
        del opt, schedule, task
        assert [ref() for ref in references[:2]] == [None, None]
        gc.collect()
        assert references[2]() is None
    finally:
        gc.enable()


@over("default", "memory host", "in backward")
@pytest.mark.parametrize("overridden", [False, True])
def test_old_pattern_warning(config, overridden):
    """Stepping a schedule before its optimizer gives a warning, stepping it afterwards does not."""
    for schedule_first in (True, False):
        task = Regression(config)
        opt = config.build(task.params)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule = lrs.StepLR(opt, 3)
            if overridden:
                original_step = opt.step
                opt.step = lambda *args, original_step=original_step: original_step(*args)
            for _ in range(3):
                if schedule_first:
                    schedule.step()
                opt.step()
                if not schedule_first:
                    schedule.step()
        texts = [str(warning.message) for warning in caught]
        word = "has been overridden" if overridden else "how-to-adjust-learning-rate"
        assert any(word in text for text in texts) == (schedule_first or overridden), texts


@pytest.mark.parametrize("min_lr", [0, [1e-5, 1e-4]], ids=["scalar", "list"])
@over("default", "memory host", "in backward", "named")
def test_add_param_group_does_not_break_reduce_lr_on_plateau(config, min_lr):
    task = Regression(config)
    opt = config.build(groups_of(config, task))
    schedule = lrs.ReduceLROnPlateau(opt, patience=1, min_lr=min_lr)
    for step in range(8):
        if step == 3:
            new_param = nn.Parameter(torch.rand(80, 3, device=DEVICE, dtype=config.dtype))
            opt.add_param_group({"params": [("late", new_param)] if config.named else [new_param], "lr": 0.05})
            if min_lr:
                schedule.min_lrs.append(1e-6)
        opt.zero_grad()
        (task.loss() if step < 3 else task.loss() + new_param.sum()).backward()
        opt.step()
        schedule.step(1.0)
    assert opt.param_groups[2]["lr"] < 0.05
    assert opt.state[new_param]["step"] == 5


@pytest.mark.parametrize("name", ["step_lr", "exp_lr", "cos_anneal_lr", "poly_lr", "linearlr", "lambda_lr"])
def test_constant_initial_lr(name):
    """And test_sequentiallr_does_not_alias_lr_and_initial_lr: a tensor rate shares no memory with a schedule's base."""
    task = Regression(CONFIGURATIONS["default"])
    opt = two_groups(lambda ps, lr: Collins(ps, lr=lr), task)
    (schedule,) = CASES[name](opt)
    initial = copy.deepcopy([group["initial_lr"] for group in opt.param_groups])
    for step in range(2):
        task.step(opt)
        advance([schedule], step)
        opt.param_groups[1]["lr"].mul_(0.1)
        assert [group["initial_lr"] for group in opt.param_groups] == initial == schedule.base_lrs
        assert opt.param_groups[1]["initial_lr"] is not schedule.base_lrs[1]


def test_cycle_lr_state_dict_picklable():
    """And test_cycle_lr_removed_after_out_of_scope."""
    opt = Collins(Regression(CONFIGURATIONS["default"]).params)
    schedule = lrs.CyclicLR(opt, 1e-3, 5e-3)
    pickle.dumps(schedule.state_dict())
    reference = weakref.ref(schedule)
    del schedule
    assert reference() is None


# Averages of weights.


class Normalized(nn.Module):
    """A layer with a batch norm whose statistics are recomputed for averaged weights."""

    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.bn = layer, norm

    def forward(self, x):
        return self.bn(self.layer(x))


def dnn():
    torch.manual_seed(0)
    return Normalized(nn.Linear(50, 100), nn.BatchNorm1d(100)).to(DEVICE), torch.rand(40, 50, device=DEVICE)


def cnn():
    torch.manual_seed(0)
    x = torch.rand(40, 3, 5, 5, device=DEVICE)
    return Normalized(nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40)).to(DEVICE), x


def train_model(config, make, steps, after):
    """Trains a model and calls `after(model)` after each step."""
    model, x = make()
    opt = config.build([named if config.named else named[1] for named in model.named_parameters()], lr=1e-2)
    for _ in range(steps):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        after(model)
    return model, x, opt


@pytest.mark.parametrize("kind", ["swa", "ema", "avg_fn"])
@over("default", "ratio 8", "universal", "memory host", "in backward", "named")
def test_averaged_model_all_devices(config, kind):
    """And test_averaged_model_exponential: the average equals that of the weights after each step."""
    averaged, history = [], []
    functions = {
        "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
        "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        "avg_fn": {"avg_fn": lambda average, p, _: 0.9 * average + 0.1 * p},
    }

    def update_average(model):
        if not averaged:
            averaged.append(AveragedModel(model, **functions[kind]))
        averaged[0].update_parameters(model)
        history.append([p.detach().clone() for p in model.parameters()])

    train_model(config, dnn, 6, update_average)
    expected = history[0]
    for number, after in enumerate(history[1:], 1):
        decay = number / (number + 1) if kind == "swa" else 0.9
        expected = [decay * average + (1 - decay) * p for average, p in zip(expected, after, strict=True)]
    torch.testing.assert_close(list(averaged[0].module.parameters()), expected)
    assert averaged[0].n_averaged == 6
    assert not same(history[-1], expected)


def test_averaged_model_state_dict():
    """And test_averaged_model_default_avg_fn_picklable: the average is saved with the optimizer and resumed."""
    averaged = []

    def update_average(model):
        averaged[:] = averaged or [AveragedModel(model)]
        averaged[0].update_parameters(model)

    model, x, opt = train_model(CONFIGURATIONS["ratio 8"], dnn, 4, update_average)
    pickle.dumps(averaged[0])
    model_copy = copy.deepcopy(model)
    other, other_average = CONFIGURATIONS["ratio 8"].build(model_copy.parameters(), lr=1e-2), AveragedModel(model_copy)
    other.load_state_dict(opt.state_dict())
    other_average.load_state_dict(averaged[0].state_dict())
    for m, o, average in ((model, opt, averaged[0]), (model_copy, other, other_average)):
        o.zero_grad()
        m(x).square().mean().backward()
        o.step()
        average.update_parameters(m)
    assert same(averaged[0].state_dict(), other_average.state_dict())


@pytest.mark.parametrize("make", [dnn, cnn], ids=["test_update_bn_dnn", "test_update_bn_cnn"])
@over("default", "memory host", "in backward")
def test_update_bn(config, make):
    """Statistics of a batch norm are recomputed for averaged weights, without gradients and state."""
    averaged = []

    def update_average(model):
        averaged[:] = averaged or [AveragedModel(model, use_buffers=False)]
        averaged[0].update_parameters(model)

    _, x, opt = train_model(config, make, 4, update_average)
    before = copy.deepcopy(opt.state_dict())
    update_bn(x.split(8), averaged[0])
    inner = averaged[0].module
    with torch.no_grad():
        features = inner.layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(inner.bn.running_mean, features.mean(1))
    assert inner.bn.momentum == 0.1
    assert averaged[0].training
    assert same(opt.state_dict(), before)


def test_a_table_of_cases_is_complete():
    """Every public schedule is among the cases."""
    opts = [two_groups(lambda ps, lr: Collins(ps, lr=lr), Regression(CONFIGURATIONS["default"])) for _ in CASES]
    used = list(itertools.chain.from_iterable(case(opt) for case, opt in zip(CASES.values(), opts, strict=True)))
    names = {type(schedule).__name__ for schedule in used}
    assert {name for name in lrs.__all__ if name != "LRScheduler"} <= names
    assert math.isfinite(rates(opts[0])[0])
