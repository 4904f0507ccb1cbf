"""PyTorch's TestOptimRenewed with Collins: state dicts, copies and hooks."""

import copy
import io

import pytest
import torch
from configurations import Regression, everywhere, uncompiled
from helpers import DEVICE, same
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import optim_db

from collins import Collins

ADAMW = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)


def without_names(state_dict):
    result = copy.deepcopy(state_dict)
    for group in result["param_groups"]:
        group.pop("param_names", None)
    return result


def model_with_norm(config):
    """A model with parameters of two kinds, and an input."""
    model = nn.Sequential(nn.Conv2d(4, 20, 4, stride=4), nn.BatchNorm2d(20)).to(DEVICE, config.dtype)
    return model, torch.rand(2, 4, 8, 8, dtype=config.dtype, device=DEVICE)


def maybe_named(params, named):
    return [(f"name{number}", p) for number, p in enumerate(params)] if named else params


named_or_not = pytest.mark.parametrize("named", [(a, b) for a in (False, True) for b in (False, True)], ids=str)


@named_or_not
@uncompiled
def test_state_dict_deterministic(config, named):
    task = Regression(config)
    opt = config.build(maybe_named(task.params, named[0] or config.named))
    for _ in range(3):
        task.step(opt)
    task_copy = task.copy()
    other = config.build(maybe_named(task_copy.params, named[1] or config.named))
    state_dict = copy.deepcopy(opt.state_dict())
    original = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    assert same(state_dict, original)
    for _ in range(3):
        task.step(opt)
        task_copy.step(other)
        assert same(task.params, task_copy.params)
    assert same(without_names(opt.state_dict()), without_names(other.state_dict()))
    other.param_groups.extend(other.param_groups)
    last_groups = (without_names(o.state_dict())["param_groups"][-1] for o in (opt, other))
    assert same(*last_groups)


@uncompiled
def test_can_load_older_state_dict(config):
    """A state dict without some options: these keep the values of the constructor."""
    model, x = model_with_norm(config)
    opt = config.build(model.parameters())

    def step():
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()

    for _ in range(3):
        step()
    old = copy.deepcopy(opt.state_dict())
    newer = {*ADAMW.not_og_supported_flags, "v_compress_ratio", "nonfinite", "residual_weight", "stochastic_rounding"}
    for group in old["param_groups"]:
        for flag in newer & group.keys():
            del group[flag]
    opt.load_state_dict(old)
    assert {name: opt.param_groups[0][name] for name in opt.defaults if name != "lr"} == {
        name: value for name, value in opt.defaults.items() if name != "lr"
    }
    step()
    assert all(state["step"] == 4 for state in opt.state.values())


@named_or_not
@uncompiled
def test_can_load_from_to_named_state_dict(config, named):
    model, x = model_with_norm(config)

    def build(is_named):
        model_copy = copy.deepcopy(model)
        params = model_copy.named_parameters() if is_named else model_copy.parameters()
        return model_copy, Collins(params, lr=config.lr(), **config.options)

    first, opt = build(named[0])
    for _ in range(2):
        opt.zero_grad()
        first(x).square().sum().backward()
        opt.step()
    second, other = build(named[1])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    second(x).square().sum().backward()
    other.step()
    if any(named):
        assert other.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(state["step"] == 3 for state in other.state.values())


@everywhere
def test_save_load_equality_with_weights_only(config):
    task = Regression(config)
    opt = config.build(task.params)
    for _ in range(3):
        task.step(opt)
    saved = opt.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    for weights_only in (False, True):
        file.seek(0)
        assert same(torch.load(file, weights_only=weights_only), saved)


@everywhere
def test_load_nontensor_step(config):
    task = Regression(config)
    opt = config.build(task.params)
    for _ in range(3):
        task.step(opt)
    state_dict = copy.deepcopy(opt.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    opt.load_state_dict(state_dict)
    task.step(opt)
    assert all(state["step"] == 4 and isinstance(state["step"], torch.Tensor) for state in opt.state.values())


@pytest.mark.cuda
@everywhere
def test_cpu_load_state_dict(config):
    """State that was saved on the CPU is loaded to the GPU, with counters on the device of the option."""
    task = Regression(config)
    opt = config.build(task.params)
    task.step(opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    task_copy = task.copy()
    other = config.build(task_copy.params)
    other.load_state_dict(torch.load(file, map_location="cpu"))
    task.step(opt)
    task_copy.step(other)
    if config.options.get("hash") == "universal":  # adds atomically on a GPU, in any order
        torch.testing.assert_close(task_copy.params, task.params)
    else:
        assert same(task.params, task_copy.params)
    device = "cuda" if config.options.get("capturable") else "cpu"
    assert all(state["step"].device.type == device for state in other.state.values())


@pytest.mark.cuda
@everywhere
def test_state_dict_with_cuda_params(config):
    lr = 1e-3
    params = [nn.Parameter(torch.randn(80, 40, dtype=config.dtype)) for _ in range(2)]
    cuda_params = [nn.Parameter(p.detach().cuda()) for p in params]
    opt, other = config.build(params, lr=lr), config.build(cuda_params, lr=lr)
    grads = [torch.randn_like(p) for p in params]

    def step(ps, o):
        for p, g in zip(ps, grads, strict=True):
            p.grad = g.to(p.device)
        o.step()

    for _ in range(3):
        step(params, opt)
    with torch.no_grad():
        for p, q in zip(params, cuda_params, strict=True):
            q.copy_(p)
    state_dict = copy.deepcopy(opt.state_dict())
    original = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    assert same(state_dict, original)
    device = "cuda" if config.options.get("capturable") else "cpu"
    assert all(state["step"].device.type == device for state in other.state_dict()["state"].values())
    if config.dtype == torch.bfloat16 or config.options.get("table_dtype") == torch.bfloat16:
        return  # rounding in 16 bits turns a difference of the last bit into one of 1 in 256
    for _ in range(3):
        step(params, opt)
        step(cuda_params, other)
        torch.testing.assert_close(params, cuda_params, check_device=False, rtol=1e-4, atol=1e-5)


@everywhere
def test_deepcopy_copies_all_public_attrs(config):
    task = Regression(config)
    opt = config.build(task.params)
    for _ in range(3):
        task.step(opt)

    def public(o):
        return {name for name in vars(o) if not name.startswith("_")}

    assert public(opt) == public(copy.deepcopy(opt))


# Hooks.


def add_entry(opt):
    opt.state["test"] = 1


def move_entry(opt, state_dict):
    state_dict["had_entry"] = state_dict["state"].pop("test", None) is not None
    return state_dict


@everywhere
def test_state_dict_pre_hook(config):
    opt = config.build(Regression(config).params)
    opt.register_state_dict_pre_hook(add_entry)
    assert opt.state_dict()["state"]["test"] == 1


@everywhere
def test_state_dict_post_hook(config):
    opt = config.build(Regression(config).params)
    opt.register_state_dict_post_hook(move_entry)
    assert opt.state_dict()["had_entry"] is False


@uncompiled
def test_state_dict_pre_post_hook(config):
    task = Regression(config)
    opt = config.build(task.params)
    opt.register_state_dict_pre_hook(add_entry)
    opt.register_state_dict_post_hook(move_entry)
    saved = opt.state_dict()
    assert saved["had_entry"]
    assert "test" not in saved["state"]
    task.step(opt)  # steps ignore keys of state that are not parameters
    assert opt.state["test"] == 1


def lower_rate(_, state_dict):
    state_dict["param_groups"][0]["lr"] = 0.002


def lower_rate_in_a_copy(_, state_dict):
    result = copy.deepcopy(state_dict)
    result["param_groups"][0]["lr"] = 0.003
    return result


def record_rate(opt):
    opt.state["rate"] = float(opt.param_groups[0]["lr"])


@everywhere
def test_load_state_dict_pre_hook_and_prepend(config):
    opt = config.build(Regression(config).params)
    saved = opt.state_dict()
    opt.register_load_state_dict_pre_hook(lower_rate)
    opt.load_state_dict(saved)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.002)
    opt.register_load_state_dict_pre_hook(lower_rate_in_a_copy, prepend=True)
    opt.load_state_dict(saved)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.002)


@pytest.mark.parametrize("lowers_rate", [False, True], ids=["post", "pre and post"])
@everywhere
def test_load_state_dict_pre_post_hook(config, lowers_rate):
    opt = config.build(Regression(config).params)
    if lowers_rate:
        opt.register_load_state_dict_pre_hook(lower_rate_in_a_copy)
    opt.register_load_state_dict_post_hook(record_rate)
    opt.load_state_dict(opt.state_dict())
    assert opt.state["rate"] == pytest.approx(0.003 if lowers_rate else float(config.lr()))


@pytest.mark.parametrize("moment", ["pre", "post"])
@everywhere
def test_step_hook(config, moment):
    """test_step_pre_hook and test_step_post_hook."""
    opt = config.build([torch.ones(2, dtype=config.dtype, device=DEVICE)])
    calls = []
    handle = getattr(opt, f"register_step_{moment}_hook")(lambda *args: calls.append(args))
    for _ in range(2):
        opt.step()
    handle.remove()
    opt.step()
    assert [(args[0], dict(args[2])) for args in calls] == [(opt, {})] * 2


@everywhere
def test_step_all_hooks(config):
    p = torch.ones(2, dtype=config.dtype, device=DEVICE)
    opt, other, calls = config.build([p]), torch.optim.SGD([p]), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
        *(o.register_step_pre_hook(lambda *_: calls.append("pre")) for o in (opt, other)),
        *(o.register_step_post_hook(lambda *_: calls.append("post")) for o in (opt, other)),
    ]
    order = ["global pre", "pre", "post", "global post"]
    try:
        for rounds, o in enumerate((opt, other, opt), 1):
            o.step()
            assert calls == order * rounds
    finally:
        for handle in handles:
            handle.remove()
    opt.step()
    other.step()
    assert calls == order * 3
