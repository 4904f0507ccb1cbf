"""Specs of parameters (moments, hash, slice), and all checks of parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from collins._torch_internals import is_fsdp_flattened
from collins.bucketing import Bucketing, moment_shape
from collins.checkpoint import (
    DENSE,
    TABLES,
    ExpectedState,
    check_moments,
    check_shape,
    is_moment,
    step_of,
)
from collins.entries import Hash, ParamEntry, ParamSpec
from collins.fingerprint import LAYOUT, Fingerprint, dense_fingerprint, fingerprint, unpacked
from collins.formats import FORMATS, TensorSpec
from collins.hashing import BlockHash, HashKey, UniversalHash, hash_key
from collins.options import check_table_dtype, listed
from collins.orthogonal import parts_of_rows
from collins.readable import unreadable
from collins.roles import Role, found_roles, role_under
from collins.rounding import ROUNDED
from collins.rule import ORTHOGONAL
from collins.schemes import Scheme, decode_of, scheme_under
from collins.sharding import Slice, check_whole, is_placed_like, is_sharded, local, local_gradient, slice_of
from collins.update import HashKeys, UpdateSpec, UpdateTask

LaunchOf = Callable[[UpdateSpec, Tensor, int], Any]

PARAM_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The group options on which a ParamSpec depends.
PLANNED = (
    "role",
    "compress_ratio",
    "v_compress_ratio",
    "min_K",
    "hash",
    "decode",
    "row_parts",
    "rehash_period",
    "table_dtype",
    "maximize",
    "stochastic_rounding",
    "nonfinite",
    "capturable",
)


class _Store(Protocol):
    """The part of a `collins.offload.tiers.Store` that the checks of moments use."""

    def serves(self, p: Tensor, moment: Tensor) -> bool:
        """Whether a step of `p` can use this moment."""


def settings_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values on which the specs of a group's parameters depend, beside their shapes."""
    return tuple(group[name] for name in PLANNED)


def check_param(name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Raises an error for a parameter that cannot be stepped under the options of its group.

    Frozen parameters are never stepped and may have any dtype.

    Raises:
        TypeError: for a layout or a dtype that is not accepted, or a parameter of `FullyShardedDataParallel`.
        ValueError: for a placement that is not accepted.
    """
    if p.layout != torch.strided:
        raise TypeError(f"{name} has layout {p.layout}; Collins accepts torch.strided parameters")
    if is_fsdp_flattened(p):
        raise TypeError(
            f"{name} was flattened and sharded by FullyShardedDataParallel, whose parts an optimizer cannot tell from"
            " whole parameters; Collins accepts parameters that torch.distributed.fsdp.fully_shard has sharded"
        )
    if p.requires_grad or p.grad is not None:
        _check_dtype(name, p)
        check_table_dtype(name, p.dtype, group["table_dtype"])
        if is_lazy(p):  # it has no shape before the first forward
            return
        (found,) = found_roles([(None, tuple(p.shape))])  # from its shape only: other parameters are not known yet
        role = role_under(found, p.numel(), group).kind
        if group["role"] != "auto":
            row_parts_of(name, p, group, role)
        if is_sharded(p):
            _slice_of(name, p, group, role, scheme_of(p, group, role))


def _check_dtype(name: str, p: Tensor) -> None:
    if p.dtype not in PARAM_DTYPES:
        raise TypeError(f"{name} has dtype {p.dtype}; Collins accepts {listed(PARAM_DTYPES)}")


def role_of(entry: ParamEntry) -> Role:
    """The role of a parameter under the options of its group."""
    assert entry.found is not None
    return role_under(entry.found, entry.p.numel(), entry.group)


def scheme_of(p: Tensor, group: Mapping[str, Any], role: str) -> Scheme:
    """The storage scheme of the moments of `p`, a parameter of this role."""
    return scheme_under(tuple(p.shape), p.dtype, group, role, sharded=is_sharded(p))


def rounds(p: Tensor, formats: Iterable[str], group: Mapping[str, Any]) -> bool:
    """Whether a step rounds the parameter or its moments stochastically."""
    rounded = p.dtype in ROUNDED or any(FORMATS[name].rounds for name in formats)
    return group["stochastic_rounding"] is not False and rounded


def row_parts_of(name: str, p: Tensor, group: Mapping[str, Any], role: str) -> tuple[int, ...]:
    """The rows of the matrices into which `p`, a parameter of this role, is cut; () if it is not orthogonalised."""
    if decode_of(group, role) != ORTHOGONAL:
        return ()
    return parts_of_rows(name, tuple(p.shape), group["row_parts"])


def _slice_of(name: str, p: Tensor, group: Mapping[str, Any], role: str, scheme: Scheme) -> Slice | None:
    """This rank's part of `p`, a parameter of this role and scheme; None for an ordinary tensor."""
    if decode_of(group, role) == ORTHOGONAL:
        check_whole(name, p)
    return slice_of(name, p, scheme.v, rounding=rounds(p, scheme.formats, group))


def state_tensors(shape: Sequence[int], scheme: Scheme) -> tuple[dict[str, TensorSpec], int]:
    """The tensors that store both moments of a parameter of this shape.

    Returns:
        The tensors, by their names in the state, and the number of those of the first moment.
    """
    names = DENSE if scheme.m.hash is None else TABLES
    found: list[dict[str, TensorSpec]] = []
    for name, bucketing, format in zip(names, (scheme.m, scheme.v), scheme.formats, strict=True):
        parts = FORMATS[format].parts(moment_shape(bucketing, tuple(shape)))
        found.append({name + suffix: spec for suffix, spec in parts.items()})
    return {**found[0], **found[1]}, len(found[0])


def spec_of(entry: ParamEntry, settings: tuple[Any, ...], seed: int, launch_of: LaunchOf) -> ParamSpec:
    """The spec of a parameter under its group's settings."""
    p, group, key = entry.p, entry.group, entry.key
    if p.requires_grad or p.grad is not None:
        _check_dtype(entry.name, p)
        check_table_dtype(entry.name, p.dtype, group["table_dtype"])
    role = role_of(entry)
    scheme = scheme_of(p, group, role.kind)
    first, second = scheme.m, scheme.v
    period, hash = group["rehash_period"], _hash_of(entry, first, seed)
    rehash = first.hash == "block" and period is not None
    update = UpdateSpec(
        first.hash,
        first.load,
        decode_of(group, role.kind),
        rehash,
        rounds(p, scheme.formats, group),
        group["maximize"],
        group["nonfinite"] == "skip",
        scheme.m_format,
        scheme.v_format,
        None if first.load == second.load else second.load,
        row_parts=row_parts_of(entry.name, p, group, role.kind),
    )
    sign_key = hash.sign_key if isinstance(hash, BlockHash) else HashKey(0, 0)
    part = _slice_of(entry.name, p, group, role.kind, scheme)
    tensors, first_count = state_tensors(p.shape, scheme)
    return ParamSpec(
        settings=settings,
        role=role,
        kind=type(p),
        size=p.shape,
        dtype=p.dtype,
        device=p.device,
        update=update,
        keys=HashKeys(sign_key, hash_key(seed, key, "round"), (0, 0, 0, 0), period or 0),
        hash=hash,
        numel=p.numel(),
        tensors=tensors,
        first_count=first_count,
        slice=part,
        launch=launch_of(update, local(p), part.start if part else 0),
    )


def _hash_of(entry: ParamEntry, bucketing: Bucketing, seed: int) -> Hash | None:
    """The hash of a parameter: the same object as long as shape, buckets and key are the same."""
    numel, key = entry.p.numel(), entry.key
    if bucketing.hash == "block":
        period = entry.group["rehash_period"]
        return BlockHash(numel, int(bucketing.load), seed=seed, key=key, period=period)
    if bucketing.hash is None:
        return None
    hash = entry.universal
    if hash is None or (hash.numel, hash.buckets, hash.key) != (numel, bucketing.buckets, key):
        hash = entry.universal = UniversalHash(numel, bucketing.buckets, seed=seed, key=key)
    return hash


def fingerprint_of(entry: ParamEntry, seed: int) -> Fingerprint | None:
    """The fingerprint of the tables of a parameter; None for dense moments."""
    spec = entry.known_spec
    return None if spec.hash is None else fingerprint(spec.size[0], spec.hash, seed, entry.key)


def mark_of(entry: ParamEntry, seed: int) -> Fingerprint | None:
    """The fingerprint to save in a parameter's state; None for dense moments without stochastic rounding."""
    spec = entry.known_spec
    if spec.hash is None and spec.update.rounding and spec.numel:
        return dense_fingerprint(spec.numel, spec.size[0] if spec.size else 1, seed, entry.key)
    return fingerprint_of(entry, seed)


def expected_state(entry: ParamEntry, seed: int) -> ExpectedState:
    """The required state of a parameter."""
    spec = entry.known_spec
    sharded = None if spec.slice is None else entry.p
    own, mark = fingerprint_of(entry, seed), mark_of(entry, seed)
    return ExpectedState(entry.name, tuple(spec.size), spec.tensors, spec.update, spec.hash, own, seed, sharded, mark)


def task_of(entry: ParamEntry, skipped: Tensor | None = None) -> UpdateTask:
    """The update task of a parameter, over this rank's parts of its moments; `skipped` is as in `UpdateTask`."""
    if entry.task is not None:
        return entry.task
    spec, moments = entry.known_spec, [local(moment) for moment in entry.moments or ()]
    keys, p, start = spec.keys, entry.p, 0
    if isinstance(spec.hash, UniversalHash):
        keys = keys._replace(universal=spec.hash.coefficients)
    if spec.slice is not None:
        p, start = local(p), spec.slice.start
    m, v = tuple(moments[: spec.first_count]), tuple(moments[spec.first_count :])
    task = UpdateTask(p, m, v, spec.update, keys, spec.numel, start, spec.launch, skipped)
    if spec.slice is None:  # a sharded parameter may have another local tensor in the next step
        entry.task = task
    return task


def gradient_of(entry: ParamEntry, g: Tensor) -> Tensor:
    """Checks the gradient of a parameter; returns this rank's part of it if the parameter is sharded.

    Raises:
        TypeError, ValueError: for a gradient that is sparse, or whose shape, dtype, device or kind is not the
            parameter's.
    """
    spec = entry.known_spec
    plain = spec.slice is None and type(g) is Tensor and g.dtype is spec.dtype and g.layout is torch.strided
    if plain and g.shape == spec.size and g.device == spec.device and not g.is_neg():
        return g
    if g.layout != torch.strided:
        raise TypeError(f"the gradient of {entry.name} has layout {g.layout}; Collins accepts torch.strided gradients")
    for what, got, accepted in (
        ("shape", g.shape, spec.size),
        ("dtype", g.dtype, spec.dtype),
        ("device", g.device, spec.device),
    ):
        if got != accepted:
            raise ValueError(f"the gradient of {entry.name} must have its {what} {accepted}, got {got}")
    if spec.slice is not None:
        return local_gradient(entry.name, g, entry.p)
    if is_sharded(g):
        raise TypeError(f"the gradient of {entry.name} must be a plain tensor as the parameter is, got a DTensor")
    return g.resolve_neg()


def check_state(entry: ParamEntry, state: Mapping[str, Any], seed: int, store: _Store) -> None:
    """Raises a ValueError, naming the parameter, for a state that its next step cannot use."""
    spec, own = entry.known_spec, fingerprint_of(entry, seed)
    if not has_moments(state):
        return
    _check_values(entry, state)
    difference = unpacked(state[LAYOUT]).difference(own) if own is not None and LAYOUT in state else None
    fits = set(filter(is_moment, state)) == spec.tensors.keys() and all(
        isinstance(state[name], Tensor) and state[name].shape == due.shape for name, due in spec.tensors.items()
    )
    if difference or not fits:
        check_shape(entry.name, "the optimizer", state, tuple(spec.size))
    if difference:
        raise ValueError(
            f"{entry.name} has tables that the current options cannot decode: they were encoded with {difference}. Set"
            " it back, remove the parameter's state to start with new moments, or see collins.convert"
        )
    if not fits:
        held = {name: value for name, value in state.items() if is_moment(name)}
        check_moments(entry.name, "the optimizer", held, spec.shapes)
    for name, due in spec.tensors.items():
        moment = state[name]
        if not is_placed_like(moment, entry.p):
            raise ValueError(
                f"{entry.name} has been sharded or unsharded since its moments were allocated: build Collins after that"
            )
        if moment.dtype != due.dtype:
            raise ValueError(
                f"{name} of {entry.name} must have the dtype {due.dtype}, which follows from its group's table_dtype"
                f" for a parameter of {spec.dtype}, got {moment.dtype}"
            )
        if not store.serves(entry.p, moment):
            raise ValueError(
                f"{name} of {entry.name} must be where its step needs it, got one on {moment.device} for a"
                f" parameter on {spec.device}: move both, or call load_state_dict(state_dict()) after moving the"
                " parameter"
            )


def _check_values(entry: ParamEntry, state: Mapping[str, Any]) -> None:
    """Raises a ValueError for a counter without a valid number, and for moments that cannot be read."""
    step, p = state.get("step"), entry.p
    # A counter on the device is not read there: this would synchronize.
    unread = isinstance(step, Tensor) and entry.group["capturable"] and step.device == p.device and not p.is_cpu
    if not unread:
        step_of(entry.name, state, "the optimizer")
    for name in entry.known_spec.tensors:
        moment = state.get(name)
        # The device of a moment is compared below.
        problem = unreadable(moment) if isinstance(moment, Tensor) and not moment.is_meta else None
        if problem is not None:
            raise ValueError(
                f"{entry.name} must have a {name} that is a dense tensor with data; the optimizer holds {problem}"
            )


def has_moments(state: Mapping[str, Any]) -> bool:
    """Whether a state has entries of Collins, not only those of wrappers."""
    return "step" in state or any(map(is_moment, state))
