"""How code that torch.compile writes for the CPU goes over buckets. In all other code these functions change nothing.

Inductor puts the sums over a bucket's elements, what is done once a bucket, and the decode of its elements into one
loop over buckets, so that each gradient comes from memory once. It does so only if all three take one bucket after
another (`in_turn`), and it writes a value anew wherever it is used unless told not to (`once`). Hashing is faster many
buckets at a time, in a loop of its own before that one (`ahead`). Not all that it writes is in vectors (`takes_bits`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_VECTOR = 16  # float32 numbers, at most


def _is_written_for_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and torch.compiler.is_compiling()


def takes_bits(p: Tensor, width: int) -> bool:
    """Whether the step of `p` works fast on the bits of its numbers, in rows of `width`.

    In code for the CPU it does where vectors are of float32 and whole; with others Inductor goes through memory.
    """
    return not _is_written_for_cpu(p.device) or (p.dtype == torch.float32 and width % _VECTOR == 0)


def once(x: Tensor) -> Tensor:
    """`x`, computed once and kept in memory: a view that fixes its strides makes Inductor store it."""
    if not _is_written_for_cpu(x.device):
        return x
    if x.dtype == torch.bool:  # vectors of it cost more than the memory that they save
        return once(x.to(torch.int32)) != 0
    return x.as_strided(x.shape, x.stride())


def spare(device: torch.device) -> int:
    """How many numbers more than are needed `ahead` is to be given, so that its loop is no other's."""
    return int(_is_written_for_cpu(device))


def ahead(x: Tensor, count: int, dim: int = 0) -> Tensor:
    """The first `count` along one dimension of `x`, which has `spare` more, from a loop of their own."""
    return once(x).narrow(dim, 0, count) if _is_written_for_cpu(x.device) else x


def in_turn(x: Tensor, words: Tensor) -> Tensor:
    """`x`, of one value a bucket, in a loop that takes one bucket after another.

    Inductor makes no vectors of int16, nor of anything in a loop where there is one. The C++ compiler sees that the
    condition always holds.

    Args:
        x: shape (R,).
        words: any integers, shape (R, n).
    """
    return torch.where(words[:, 0].to(torch.int16) <= 32767, x, 0) if _is_written_for_cpu(x.device) else x
