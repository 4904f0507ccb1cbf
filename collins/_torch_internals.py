"""All private names of PyTorch that Collins uses, which PyTorch may change or remove.

The text at each name documents the behaviour that Collins relies on, the versions of torch in which it was checked, and
the effect of the name's absence. `tests/test_torch_internals.py` has a contract test for each name, and searches all
other files for private names.

Importing this file imports nothing that `import torch` has not imported: torch.compile and DTensor are imported at
their first use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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
    "dispatching_to_autograd",
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

# `torch.utils._pytree`: converts nested tuples, lists, dicts and named tuples to flat lists of leaves, and back. All
# other values are leaves, None and tensors included. Seen in 2.9 to 2.14. If absent, `import collins` fails.

# `torch._foreach_*`: one operation over lists of tensors, in few kernels. `foreach_norm(tensors, ord, dtype)` returns a
# list of 0-d tensors, in the tensors' own dtype unless `dtype` is given; the others change their first list in place.
# Seen in 2.9 to 2.14. If absent, `import collins` fails.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_norm = torch._foreach_norm


def _current_raw_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# `torch._C._cuda_getCurrentRawStream`: the address of the current stream of the CUDA device of that index, as an int;
# PyTorch's compiled code uses it for launches. Seen in 2.9 to 2.14. If absent, as in builds without CUDA, the address
# is read from the public `torch.cuda.current_stream`, which creates a Python object in each call.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_raw_stream)


def tensor_guards(tensors: Sequence[Tensor]) -> Any:
    """The guards of torch.compile: `check(*others)` tells, in C, whether the same number of tensors match `tensors`.

    It compares Python type, dtype, device, sizes, strides, `requires_grad` and dispatch keys, and returns False for
    None. It keeps no reference to a tensor. It is `torch._C._dynamo.guards.TensorGuards`, seen in 2.9 to 2.14; check
    `GUARDS_AVAILABLE` first.
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


def dispatching_to_autograd() -> AbstractContextManager[Any]:
    """A context in which operators on tensors take autograd's kernels, also within `TorchDispatchMode`.

    torch.compile makes the first call of a compiled function within such a mode, which hides autograd's dispatch keys.
    Guards compare those keys, so that they would reject the same tensors in all later calls. It is
    `torch._C._ForceDispatchKeyGuard` with `_dispatch_tls_local_include_set` and `_dispatch_tls_local_exclude_set`, seen
    in 2.11 and 2.13. If absent, the step raises an AttributeError.
    """
    hidden = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)  # as for every other device
    hidden |= torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    context: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(included, excluded - hidden)
    return context


GUARDS_AVAILABLE = _guards_available()
"""Whether `tensor_guards` works in this torch. If not, no program is run again: every step checks all parameters."""


def is_compile_error(error: BaseException) -> bool:
    """Whether an error means that torch.compile could not trace or compile, rather than that the traced code is wrong.

    All such errors of Dynamo and Inductor are `torch._dynamo.exc.TorchDynamoException`, seen in 2.9 to 2.14. If absent,
    this returns False, and a compile error is raised from the step instead of making the step eager.
    """
    module = sys.modules.get("torch._dynamo.exc")  # a module that was never imported cannot have raised
    kind = getattr(module, "TorchDynamoException", None)
    return kind is not None and isinstance(error, kind)


def mark_dynamic(t: Tensor, dim: int) -> None:
    """Makes torch.compile treat the size of a dimension, at least 2, as a variable from its first graph on.

    It is `torch._dynamo.mark_dynamic`, seen in 2.9 to 2.14. If absent, the step raises an AttributeError.
    """
    torch._dynamo.mark_dynamic(t, dim)


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The subset of Inductor's `options` that this torch has, since `torch.compile` raises for unknown ones.

    They are attributes of `torch._inductor.config`, and `torch._inductor.list_options` returns their names: both seen
    in 2.9 to 2.14, "deterministic" in 2.10 to 2.14.
    """
    import torch._inductor

    known = set(torch._inductor.list_options())
    return {name: value for name, value in options.items() if name in known}


def post_accumulate_grad_hooks(p: Tensor) -> tuple[Any, ...]:
    """The hooks that `p.register_post_accumulate_grad_hook` has registered and that were not removed, in order.

    It is `Tensor._post_accumulate_grad_hooks`, None or a dict, seen in 2.9 to 2.14. If absent, this returns no hooks,
    and two optimizers that step the same parameter in backward are not detected.
    """
    return tuple((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())


def version_of(t: Tensor) -> int:
    """The number of in-place writes to `t` and to the tensors that share its counter.

    It is `Tensor._version`, seen in 2.9 to 2.14. If absent, the step raises an AttributeError.
    """
    return t._version


def is_fsdp_flattened(p: Tensor) -> bool:
    """Whether `p` is this rank's part of a parameter of `FullyShardedDataParallel`, which is an ordinary tensor.

    It is the attribute `_fsdp_flattened`, which FSDP sets on its flat parameter and on the views of it, seen in 2.9 to
    2.14. If absent, such a part is treated as a whole parameter.
    """
    return bool(getattr(p, "_fsdp_flattened", False))


def waited(t: Tensor) -> Tensor:
    """Waits for the collective that writes `t`; returns an ordinary tensor where `t` is asynchronous, else `t`.

    It is `AsyncCollectiveTensor.trigger_wait`, seen in 2.9 to 2.14. If absent, `t` waits at its first use.
    """
    wait: Callable[[], Tensor] | None = getattr(t, "trigger_wait", None)
    return t if wait is None else wait()


def split_factor(placement: object) -> int | None:
    """The number of shards of a dimension before this placement shards each of them again; None for other placements.

    It is `split_factor` of `torch.distributed.tensor.placement_types._StridedShard`, with which FSDP2 shards a
    dimension that tensor parallelism has sharded already, seen in 2.9 to 2.14. If absent, such a placement is treated
    as one whose rows are in mesh order, and the check of the rows' extent then raises.
    """
    factor: int | None = getattr(placement, "split_factor", None)
    return factor


def dtensor(local: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], strides: Sequence[int]) -> Any:
    """A DTensor of global `shape` and `strides` over `local`, in the same memory and on the same device.

    `DTensor.from_local` would move `local` to the mesh's device. This calls the constructor, which takes a
    `DTensorSpec` of `torch.distributed.tensor._dtensor_spec`, seen in 2.9 to 2.14. If absent, the first step of a
    sharded parameter raises an ImportError or a TypeError.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), tuple(strides), local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def local_extent(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a tensor of global `shape`, and the part's offset in each dimension.

    On a rank outside the mesh the part has no rows. It is
    `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`, seen in 2.9 to 2.14. If absent, adding a
    sharded parameter raises an ImportError.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, tuple(placements))
    if not offset and shape:  # outside the mesh the function returns ((0,), ()) for any shape
        return (0, *shape[1:]), (0,) * len(shape)
    return tuple(map(int, size)), tuple(map(int, offset))
