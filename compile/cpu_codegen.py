"""Hints for Inductor's C++ backend: how its generated code for the CPU loops over buckets.

Inductor fuses three computations into one loop over buckets, so that each gradient is read from memory once: the sums
over a bucket's elements, the computation on each bucket, and the decode of its elements. It fuses them only if none of
the three loops over buckets is vectorized (`scalar_loop`), and it recomputes a value wherever the value is used unless
it is made to store it (`realized`). Hashing is faster when it is vectorized over buckets, in a loop of its own before
the fused one (`separate_loop`). Inductor cannot vectorize some operations on bits (`bitwise`).

Without any of these hints a compiled step of bf16 parameters takes 2.8 to 3.2 times as long. A compiled step of fp32
parameters takes 1.2 to 1.4 times as long on two cores that are bound by memory bandwidth (layers of LLaMA 1B's width),
and as long as with the hints on one core (a matrix of 4096 x 4096). All with torch 2.13.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from collins.hints import Hints
from collins.update import UpdateSpec

_VECTOR = 16  # float32 numbers, at most


class CpuHints(Hints):
    """For graphs of tensors on the CPU. Their effect was observed in torch 2.13; in other versions they may only cost
    time.
    """

    padding: ClassVar[int] = 1  # a loop of another length is not fused with the loops that follow

    def bitwise(self, p: Tensor, width: int) -> bool:
        """Whether vectors are full and of float32; Inductor passes other ones through memory."""
        return p.dtype == torch.float32 and width % _VECTOR == 0

    def realized(self, x: Tensor) -> Tensor:
        """A view that fixes its strides makes Inductor store `x`."""
        if x.dtype == torch.bool:  # code for vectors of bool is slower than int32, although it moves fewer bytes
            return self.realized(x.to(torch.int32)) != 0
        return x.as_strided(x.shape, x.stride())

    def separate_loop(self, x: Tensor, count: int, dim: int = 0) -> Tensor:
        return self.realized(x).narrow(dim, 0, count)

    def scalar_loop(self, x: Tensor, words: Tensor) -> Tensor:
        """Inductor does not vectorize int16, nor any loop that contains it. The C++ compiler removes the condition,
        which always holds.
        """
        return torch.where(words[:, 0].to(torch.int16) <= 32767, x, 0)


def hinted(spec: UpdateSpec, device: torch.device) -> UpdateSpec:
    """The spec from which a graph of tensors on `device` is traced."""
    return spec._replace(hints=CpuHints()) if device.type == "cpu" else spec
