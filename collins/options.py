"""Checks of the options of a parameter group, and their errors."""

from __future__ import annotations

import functools
import math
import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Integral, Real
from operator import is_
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from collins.bucketing import HASHES, NONFINITE
from collins.formats import FORMATS, FloatFormat, NoFormat
from collins.roles import ROLES
from collins.rule import DECODES, ORTHOGONAL

TABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
OF_THE_WHOLE = frozenset(
    {"accumulation_steps", "compile", "in_backward", "max_grad_norm", "memory", "seed"}
)  # options that no group has
_MOST_PARTS = 256  # partial steps of one step: as many have random bits of their own
_LIMIT = 2**63  # torch passes an int to its kernels in 64 bits
_DIGITS = 4096  # bits of an int that Python can print under any limit of digits


def listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


def shown(value: object) -> str:
    """`repr`, which also works for an int with more digits than Python prints."""
    long = isinstance(value, int) and value.bit_length() > _DIGITS
    return f"an int of more than {_DIGITS} bits" if long else repr(value)


def require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {accepted}, got {shown(value)}")


def seed_of(value: object) -> int:
    """A seed as a Python int, given as an integer of any library.

    Raises:
        ValueError: for other values, and for ints with more digits than Python prints: hashes derive from the digits.
    """
    require(_whole(value), "seed", value, "an int")
    seed: int = int(value)  # type: ignore[call-overload]
    require(seed.bit_length() <= _DIGITS, "seed", value, f"an int of at most {_DIGITS} bits")
    return seed


def max_norm_of(value: object) -> float | None:
    """`max_grad_norm` as a Python float, given as a number of any library; None for None.

    Raises:
        ValueError: for other values than numbers above 0 (infinity is accepted).
    """
    value = read("max_grad_norm", value)
    norm = None if value is None else _number(value)
    accepted = "None or a number above 0, inf to measure the norm alone"
    require(norm is None or norm > 0, "max_grad_norm", value, accepted)
    return norm


def accumulation_of(value: object, in_backward: bool) -> int:
    """How many backward passes make up one step, of any library's integers, as Python's.

    Raises:
        ValueError: for anything but an int of at least 1, and for more than 1 where steps come after backward.
    """
    value = read("accumulation_steps", value)
    require(_whole(value) and value >= 1, "accumulation_steps", value, "an int of at least 1")  # type: ignore[operator]
    steps: int = int(value)  # type: ignore[call-overload]
    accepted = "1 without in_backward=True: gradients add up in .grad until step() is called"
    require(steps == 1 or in_backward, "accumulation_steps", steps, accepted)
    require(steps <= _MOST_PARTS, "accumulation_steps", steps, f"at most {_MOST_PARTS}")
    return steps


def check_table_dtype(name: str, dtype: torch.dtype, table_dtype: torch.dtype | str | None) -> None:
    """Raises a ValueError for float64 tables of the parameter `name` of another `dtype`.

    The means of its gradients are float32, and the kernel computes the whole step in float32: float64 tables would
    store the same values in twice the bytes.
    """
    if table_dtype == torch.float64 and dtype != torch.float64:
        raise ValueError(
            f"table_dtype must be torch.float32 or torch.bfloat16 for {name} of {dtype}, got torch.float64: steps are"
            " computed in float64 for parameters of torch.float64 only"
        )


def read(name: str, value: Any) -> Any:
    """Parses a string value of the option `name`, as configuration files and command lines contain them.

    Strings may be numbers, truth values, pairs of numbers, dtypes, and None where it is accepted ("none" or "null").
    The types of an option are read from its annotation in `Collins`, so that a new option needs no entry here. Strings
    that cannot be parsed, and values that are not strings, are returned unchanged, for later checks.
    """
    if not isinstance(value, str):
        return value
    kinds = _kinds().get(name, ())
    if type(None) in kinds and value.strip().lower() in ("none", "null"):
        return None
    for kind, reader in _READERS.items():
        if kind in kinds:
            return reader(value)
    return value


@functools.cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """The types in the annotation of each option."""
    from collins.optimizer import Collins  # which imports this module

    found = {}
    for name, hint in get_type_hints(Collins.__init__).items():
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        found[name] = tuple(get_origin(member) or member for member in members)
    return found


def _read_number(text: Any) -> Any:
    try:
        return float(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _read_whole(text: str) -> Any:
    try:
        return int(text)
    except ValueError:  # YAML parses 1e3 as a string
        number = _read_number(text)
        return int(number) if isinstance(number, float) and number.is_integer() else text


def _read_wholes(text: str) -> Any:
    """An int, or several ints separated by commas."""
    parts = [_read_whole(part) for part in text.strip().strip("[]()").split(",")]
    return text if any(isinstance(part, str) for part in parts) else parts[0] if len(parts) == 1 else tuple(parts)


def _read_flag(text: str) -> Any:
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def _read_pair(text: str) -> Any:
    parts = re.fullmatch(r"\s*[\[(]?([^,]+),([^,]+?)[\])]?\s*", text)
    pair = tuple(map(_read_number, parts.groups())) if parts else ()
    return pair if pair and not any(isinstance(each, str) for each in pair) else text


def _read_dtype(text: str) -> Any:
    """A dtype by its name in torch or by a short name; the name of an integer format is returned as a string."""
    name = text.strip().removeprefix("torch.")
    if name in FORMATS and not isinstance(FORMATS[name], FloatFormat):
        return name
    dtype = getattr(torch, _SHORT.get(name, name), None)
    return dtype if isinstance(dtype, torch.dtype) else text


_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

# In the order in which the types of an option are tried. Options that accept any string have none of these types.
_READERS: dict[Any, Callable[[str], Any]] = {
    torch.dtype: _read_dtype,
    tuple: _read_pair,
    Sequence: _read_wholes,
    bool: _read_flag,
    int: _read_whole,
    float: _read_number,
}


def read_whole_options(compile: Any, in_backward: Any, seed: Any, memory: Any) -> tuple[bool | None, bool, int, Any]:
    """Parses and checks the options of the whole optimizer; `MemoryPolicy.of` checks `memory`.

    Raises:
        ValueError: for a value that is not accepted.
    """
    compile, in_backward = read("compile", compile), read("in_backward", in_backward)
    require(compile is None or isinstance(compile, bool), "compile", compile, "True, False or None")
    require(isinstance(in_backward, bool), "in_backward", in_backward, "True or False")
    return compile, in_backward, seed_of(read("seed", seed)), read("memory", memory)


def _number(value: object) -> float:
    """A real number as a float; NaN, which is in no range, for other values."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _two_numbers(value: Any) -> tuple[float, ...]:
    """A sequence of two values as floats, with NaN for values that are not numbers; () for other values."""
    if isinstance(value, str | bytes | Mapping | Set) or not hasattr(value, "__getitem__"):
        return ()
    try:
        return (
            tuple(_number(_read_number(each) if isinstance(each, str) else each) for each in value)
            if len(value) == 2
            else ()
        )
    except TypeError:  # an array without dimensions
        return ()


def _check_range(group: dict[str, Any], name: str, accepted: str = "finite and at least 0") -> None:
    value = group[name]
    number = _number(value)
    require(0 <= number < math.inf, name, value, accepted)
    require(number < _LIMIT, name, value, "below 2**63")
    if type(value) is not float and type(value) is not int:
        group[name] = number


def _check_whole(group: dict[str, Any], name: str, accepted: str) -> None:
    value = group[name]
    require(_whole(value) and value >= 1, name, value, accepted)
    if type(value) is not int:
        group[name] = int(value)


def _check_row_parts(group: dict[str, Any]) -> None:
    """Checks `row_parts`, and converts it to an int, or to a tuple of ints if it is a sequence of at least two."""
    value, name = group["row_parts"], "row_parts"
    accepted = "an int of at least 1, or at least two of them"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        require(len(value) > 1 and all(_whole(rows) and rows >= 1 for rows in value), name, value, accepted)
        group[name] = tuple(map(int, value))
    else:
        _check_whole(group, name, accepted)


def _check_lr(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        one = lr.numel() == 1 and lr.layout == torch.strided and not lr.is_meta and not lr.is_complex()
        require(one, "lr", lr, "a number or a tensor of one element")
        # Reading it from an accelerator would stall the device.
        require(not lr.is_cpu or 0 <= float(lr.detach()) < math.inf, "lr", lr, "finite and at least 0")
    else:
        _check_range(group, "lr")


def check_options(group: dict[str, Any]) -> None:
    """Raises a ValueError that names the first option of a parameter group that is out of range.

    Values are converted to Python numbers in `group`, so that every step computes with the same numbers and every way
    of saving supports them: betas, any sequence of two numbers, to a tuple of two floats; scalars of numpy to floats
    and ints; strings, of subclasses too, to plain strings or to the values that they represent (`read`).
    """
    if not OF_THE_WHOLE.isdisjoint(group):
        name = min(OF_THE_WHOLE & group.keys())
        raise ValueError(
            f"{name} is an option of the whole optimizer, got {name}={shown(group[name])} in a parameter group: pass it"
            " to Collins beside params"
        )
    for name, value in group.items():
        if isinstance(value, str):
            known = type(value) is str or name not in _kinds()
            group[name] = read(name, value if known else str.__str__(value))
    _check_lr(group)
    betas = group["betas"]
    if type(betas) is not tuple or not all(type(beta) is float for beta in betas):
        betas = _two_numbers(betas)
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", group["betas"], "two numbers in [0, 1)")
    if betas is not group["betas"]:
        group["betas"] = betas
    for name in ("eps", "weight_decay"):
        _check_range(group, name)
    ratio = group["compress_ratio"]
    require(1 <= _number(ratio) < math.inf, "compress_ratio", ratio, "at least 1")
    if type(ratio) is not float and type(ratio) is not int:
        group["compress_ratio"] = float(ratio)
    second = group["v_compress_ratio"]
    if second is not None:
        accepted = "None, or finite and at least compress_ratio"
        require(group["compress_ratio"] <= _number(second) < math.inf, "v_compress_ratio", second, accepted)
        if type(second) is not float and type(second) is not int:
            group["v_compress_ratio"] = float(second)
    _check_whole(group, "min_K", "an int of at least 1")
    for name, values in _CHOICES:
        require(isinstance(group[name], str) and group[name] in values, name, group[name], listed(tuple(values)))
    whole = group["decode"] != ORTHOGONAL or group["hash"] == "block"
    require(whole, "hash", group["hash"], f"'block' for decode='{ORTHOGONAL}'")
    _check_row_parts(group)
    _check_range(group, "residual_square")
    if group["residual_weight"] is not None:
        _check_range(group, "residual_weight", "None, or finite and at least 0")
    if group["rehash_period"] is not None:
        _check_whole(group, "rehash_period", "None or an int of at least 1")
        require(group["rehash_period"] < 2**31, "rehash_period", group["rehash_period"], "None or an int below 2**31")
    dtype = group["table_dtype"]
    named = isinstance(dtype, str) and dtype in FORMATS and not isinstance(FORMATS[dtype], FloatFormat | NoFormat)
    chosen = dtype is None and second is not None
    require(not chosen, "v_compress_ratio", second, "None without a table_dtype: compress_ratio chooses both loads")
    require(not named or group["hash"] == "block", "hash", group["hash"], f"'block' for tables in {dtype}")
    known = dtype is None or named or (isinstance(dtype, torch.dtype) and dtype in TABLE_DTYPES)
    require(known, "table_dtype", dtype, listed(TABLE_DTYPES))
    require(isinstance(group["maximize"], bool), "maximize", group["maximize"], "True or False")
    rounding = group["stochastic_rounding"]
    require(rounding is None or isinstance(rounding, bool), "stochastic_rounding", rounding, "True, False or None")
    capturable = group["capturable"]
    require(isinstance(capturable, bool), "capturable", capturable, "True or False")
    waits = capturable and group["nonfinite"] == "error"
    accepted = "propagate or skip with capturable=True, since a captured step cannot synchronize"
    require(not waits, "nonfinite", group["nonfinite"], accepted)


class FixedOptions:
    """A base class of the optimizer, by which options of the whole optimizer cannot be set once it has been built."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and "_stepper" in self.__dict__:
            raise ValueError(
                f"{name} cannot be changed once the optimizer has been built, got {shown(value)}: build Collins with"
                f" {name}, and load the state dict into it"
            )
        super().__setattr__(name, value)


_FIXED = OF_THE_WHOLE - {"max_grad_norm"}

_DECODES: Mapping[str, Any] = ChainMap[str, Any]({ORTHOGONAL: None}, DECODES)
_CHOICES = (("role", ROLES), ("hash", HASHES), ("decode", _DECODES), ("nonfinite", NONFINITE))


class CheckedOptions:
    """The options of a group that `check_options` has accepted, which later steps check for changes.

    Values that are the same objects are accepted at once, since no option but a tensor lr is mutable once it has been
    checked. lr is always checked: schedulers change it in every step.

    Args:
        group: the group.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self._group, self._known = group, dict(group)

    def changed(self) -> bool:
        """Checks the current options, and returns whether any but lr may have changed since the last call.

        Raises:
            ValueError: as `check_options`.
        """
        group, known = self._group, self._known
        lr = known["lr"] = group["lr"]
        same = len(known) == len(group) and all(map(is_, known, group))
        if same and all(map(is_, known.values(), group.values())) and not isinstance(lr, str):
            _check_lr(group)
            return False
        check_options(group)
        self._known = dict(group)
        return True
