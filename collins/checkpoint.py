"""State dicts: what one must hold to be loaded, all of it checked before anything changes.

Moments are loaded bit for bit and in place. torch's own `load_state_dict` would cast them to the parameter's dtype and
move them to its device, so it gets to see the parameter groups only; and it would adopt every saved option, so that
tables could come to be read under options that the optimizer was not built with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins.fingerprint import LAYOUT, Fingerprint, unpacked
from collins.formats import FORMATS, TensorSpec, format_name
from collins.hashing import BlockHash, UniversalHash
from collins.options import TABLE_DTYPES, check_options, listed
from collins.sharding import saved_part
from collins.update import UpdateSpec

DENSE, TABLES = ("exp_avg", "exp_avg_sq"), ("m_table", "v_table")

# What a state dict sets: the numbers that schedules change. The other options stay as the optimizer was built.
ADOPTED = ("lr", "betas", "eps", "weight_decay", "residual_weight")


def part_of(name: object) -> str | None:
    """The moment that a state keeps, or keeps a part of, under this name; None for another name."""
    if name in DENSE or name in TABLES:
        return str(name)
    return next((table for table in TABLES if isinstance(name, str) and name.startswith(f"{table}_")), None)


def is_moment(name: object) -> bool:
    """Whether a state keeps a moment, or a part of one, under this name."""
    return part_of(name) is not None


class ExpectedState(NamedTuple):
    """What the state of one parameter must be."""

    name: str  # for errors
    param_shape: tuple[int, ...]
    tensors: dict[str, TensorSpec]  # in which both moments are stored, by name, the first one's first
    update: UpdateSpec  # with the formats and the loads of both
    hash: BlockHash | UniversalHash | None  # None for dense moments
    fingerprint: Fingerprint | None  # None for dense moments
    seed: int
    sharded: Tensor | None = None  # the parameter, where it is a DTensor


class SavedState(NamedTuple):
    """One parameter's state as it is to be loaded."""

    step: float
    moments: tuple[Tensor, ...]  # as `ExpectedState.tensors`
    key: int | None  # of the parameter, where its tables were encoded under another than it has here


class CheckedStateDict(NamedTuple):
    """A state dict that fits: groups as they will be, and each parameter's state, None where there is none."""

    groups: list[dict[str, Any]]
    states: list[SavedState | None]
    rest: dict[Any, Any]  # state of no parameter, which torch keeps as it is


def loadable(
    state_dict: Mapping[str, Any],
    own: Sequence[dict[str, Any]],
    options: Sequence[str],
    expected_states: Sequence[ExpectedState],
) -> CheckedStateDict:
    """What a state dict comes to for an optimizer of the groups `own`, whose options are named `options`.

    Args:
        expected_states: one for each parameter, through all groups.

    Raises:
        ValueError: naming the parameter or option that does not fit, what was saved, and what this optimizer has.
    """
    saved, state = saved_groups(state_dict, own)
    check_order(saved, own)
    groups = []
    for theirs, mine in zip(saved, own, strict=True):
        kept = {name: mine[name] for name in options if name not in ADOPTED or name not in theirs}
        groups.append({**theirs, **kept})
        check_options(groups[-1])
    places = [(place, group.get("table_dtype")) for group in saved for place in group["params"]]
    states = [
        _fitting(state[i], expected, table_dtype) if state.get(i) else None
        for (i, table_dtype), expected in zip(places, expected_states, strict=True)
    ]
    known = {place for place, _ in places}
    return CheckedStateDict(groups, states, {key: value for key, value in state.items() if key not in known})


def saved_groups(
    state_dict: Mapping[str, Any], own: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """The groups and the state in a state dict, after a check that the groups are as large as `own`.

    Raises:
        ValueError: when they are not, or when this is no state dict of an optimizer.
    """
    keys = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"state_dict must be a dict with the keys 'state' and 'param_groups', got {keys}")
    groups = state_dict["param_groups"]
    sizes, mine = [len(group["params"]) for group in groups], [len(group["params"]) for group in own]
    if sizes != mine:
        raise ValueError(f"state_dict has parameter groups of {sizes} parameters; this optimizer has {mine}")
    return list(groups), state_dict["state"]


def check_order(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> None:
    """Raises a ValueError for a parameter that was saved at another place, where both sides know names."""
    theirs, mine = ([*_names(groups)] for groups in (saved, own))
    places = {name: place for place, name in enumerate(mine) if name is not None}
    for place, name in enumerate(theirs):
        if name is not None and places.get(name, place) != place:
            raise ValueError(
                f"parameter {name!r} is number {place} in state_dict and number {places[name]} in this optimizer: "
                "build the optimizer with its parameters in the saved order"
            )


def check_moments(name: str, where: str, found: Mapping[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises a ValueError unless these moments, and no others, are there in these shapes."""
    got = {key: tuple(value.shape) if isinstance(value, Tensor) else value for key, value in found.items()}
    if got != shapes:
        raise ValueError(
            f"{name} has moments {shapes} under its group's compress_ratio, min_K and hash; {where} holds {got}"
        )


def step_of(name: str, state: Mapping[str, Any]) -> float:
    """The number of steps in a saved state.

    Raises:
        ValueError: unless it is there, finite and at least 0.
    """
    step = state.get("step")
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise ValueError(f"{name} must have a step that is a number of at least 0; state_dict holds {step!r}")
    return float(number)


def _names(groups: Sequence[dict[str, Any]]) -> Iterator[str | None]:
    for group in groups:
        yield from group.get("param_names") or [None] * len(group["params"])


def _fitting(state: Mapping[str, Any], expected: ExpectedState, table_dtype: object) -> SavedState:
    name = expected.name
    step, own_key = step_of(name, state), None
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
    found = {key: value for key, value in state.items() if is_moment(key)}
    check_moments(name, "state_dict", found, {key: spec.shape for key, spec in expected.tensors.items()})
    if LAYOUT not in state and expected.fingerprint is not None:
        raise ValueError(f"{name} has tables in state_dict without the {LAYOUT!r} that says what they mean")
    for key, spec in expected.tensors.items():
        if found[key].dtype != spec.dtype:
            raise ValueError(
                f"{name} keeps {key} in {spec.dtype}, by its dtype and its group's table_dtype; state_dict holds"
                f" {found[key].dtype}"
            )
    if table_dtype is not None:
        _check_table_dtype(expected, table_dtype)
    here = [saved_part(name, key, found[key], expected.sharded) for key in expected.tensors]
    return SavedState(step, tuple(here), own_key)


def _check_table_dtype(expected: ExpectedState, saved: object) -> None:
    """Raises a ValueError for moments that were saved in another format than they arrive in.

    `torch.distributed.checkpoint` reads into tensors that are there, and casts without a word what it reads.
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
    """The fingerprint in the saved state of the parameter `name`; a ValueError where it is none."""
    try:
        return unpacked(state[LAYOUT])
    except ValueError as error:
        raise ValueError(f"{name} in state_dict: {error}") from None
