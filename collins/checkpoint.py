"""Checks of state dicts, all of them before anything changes.

Moments are loaded bit for bit and in place. torch's own `load_state_dict` would cast them to the parameter's dtype and
move them to its device, so only the parameter groups are passed to it. It would also adopt every saved option, and
tables could then be read under other options than those that the optimizer was built with.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import tree_leaves, tree_map, tree_map_only
from collins.clipping import LAST_NORM
from collins.fingerprint import LAYOUT, Fingerprint, unpacked
from collins.formats import FORMATS, TensorSpec, format_name
from collins.hashing import BlockHash, UniversalHash
from collins.options import OF_THE_WHOLE, TABLE_DTYPES, check_options, listed, shown
from collins.readable import kind_of, uncopied, unreadable, without_data
from collins.sharding import is_sharded, saved_part
from collins.update import UpdateSpec

DENSE, TABLES = ("exp_avg", "exp_avg_sq"), ("m_table", "v_table")

# The options that are loaded from a state dict, which schedules change. All others keep the values of this optimizer.
ADOPTED = ("lr", "betas", "eps", "weight_decay", "residual_weight", "residual_square")

WITH_STATE = "with_state"  # in a saved group: the number of its parameters that had a state

LARGEST_STEP = 2**24  # float32, the counter's dtype, cannot represent the next integer: the counter would stop here


def part_of(name: object) -> str | None:
    """The moment of which the state entry `name` is the whole or a part; None if it is not of a moment."""
    return _moments_by_name(tuple(FORMATS)).get(name) if isinstance(name, str) else None


@functools.cache
def _moments_by_name(formats: tuple[str, ...]) -> dict[str, str]:
    """The moment to which each name of a tensor belongs that one of these formats uses. All other names are free."""
    suffixes = {suffix for format in formats for suffix in FORMATS[format].parts((FORMATS[format].unit,))}
    return {moment + suffix: moment for moment in (*DENSE, *TABLES) for suffix in {"", *suffixes}}


def is_moment(name: object) -> bool:
    """Whether the state entry `name` is a moment or a part of one."""
    return part_of(name) is not None


class ExpectedState(NamedTuple):
    """The required state of one parameter."""

    name: str  # for errors
    param_shape: tuple[int, ...]
    tensors: dict[str, TensorSpec]  # the tensors of both moments by name, the first moment's first
    update: UpdateSpec  # with the formats and the loads of both moments
    hash: BlockHash | UniversalHash | None  # None for dense moments
    fingerprint: Fingerprint | None  # None for dense moments
    seed: int
    sharded: Tensor | None = None  # the parameter, where it is a DTensor
    mark: Fingerprint | None = None  # saved in its state: `fingerprint`, or that of dense moments that are rounded


class SavedState(NamedTuple):
    """The checked state of one parameter, ready to be loaded."""

    step: float
    moments: tuple[Tensor, ...]  # in the order of `ExpectedState.tensors`
    key: int | None  # the hash key of the saved tables, if it is not the one that the parameter has here
    others: dict[Any, Any]  # entries of a wrapper (the slow weights of a Lookahead), by its keys

    def others_on(self, device: torch.device) -> dict[Any, Any]:
        """Copies of the other values: tensors on `device`, in the dtypes in which they were saved."""

        def clone(t: Tensor) -> Tensor:
            return t.detach().clone() if is_sharded(t) else t.detach().to(device, copy=True)

        return {key: tree_map_only(Tensor, clone, value) for key, value in self.others.items()}


class CheckedStateDict(NamedTuple):
    """A checked state dict: the groups after loading, and the state of each parameter, None if it has none."""

    groups: list[dict[str, Any]]
    states: list[SavedState | None]
    rest: dict[Any, Any]  # state that belongs to no parameter, which torch keeps unchanged


def loadable(
    state_dict: Mapping[str, Any],
    own: Sequence[dict[str, Any]],
    options: Sequence[str],
    expected_states: Sequence[ExpectedState],
) -> CheckedStateDict:
    """The checked form of a state dict for an optimizer of the groups `own`, whose options are named `options`.

    Args:
        expected_states: one for each parameter, through all groups.

    Raises:
        ValueError: naming the parameter or option that does not fit, what was saved, and what this optimizer has.
    """
    saved, state = saved_groups(state_dict, own)
    check_order(saved, own)
    groups = []
    for number, (theirs, mine) in enumerate(zip(saved, own, strict=True)):
        kept = {name: mine[name] for name in options if name not in ADOPTED or name not in theirs}
        # Earlier versions accepted options of the whole optimizer in a group, and ignored them.
        left_out = {*OF_THE_WHOLE, "params", WITH_STATE}
        rest = {name: theirs[name] for name in theirs if name not in left_out}
        group = copied(f"parameter group {number}", {**rest, **kept})
        check_options(group)
        _check_last_norm(number, group.get(LAST_NORM, 0.0))
        groups.append({**group, "params": theirs["params"]})
    for number, group in enumerate(saved):
        _check_complete(number, group, state)
    places = [(place, group.get("table_dtype")) for group in saved for place in group["params"]]
    states = [
        _fitting(state[i], expected, table_dtype) if state.get(i) else None
        for (i, table_dtype), expected in zip(places, expected_states, strict=True)
    ]
    states = _numbered(states, [LAYOUT in state.get(place, {}) for place, _ in places])
    known = {place for place, _ in places}
    return CheckedStateDict(groups, states, {key: value for key, value in state.items() if key not in known})


def _check_last_norm(number: int, value: Any) -> None:
    if isinstance(value, Tensor) and uncopied(value) is None and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(
            f"state_dict['param_groups'][{number}] must have a {LAST_NORM} that is finite and at least 0, got"
            f" {shown(value)}"
        )


def _numbered(states: Sequence[SavedState | None], marked: Sequence[bool]) -> list[SavedState | None]:
    """Sets the keys of dense moments that carry no fingerprint (are not `marked`), as version 0.2 saved them.

    Version 0.2 derived keys from the parameters' numbers, also where parameters had names. If all tables of `states`
    were encoded under the numbers of their parameters, dense moments were rounded under theirs too.
    """
    found = [(number, state.key) for number, state in enumerate(states) if state is not None and state.key is not None]
    if not found or any(number != key for number, key in found):
        return list(states)
    return [
        state if state is None or known else state._replace(key=number)
        for number, (state, known) in enumerate(zip(states, marked, strict=True))
    ]


def _check_complete(number: int, group: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
    """Raises a ValueError where moments were saved and none of them have been read.

    `torch.distributed.checkpoint.load` reads only entries for which it is given a tensor, and the state dict of an
    optimizer that has not stepped has no tensors for moments.
    """
    saved, found = group.get(WITH_STATE, 0), sum(bool(state.get(place)) for place in group["params"])
    if isinstance(saved, int) and saved and not found:
        raise ValueError(
            f"state_dict['param_groups'][{number}] was saved with the moments of {saved} parameters, and state_dict"
            " holds none: an optimizer that has not stepped gives torch.distributed.checkpoint.load no tensors to"
            " read them into. Load through torch.distributed.checkpoint.state_dict (get_state_dict, set_state_dict),"
            " which makes them first"
        )


def saved_groups(
    state_dict: Mapping[str, Any], own: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """The groups and the state in a state dict, after a check of its form and of the sizes of its groups.

    Raises:
        ValueError: if a group is not as large as in `own`, or if this is not the state dict of an optimizer.
    """
    _check_keys("state_dict", state_dict, ("state", "param_groups"))
    groups, state = state_dict["param_groups"], state_dict["state"]
    _check_kind("state_dict['state']", state, Mapping, "a mapping")
    _check_kind("state_dict['param_groups']", groups, list | tuple, "a list")
    for number, group in enumerate(groups):
        _check_group(f"state_dict['param_groups'][{number}]", group)
    sizes, mine = [len(group["params"]) for group in groups], [len(group["params"]) for group in own]
    if sizes != mine:
        raise ValueError(f"state_dict has parameter groups of {sizes} parameters; this optimizer has {mine}")
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        names = group.get("param_names")
        if names and len(names) != size:
            raise ValueError(
                f"state_dict['param_groups'][{number}] must have as many param_names as params, got {len(names)} names"
            )
    places = [place for group in groups for place in group["params"]]
    if len(set(places)) < len(places):
        raise ValueError("state_dict must have each parameter in its param_groups once, got one twice")
    for place in places:
        _check_kind(f"state_dict['state'][{place!r}]", state.get(place, {}), Mapping, "a mapping")
    return list(groups), state


def as_dict(state_dict: object) -> dict[str, Any]:
    """A shallow copy of a state dict; raises a ValueError if it is not a mapping."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must be a dict, got {kind_of(state_dict)}")
    return dict(state_dict)


def _check_keys(what: str, value: object, keys: Sequence[str]) -> None:
    if not isinstance(value, Mapping) or not all(key in value for key in keys):
        got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        noun = "key" if len(keys) == 1 else "keys"
        raise ValueError(f"{what} must be a dict with the {noun} {' and '.join(map(repr, keys))}, got {got}")


def _check_kind(what: str, value: object, kind: Any, accepted: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} must be {accepted}, got {kind_of(value)}")


def _check_group(what: str, group: object) -> None:
    _check_keys(what, group, ("params",))
    found: Any = group
    _check_kind(f"{what}['params']", found["params"], list | tuple, "a list")
    for place in found["params"]:
        _check_kind(f"each of {what}['params']", place, int | str | Tensor, "a parameter's number")
    names = found.get("param_names")
    if names is not None:
        _check_kind(f"{what}['param_names']", names, list | tuple, "a list")
        for name in names:
            _check_kind(f"each of {what}['param_names']", name, str | None, "a string")


def copied(what: str, value: Any) -> Any:
    """A deep copy; raises a ValueError, before anything has changed, if the value cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception as error:
        raise ValueError(f"{what} in state_dict holds a value that cannot be copied: {error}") from error


def check_order(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> None:
    """Raises a ValueError for a parameter that was saved under another number, where both sides have names."""
    theirs, mine = ([*_names(groups)] for groups in (saved, own))
    places = {name: place for place, name in enumerate(mine) if name is not None}
    for place, name in enumerate(theirs):
        if name is not None and places.get(name, place) != place:
            raise ValueError(
                f"parameter {name!r} is number {place} in state_dict and number {places[name]} in this optimizer: "
                "build the optimizer with its parameters in the saved order"
            )


def check_shape(name: str, where: str, state: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Raises a ValueError for the state of a parameter that had another shape."""
    was, first = None, state.get(DENSE[0])
    if uncopied(first) is None and not _may_be_first(first, shape):
        was = f"{DENSE[0]} of the shape {tuple(first.shape)}"  # type: ignore[union-attr]
    if LAYOUT in state:
        saved = fingerprint_in(name, state)
        if (saved.numel, saved.rows) != (math.prod(shape), shape[0] if shape else 1):
            was = f"the tables of {saved.numel} elements in {saved.rows} rows"
    if was is not None:
        raise ValueError(
            f"{name} has the shape {shape}; {where} holds {was}: the moments of a parameter whose shape has changed"
            " cannot be used, so remove that state"
        )


def _may_be_first(m: Any, shape: tuple[int, ...]) -> bool:
    """Whether a dense first moment, possibly stored as integers, can be of a parameter of this shape."""
    if m.is_floating_point():
        return bool(tuple(m.shape) == shape)
    return bool(m.numel() == (math.prod(shape) if m.dtype is torch.int8 else -(-math.prod(shape) // 2)))


def check_moments(name: str, where: str, found: Mapping[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises a ValueError unless `found` has exactly these moments, in these shapes, with data to copy."""
    for key, value in found.items():
        problem = uncopied(value)
        if problem is not None:
            raise ValueError(f"{name} must have a {key} that is a dense tensor with data; {where} holds {problem}")
    got = {key: tuple(value.shape) for key, value in found.items()}
    if got != shapes:
        hint = ". Version 0.2 kept vectors in tables too, as role='matrix' does" if DENSE[0] in shapes else ""
        raise ValueError(
            f"{name} has moments {shapes}, by its group's role, compress_ratio, min_K and hash; {where} holds"
            f" {got}{hint if TABLES[0] in got else ''}"
        )


def step_of(name: str, state: Mapping[str, Any], where: str = "state_dict") -> float:
    """The number of steps in the state of the parameter `name`.

    Raises:
        ValueError: if it is missing, or not a whole number from 0 to `LARGEST_STEP`.
    """
    step = state.get("step")
    number: Any = step
    if isinstance(step, Tensor):
        number = step.detach().item() if unreadable(step) is None and step.numel() == 1 else None
    real = isinstance(number, Real) and not isinstance(number, bool)
    if not real or not 0 <= number <= LARGEST_STEP or number != int(number):
        raise invalid_step(name, where, step)
    return float(number)


def invalid_step(name: str, where: str, step: object) -> ValueError:
    """The error for a step counter that is not a whole number from 0 to `LARGEST_STEP`."""
    return ValueError(
        f"{name} must have a step that is a whole number from 0 to {LARGEST_STEP}, the range that its float32"
        f" counter represents exactly; {where} holds {shown(step)}"
    )


def _names(groups: Sequence[dict[str, Any]]) -> Iterator[str | None]:
    for group in groups:
        yield from group.get("param_names") or [None] * len(group["params"])


def _fitting(state: Mapping[str, Any], expected: ExpectedState, table_dtype: object) -> SavedState:
    name = expected.name
    step, own_key = step_of(name, state), None
    check_shape(name, "state_dict", state, expected.param_shape)
    if expected.hash is not None and any(key in state for key in DENSE) and not any(key in state for key in TABLES):
        raise ValueError(
            f"{name} keeps its moments in tables; state_dict holds dense ones, as torch.optim.AdamW saves them: load"
            " the state dict that collins.convert(state_dict, optimizer) returns"
        )
    if LAYOUT in state and expected.fingerprint is not None:
        saved = fingerprint_in(name, state)
        difference = saved.difference(expected.fingerprint)
        if difference:
            own_key = saved.key_under(expected.fingerprint, expected.seed)
        if difference and own_key is None:
            raise ValueError(
                f"{name} does not fit what was saved: state_dict has {difference}; build the optimizer as it was saved,"
                " or see collins.convert"
            )
    if LAYOUT in state and expected.hash is None and expected.mark is not None:
        saved = fingerprint_in(name, state)
        own_key = saved.key_under(expected.mark, expected.seed) if saved.difference(expected.mark) else None
    found = {key: value for key, value in state.items() if is_moment(key)}
    check_moments(name, "state_dict", found, {key: spec.shape for key, spec in expected.tensors.items()})
    if LAYOUT not in state and expected.fingerprint is not None:
        raise ValueError(
            f"{name} has tables in state_dict without the {LAYOUT!r} entry that says how they were encoded"
        )
    for key, spec in expected.tensors.items():
        if found[key].dtype != spec.dtype:
            raise ValueError(
                f"{name} keeps {key} in {spec.dtype}, by its dtype and its group's table_dtype; state_dict holds"
                f" {found[key].dtype}: load the state dict that collins.convert(state_dict, optimizer) returns"
            )
    if table_dtype is not None:
        _check_table_dtype(expected, table_dtype)
    here = [saved_part(name, key, found[key], expected.sharded) for key in expected.tensors]
    return SavedState(step, tuple(here), own_key, other_values(name, state))


def other_values(name: str, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries of a saved state that are not of Collins: the tensors themselves, and copies of all other values.

    Raises:
        ValueError: for a value that cannot be copied.
    """
    others = {key: value for key, value in state.items() if key not in ("step", LAYOUT) and not is_moment(key)}
    for key, value in others.items():
        what = f"{key} of {name}"
        for leaf in tree_leaves(value):
            problem = without_data(leaf) if isinstance(leaf, Tensor) else None
            if problem is not None:
                raise ValueError(f"{what} must hold data; state_dict holds {problem}")
        others[key] = tree_map(partial(_kept, what), value)
    return others


def _kept(what: str, value: Any) -> Any:
    return value if isinstance(value, Tensor) else copied(what, value)


def _check_table_dtype(expected: ExpectedState, saved: object) -> None:
    """Raises a ValueError for moments that were saved in another format than the one in which they were read.

    `torch.distributed.checkpoint` reads into existing tensors, and casts silently to their dtype.
    """
    format = format_name(str(saved))
    if format not in FORMATS:
        raise ValueError(f"table_dtype in state_dict must be {listed(TABLE_DTYPES)}, got {saved!r}")
    own = expected.update.m_format
    if expected.hash is None:
        format = format_name(torch.promote_types(FORMATS[format].parts(())[""].dtype, FORMATS[own].parts(())[""].dtype))
    if format != own:
        name = next(iter(expected.tensors))
        raise ValueError(
            f"{expected.name} keeps {name} in {expected.tensors[name].dtype}, by its dtype and its group's table_dtype;"
            f" state_dict was saved with table_dtype={saved}"
        )


def fingerprint_in(name: str, state: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint in the saved state of the parameter `name`; raises a ValueError if it is invalid."""
    try:
        return unpacked(state[LAYOUT])
    except ValueError as error:
        raise ValueError(f"{name} in state_dict: {error}") from None
