"""Parameters that FSDP2 or tensor parallelism has sharded as DTensors: this rank's parts of them and of their moments.

Layout, signs and random bits of a parameter's moments are derived from the whole parameter. So they are the same on all
ranks and for every number of ranks, and the results on each rank are bitwise those of a single process. Moments are
DTensors placed like their parameter, so that `torch.distributed.checkpoint` can reshard them; it would treat plain
tensors that differ between ranks as replicas, without an error.

This module does not import DTensor: if nobody else has imported it, there are no sharded parameters.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import dtensor, local_extent, split_factor, waited
from collins.bucketing import Bucketing

_MODULE = "torch.distributed.tensor"
_DEEPSPEED = "deepspeed.runtime.base_optimizer"


class Slice(NamedTuple):
    """This rank's part of a parameter."""

    start: int  # the row-major index of its first element in the whole parameter
    shape: tuple[int, ...]  # the shape of the local tensor


def is_sharded(t: object) -> bool:
    """Whether `t` is a DTensor, which may be sharded over several ranks or replicated."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, in the same memory; the tensor itself if it is not a DTensor."""
    if not is_sharded(t):
        return t
    with torch.no_grad():  # if gradients were recorded, `to_local` would return a view
        part: Tensor = t.to_local()  # type: ignore[attr-defined]
    return waited(part)


def check_whole(name: str, p: Tensor) -> None:
    """Raises a ValueError, naming the parameter, if this rank has only a part of it."""
    if not is_sharded(p):
        return
    found: Any = p
    sizes = [
        found.device_mesh.size(dim) for dim, placement in enumerate(found.placements) if not placement.is_replicate()
    ]
    if math.prod(sizes) > 1:
        raise ValueError(
            f"{name} is a DTensor placed as {_text(found.placements)} over {math.prod(sizes)} ranks, and decode is"
            " 'orthogonal', which needs the whole matrix: Collins accepts it on one rank, or replicated. Otherwise put"
            " it into a group of its own with decode='residual'"
        )


def slice_of(name: str, p: Tensor, layout: Bucketing, *, rounding: bool) -> Slice | None:
    """This rank's part of the parameter `p`, or None for an ordinary tensor.

    Args:
        name: the parameter's name, for errors.
        layout: the layout of its second moment, which is the coarser one.
        rounding: whether the step rounds stochastically, with random bits for each element.

    Raises:
        ValueError: for a placement or a hash with which a rank could not step its part by itself.
    """
    if not is_sharded(p):
        return None
    if layout.hash == "universal":
        raise ValueError(
            f"{name} is a DTensor, and hash is 'universal', whose buckets have elements on every rank: use"
            " hash='block', or compress_ratio=1 for exact moments"
        )
    found: Any = p
    shape, offset = _extent(p, tuple(p.shape))
    if not _is_rows(p) and (layout.hash is not None or rounding or _partial(found.placements)):
        raise ValueError(
            f"{name} is a DTensor placed as {_text(found.placements)}; Collins accepts Replicate() and Shard(0), under"
            " which buckets and words of random bits stay whole. In a group of its own with compress_ratio=1 and, for"
            " parameters or tables of 16 bits, stochastic_rounding=False, it may be sharded along any dimension"
        )
    return Slice(offset[0] * math.prod(p.shape[1:]) if offset else 0, shape)


def placed(part: Tensor, p: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of global `shape`, placed like `p`, with `part` as this rank's part; `part` itself for an ordinary `p`.

    Dimension 0 must be that of `p`, unless no dimension is sharded. `part` stays on its device, which for parameters
    that FSDP2 keeps on the host is not that of the mesh.
    """
    if not is_sharded(p):
        return part
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    like: Any = p
    whole: Tensor = dtensor(part, like.device_mesh, like.placements, shape, strides)
    return whole


def is_placed_like(t: Tensor, p: Tensor) -> bool:
    """Whether both are ordinary tensors, or both are DTensors with the same placements on the same mesh."""
    first: Any = t
    second: Any = p
    if not (is_sharded(t) and is_sharded(p)):
        return is_sharded(t) == is_sharded(p)
    return bool(first.device_mesh == second.device_mesh and first.placements == second.placements)


def local_gradient(name: str, g: Tensor, p: Tensor) -> Tensor:
    """The gradient of this rank's part of a sharded parameter.

    A gradient with other placements, such as a partial one that must be summed over ranks, is redistributed first,
    which is a collective operation.

    Raises:
        TypeError: if the gradient is not a DTensor.
        ValueError: if the gradient is on another mesh.
    """
    if not is_sharded(g):
        raise TypeError(f"the gradient of {name} must be a DTensor as the parameter is, got a plain tensor")
    gradient: Any = g
    like: Any = p
    if gradient.device_mesh != like.device_mesh:
        raise ValueError(f"the gradient of {name} must be on {like.device_mesh}, got {gradient.device_mesh}")
    if gradient.placements != like.placements:
        g = gradient.redistribute(placements=like.placements)
    return local(g)


def saved_part(name: str, key: str, saved: Tensor, p: Tensor | None) -> Tensor:
    """This rank's part of a saved moment.

    Args:
        name: the name of the parameter, for errors.
        key: the name of the moment, for errors.
        saved: a DTensor placed like `p`, or a whole tensor.
        p: the parameter if it is a DTensor, else None.

    Raises:
        ValueError: for a DTensor with other placements than `p`.
    """
    if p is None or not is_sharded(p):
        if is_sharded(saved):
            raise ValueError(
                f"{name} is not a DTensor here, but {key} is one in state_dict: gather it on every rank with"
                " torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)"
            )
        return saved
    if is_sharded(saved):
        if not is_placed_like(saved, p):
            given: Any = saved
            like: Any = p
            raise ValueError(
                f"{name} is placed as {_text(like.placements)} on {like.device_mesh}, and {key} in state_dict as"
                f" {_text(given.placements)} on {given.device_mesh}: load it with torch.distributed.checkpoint, which"
                " reshards"
            )
        return local(saved)
    shape, offset = _extent(p, tuple(saved.shape))
    return saved[tuple(slice(first, first + count) for first, count in zip(offset, shape, strict=True))]


def agreed(flags: Sequence[bool], params: Sequence[Tensor]) -> list[bool]:
    """`flags`, one for each parameter; the flag of a sharded parameter is set if it is set on all ranks of its mesh.

    This takes one collective operation for each dimension of each mesh, and none without sharded parameters.
    """
    result = list(flags)
    by_mesh: dict[Any, list[int]] = {}
    for place, p in enumerate(params):
        if is_sharded(p):
            by_mesh.setdefault(p.device_mesh, []).append(place)  # type: ignore[attr-defined]
    for mesh, places in by_mesh.items():
        votes = torch.tensor([result[place] for place in places], dtype=torch.int32, device=mesh.device_type)
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dim))
        for place, vote in zip(places, votes.tolist(), strict=True):
            result[place] = bool(vote)
    return result


def sharded_over(p: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a DTensor, and the mesh dimensions over which it is sharded; None if it is whole on every rank."""
    like: Any = p
    dims = tuple(dim for dim, placement in enumerate(like.placements) if not placement.is_replicate())
    return (like.device_mesh, dims) if math.prod(like.device_mesh.size(dim) for dim in dims) > 1 else None


def norm_over(norm: Tensor, mesh: Any, dims: Sequence[int]) -> Tensor:
    """The norm of tensors that are sharded over dimensions of a mesh, given the norm of this rank's parts.

    This takes one collective operation for each dimension.
    """
    squares = norm.to(mesh.device_type, torch.float64).square()
    for dim in dims:
        torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt().to(norm.dtype)


def _extent(p: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the offset of this rank's part of a tensor of global `shape` that is placed like `p`."""
    like: Any = p
    return local_extent(shape, like.device_mesh, like.placements)


def _is_rows(p: Tensor) -> bool:
    """Whether every rank's part consists of consecutive rows; the answer is the same on all ranks."""
    like: Any = p
    ways = [
        (placement, like.device_mesh.size(dim))
        for dim, placement in enumerate(like.placements)
        if not placement.is_replicate()
    ]
    if any(getattr(placement, "dim", None) != 0 for placement, _ in ways):
        return False
    # With FSDP2 over tensor parallelism along the same dimension, rows are distributed over the inner mesh dimension
    # first, which is recorded as _StridedShard. Parts are consecutive rows if the rows divide evenly.
    factors = [(i, split_factor(placement)) for i, (placement, _) in enumerate(ways)]
    strided = [(i, factor) for i, factor in factors if factor is not None]
    inner = [math.prod(size for _, size in ways[i + 1 :]) for i, _ in strided]
    evenly = not strided or p.shape[0] % math.prod(size for _, size in ways) == 0
    return evenly and [factor for _, factor in strided] == inner


def _partial(placements: Sequence[Any]) -> bool:
    return any(placement.is_partial() for placement in placements)


def _text(placements: Sequence[Any]) -> str:
    return f"({', '.join(map(repr, placements))})"


def refuse_flat_partitions(groups: Sequence[dict[str, Any]]) -> None:
    """Raises a RuntimeError if DeepSpeed has replaced the parameters of these groups by flat partitions.

    ZeRO of every stage concatenates the parameters of a group and passes this rank's part of it to the optimizer as one
    vector. Such a vector has neither rows nor names, biases and norms would be compressed like everything else, and its
    buckets would depend on the number of ranks. DeepSpeed's optimizers, which hold the groups, are searched for among
    all objects, so call this only when parameters have changed.
    """
    deepspeed = sys.modules.get(_DEEPSPEED)
    if deepspeed is None:
        return
    for wrapper in [one for one in gc.get_objects() if issubclass(type(one), deepspeed.DeepSpeedOptimizer)]:
        flat = isinstance(wrapper, deepspeed.ZeROOptimizer) or hasattr(wrapper, "fp32_groups_flat")
        if flat and getattr(getattr(wrapper, "optimizer", None), "param_groups", None) is groups:
            raise RuntimeError(
                f"{type(wrapper).__name__} of DeepSpeed has replaced parameters by flat partitions: Collins needs whole"
                " parameters, whose rows, names and sizes determine how their moments are stored. Set ZeRO stage 0, or"
                " shard the model with torch.distributed.fsdp.fully_shard. With 0.2 byte of state per parameter, ZeRO"
                " stage 1 would save little"
            )
