"""Options as strings, as configuration files and command lines pass them."""

import enum
import inspect
import io
import re

import numpy as np
import pytest
import torch

from collins import Collins
from collins.offload import MemoryPolicy

OPTIMIZER_OPTIONS = ("accumulation_steps", "seed", "compile", "in_backward", "max_grad_norm", "memory")
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Collins.__init__).parameters.items()
    if parameter.default is not parameter.empty
}
VALUES = [
    ("lr", "3e-3", 3e-3),
    ("lr", " 1 ", 1.0),
    ("betas", "0.9,0.95", (0.9, 0.95)),
    ("betas", "[0.9, 95e-2]", (0.9, 0.95)),
    ("betas", ["0.9", "0.95"], (0.9, 0.95)),
    ("betas", [0.9, "0.95"], (0.9, 0.95)),
    ("eps", "1e-6", 1e-6),
    ("compress_ratio", "16", 16.0),
    ("v_compress_ratio", "128", 128.0),
    ("v_compress_ratio", "none", None),
    ("min_K", "256", 256),
    ("min_K", "1e3", 1000),
    ("residual_weight", "0.5", 0.5),
    ("residual_weight", "null", None),
    ("rehash_period", "50", 50),
    ("rehash_period", "None", None),
    ("table_dtype", "bfloat16", torch.bfloat16),
    ("table_dtype", "bf16", torch.bfloat16),
    ("table_dtype", "torch.float32", torch.float32),
    ("table_dtype", "int8", "int8"),
    ("table_dtype", "torch.int4", "int4"),
    ("maximize", "true", True),
    ("maximize", "False", False),
    ("stochastic_rounding", "false", False),
    ("stochastic_rounding", "none", None),
    ("capturable", "false", False),
    ("nonfinite", "skip", "skip"),
    ("seed", "7", 7),
    ("seed", str(2**80 + 1), 2**80 + 1),
    ("compile", "false", False),
    ("compile", "null", None),
    ("in_backward", "false", False),
    ("accumulation_steps", "1", 1),
    ("max_grad_norm", "0.5", 0.5),
    ("max_grad_norm", "inf", float("inf")),
    ("max_grad_norm", "none", None),
    ("memory", "none", None),
    ("memory", "host", MemoryPolicy("host")),
]


def make_optimizer(**options):
    if "v_compress_ratio" in options:
        options.setdefault("table_dtype", "float32")
    return Collins([torch.nn.Parameter(torch.zeros(3))], **options)


def value_of(opt, name):
    return getattr(opt, name) if name in OPTIMIZER_OPTIONS else opt.param_groups[0][name]


def alike(a, b):
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(("name", "text", "value"), VALUES, ids=[f"{name}={text}"[:40] for name, text, _ in VALUES])
def test_a_string_is_converted_to_its_value(name, text, value):
    assert alike(value_of(make_optimizer(**{name: text}), name), value)
    if name not in OPTIMIZER_OPTIONS:
        opt = make_optimizer(**{name: value})
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], name: text})
        assert alike(opt.param_groups[1][name], value)
        opt.param_groups[0][name] = text
        opt.param_groups[0]["params"][0].grad = torch.zeros(3)
        opt.step()
        assert alike(value_of(opt, name), value)
        assert alike(opt.state_dict()["param_groups"][0][name], value if name != "table_dtype" else str(value))


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_default_is_accepted_as_a_string(name):
    """This includes options that are added later: their types are read from their annotations."""
    value = value_of(make_optimizer(**{name: str(DEFAULTS[name])}), name)
    assert value == DEFAULTS[name]
    assert isinstance(value, float) or type(value) is type(DEFAULTS[name])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lr", "fast"),
        ("lr", ""),
        ("lr", "none"),
        ("betas", "0.9"),
        ("betas", "0.9,0.95,0.99"),
        ("betas", "0.9,high"),
        ("min_K", "2.5"),
        ("rehash_period", "often"),
        ("table_dtype", "float8"),
        ("table_dtype", "nn"),
        ("maximize", "1"),
        ("stochastic_rounding", "maybe"),
        ("hash", "none"),
        ("seed", "1.5"),
        ("compile", "fast"),
        ("in_backward", "none"),
        ("max_grad_norm", "large"),
        ("memory", "gpu"),
    ],
)
def test_an_invalid_string_is_shown_unchanged_in_the_error(name, text):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {re.escape(repr(text))}"):
        make_optimizer(**{name: text})


def test_a_number_out_of_range_is_rejected_as_a_string_too():
    with pytest.raises(ValueError, match=re.escape("betas must be two numbers in [0, 1), got (0.9, 1.5)")):
        make_optimizer(betas="0.9,1.5")
    with pytest.raises(ValueError, match=r"lr must be finite and at least 0, got -1\.0"):
        make_optimizer(lr="-1")


class Decode(enum.StrEnum):
    """Options as programs declare them."""

    RESIDUAL = "residual"


def test_a_string_of_a_subclass_is_kept_as_a_plain_string():
    """`torch.load` with `weights_only=True` reads plain strings only."""
    opt = make_optimizer(decode=Decode.RESIDUAL, nonfinite=np.str_("skip"))
    (group,) = opt.param_groups
    assert alike(group["decode"], "residual")
    assert alike(group["nonfinite"], "skip")
    torch.save(opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))
