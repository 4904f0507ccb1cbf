"""Every name of PyTorch that Collins uses and that PyTorch does not promise to keep.

Each name here says what Collins relies on, in which versions of torch it was seen, and what happens where it is absent.
`tests/test_torch_internals.py` holds a contract test for each, and looks for private names in all other files.

Importing this file imports nothing that `import torch` has not imported: torch.compile and DTensor are looked up when
they are called for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_leaves,
    tree_leaves_with_path,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "GUARDS_AVAILABLE",
    "current_raw_stream",
    "dtensor",
    "foreach_add_",
    "foreach_copy_",
    "foreach_norm",
    "is_compile_error",
    "is_fsdp_flattened",
    "keystr",
    "known_options",
    "local_extent",
    "mark_dynamic",
    "post_accumulate_grad_hooks",
    "split_factor",
    "tensor_guards",
    "tree_flatten",
    "tree_leaves",
    "tree_leaves_with_path",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "version_of",
    "waited",
]

# `torch.utils._pytree`: nested tuples, lists, dicts and named tuples as flat lists of leaves, and back. All else is a
# leaf, None and tensors included. Seen in 2.9 to 2.14. Absent, `import collins` fails.

# `torch._foreach_*`: one operation over lists of tensors, in few kernels. `foreach_norm(tensors, ord, dtype)` gives a
# list of 0-d tensors, in the tensors' own dtype unless one is given; the others change their first list in place. Seen
# in 2.9 to 2.14. Absent, `import collins` fails.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_norm = torch._foreach_norm


def _current_raw_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# `torch._C._cuda_getCurrentRawStream`: the address of the current stream of the CUDA device of that index, as an int;
# PyTorch's own compiled code launches with it. Seen in 2.9 to 2.14. Absent, as in builds without CUDA, it is read from
# `torch.cuda.current_stream`, which is public and makes a Python object in each call.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_raw_stream)


def tensor_guards(tensors: Sequence[Tensor]) -> Any:
    """What guards torch.compile's own code: `check(*tensors)` says, in C, whether as many tensors are like `tensors`.

    It compares Python type, dtype, device, sizes, strides, `requires_grad` and dispatch keys, and returns False for
    None. It keeps no tensor. It is `torch._C._dynamo.guards.TensorGuards`, seen in 2.9 to 2.14; ask `GUARDS_AVAILABLE`
    first.
    """
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def _guards_available() -> bool:
    sample, other = (torch.empty(count, device="cpu") for count in (1, 2))
    try:
        guards = tensor_guards([sample])
        return bool(guards.check(sample)) and not guards.check(other)
    except Exception:
        return False


GUARDS_AVAILABLE = _guards_available()
"""Whether `tensor_guards` works in this torch. Where it does not, no step is repeated: each one is checked in full."""


def is_compile_error(error: BaseException) -> bool:
    """Whether torch.compile could not trace or compile, rather than the traced code or its caller being wrong.

    All such errors of Dynamo and Inductor are `torch._dynamo.exc.TorchDynamoException`, seen in 2.9 to 2.14. Absent,
    none is one, and an error in compiling ends the step instead of making it eager.
    """
    module = sys.modules.get("torch._dynamo.exc")  # not imported, it has raised nothing
    kind = getattr(module, "TorchDynamoException", None)
    return kind is not None and isinstance(error, kind)


def mark_dynamic(t: Tensor, dim: int) -> None:
    """Makes torch.compile take the size of a dimension, of at least 2, as a variable, in its first graph already.

    It is `torch._dynamo.mark_dynamic`, seen in 2.9 to 2.14. Absent, the step is an AttributeError.
    """
    torch._dynamo.mark_dynamic(t, dim)


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` for Inductor that this torch has, since `torch.compile` refuses others.

    They are attributes of `torch._inductor.config`, whose names `torch._inductor.list_options` gives: both seen in 2.9
    to 2.14, "deterministic" in 2.10 to 2.14.
    """
    import torch._inductor

    known = set(torch._inductor.list_options())
    return {name: value for name, value in options.items() if name in known}


def post_accumulate_grad_hooks(p: Tensor) -> tuple[Any, ...]:
    """What `p.register_post_accumulate_grad_hook` has registered and not removed, in that order.

    It is `Tensor._post_accumulate_grad_hooks`, None or a dict, seen in 2.9 to 2.14. Absent, there seem to be none: two
    optimizers that step one parameter in backward are then not told.
    """
    return tuple((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())


def version_of(t: Tensor) -> int:
    """How often `t`, or a tensor that shares its counter, has been written to in place.

    It is `Tensor._version`, seen in 2.9 to 2.14. Absent, the step is an AttributeError.
    """
    return t._version


def is_fsdp_flattened(p: Tensor) -> bool:
    """Whether `p` is this rank's part of a parameter in `FullyShardedDataParallel`: an ordinary tensor, and no copy.

    It is the attribute `_fsdp_flattened`, which FSDP sets on its flat parameter and on the views of it, seen in 2.9 to
    2.14. Absent, such a part is taken for a whole parameter.
    """
    return bool(getattr(p, "_fsdp_flattened", False))


def waited(t: Tensor) -> Tensor:
    """`t`, once the collective that writes it is complete: an ordinary tensor where `t` is asynchronous, else `t`.

    It is `AsyncCollectiveTensor.trigger_wait`, seen in 2.9 to 2.14. Absent, `t` waits when it is first used.
    """
    wait: Callable[[], Tensor] | None = getattr(t, "trigger_wait", None)
    return t if wait is None else wait()


def split_factor(placement: object) -> int | None:
    """Into how many shards a dimension was cut before this placement cut them again, None for other placements.

    It is `split_factor` of `torch.distributed.tensor.placement_types._StridedShard`, by which FSDP2 shards what tensor
    parallelism has sharded along the same dimension, seen in 2.9 to 2.14. Absent, such a placement is taken for one
    whose rows are in the order of the mesh, which their extent then contradicts.
    """
    factor: int | None = getattr(placement, "split_factor", None)
    return factor


def dtensor(local: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], strides: Sequence[int]) -> Any:
    """A DTensor of global `shape` and `strides` over `local`, in the same memory and on the same device.

    `DTensor.from_local` moves `local` to the mesh's device. This is its constructor, which takes a `DTensorSpec` of
    `torch.distributed.tensor._dtensor_spec`, seen in 2.9 to 2.14. Absent, a sharded parameter's first step is an
    ImportError or a TypeError.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), tuple(strides), local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def local_extent(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a tensor of global `shape`, and where in each dimension that part begins.

    On a rank outside the mesh the part has no rows. It is
    `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`, seen in 2.9 to 2.14. Absent, a sharded
    parameter is refused with an ImportError when it is added.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, tuple(placements))
    if not offset and shape:  # what is returned outside the mesh is ((0,), ()), whatever the shape
        return (0, *shape[1:]), (0,) * len(shape)
    return tuple(map(int, size)), tuple(map(int, offset))
