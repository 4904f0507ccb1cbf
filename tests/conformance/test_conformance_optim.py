"""PyTorch's TestOptimRenewed with Collins: steps, errors, and the equality of all ways to step.

See `configurations` for cases that have no counterpart, and test_conformance_state for state dicts and hooks.
"""

import copy
import gc

import pytest
import torch
from configurations import CONFIGURATIONS, Regression, everywhere, over, uncompiled
from helpers import DEVICE, moments, same, with_kernel
from torch import nn
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from collins import Collins

ADAMW = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
SCHEDULES = {
    "none": lambda opt: [],
    "with_lrsched": lambda opt: [lr_scheduler.StepLR(opt, 10, gamma=0.9), lr_scheduler.ReduceLROnPlateau(opt)],
}
scheduled = pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def advance(schedules, loss):
    for schedule in schedules:
        schedule.step(loss) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()


def skip_tensor_lr_on_two_devices(config):
    if config.options.get("capturable") and isinstance(config.lr(), torch.Tensor):
        pytest.skip("a step on one GPU cannot read a learning rate on another")


# Training changes the loss as expected.


@scheduled
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@uncompiled
def test_forloop_goes_right_direction(config, contiguous, schedules):
    task = Regression(config, contiguous)
    before, opt = task.value(), config.build(task.params)
    running = schedules(opt)
    for _ in range(20):
        advance(running, task.step(opt))
    assert task.has_moved_as_expected(before, config)


@two_gpus
@uncompiled
def test_forloop_goes_right_direction_multigpu(config):
    skip_tensor_lr_on_two_devices(config)
    task = Regression(config, devices=("cuda:0", "cuda:1"))
    before, opt = task.value(), config.build(task.params)
    running = SCHEDULES["with_lrsched"](opt)
    for _ in range(20):
        advance(running, task.step(opt, with_closure=True))
    assert task.has_moved_as_expected(before, config)


@everywhere
def test_param_group_with_lrscheduler_goes_right_direction(config):
    task = Regression(config)
    weight, bias = ([(name, p)] if config.named else [p] for name, p in zip("wb", task.params, strict=True))
    before, opt = task.value(), config.build([{"params": weight}, {"params": bias, "lr": 0.01}])
    running = SCHEDULES["with_lrsched"](opt)
    for _ in range(20):
        advance(running, task.step(opt, with_closure=True))
    assert task.has_moved_as_expected(before, config)


@everywhere
def test_tensor_lr(config):
    float_task, tensor_task = Regression(config), Regression(config)
    first = config.build(float_task.params, lr=1e-3)
    second = config.build(tensor_task.params, lr=torch.tensor(1e-3, dtype=torch.float64))
    for _ in range(5):
        float_task.step(first)
        tensor_task.step(second)
        assert isinstance(second.param_groups[0]["lr"], torch.Tensor)
        torch.testing.assert_close(float_task.params, tensor_task.params)


@uncompiled
def test_param_groups_weight_decay(config):
    task, decayed = Regression(config), Regression(config)
    with torch.no_grad():  # large enough for its decay to be visible
        for p in (task.params[1], decayed.params[1]):
            p.mul_(8)
    weight, bias = ([(name, p)] if config.named else [p] for name, p in zip("wb", task.params, strict=True))
    opt = config.build([{"params": weight, "weight_decay": 0.1}, {"params": bias, "weight_decay": 0.0}])
    other = config.build(
        [("w", decayed.params[0]), ("b", decayed.params[1])] if config.named else decayed.params, weight_decay=0.1
    )
    before = task.value()
    for _ in range(20):
        task.step(opt)
        decayed.step(other)
    assert task.has_moved_as_expected(before, config)
    assert task.params[1].norm() > decayed.params[1].norm()


@uncompiled
def test_param_groups_lr(config):
    task, irrelevant = Regression(config), nn.Parameter(torch.ones(2, dtype=config.dtype, device=DEVICE))
    params = [("w", task.params[0]), ("b", task.params[1])] if config.named else task.params
    opt = config.build(
        [{"params": params, "lr": 1e-2}, {"params": [("i", irrelevant)] if config.named else [irrelevant]}], lr=1e-28
    )
    before = task.value()
    for _ in range(20):
        irrelevant.grad = None if config.in_backward else torch.rand_like(irrelevant)
        if config.in_backward:
            (irrelevant * 0.5).sum().backward()
        task.step(opt)
    assert task.has_moved_as_expected(before, config)
    assert torch.equal(irrelevant, torch.ones_like(irrelevant))


@everywhere
def test_step_is_noop_when_params_have_no_grad(config):
    params = [torch.randn(80, 40, dtype=config.dtype, device=DEVICE) for _ in range(2)]
    before = copy.deepcopy(params)
    opt = config.build(params)
    closure = None if config.in_backward else lambda: torch.tensor([1.0])
    for _ in range(2):
        assert opt.step(closure) == (None if closure is None else 1)
    assert same(params, before)
    assert not opt.state


@everywhere
def test_step_is_noop_for_zero_grads(config):
    p = nn.Parameter(torch.randn(80, 40, dtype=config.dtype, device=DEVICE))
    before, opt = p.detach().clone(), config.build([p], weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        opt.step(None if config.in_backward else lambda: 1.0)
    assert torch.equal(p, before)
    assert opt.state[p]["step"] == 3


@everywhere
def test_optimizer_can_be_printed(config):
    text = repr(config.build(Regression(config).params))
    assert text.startswith("Collins")
    assert "lr: " in text


@uncompiled
def test_non_empty_state(config):
    model = nn.Linear(50, 50).to(DEVICE, config.dtype)
    opt = config.build(model.parameters())
    model(torch.rand(2, 50, dtype=config.dtype, device=DEVICE)).sum().backward()
    opt.step()
    assert len(opt.state) == 2
    assert all(len(state) >= 3 for state in opt.state.values())


# Errors.


@over("default", "ratio 1")
def test_optim_infos_do_not_specify_global_cliquey_kwargs(config):
    flags = ("foreach", "fused", "differentiable", "amsgrad")
    assert not any(flag in configuration.options for flag in flags for configuration in CONFIGURATIONS.values())
    for flag in flags:
        with pytest.raises(TypeError, match=flag):
            config.build(Regression(config).params, **{flag: True})


ERRORS = ADAMW.optim_error_inputs_func(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("case", ERRORS, ids=[error.optimizer_error_input.desc for error in ERRORS])
def test_errors(case):
    """All errors of AdamW in PyTorch; a duplicate parameter is an error here instead of a warning."""
    inputs = case.optimizer_error_input
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    options = {name: value for name, value in inputs.kwargs.items() if name != "foreach"}
    params = [nn.Parameter(torch.ones(1))] if inputs.params is None else inputs.params
    if options != inputs.kwargs:
        with pytest.raises(TypeError, match="foreach"):
            Collins(params, **inputs.kwargs)
    if isinstance(options.get("lr"), torch.Tensor) and options["lr"].numel() == 1:
        Collins(params, **options)  # an error of foreach=True only
        return
    with pytest.raises(ValueError if issubclass(case.error_type, Warning) else case.error_type):
        Collins(params, **options)


@pytest.mark.parametrize("make", [torch.tensor, lambda beta: torch.full((1, 1), beta)], ids=["0-d", "2-d"])
def test_errors_of_betas_as_tensors(make):
    """AdamW accepts them if capturable or compiled; here betas are numbers, as schedulers set them."""
    with pytest.raises(ValueError, match="betas must be two numbers in"):
        Collins([nn.Parameter(torch.ones(1))], betas=(make(0.9), make(0.99)))


@everywhere
def test_rosenbrock_sparse(config):
    """AdamW rejects sparse gradients, too; nothing changes."""
    point = nn.Parameter(torch.tensor([1.5, 1.5], dtype=config.dtype, device=DEVICE))
    opt = config.build([point])
    entries = torch.tensor([[0, 0]]), torch.ones(2, dtype=config.dtype)
    point.grad = torch.sparse_coo_tensor(*entries, (2,), device=DEVICE, check_invariants=True)
    with pytest.raises(TypeError, match=r"gradient of .*sparse_coo"):
        opt.step()
    assert torch.equal(point, torch.full_like(point, 1.5))
    assert not opt.state


@everywhere
def test_complex(config):
    """Complex parameters are rejected by name; their real views are stepped like other real parameters."""
    complex_param = torch.randn(10, 5, dtype=torch.complex64, device=DEVICE)
    with pytest.raises(TypeError, match="complex"):
        config.build([nn.Parameter(complex_param)])


@over("default", "ratio 1", "memory host", "in backward")
def test_complex_2d(config):
    complex_ = torch.randn(80, 40, dtype=torch.complex64, device=DEVICE)
    viewed = [torch.view_as_real(complex_.clone()).requires_grad_()]
    real = [torch.view_as_real(complex_).clone().requires_grad_()]
    opts = config.build(viewed), config.build(real)
    for _ in range(3):
        for (p,), opt in zip((viewed, real), opts, strict=True):
            opt.zero_grad()
            torch.view_as_complex(p).abs().square().sum().backward()
            opt.step()
    assert torch.equal(viewed[0], real[0])


@everywhere
def test_fused_error_on_params_on_meta(config):
    """Steps on meta create state there, as in AdamW; the host tier rejects them. Models filled later are stepped."""
    model = nn.Linear(80, 40, device="meta", dtype=config.dtype)
    opt = config.build(model.parameters())
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    if config.options.get("memory") == "host":
        with pytest.raises(ValueError, match="got meta"):
            opt.step()
        assert not opt.state
    else:
        for _ in range(2):
            opt.step()
        all_moments = [moment for p in model.parameters() for moment in moments(opt, p)]
        scales = sum(name.endswith("_scale") for p in model.parameters() for name in opt.state[p])
        assert len(all_moments) == 4 + scales
        assert all(moment.is_meta for moment in all_moments)
    model.to_empty(device=DEVICE)
    opt = config.build(model.parameters())
    for p in model.parameters():
        nn.init.zeros_(p)
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(p.any() and p.isfinite().all() for p in model.parameters())


# All ways to step are equal.


def compare_between(models, opts, inputs, **tolerances):
    """Seven steps of two models, with one of no gradients and two of a frozen layer; weights and states stay close."""
    for step in range(7):
        for model, opt, x in zip(models, opts, inputs, strict=True):
            opt.zero_grad()
            if step in (3, 5):
                model[2].requires_grad_(step == 5)
            if step != 2:
                model(x).sum().backward()
            opt.step()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, check_device=False, **tolerances)
            state, other_state = opts[0].state[p], opts[1].state[q]
            assert (
                state["step"]
                == other_state["step"]
                == (step if step > 1 else step + 1) - (frozen_steps(models[0], p, step))
            )
            assert state["step"].dtype == other_state["step"].dtype == torch.float32
            for name in state.keys() & other_state.keys() - {"layout"}:
                torch.testing.assert_close(state[name], other_state[name], check_device=False, **tolerances)


def frozen_steps(model, p, step):
    """The number of steps so far that skipped this parameter, because its layer was frozen."""
    return max(min(step - 2, 2), 0) if any(p is q for q in model[2].parameters()) else 0


def layers(dtype, device=DEVICE):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(40, 60), nn.Sigmoid(), nn.Linear(60, 20), nn.Sigmoid()).to(device, dtype)


def batch(dtype, device=DEVICE):
    return torch.linspace(0.1, 0.6, 120).reshape(3, 40).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@over("ratio 1", "memory host", "in backward")
def test_foreach_matches_forloop(config, dtype):
    """Exact moments are AdamW's, with a zero-dimensional parameter last."""
    models = [layers(dtype) for _ in range(2)]
    scalars = [nn.Parameter(torch.ones((), dtype=dtype, device=DEVICE)) for _ in range(2)]
    params = [[*model.parameters(), scalar] for model, scalar in zip(models, scalars, strict=True)]
    opt, adamw = config.build(params[0], compress_ratio=1), torch.optim.AdamW(params[1])
    scalars[0].grad, scalars[1].grad = torch.ones_like(scalars[0]), torch.ones_like(scalars[1])
    compare_between(models, (opt, adamw), [batch(dtype)] * 2)
    assert torch.equal(*scalars)


@over("ratio 8")
def test_fused_matches_forloop(config):
    """Compiled steps equal eager ones."""
    models = [layers(config.dtype) for _ in range(2)]
    opts = [config.build(model.parameters(), compile=model is models[0]) for model in models]
    compare_between(models, opts, [batch(config.dtype)] * 2)


def test_fused_matches_forloop_in_the_kernel():
    config = CONFIGURATIONS["ratio 8"]
    models = [layers(config.dtype) for _ in range(2)]
    opts = config.build(models[0].parameters(), compile=None), config.build(models[1].parameters(), compile=False)
    with_kernel(opts[0])
    compare_between(models, opts, [batch(config.dtype)] * 2)


@pytest.mark.cuda
@everywhere
def test_fused_cpu_matches_cuda(config):
    models = layers(config.dtype, "cpu"), layers(config.dtype, "cuda")
    if config.dtype == torch.bfloat16 or config.options.get("table_dtype") == torch.bfloat16:
        pytest.skip("rounding in 16 bits turns a difference of the last bit into one of 1 in 256")
    options = {} if not isinstance(config.lr(), torch.Tensor) else {"lr": 1e-3}
    opts = [config.build(model.parameters(), **options) for model in models]
    compare_between(models, opts, [batch(config.dtype, device) for device in ("cpu", "cuda")], rtol=1e-4, atol=1e-5)


def mixed_parameters(devices):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(40, 30, generator=generator).to(device, dtype) for device in devices for dtype in dtypes]
    return [(f"p{number}", nn.Parameter(t)) for number, t in enumerate(tensors)]


@pytest.mark.parametrize("devices", [(DEVICE,), pytest.param(("cuda:0", "cuda:1"), marks=two_gpus)], ids=str)
@uncompiled
def test_mixed_device_dtype(config, devices):
    """One optimizer of different parameters gives each the steps of a separate optimizer."""
    if config.dtype != torch.float32 and config.options.get("table_dtype"):
        pytest.skip("tables of float64 are for parameters of float64 only")
    if len(devices) > 1:
        skip_tensor_lr_on_two_devices(config)
    joint, separate = mixed_parameters(devices), mixed_parameters(devices)
    frozen = nn.Parameter(torch.randint(9, (2, 3), device=devices[-1]), requires_grad=False)
    opts = [config.build([*joint, ("frozen", frozen)]), *(config.build([named_param]) for named_param in separate)]
    for step in range(3):
        for ps in (joint, separate):
            for number, (_, p) in enumerate(ps):
                grad = torch.rand(p.shape, generator=torch.Generator().manual_seed(10 * step + number))
                p.grad = grad.to(p)
        for opt in opts:
            opt.step()
    for (_, p), (_, q) in zip(joint, separate, strict=True):
        torch.testing.assert_close(p, q, rtol=0 if DEVICE == "cpu" else None, atol=0 if DEVICE == "cpu" else None)
    assert frozen not in opts[0].state


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@uncompiled
def test_set_default_dtype_works_with_foreach(config, default):
    """The default dtype of the process has no effect: step counters are always float32."""
    tasks = [Regression(config) for _ in range(2)]
    opts = [config.build(tasks[0].params, lr=1e-3)]
    torch.set_default_dtype(default)
    try:
        opts.append(config.build(tasks[1].params, lr=1e-3))
        for _ in range(3):
            tasks[1].step(opts[1])
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(3):
        tasks[0].step(opts[0])
    assert same(tasks[0].params, tasks[1].params)
    assert all(state["step"].dtype == torch.float32 for state in opts[1].state.values())


@pytest.mark.cuda
@over("default", "sketch", "ratio 1")
def test_foreach_large_tensor(config):
    """Elements are indexed in 64 bits: the last of 2**32 are stepped like the first."""
    required_bytes = 2**32 * (2 + 2 + (8 if config.options.get("compress_ratio") == 1 else 1)) + 2**30
    if torch.cuda.mem_get_info()[0] < required_bytes:
        pytest.skip(f"needs {required_bytes / 2**30:.0f} GiB of free GPU memory")
    p = torch.ones(2**32, dtype=torch.float16, device="cuda")
    p.grad = torch.ones_like(p)
    config.build([p], lr=1e-2, stochastic_rounding=False, rehash_period=None).step()
    # With "sketch", an element whose bucket's signs cancel is unchanged, but their mean is not.
    assert p[:4096].float().mean() < 1
    assert p[-4096:].float().mean() < 1
    del p
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.cuda
@everywhere
def test_peak_memory_foreach(config):
    """A step allocates at most the size of the gradients, the limit of PyTorch's foreach steps."""
    params = [nn.Parameter(torch.rand(16, 80, dtype=config.dtype, device="cuda")) for _ in range(10)]
    opt = config.build(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.rand_like(p)
        opt.step()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    opt.step()
    size = sum(p.numel() * max(p.element_size(), 4) for p in params)
    assert torch.cuda.max_memory_allocated() - allocated <= 2 * size


@over("ratio 8", "capturable", "memory host", "universal")
@pytest.mark.parametrize("scaled", [True, False])
def test_fused_does_not_step_if_foundinf(config, scaled):
    """With a GradScaler, an infinite gradient leaves weights, moments and counters unchanged."""
    task = Regression(config)
    opt = config.build(task.params)
    task.step(opt)
    before = copy.deepcopy((task.params, opt.state_dict()))
    scaler = torch.amp.GradScaler(DEVICE, enabled=scaled)
    opt.zero_grad()
    scaler.scale(task.loss()).backward()
    if scaled:
        task.params[0].grad[0, 0] = torch.inf
    scaler.step(opt)
    scaler.update()
    assert same((task.params, opt.state_dict()), before) == scaled
    task.step(opt)
    assert opt.state[task.params[0]]["step"] == (2 if scaled else 3)
