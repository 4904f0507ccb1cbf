"""Converts state dicts of AdamW, and of Collins under other settings, where the mathematics allows.

Encoding and averaging are both linear, so an average of sketches is the sketch of the average:

    M_b = (1/c_b) sum_{h(i)=b} s(i) m_i           V_b = (1/c_b) sum_{h(i)=b} v_i

From AdamW's m and v, these are the tables that Collins would have after the same gradients under the current signs,
except that M contains all of m, including gradients from before a bucket drew these signs: c s(i) M_{h(i)} decodes m_i
without bias.

From tables of hash="block" with load c to coarser ones with load c', where c divides c':

- V is exact: a mean of means, each weighted by its bucket's load.
- M restarts at 0, as in every bucket that draws new signs. The old signs belong to the old buckets, and no linear map
  takes the old M to the new one. Encoding the unbiased decode c s(i) M_{h(i)} again would be right on average, but its
  noise has about sqrt(c) times the size of the moment, and all of that noise would enter the step.

Two conversions are impossible and refused: to finer tables, since a mean does not determine its parts, and between
hash="universal" with different coefficients, since elements that shared a bucket no longer share one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from collins.checkpoint import (
    ADOPTED,
    DENSE,
    TABLES,
    WITH_STATE,
    ExpectedState,
    check_moments,
    check_order,
    check_shape,
    copied,
    fingerprint_in,
    other_values,
    part_of,
    saved_groups,
    step_of,
    uncopied,
)
from collins.fingerprint import LAYOUT, Fingerprint
from collins.formats import FORMATS, NONE, IntFormat
from collins.hashing import BlockHash, UniversalHash
from collins.options import OF_THE_WHOLE, check_options, shown
from collins.sharding import is_sharded

if TYPE_CHECKING:
    from collins.optimizer import Collins

# Options of AdamW's groups that choose its implementation and do not affect the saved state.
_ADAMWS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay")
_PIECE = 1 << 22  # elements that are encoded at once


def convert(state_dict: Mapping[str, Any], optimizer: Collins) -> dict[str, Any]:
    """Converts a state dict of `torch.optim.AdamW`, or of Collins under other settings, for loading into `optimizer`.

    Each parameter is converted according to its saved state:

    | saved | state in `optimizer` | M | V |
    |---|---|---|---|
    | dense moments | dense moments, in any dtype | the same | the same |
    | dense moments | tables of any hash; a coarser second moment | exact | exact |
    | tables | tables with the same encoding, in any dtype | the same | the same |
    | tables of hash="block" | as coarse or coarser a second moment, any seed and period | restarts at 0 | exact |
    | dense moments, or M alone | M alone, as decode="orthogonal" keeps it, dense or in tables | exact | dropped |
    | tables, or M alone | tables of M alone | the same if the encoding is the same, else restarts at 0 | dropped |

    Other entries of a parameter's state (slow weights of a wrapper) are kept unchanged.

    "Exact" means up to the rounding of the saved format and of the new one, which is to nearest. Every other conversion
    is refused. lr, betas, eps, weight_decay and, from Collins, residual_weight and residual_square are the saved ones;
    set those that were for another rule after loading: the best learning rate of AdamW is lower than that of Collins.

    Args:
        state_dict: the state dict of an optimizer with the same groups of parameters in the same order. It is not
            changed.
        optimizer: the optimizer whose settings are used. It is not changed.

    Returns:
        A state dict for `optimizer.load_state_dict`; its tensors are on the devices of the given ones.

    Raises:
        TypeError: for an optimizer that is not Collins.
        ValueError: for a state that cannot be converted, such as sharded tensors, naming the parameter and the reason.

    Example:
        >>> from collins import Collins
        >>> model = torch.nn.Linear(512, 512)
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(8, 512)).square().mean().backward()
        >>> adamw.step()
        >>> opt = Collins(model.parameters())
        >>> opt.load_state_dict(convert(adamw.state_dict(), opt))
    """
    if not hasattr(optimizer, "expected_states"):
        raise TypeError(f"optimizer must be a Collins, got {type(optimizer).__name__}")
    saved, states = saved_groups(state_dict, optimizer.param_groups)
    check_order(saved, optimizer.param_groups)
    groups: list[dict[str, Any]] = []
    new: dict[int, dict[str, Any]] = {}
    expected_states = iter(optimizer.expected_states())
    for theirs, mine in zip(saved, optimizer.param_groups, strict=True):
        _check_group(theirs, mine)
        dropped = {*mine, *_ADAMWS, *OF_THE_WHOLE}
        kept = {name: theirs[name] for name in theirs if name in ADOPTED or name not in dropped}
        first = len(new)
        for place, expected in zip(theirs["params"], expected_states, strict=False):
            new[len(new)] = _converted(states[place], expected) if states.get(place) else {}
        group = copied(f"parameter group {len(groups)}", {name: kept[name] for name in kept if name != "params"})
        own = range(first, len(new))
        groups.append({**mine, **group, WITH_STATE: sum(bool(new[number]) for number in own), "params": list(own)})
        check_options(groups[-1])
    return {"state": {number: state for number, state in new.items() if state}, "param_groups": groups}


def _check_group(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if _flag(saved, "amsgrad", False):
        raise ValueError("amsgrad is True in state_dict: Collins keeps no maximum of second moments")
    decay, maximize = saved.get("weight_decay", 0), _flag(saved, "maximize", False)
    if not isinstance(decay, Real):
        raise ValueError(f"weight_decay must be a number, got {shown(decay)} in state_dict")
    if decay and not _flag(saved, "decoupled_weight_decay", True):
        raise ValueError(
            f"weight_decay is {decay} in state_dict and not decoupled, as in torch.optim.Adam: it is part of the saved"
            " moments, and Collins would decay weights a second time"
        )
    if maximize != own["maximize"]:
        raise ValueError(
            f"maximize is {maximize} in state_dict and {own['maximize']} in this optimizer: the first moment would have"
            " the wrong sign"
        )


def _flag(saved: Mapping[str, Any], name: str, default: bool) -> bool:
    value = saved.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)} in state_dict")
    return value


def _converted(state: Mapping[str, Any], expected: ExpectedState) -> dict[str, Any]:
    for name, moment in state.items():
        if is_sharded(moment):
            raise ValueError(
                f"{expected.name} cannot be converted: {name} is sharded in state_dict (DTensor), and the new buckets"
                " may need elements of other ranks. Convert the whole state, which get_optimizer_state_dict gathers"
                " under StateDictOptions(full_state_dict=True); Collins loads the result on every rank"
            )
    step = step_of(expected.name, state)
    check_shape(expected.name, "state_dict", state, expected.param_shape)
    m, v = (_from_tables if TABLES[0] in state else _from_dense)(state, expected, int(step))
    moments = {name: torch.zeros(t.shape, dtype=t.dtype, device=m.device) for name, t in expected.tensors.items()}
    parts = {name: [t.view(-1) for key, t in moments.items() if part_of(key) == name] for name in _names(expected)}
    for name, format, values in zip(parts, expected.update.formats, (m, v), strict=True):
        for part, value in zip(parts[name], format.written(parts[name], values.reshape(-1), None), strict=True):
            part.copy_(value)
    mark = {} if expected.fingerprint is None else {LAYOUT: expected.fingerprint.packed()}
    if expected.hash is None and LAYOUT in state and TABLES[0] not in state:
        mark = {LAYOUT: state[LAYOUT]}  # keeps the key of stochastic rounding
    others = other_values(expected.name, state)
    return {**others, "step": torch.tensor(step, dtype=torch.float32, device="cpu"), **moments, **mark}


def _names(expected: ExpectedState) -> tuple[str, str]:
    return DENSE if expected.hash is None else TABLES


def _from_dense(state: Mapping[str, Any], expected: ExpectedState, step: int) -> tuple[Tensor, Tensor]:
    numel, hash = math.prod(expected.param_shape), expected.hash
    if not _keeps_second(state, expected, DENSE[1]):
        m = _first_moment(expected.name, state, DENSE, numel, expected.param_shape, None)
        return m if hash is None else _means(m, hash, step, signed=True), m[:0]
    v = state.get(DENSE[1])
    v_load = 1
    while isinstance(v, Tensor) and 0 < v.numel() < -(-numel // v_load):
        v_load *= 2
    m = _first_moment(expected.name, state, DENSE, numel, expected.param_shape, -(-numel // v_load))
    if isinstance(hash, UniversalHash):
        if v_load > 1:
            raise _undivided(expected.name, f"a second moment for each {v_load} elements")
        return _means(m, hash, step, signed=True), _means(state[DENSE[1]].detach(), hash, step, signed=False)
    return m if hash is None else _means(m, hash, step, signed=True), _coarser(state[DENSE[1]], v_load, expected)


def _keeps_second(state: Mapping[str, Any], expected: ExpectedState, name: str) -> bool:
    """Whether the parameter keeps a second moment, which is saved under `name`.

    Raises:
        ValueError: if it does, and none was saved.
    """
    keeps = expected.update.v_format != NONE
    if keeps and name not in state:
        raise ValueError(
            f"{expected.name} cannot be converted: it keeps a second moment here, and state_dict holds none, as under"
            " decode='orthogonal'. Remove that state to start with new moments"
        )
    return keeps


def _first_moment(
    name: str,
    state: Mapping[str, Any],
    names: tuple[str, str],
    count: int,
    shape: tuple[int, ...] | None,
    v_count: int | None,
) -> Tensor:
    """Checks both saved moments, and returns the `count` entries of the first one, flat.

    Args:
        names: the names of both moments.
        shape: the shape of a first moment that is not stored as integers; None for any shape.
        v_count: entries of the second moment; None if it is dropped.
    """
    found = {key: state[key] for key in state if part_of(key) in (names if v_count is not None else names[:1])}
    integers = found.get(names[0])
    stored = isinstance(integers, Tensor) and integers.dtype in (torch.int8, torch.uint8)
    if stored:
        format = _int_format(cast(Tensor, integers), found.get(names[0] + "_scale"), count)
        shapes = {names[0] + suffix: spec.shape for suffix, spec in format.parts((count,)).items()}
    else:
        shapes = {names[0]: (count,) if shape is None else shape}
    whole = {key: t.reshape(-1) if uncopied(t) is None and (stored or shape is None) else t for key, t in found.items()}
    if v_count is not None:
        shapes[names[1]] = (v_count,)
        if uncopied(found.get(names[1])) is None:
            whole[names[1]] = found[names[1]].reshape(-1)
    check_moments(name, "state_dict", whole, shapes)
    if stored:
        stored_in = [whole[names[0] + suffix].detach() for suffix in format.parts((count,))]
        return format.load(stored_in, count, torch.float32)
    return cast(Tensor, whole[names[0]]).detach().reshape(-1).clone()


def _int_format(integers: Tensor, scales: Any, count: int) -> IntFormat:
    """The format of `count` saved integers, by their dtype and the number of their scales."""
    bits = 8 if integers.dtype is torch.int8 else 4
    formats = [format for format in FORMATS.values() if isinstance(format, IntFormat) and format.bits == bits]
    entries = scales.numel() if isinstance(scales, Tensor) else 0
    fit = [format for format in formats if -(-count // format.block) == entries]
    return (fit or formats)[0]


def _undivided(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name} cannot be converted: state_dict has {what}; buckets cannot be divided: a mean does not determine its"
        " elements"
    )


def _coarser(v: Tensor, load: int, expected: ExpectedState) -> Tensor:
    """A saved second moment of `load` elements per entry, averaged to the load that the optimizer expects.

    The result is a mean of means, each weighted by its bucket's load.
    """
    v, own, numel = v.detach().reshape(-1), int(expected.update.loads[1]), math.prod(expected.param_shape)
    if own % load:
        raise _undivided(expected.name, f"a second moment for each {load} elements where this optimizer has {own}")
    if own == load:
        return v.clone()
    loads = torch.full_like(v, load, dtype=torch.float64)
    loads[-1] = numel - (len(v) - 1) * load
    buckets = torch.arange(len(v), device=v.device) // (own // load)
    sums, counts = torch.zeros(2, -(-numel // own), dtype=torch.float64, device=v.device)
    sums.index_add_(0, buckets, loads * v.double())
    counts.index_add_(0, buckets, loads)
    means: Tensor = sums / counts
    return means


def _means(x: Tensor, hash: BlockHash | UniversalHash, step: int, *, signed: bool) -> Tensor:
    """Each bucket's mean of x, or of s(i) x_i under the signs of this step: float64, shape (K,)."""
    sums = torch.zeros(hash.buckets, dtype=torch.float64, device=x.device)
    for first, piece in _pieces(x.reshape(-1)):
        index = torch.arange(first, first + piece.numel(), device=x.device)
        piece = piece.double() * hash.sign(index, step) if signed else piece.double()
        sums.index_add_(0, hash.bucket(index), piece)
    return sums / _loads(hash, x.device)


def _loads(hash: BlockHash | UniversalHash, device: torch.device) -> Tensor | float:
    if isinstance(hash, UniversalHash):
        return hash.numel / hash.buckets
    return hash.load(torch.arange(hash.buckets, device=device)).double()


def _pieces(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, x.numel(), _PIECE):
        yield first, x[first : first + _PIECE]


def _from_tables(state: Mapping[str, Any], expected: ExpectedState, step: int) -> tuple[Tensor, Tensor]:
    name = expected.name
    if LAYOUT not in state:
        raise ValueError(
            f"{name} has tables in state_dict without the {LAYOUT!r} entry that says how they were encoded"
        )
    saved, own = fingerprint_in(name, state), expected.fingerprint
    if not _keeps_second(state, expected, TABLES[1]):
        m = _first_moment(name, state, TABLES, saved.buckets, None, None)
        if own is None or saved.difference(own) is not None:
            m = torch.zeros(saved.numel if own is None else own.buckets, device=m.device)
        return m, m[:0]
    v_buckets, v_load = _second_buckets(saved, state.get(TABLES[1]))
    m = _first_moment(name, state, TABLES, saved.buckets, None, v_buckets)
    same, own_load = own is not None and saved.difference(own) is None, int(expected.update.loads[1])
    if same and saved.load == 0:
        return m, state[TABLES[1]].detach().reshape(-1).clone()
    if own is not None:
        _check_coarsening(name, saved._replace(load=v_load), own._replace(load=own_load if own.load else 0))
    elif saved.load == 0 or own_load == 1:
        raise ValueError(f"{name} keeps dense moments here; the bucket means in state_dict do not determine them")
    v = _coarser(state[TABLES[1]], v_load, expected)
    entries = math.prod(expected.param_shape) if own is None else own.buckets
    return m if same else torch.zeros(entries, device=v.device), v


def _second_buckets(saved: Fingerprint, v: Tensor | None) -> tuple[int, int]:
    """The number of buckets of a saved second moment, and their load, which is a multiple of the first moment's."""
    buckets, load = saved.buckets, saved.load
    while load and isinstance(v, Tensor) and 0 < v.numel() < buckets:
        load *= 2
        buckets = -(-saved.numel // load)
    return buckets, load


def _check_coarsening(name: str, saved: Fingerprint, own: Fingerprint) -> None:
    difference = saved.difference(own)
    if saved.numel != own.numel or saved.rows != own.rows:
        reason = "these are different parameters"
    elif saved.load == 0 or own.load == 0:
        reason = "elements that share a bucket of hash='universal' do not share one under any other hash"
    elif own.load % saved.load:
        reason = "buckets cannot be divided: a mean does not determine its elements"
    else:
        return
    raise ValueError(f"{name} cannot be converted: state_dict has {difference}; {reason}")
