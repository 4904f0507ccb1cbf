"""Parameters that are sharded as DTensors, by FSDP2 or tensor parallelism: what part of them is here, and of what.

Which moments a parameter has, and with which signs and random bits it is stepped, is decided on the whole parameter. So
all ranks agree on it, it does not change with their number, and each steps its part to the bits that one process would
have come to. Moments are DTensors placed like their parameter, which is what `torch.distributed.checkpoint` reshards;
plain tensors that differ between ranks it would silently take for copies of each other.

Nothing here imports DTensor before somebody else has: without it there is no sharded parameter.
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

    start: int  # the number of its first element in the whole parameter, row-major
    shape: tuple[int, ...]  # of the local tensor


def is_sharded(t: object) -> bool:
    """Whether `t` is a DTensor, which may be sharded over several ranks or whole on each."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, in the same memory: all of it unless it is a DTensor."""
    if not is_sharded(t):
        return t
    with torch.no_grad():  # where gradients are recorded, what comes back is a view
        part: Tensor = t.to_local()  # type: ignore[attr-defined]
    return waited(part)


def check_whole(name: str, p: Tensor) -> None:
    """Raises a ValueError, naming the parameter, for one of which this rank may have a part only."""
    if not is_sharded(p):
        return
    found: Any = p
    sizes = [
        found.device_mesh.size(dim) for dim, placement in enumerate(found.placements) if not placement.is_replicate()
    ]
    if math.prod(sizes) > 1:
        raise ValueError(
            f"{name} is a DTensor placed as {_text(found.placements)} over {math.prod(sizes)} ranks, and decode is"
            " 'orthogonal', which takes the whole matrix at once: Collins accepts it on one rank, or replicated. In a"
            " group of its own give it decode='residual'"
        )


def slice_of(name: str, p: Tensor, layout: Bucketing, *, rounding: bool) -> Slice | None:
    """Which part of the parameter `p` is here, or None for an ordinary tensor.

    Args:
        name: for errors.
        layout: of the parameter's second moment, the coarser one.
        rounding: whether the step rounds stochastically, with random bits for each element.

    Raises:
        ValueError: for a placement, or a hash, under which a rank could not step its part on its own.
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
    """A tensor of global `shape` of which `part` is this rank's, placed like `p`; `part` itself for ordinary `p`.

    Dimension 0 is that of `p`, or else no dimension is sharded. `part` stays on its device, as FSDP2 leaves a parameter
    that it keeps on the host.
    """
    if not is_sharded(p):
        return part
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    like: Any = p
    whole: Tensor = dtensor(part, like.device_mesh, like.placements, shape, strides)
    return whole


def is_placed_like(t: Tensor, p: Tensor) -> bool:
    """Whether both are ordinary tensors, or DTensors placed alike on the same ranks."""
    first: Any = t
    second: Any = p
    if not (is_sharded(t) and is_sharded(p)):
        return is_sharded(t) == is_sharded(p)
    return bool(first.device_mesh == second.device_mesh and first.placements == second.placements)


def local_gradient(name: str, g: Tensor, p: Tensor) -> Tensor:
    """The gradient of this rank's part of a sharded parameter.

    A gradient that is placed otherwise, such as one that is still to be summed over ranks, is redistributed first; that
    is a collective operation.

    Raises:
        TypeError: for a gradient that is no DTensor.
        ValueError: for one on other ranks.
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
    """This rank's part of a saved moment for the parameter `p`; None: a parameter that is whole here.

    Args:
        name: of the parameter, for errors.
        key: of the moment, for errors.
        saved: a DTensor placed like `p`, or a whole tensor.

    Raises:
        ValueError: for a DTensor that is placed otherwise.
    """
    if p is None or not is_sharded(p):
        if is_sharded(saved):
            raise ValueError(
                f"{name} is no DTensor here, but {key} is one in state_dict: make it whole on every rank with"
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
    """`flags`, one for each parameter; for sharded ones, whether it is set on all ranks that have a part of it.

    A collective operation for each mesh, none without sharded parameters.
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
    """The mesh of a DTensor, and those of its dimensions that `p` is cut along; None if it is whole on every rank."""
    like: Any = p
    dims = tuple(dim for dim, placement in enumerate(like.placements) if not placement.is_replicate())
    return (like.device_mesh, dims) if math.prod(like.device_mesh.size(dim) for dim in dims) > 1 else None


def norm_over(norm: Tensor, mesh: Any, dims: Sequence[int]) -> Tensor:
    """The norm of what is cut along dimensions of a mesh, from that of this rank's part: a collective for each."""
    squares = norm.to(mesh.device_type, torch.float64).square()
    for dim in dims:
        torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt().to(norm.dtype)


def _extent(p: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a tensor of global `shape` placed like `p`, and where in it that part begins."""
    like: Any = p
    return local_extent(shape, like.device_mesh, like.placements)


def _is_rows(p: Tensor) -> bool:
    """Whether this rank's part is consecutive rows, on whatever rank this is asked."""
    like: Any = p
    ways = [
        (placement, like.device_mesh.size(dim))
        for dim, placement in enumerate(like.placements)
        if not placement.is_replicate()
    ]
    if any(getattr(placement, "dim", None) != 0 for placement, _ in ways):
        return False
    # FSDP2 over tensor parallelism along the same dimension: rows are dealt out in the order of the inner mesh
    # dimension first, which _StridedShard says. They are consecutive where they divide evenly.
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
    """Raises a RuntimeError if DeepSpeed has put flat partitions in the place of the parameters of these groups.

    ZeRO of every stage concatenates the parameters of a group and gives the optimizer this rank's part of that as one
    vector. It has neither rows nor names, biases and norms are compressed along with everything else, and its buckets
    go by the number of ranks. DeepSpeed's own optimizers, which hold the group, are looked for among all objects: call
    this when parameters have changed.
    """
    deepspeed = sys.modules.get(_DEEPSPEED)
    if deepspeed is None:
        return
    for wrapper in [one for one in gc.get_objects() if issubclass(type(one), deepspeed.DeepSpeedOptimizer)]:
        flat = isinstance(wrapper, deepspeed.ZeROOptimizer) or hasattr(wrapper, "fp32_groups_flat")
        if flat and getattr(getattr(wrapper, "optimizer", None), "param_groups", None) is groups:
            raise RuntimeError(
                f"{type(wrapper).__name__} of DeepSpeed has put flat partitions in the place of parameters: Collins"
                " needs whole parameters, whose rows, names and sizes decide how their moments are kept. Set ZeRO"
                " stage 0, or shard the model by torch.distributed.fsdp.fully_shard. Tables of 0.25 byte per parameter"
                " leave ZeRO stage 1 little to divide"
            )
