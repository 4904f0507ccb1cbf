"""Programs that step each parameter in their own hooks get bitwise the result of a step after backward."""

import copy

import pytest
import torch
from helpers import OPTIONS, bits, same
from training import TIERS, backward, made, same_bits, stepped

from collins import Collins

STEPS = 7
tiers = pytest.mark.parametrize("memory", TIERS.values(), ids=TIERS)


def hosted(model, opt, first=0):
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


def pair(memory, schedule=False, **options):
    sides = []
    for _ in range(2):
        model = made()
        opt = Collins(model.named_parameters(), **{**OPTIONS, "memory": memory, **options})
        rate = torch.optim.lr_scheduler.LinearLR(opt, total_iters=STEPS) if schedule else None
        sides.append((model, opt, rate))
    return sides


@tiers
@pytest.mark.parametrize("calls_step", [True, False], ids=["step follows", "no step follows"])
def test_steps_in_hooks_of_a_program_equal_steps_after_backward(memory, calls_step):
    """The model uses some parameters in every second pass only, and the learning rate changes."""
    (model, opt, rate), (other, theirs, their_rate) = pair(memory, schedule=True)
    stepped(model, opt, range(STEPS), rate)
    hosted(other, theirs)
    for step in range(STEPS):
        backward(other, step)
        assert all(p.grad is None for p in other.parameters())
        if calls_step:
            theirs.step()
        else:
            theirs._opt_called = True  # schedules check this, which such a program does not set
        their_rate.step()
    assert same_bits((model, opt), (other, theirs))


def test_some_parameters_may_be_stepped_by_step():
    (model, opt, _), (other, theirs, _) = pair(None)
    stepped(model, opt, range(STEPS))
    for handle in hosted(other, theirs)[::2]:
        handle.remove()
    stepped(other, theirs, range(STEPS))
    assert same_bits((model, opt), (other, theirs))


def test_a_loaded_state_is_used_by_the_next_step():
    (model, opt, _), (other, theirs, _) = pair(None)
    stepped(model, opt, range(3))
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    hosted(other, theirs)
    backward(other, 50)  # no call marks the end of this step
    theirs.load_state_dict(saved)
    other.load_state_dict(weights)
    for step in range(3, STEPS):
        backward(other, step)
    stepped(model, opt, range(3, STEPS))
    assert same_bits((model, opt), (other, theirs))


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
    assert [int(opt.state[each]["step"]) for each in (p, q)] == [1, 1]
    moved = [float((1 - each.detach()).mean()) for each in (p, q)]
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)


def test_statistics_of_a_step_in_hooks_include_all_parameters():
    (model, opt, _), (other, theirs, _) = pair(None, nonfinite="skip")
    hosted(other, theirs)
    for step in range(3):
        for each in (opt, theirs):
            each.statistics(updates=True)
        stepped(model, opt, [step])
        backward(other, step)
        if step == 1:
            theirs.step()
    backward(other, 3)  # this ends the previous step
    known, found = opt.statistics(), theirs.statistics()
    assert known.keys() == found.keys() >= {"update_rms/0", "weight_rms/0", "skipped_steps"}
    for name in ("update_rms/0", "weight_rms/0", "skipped_buckets", "skipped_steps"):
        torch.testing.assert_close(found[name], known[name])


@pytest.mark.parametrize("change", ["option", "gradient", "stranger", "in_backward", "max_grad_norm"])
def test_an_unsupported_step_is_rejected_and_nothing_changes(change):
    p, stranger = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    opt = Collins([p], in_backward=change == "in_backward")
    p.grad = stranger.grad = torch.ones(64, 64)
    if change != "in_backward":
        opt.step_parameter(p)
    opt.max_grad_norm = 1.0 if change == "max_grad_norm" else None
    before, state = p.detach().clone(), copy.deepcopy(opt.state_dict())
    error, text, of = ValueError, "p must be a parameter of this optimizer", stranger
    if change == "option":
        opt.param_groups[0]["decode"] = "raw"
        error, text, of = ValueError, "decode must be", p
    elif change == "gradient":
        p.grad = p.grad.to_sparse()
        error, text, of = TypeError, "sparse", p
    elif change == "in_backward":
        assert not opt.supports_fused_back_pass
        error, text, of = RuntimeError, "in_backward=True", p
    elif change == "max_grad_norm":
        assert not opt.supports_fused_back_pass
        error, text, of = RuntimeError, "max_grad_norm must be None for step_parameter, got 1", p
    with pytest.raises(error, match=text):
        opt.step_parameter(of)
    opt.param_groups[0]["decode"] = state["param_groups"][0]["decode"]
    assert torch.equal(bits(p), bits(before))
    assert same(opt.state_dict(), state)
