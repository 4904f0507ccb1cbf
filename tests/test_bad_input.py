"""Errors for invalid input name the argument, its value and what is accepted, and leave everything unchanged."""

import contextlib
import math
import re
from collections import UserList

import numpy as np
import pytest
import torch

from collins import Collins

BAD_OPTIONS = [
    ("lr", -1e-3, "finite and at least 0"),
    ("lr", float("nan"), "finite and at least 0"),
    ("lr", float("inf"), "finite and at least 0"),
    ("lr", "fast", "finite and at least 0"),
    ("lr", torch.tensor(-1.0), "finite and at least 0"),
    ("lr", torch.tensor([1.0, 2.0]), "a number or a tensor of one element"),
    ("betas", (-0.1, 0.9), "two numbers in [0, 1)"),
    ("betas", (0.9, 1.0), "two numbers in [0, 1)"),
    ("betas", (0.9, float("nan")), "two numbers in [0, 1)"),
    ("betas", (0.9,), "two numbers in [0, 1)"),
    ("betas", 0.9, "two numbers in [0, 1)"),
    ("betas", "00", "two numbers in [0, 1)"),
    ("betas", {0.9: 0, 0.95: 1}, "two numbers in [0, 1)"),
    ("betas", (0.9, "high"), "two numbers in [0, 1)"),
    ("betas", np.zeros(()), "two numbers in [0, 1)"),
    ("betas", np.zeros((2, 1)), "two numbers in [0, 1)"),
    ("betas", np.array([0.9, 1.0]), "two numbers in [0, 1)"),
    ("eps", -1e-8, "finite and at least 0"),
    ("eps", float("inf"), "finite and at least 0"),
    ("eps", 2**70, "below 2**63"),
    ("weight_decay", 2**70, "below 2**63"),
    ("residual_weight", 2**70, "below 2**63"),
    ("lr", 10**400, "finite and at least 0"),
    ("lr", torch.zeros((), device="meta"), "a number or a tensor of one element"),
    ("weight_decay", -0.1, "finite and at least 0"),
    ("weight_decay", float("nan"), "finite and at least 0"),
    ("compress_ratio", 0.5, "at least 1"),
    ("compress_ratio", 0, "at least 1"),
    ("compress_ratio", float("inf"), "at least 1"),
    ("min_K", 0, "an int of at least 1"),
    ("min_K", 10.0, "an int of at least 1"),
    ("min_K", np.float64(10), "an int of at least 1"),
    ("role", "token", "auto, matrix, tokens or exact"),
    ("role", None, "auto, matrix, tokens or exact"),
    ("hash", "sha256", "block or universal"),
    ("hash", ["block"], "block or universal"),
    ("decode", "raw", "least_squares, residual, sketch or orthogonal"),
    ("residual_weight", -1.0, "None, or finite and at least 0"),
    ("residual_weight", float("nan"), "None, or finite and at least 0"),
    ("rehash_period", 0, "None or an int of at least 1"),
    ("rehash_period", 2.5, "None or an int of at least 1"),
    ("rehash_period", 2**31, "None or an int below 2**31"),
    ("table_dtype", torch.float16, "torch.float64, torch.float32 or torch.bfloat16"),
    ("table_dtype", "float8", "torch.float64, torch.float32 or torch.bfloat16"),
    ("maximize", 1, "True or False"),
    ("stochastic_rounding", "yes", "True, False or None"),
    ("nonfinite", "ignore", "propagate, skip or error"),
]
ids = [f"{name}={value}"[:40] for name, value, _ in BAD_OPTIONS]


def param(*shape):
    return torch.nn.Parameter(torch.randn(*shape))


def message(name, value, accepted):
    return re.escape(f"{name} must be {accepted}, got {value!r}")


@pytest.mark.parametrize(("name", "value", "accepted"), BAD_OPTIONS, ids=ids)
def test_an_option_out_of_range(name, value, accepted):
    with pytest.raises(ValueError, match=message(name, value, accepted)):
        Collins([param(10)], **{name: value})
    with pytest.raises(ValueError, match=message(name, value, accepted)):
        Collins([{"params": [param(10)], name: value}])
    opt = Collins([param(10)])
    with pytest.raises(ValueError, match=message(name, value, accepted)):
        opt.add_param_group({"params": [param(3)], name: value})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(("name", "value", "accepted"), BAD_OPTIONS, ids=ids)
def test_an_option_changed_to_an_invalid_value_raises_before_the_step(name, value, accepted):
    p, q = param(10), param(10)
    opt = Collins([{"params": [p]}, {"params": [q]}])
    p.grad, q.grad = torch.ones(10), torch.ones(10)
    opt.param_groups[1][name] = value
    before = p.detach().clone()
    with pytest.raises(ValueError, match=message(name, value, accepted)):
        opt.step()
    assert torch.equal(p.detach(), before)
    assert not opt.state


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [("seed", 0.5, "an int"), ("seed", True, "an int"), ("compile", "yes", "True, False or None")],
)
def test_options_of_the_whole_optimizer(name, value, accepted):
    with pytest.raises(ValueError, match=message(name, value, accepted)):
        Collins([param(10)], **{name: value})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), 0, 1])
def test_any_real_number_is_a_number(value):
    Collins([param(10)], lr=value, eps=value, weight_decay=value)


class Pair(UserList):
    """A sequence of two that is neither list nor tuple, as OmegaConf's ListConfig is."""


BETAS = [[0.5, 0.75], Pair([0.5, 0.75]), np.array([0.5, 0.75]), (np.float32(0.5), np.float64(0.75))]


@pytest.mark.parametrize("betas", BETAS, ids=lambda betas: type(betas).__name__)
@pytest.mark.parametrize("where", ["argument", "group", "later"])
def test_betas_are_any_sequence_of_two_and_kept_as_a_tuple_of_floats(betas, where):
    def step_with(betas):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64))
        p.grad = p.detach().sin()
        opt = Collins([{"params": [p], **({"betas": betas} if where == "group" else {})}], min_K=16,
                      **({"betas": betas} if where == "argument" else {}))  # fmt: skip
        if where == "later":
            opt.param_groups[0]["betas"] = betas
        opt.step()
        return p.detach(), opt

    (p, opt), (q, _) = step_with(betas), step_with((0.5, 0.75))
    assert torch.equal(p, q)
    betas_of_group = opt.param_groups[0]["betas"]
    assert betas_of_group == (0.5, 0.75)
    assert [type(betas_of_group), *map(type, betas_of_group)] == [tuple, float, float]


def test_numbers_of_numpy_are_kept_as_pythons(tmp_path):
    ints = {"seed": 3, "min_K": 16, "rehash_period": 5}
    floats = {"lr": 0.5, "eps": 0.25, "weight_decay": 0.0, "compress_ratio": 4.0, "residual_weight": 0.5}
    opt = Collins(
        [param(64, 64)],
        **{name: np.int64(value) for name, value in ints.items()},
        **{name: np.float32(value) for name, value in floats.items()},
    )
    options = {"seed": opt.seed, **opt.param_groups[0]}
    assert {name: (type(options[name]), options[name]) for name in ints} == {name: (int, ints[name]) for name in ints}
    assert {name: (type(options[name]), options[name]) for name in floats} == {
        name: (float, floats[name]) for name in floats
    }
    torch.save(opt.state_dict(), tmp_path / "state")
    torch.load(tmp_path / "state", weights_only=True)


@pytest.mark.parametrize("name", ["seed", "eps", "rehash_period", "lr", "weight_decay", "compress_ratio"])
def test_a_number_too_large_to_print_is_rejected(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got an int of more than 4096 bits"):
        Collins([param(10)], **{name: 10**5000})


@pytest.mark.parametrize(
    "option", [{"compile": True}, {"in_backward": True}, {"seed": 5}, {"memory": "host"}, {"memory": None}], ids=str
)
def test_an_option_of_the_whole_optimizer_is_rejected_in_a_group(option):
    (name,) = option
    text = f"{name} is an option of the whole optimizer, got {name}=.* in a parameter group: pass it to Collins"
    with pytest.raises(ValueError, match=text):
        Collins([{"params": [param(10)], **option}])
    opt = Collins([param(10)])
    with pytest.raises(ValueError, match=text):
        opt.add_param_group({"params": [param(3)], **option})
    assert len(opt.param_groups) == 1


def test_a_group_may_have_keys_that_are_not_options():
    opt = Collins([{"params": [param(10)], "initial_lr": 0.5, "tag": "head"}])
    assert opt.param_groups[0]["tag"] == "head"
    opt.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float64_tables_require_float64_parameters(dtype):
    p, q = (torch.nn.Parameter(torch.randn(64, 64, dtype=d)) for d in (dtype, torch.float64))
    text = f"table_dtype must be torch.float32 or torch.bfloat16 for parameter 1 of {dtype}, got torch.float64"
    with pytest.raises(ValueError, match=text):
        Collins([q, p], table_dtype=torch.float64)
    Collins([{"params": [q], "table_dtype": torch.float64}, {"params": [p]}])
    opt = Collins([q, p])
    opt.param_groups[0]["table_dtype"] = torch.float64
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    with pytest.raises(ValueError, match=text):
        opt.step()
    assert not opt.state


BAD_PARAMETERS = [
    (
        torch.randn(3, dtype=torch.complex64, requires_grad=True),
        TypeError,
        "parameter 1 has dtype torch.complex64; Collins accepts torch",
    ),
    (
        torch.randn(3).to(torch.float8_e4m3fn).requires_grad_(),
        TypeError,
        "parameter 1 has dtype torch.float8_e4m3fn; Collins accepts torch",
    ),
    (torch.eye(3).to_sparse(), TypeError, "parameter 1 has layout torch.sparse_coo; Collins accepts torch.strided"),
    ("weights", TypeError, "optimizer can only optimize Tensors"),
]


@pytest.mark.parametrize(("bad_param", "error", "text"), BAD_PARAMETERS)
def test_a_parameter_that_cannot_be_optimized(bad_param, error, text):
    with pytest.raises(error, match=text):
        Collins([param(3), bad_param])
    with pytest.raises(error, match=text.replace("parameter 1", "parameter 'w'")):
        Collins([("v", param(3)), ("w", bad_param)])
    opt = Collins([param(3)])
    with pytest.raises(error):
        opt.add_param_group({"params": [param(2), bad_param]})
    assert len(opt.param_groups) == 1


def test_a_parameter_given_twice():
    p, q = param(3), param(3)
    with pytest.raises(ValueError, match="parameter 2 of the new group is already in the optimizer as parameter 0"):
        Collins([p, q, p])
    with pytest.raises(ValueError, match="parameter 'b' of the new group is already in the optimizer as parameter 'a'"):
        Collins([("a", p), ("b", p)])
    opt = Collins([p])
    with pytest.raises(ValueError, match="parameter 1 of the new group is already in the optimizer as parameter 0"):
        opt.add_param_group({"params": [q, p]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("params", [[], torch.zeros(3), [{"params": {param(3)}}]])
def test_parameters_that_torch_rejects_are_rejected(params):
    with pytest.raises((TypeError, ValueError)):
        Collins(params)


def test_a_group_without_parameters():
    with pytest.raises(TypeError, match=re.escape("param_group must be a dict with the key 'params', got {}")):
        Collins([param(3)]).add_param_group({})


def mismatched_gradient(p, kind):
    if kind == "sparse":
        return torch.eye(*p.shape).to_sparse(), TypeError, "has layout torch.sparse_coo"
    if kind == "shape":
        return torch.zeros(3), ValueError, r"must have its shape torch.Size\(\[40, 50\]\), got torch.Size\(\[3\]\)"
    if kind == "dtype":
        return torch.zeros(40, 50).double(), ValueError, "must have its dtype torch.float32, got torch.float64"
    return torch.zeros(40, 50, device="meta"), ValueError, "must have its device cpu, got meta"


class AnyGradient(torch.nn.Parameter):
    """A parameter whose gradient can be set to any value; torch rejects most of these."""

    @property
    def grad(self):
        return self.value

    @grad.setter
    def grad(self, value):
        self.value = value


@pytest.mark.parametrize("kind", ["sparse", "shape", "dtype", "device"])
def test_a_gradient_that_does_not_fit_its_parameter(kind):
    p, q = param(64, 64), AnyGradient(torch.randn(40, 50))
    p.grad = torch.ones_like(p)
    q.grad, error, text = mismatched_gradient(q, kind)
    opt = Collins([("p", p), ("q", q)])
    before = p.detach().clone()
    with pytest.raises(error, match=f"the gradient of parameter 'q' {text}"):
        opt.step()
    assert torch.equal(p.detach(), before)
    assert not opt.state


def test_a_layout_that_does_not_match_its_tables():
    p = param(64, 64)
    opt = Collins([p], min_K=16, table_dtype=torch.float32)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0]["compress_ratio"] = 8
    with pytest.raises(
        ValueError,
        match=r"parameter 0 has tables that the current options cannot decode: .*load c 32 where this optimizer has 8",
    ):
        opt.step()
    assert opt.state[p]["step"].item() == 1


@pytest.mark.parametrize("options", [{}, {"hash": "universal"}, {"compress_ratio": 1}], ids=str)
def test_a_resized_parameter_is_reported_with_its_shape(options):
    p = param(64, 64)
    opt = Collins([("table", p)], min_K=16, **options)
    p.grad = torch.ones_like(p)
    opt.step()
    saved = opt.state_dict()
    p.data = torch.randn(72, 64)
    p.grad = torch.ones(72, 64)
    text = r"parameter 'table' has the shape \(72, 64\); {} holds .*64.* that state"
    with pytest.raises(ValueError, match=text.format("the optimizer")):
        opt.step()
    with pytest.raises(ValueError, match=text.format("state_dict")):
        Collins([("table", p)], min_K=16, **options).load_state_dict(saved)
    del opt.state[p]
    opt.step()


MOVES = {
    "size": (lambda p, state: setattr(state["m_table"], "data", torch.zeros(2)), "the optimizer holds .*m_table': .2,"),
    "dtype": (
        lambda p, state: setattr(state["v_table"], "data", state["v_table"].bfloat16()),
        "v_table of parameter 0 must have the dtype torch.float32, .* got torch.bfloat16",
    ),
    "table": (lambda p, state: state.update(m_table=torch.zeros(64, 2, device="meta")), "got one on meta"),
    "parameter": (
        lambda p, state: torch.utils.swap_tensors(p, torch.nn.Parameter(torch.zeros(64, 64, device="meta"))),
        "m_table of parameter 0 must be where .* got one on cpu for a parameter on meta: move both, or call load_state",
    ),
}


POLICY = {"memory": "host"}
MOVED = [(what, {}) for what in MOVES] + [(what, POLICY) for what in ("size", "dtype", "parameter")]


@pytest.mark.parametrize(("what", "options"), MOVED, ids=str)
def test_modified_moments_are_rejected(what, options):
    move, message = MOVES[what]
    p, other = param(64, 64), param(40)
    opt = Collins([p, other], min_K=16, table_dtype=torch.float32, **options)
    p.grad, other.grad = torch.ones_like(p), torch.ones_like(other)
    opt.step()
    move(p, opt.state[p])
    p.grad, before = torch.ones_like(p), other.detach().clone()
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(other.detach(), before)


def freed(t):
    t.untyped_storage().resize_(0)
    return t


UNREADABLE = {
    "sparse": ("exp_avg", lambda t: t.to_sparse(), "dense tensor with data; the optimizer holds a tensor of layout"),
    "freed": ("exp_avg_sq", lambda t: freed(t.clone()), "the optimizer holds a tensor whose memory has been freed"),
    "meta": ("exp_avg", lambda t: t.to("meta"), "got one on meta"),
    "no step": ("step", lambda t: None, "must have a step that is a whole number .* the optimizer holds None"),
    "NaN": ("step", lambda t: torch.tensor(math.nan), "parameter 0 must have a step that .* holds tensor.nan"),
    "negative": ("step", lambda t: torch.tensor(-1.0), "parameter 0 must have a step that .* holds tensor.-1"),
    "two": ("step", lambda t: torch.ones(2), "parameter 0 must have a step that .* holds tensor"),
    "filled with NaN": ("step", lambda t: t.fill_(math.nan), "parameter 0 must have a step that .* holds nan"),
    "filled with -1": ("step", lambda t: t.fill_(-1), "parameter 0 must have a step that .* holds -1.0"),
}


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize("memory", [None, "device", "host"])
@pytest.mark.parametrize("what", UNREADABLE)
def test_state_that_cannot_be_read_is_rejected_in_every_tier(what, memory, in_backward):
    name, change, message = UNREADABLE[what]
    p = param(64, 64)
    opt = Collins([p], compress_ratio=1, memory=memory, in_backward=in_backward)
    for step in range(4):
        if step == 3:
            before = p.detach().clone()
            opt.state[p][name] = change(opt.state[p][name])
        with pytest.raises(ValueError, match=message) if step == 3 else contextlib.nullcontext():
            p.square().sum().backward()
            opt.step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_a_parameter_listed_twice_after_construction(in_backward):
    p, q = param(64, 64), param(40)
    opt = Collins([{"params": [p]}, {"params": [q]}], in_backward=in_backward)
    opt.param_groups[1]["params"].append(p)
    before = p.detach().clone()
    message = r"params\[1\] of parameter group 1 must be .* got that of params\[0\] of parameter group 0"
    step = (p.square().sum() + q.square().sum()).backward
    if not in_backward:
        step()
        step = opt.step
    with pytest.raises(ValueError, match=message):
        step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("what", ["size", "dtype"])
def test_modified_moments_are_rejected_in_backward(what):
    move, message = MOVES[what]
    p, other = param(64, 64), param(40)
    opt = Collins([p, other], min_K=16, in_backward=True)
    (p.square().sum() + other.square().sum()).backward()
    opt.step()
    move(p, opt.state[p])
    before = other.detach().clone()
    with pytest.raises(ValueError, match=message):
        (p.square().sum() + other.square().sum()).backward()
    assert torch.equal(other.detach(), before)


def test_moments_are_moved_with_their_parameter_by_a_state_dict():
    p = param(64, 64)
    opt = Collins([p], min_K=16, table_dtype=torch.float32)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p].update({name: opt.state[p][name].to("meta") for name in ("m_table", "v_table")})
    state_dict = opt.state_dict()
    for moments in state_dict["state"].values():
        moments.update(m_table=torch.ones(64, 2), v_table=torch.ones(64, 2))
    opt.load_state_dict(state_dict)
    assert opt.state[p]["m_table"].device == p.device
    opt.step()


def test_a_changed_table_dtype_applies_to_new_tables_only():
    p = param(64, 64)
    opt = Collins([p], min_K=16, table_dtype=torch.float32)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0]["table_dtype"] = torch.bfloat16
    with pytest.raises(
        ValueError, match=r"m_table of parameter 0 must have the dtype torch.bfloat16.* got torch.float32"
    ):
        opt.step()
    assert opt.state[p]["step"].item() == 1


def test_hash_of_a_parameter_that_is_not_in_the_optimizer():
    with pytest.raises(ValueError, match=r"param must be a parameter of this optimizer, got a \(3,\) tensor"):
        Collins([param(10)]).hash_of(param(3))
