"""Steps that repeat the previous program bitwise equal steps that check everything, whatever changes between steps."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import DEVICE, bits, give_gradients, parameters, with_kernel

pytest.importorskip("triton")

from collins import Collins, entries
from collins.compile import program
from collins.compile.program import StepProgram
from collins.entries import ParamEntry
from collins.stepper import Stepper


def make_optimizer(compile=None):
    ps = parameters(torch.float32, [(64, 64), (40,), (33, 37), (96, 64)])
    groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": 2e-2, "weight_decay": 0.1}]
    opt = Collins(groups, min_K=16, rehash_period=3, table_dtype=torch.float32, compile=compile)
    return ps, opt if compile is False else with_kernel(opt)


def set_gradients_of_some(step, ps):
    """Gradients to another set of parameters in each step."""
    give_gradients(step, ps)
    ps[2 + step % 2].grad = None


def nothing(ps, opt):
    return opt


def another_rate(ps, opt):
    opt.param_groups[0].update(lr=5e-2, betas=(0.8, 0.99))
    return opt


def another_decode(ps, opt):
    opt.param_groups[1]["decode"] = "sketch"
    return opt


def no_gradient(ps, opt):
    ps[1].grad = None
    return opt


def other_memory(ps, opt):
    ps[0].data = ps[0].data.clone()
    return opt


def other_strides(ps, opt):
    ps[0].grad = ps[0].grad.t().contiguous().t()
    return opt


def other_moments(ps, opt):
    state = opt.state[ps[0]]
    state["m_table"] = 2 * state["m_table"]
    return opt


def no_state(ps, opt):
    opt.state.clear()
    return opt


def one_more_group(ps, opt):
    ps.append(torch.nn.Parameter(torch.ones(64, 64, device=DEVICE)))
    ps[-1].grad = torch.ones_like(ps[-1])
    opt.add_param_group({"params": ps[-1:]})
    return opt


def another_parameter(ps, opt):
    ps[0] = torch.nn.Parameter(ps[0].detach().clone())
    ps[0].grad = torch.ones_like(ps[0])
    opt.param_groups[0]["params"][0] = ps[0]
    return opt


def loaded(ps, opt):
    state = copy.deepcopy(opt.state_dict())
    for state_of_p in state["state"].values():
        state_of_p["step"] += 5
    opt.load_state_dict(state)
    return opt


def capturable(ps, opt):
    if DEVICE == "cuda":
        opt.param_groups[0]["capturable"] = True
    return opt


def frozen(ps, opt):
    ps[1].requires_grad_(False)
    return opt


def transposed(ps, opt):
    ps[0].data = ps[0].data.t()
    return opt


def moved_moments(ps, opt):
    state = opt.state[ps[2]]
    state["v_table"].data = state["v_table"].data.clone()
    return opt


CHANGES = [
    nothing, another_rate, another_decode, no_gradient, other_memory, other_strides, other_moments, no_state,
    one_more_group, another_parameter, loaded, capturable, frozen, transposed, moved_moments,
]  # fmt: skip


def assert_equal_runs(first, second):
    """Of two pairs of parameters and their optimizer, weights are equal, and all values of states bit for bit."""
    (ps, opt), (other_ps, other) = first, second
    for p, q in zip(ps, other_ps, strict=True):
        assert torch.equal(p.detach(), q.detach())
        assert opt.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(bits(opt.state[p][name]), bits(other.state[q][name])) for name in opt.state[p])


def run_with_change(change, set_gradients, **options):
    """Parameters and optimizer after eight steps, with a change before the fifth."""
    ps, opt = make_optimizer(**options)
    for step in range(8):
        set_gradients(step, ps)
        if step == 4:
            opt = change(ps, opt)
        opt.step()
    return ps, opt


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_repeated_step_equals_an_ordinary_step(change, monkeypatch):
    results, repeats = [], []
    for repeats_are_allowed in (True, False):
        with monkeypatch.context() as patch:
            if repeats_are_allowed:
                original = Stepper.matching

                def counting(self, groups, states, original=original):
                    bound = original(self, groups, states)
                    repeats.append(bound is not None)
                    return bound

                patch.setattr(Stepper, "matching", counting)
            else:
                patch.setattr(Stepper, "matching", lambda self, groups, states: None)
            results.append(run_with_change(change, give_gradients))
    assert repeats[:4] == [False, False, True, True]  # the program of the second step has guards
    assert repeats[-1] is not (change is capturable and DEVICE == "cuda")  # its counters are on the device
    assert_equal_runs(*results)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_step_of_another_set_of_parameters_equals_one_that_checks_all(change, monkeypatch):
    results, accepted, original = [], [], ParamEntry.accepts

    def counting(*args):
        accepted.append(original(*args))
        return accepted[-1]

    for accepts in (counting, lambda *_: False):
        with monkeypatch.context() as patch:
            patch.setattr(ParamEntry, "accepts", accepts)
            results.append(run_with_change(change, set_gradients_of_some, compile=False))
    assert all(accepted[-3:])
    assert_equal_runs(*results)


@pytest.mark.parametrize("set_gradients", [give_gradients, set_gradients_of_some])
def test_other_values_in_a_state_are_left_alone_and_not_kept(set_gradients):
    ps, opt = make_optimizer(compile=False)
    for step in range(4):
        set_gradients(step, ps)
        opt.step()
        opt.state[ps[0]]["average"] = value = torch.full((3,), float(step))
    for step in range(4, 8):
        set_gradients(step, ps)
        opt.step()
    assert opt.state[ps[0]]["average"] is value
    reference = weakref.ref(value)
    del value, opt.state[ps[0]]["average"]
    for step in range(8, 11):
        set_gradients(step, ps)
        opt.step()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("set_gradients", [give_gradients, set_gradients_of_some])
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", True), ("lr", torch.tensor(-1.0)), ("maximize", 1), ("min_K", True), ("eps", float("nan"))],
)
def test_an_option_is_checked_in_every_step(name, value, set_gradients):
    """Also one that equals the value before, but is of a type that is not accepted."""
    ps, opt = make_optimizer(compile=False)
    for group in opt.param_groups:
        group.update(maximize=True, min_K=1)
    for step in range(5):
        set_gradients(step, ps)
        if step == 4:
            opt.param_groups[1][name] = value
            with pytest.raises(ValueError, match=f"{name} must be"):
                opt.step()
        else:
            opt.step()
    opt.param_groups[1].update({name: {"lr": "3e-3", "maximize": "true", "min_K": "1", "eps": "1e-8"}[name]})
    opt.step()
    assert not isinstance(opt.param_groups[1][name], str)


@pytest.mark.parametrize("set_gradients", [give_gradients, set_gradients_of_some])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ps, opt: setattr(ps[0], "grad", ps[0].grad.to_sparse()), "sparse"),
        (lambda ps, opt: opt.param_groups[1].update(betas=(0.9, 1.5)), "betas must be"),
        (lambda ps, opt: opt.state[ps[0]].update(m_table=torch.zeros(3, device=DEVICE)), "m_table"),
        (lambda ps, opt: setattr(ps[0], "data", ps[0].data[:32]), "parameter 0 has the shape"),
        (lambda ps, opt: setattr(ps[0], "data", ps[0].data.bfloat16()), "grad"),
    ],
    ids=["gradient", "option", "state", "size", "dtype"],
)
def test_invalid_changes_raise_and_change_nothing(change, message, set_gradients):
    ps, opt = make_optimizer() if set_gradients is give_gradients else make_optimizer(compile=False)
    for step in range(3):
        set_gradients(step, ps)
        opt.step()
    set_gradients(3, ps)
    change(ps, opt)
    before = [p.detach().clone() for p in ps]
    with pytest.raises((ValueError, TypeError), match=message):
        opt.step()
    assert all(torch.equal(p.detach(), q) for p, q in zip(ps, before, strict=True))
    assert opt.state[ps[1]]["step"] == 3


def test_no_repetition_is_prepared_while_the_set_of_gradients_changes(monkeypatch):
    monkeypatch.setattr(StepProgram, "guard", None)
    ps, opt = make_optimizer()
    for step in range(4):
        give_gradients(step, ps)
        ps[step].grad = None
        opt.step()
    assert [opt.state[p]["step"] for p in ps] == [3, 3, 3, 3]


def test_without_the_guards_of_torch_each_step_checks_everything(monkeypatch):
    for module in (program, entries):
        monkeypatch.setattr(module, "GUARDS_AVAILABLE", False)
        monkeypatch.setattr(module, "tensor_guards", None)
    ps, opt = make_optimizer()
    for step in range(3):
        give_gradients(step, ps)
        opt.step()
    assert opt.state[ps[1]]["step"] == 3


def test_no_gradient_is_kept_after_its_step():
    ps, opt = make_optimizer()
    for step in range(3):
        give_gradients(step, ps)
        opt.step()
    references = [weakref.ref(p.grad) for p in ps]
    opt.zero_grad()
    gc.collect()
    assert not any(ref() is not None for ref in references)
