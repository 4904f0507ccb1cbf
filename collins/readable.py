"""Checks whether values are dense tensors that can be read, copied and written."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from collins.sharding import local


def kind_of(value: object) -> str:
    """The type of a value, for errors."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def without_data(t: Tensor) -> str | None:
    """The reason why a tensor has no data that could be read, or None if it has."""
    if is_lazy(t):
        return "a parameter that has not been initialized"
    t = local(t)
    # The device of a fake tensor is the one that it simulates; its storage is on the meta device.
    if t.is_meta or (t.layout == torch.strided and not t.is_nested and t.untyped_storage().device.type == "meta"):
        return "a tensor on the meta device, which has no data"
    if t.layout == torch.strided and t.numel() and not t.untyped_storage().nbytes():
        return "a tensor whose memory has been freed"
    return None


def unreadable(value: object) -> str | None:
    """The reason why a value is not a dense tensor with data, or None if it is one."""
    if not isinstance(value, Tensor):
        return kind_of(value)
    if value.is_nested or value.layout != torch.strided:
        return "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
    return without_data(value)


def uncopied(value: object) -> str | None:
    """The reason why a saved value cannot be copied into a moment of its shape and dtype, or None if it can."""
    requires_grad = isinstance(value, Tensor) and value.requires_grad
    return unreadable(value) or ("a tensor that requires a gradient" if requires_grad else None)


def writable(value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a value in an optimizer's state is a tensor of the required form that can be overwritten in place."""
    return (
        isinstance(value, Tensor)
        and uncopied(value) is None
        and (value.shape, value.dtype, value.device) == (shape, dtype, device)
        and local(value).is_contiguous()
        and not value.is_inference()
    )
