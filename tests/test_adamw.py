"""With exact moments Collins equals torch.optim.AdamW, also with schedules, groups, closures and averaging."""

import copy

import pytest
import torch
from helpers import give_gradients, parameters
from torch.optim import lr_scheduler

from collins import Collins

SHAPES = ((33, 37), (5,), (), (2, 3, 4, 5))


def parameter_copies(dtype, device="cpu"):
    """The same parameters twice."""
    return parameters(dtype, SHAPES, device), parameters(dtype, SHAPES, device)


def assert_close(actual, expected, dtype):
    tolerances = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerances)


@pytest.mark.parametrize(
    ("dtype", "compile"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 1e-2, "weight_decay": 0.3}, {"betas": (0.0, 0.5), "eps": 1e-3}, {"maximize": True, "weight_decay": 0}],
    ids=str,
)
def test_ratio_one_equals_adamw_over_100_steps(options, dtype, compile, device):
    collins_ps, adamw_ps = parameter_copies(dtype, device)
    opts = Collins(collins_ps, **options, compress_ratio=1, compile=compile), torch.optim.AdamW(adamw_ps, **options)
    for step in range(100):
        give_gradients(step, collins_ps, adamw_ps)
        for opt in opts:
            opt.step()
    assert_close(collins_ps, adamw_ps, dtype)
    for p, q in zip(collins_ps, adamw_ps, strict=True):
        assert opts[0].state[p].keys() == opts[1].state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert opts[0].state[p]["step"].item() == 100


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 6]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.StepLR(o, 2)], [3]
    ),
}


def test_every_scheduler_is_tested():
    public = {name for name in lr_scheduler.__all__ if name not in ("LRScheduler", "SWALR")}
    assert public == SCHEDULERS.keys()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name, tensor_lr):
    collins_ps, adamw_ps = parameter_copies(torch.float64)
    rates = [torch.tensor(1e-2, dtype=torch.float64) if tensor_lr else 1e-2 for _ in range(2)]
    opts = Collins(collins_ps, lr=rates[0], compress_ratio=1), torch.optim.AdamW(adamw_ps, lr=rates[1])
    schedules = [SCHEDULERS[name](opt) for opt in opts]
    for step in range(10):
        give_gradients(step, collins_ps, adamw_ps)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
        assert float(opts[0].param_groups[0]["lr"]) == pytest.approx(float(opts[1].param_groups[0]["lr"]))
    assert_close(collins_ps, adamw_ps, torch.float64)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("hash", ["block", "universal"])
def test_no_scheduler_recompiles(hash, tensor_lr):
    ps = parameters(torch.float32, SHAPES, "cpu")
    opt = Collins(ps, lr=torch.tensor(1e-2) if tensor_lr else 1e-2, min_K=8, hash=hash, compile=True)
    give_gradients(0, ps)
    opt.step()
    graphs = opt._stepper.engine.graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        for name, make_schedule in {
            **SCHEDULERS,
            "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
        }.items():
            schedule = make_schedule(opt)
            for step in range(8):
                give_gradients(step, ps)
                opt.step()
                schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
    assert opt._stepper.engine.graphs == graphs


def test_swa_utils_and_swalr():
    collins_ps, adamw_ps = parameter_copies(torch.float64)
    opts = Collins(collins_ps, compress_ratio=1), torch.optim.AdamW(adamw_ps)
    schedules = [torch.optim.swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=3) for opt in opts]
    for step in range(6):
        give_gradients(step, collins_ps, adamw_ps)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            schedule.step()
    assert_close(collins_ps, adamw_ps, torch.float64)


def test_groups_names_and_groups_added_later():
    def build(make, **exact):
        ps = parameters(torch.float64, SHAPES, "cpu")
        opt = make([{"params": [("a", ps[0])], "lr": 1e-2}, {"params": [("b", ps[1])], "weight_decay": 0.5}], **exact)
        return ps, opt

    collins_ps, opt = build(Collins, compress_ratio=1)
    adamw_ps, adamw = build(torch.optim.AdamW)
    for step in range(20):
        if step == 5:
            for ps, o in ((collins_ps, opt), (adamw_ps, adamw)):
                o.add_param_group({"params": [("c", ps[2]), ("d", ps[3])], "betas": (0.5, 0.6)})
        give_gradients(step, collins_ps, adamw_ps)
        opt.step()
        adamw.step()
    assert_close(collins_ps, adamw_ps, torch.float64)
    assert [group["param_names"] for group in opt.param_groups] == [["a"], ["b"], ["c", "d"]]


def test_gradients_that_are_absent_in_some_steps():
    collins_ps, adamw_ps = parameter_copies(torch.float64)
    opts = Collins(collins_ps, compress_ratio=1), torch.optim.AdamW(adamw_ps)
    for step in range(12):
        give_gradients(step, collins_ps, adamw_ps)
        absent = step % len(collins_ps)
        collins_ps[absent].grad = adamw_ps[absent].grad = None
        for opt in opts:
            opt.step()
    assert_close(collins_ps, adamw_ps, torch.float64)


def test_closure_and_its_loss():
    collins_ps, adamw_ps = parameter_copies(torch.float64)
    opts = Collins(collins_ps, compress_ratio=1), torch.optim.AdamW(adamw_ps)
    losses = []
    for ps, opt in zip((collins_ps, adamw_ps), opts, strict=True):

        def closure(ps=ps, opt=opt):
            opt.zero_grad()
            loss = sum(p.square().sum() for p in ps)
            loss.backward()
            return loss

        losses.append([opt.step(closure).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1])
    assert_close(collins_ps, adamw_ps, torch.float64)


def test_adamw_state_loads_into_exact_moments_and_back():
    collins_ps, adamw_ps = parameter_copies(torch.float64)
    opt, adamw = Collins(collins_ps, compress_ratio=1), torch.optim.AdamW(adamw_ps)
    give_gradients(0, collins_ps, adamw_ps)
    adamw.step()
    for p, q in zip(collins_ps, adamw_ps, strict=True):
        p.data.copy_(q.data)
    loaded = copy.deepcopy(adamw.state_dict())
    for group in loaded["param_groups"]:
        group["compress_ratio"] = 1
    opt.load_state_dict(loaded)
    give_gradients(1, collins_ps, adamw_ps)
    opt.step()
    adamw.step()
    assert_close(collins_ps, adamw_ps, torch.float64)
