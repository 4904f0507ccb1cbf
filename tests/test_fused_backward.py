"""Programs that step each parameter in their own hooks get bitwise the result of a step after backward."""

import copy

import pytest
import torch
from helpers import OPTIONS, bits, same
from training import TIERS, backward, make_model, same_bits, take_steps

from collins import Collins

STEPS = 7
tiers = pytest.mark.parametrize("memory", TIERS.values(), ids=TIERS)


def register_hooks(model, opt, first=0):
    """Hooks as OneTrainer registers them (modules/trainer/GenericTrainer.py, commit 23df383, 2026-08-19)."""
    assert opt.supports_fused_back_pass
    handles = []
    for group in opt.param_groups:
        for i, parameter in enumerate(group["params"]):

            def hook(p, group=group, i=i):
                opt.step_parameter(p, group, i)
                p.grad = None

            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    return handles


def make_pair(memory, schedule=False, **options):
    pairs = []
    for _ in range(2):
        model = make_model()
        opt = Collins(model.named_parameters(), **{**OPTIONS, "memory": memory, **options})
        rate = torch.optim.lr_scheduler.LinearLR(opt, total_iters=STEPS) if schedule else None
        pairs.append((model, opt, rate))
    return pairs


@tiers
@pytest.mark.parametrize("calls_step", [True, False], ids=["step follows", "no step follows"])
def test_steps_in_hooks_of_a_program_equal_steps_after_backward(memory, calls_step):
    """The model uses some parameters in every second pass only, and the learning rate changes."""
    (model, opt, rate), (other, other_opt, other_rate) = make_pair(memory, schedule=True)
    take_steps(model, opt, range(STEPS), rate)
    register_hooks(other, other_opt)
    for step in range(STEPS):
        backward(other, step)
        assert all(p.grad is None for p in other.parameters())
        if calls_step:
            other_opt.step()
        else:
            other_opt._opt_called = True  # schedules check this, which such a program does not set
        other_rate.step()
    assert same_bits((model, opt), (other, other_opt))


def test_some_parameters_may_be_stepped_by_step():
    (model, opt, _), (other, other_opt, _) = make_pair(None)
    take_steps(model, opt, range(STEPS))
    for handle in register_hooks(other, other_opt)[::2]:
        handle.remove()
    take_steps(other, other_opt, range(STEPS))
    assert same_bits((model, opt), (other, other_opt))


def test_a_loaded_state_is_used_by_the_next_step():
    (model, opt, _), (other, other_opt, _) = make_pair(None)
    take_steps(model, opt, range(3))
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    register_hooks(other, other_opt)
    backward(other, 50)  # no call marks the end of this step
    other_opt.load_state_dict(saved)
    other.load_state_dict(weights)
    for step in range(3, STEPS):
        backward(other, step)
    take_steps(model, opt, range(3, STEPS))
    assert same_bits((model, opt), (other, other_opt))


def test_a_parameter_without_a_gradient_is_unchanged_and_an_added_one_is_stepped():
    p, q = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    opt = Collins([p], compress_ratio=1)
    opt.step_parameter(p)
    assert not opt.state
    assert torch.equal(p, torch.ones(64, 64))
    p.grad = q.grad = torch.ones(64, 64)
    opt.step_parameter(p, opt.param_groups[0], 0)
    opt.add_param_group({"params": [q], "lr": 1e-2})
    opt.step_parameter(q)
    assert [int(opt.state[o]["step"]) for o in (p, q)] == [1, 1]
    changes = [float((1 - o.detach()).mean()) for o in (p, q)]
    assert changes[1] == pytest.approx(10 * changes[0], rel=1e-3)


def test_statistics_of_a_step_in_hooks_include_all_parameters():
    (model, opt, _), (other, other_opt, _) = make_pair(None, nonfinite="skip")
    register_hooks(other, other_opt)
    for step in range(3):
        for o in (opt, other_opt):
            o.statistics(updates=True)
        take_steps(model, opt, [step])
        backward(other, step)
        if step == 1:
            other_opt.step()
    backward(other, 3)  # this ends the previous step
    expected, actual = opt.statistics(), other_opt.statistics()
    assert expected.keys() == actual.keys() >= {"update_rms/0", "weight_rms/0", "skipped_steps"}
    for name in ("update_rms/0", "weight_rms/0", "skipped_buckets", "skipped_steps"):
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("change", ["option", "gradient", "foreign parameter", "in_backward", "max_grad_norm"])
def test_an_unsupported_step_is_rejected_and_nothing_changes(change):
    p, foreign = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    opt = Collins([p], in_backward=change == "in_backward")
    p.grad = foreign.grad = torch.ones(64, 64)
    if change != "in_backward":
        opt.step_parameter(p)
    opt.max_grad_norm = 1.0 if change == "max_grad_norm" else None
    before, state = p.detach().clone(), copy.deepcopy(opt.state_dict())
    error, text, parameter = ValueError, "p must be a parameter of this optimizer", foreign
    if change == "option":
        opt.param_groups[0]["decode"] = "raw"
        error, text, parameter = ValueError, "decode must be", p
    elif change == "gradient":
        p.grad = p.grad.to_sparse()
        error, text, parameter = TypeError, "sparse", p
    elif change == "in_backward":
        assert not opt.supports_fused_back_pass
        error, text, parameter = RuntimeError, "in_backward=True", p
    elif change == "max_grad_norm":
        assert not opt.supports_fused_back_pass
        error, text, parameter = RuntimeError, "max_grad_norm must be None for step_parameter, got 1", p
    with pytest.raises(error, match=text):
        opt.step_parameter(parameter)
    opt.param_groups[0]["decode"] = state["param_groups"][0]["decode"]
    assert torch.equal(bits(p), bits(before))
    assert same(opt.state_dict(), state)
