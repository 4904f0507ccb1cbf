"""Hints for Inductor's C++ backend: how the code that it writes for the CPU goes over buckets.

Inductor puts the sums over a bucket's elements, what is done once a bucket, and the decode of its elements into one
loop over buckets, so that each gradient comes from memory once. It does so only if all three take one bucket after
another (`scalar_loop`), and it computes a value anew wherever it is used unless it is told to store it (`realized`).
Hashing is faster in vectors, many buckets at a time, in a loop of its own before that one (`separate_loop`). Not all
that it writes is in vectors (`bitwise`).

Without any of these hints a compiled step of bf16 parameters takes 2.8 to 3.2 times as long. One of fp32 parameters
takes 1.2 to 1.4 times where two cores wait for memory, as on layers of LLaMA 1B's width, and as long on one core, for a
matrix of 4096 x 4096 (torch 2.13).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from collins.hints import Hints
from collins.update import UpdateSpec

_VECTOR = 16  # float32 numbers, at most


class CpuHints(Hints):
    """For graphs of tensors on the CPU. What they do was seen in torch 2.13; elsewhere they may only cost time."""

    padding: ClassVar[int] = 1  # a loop of another length is not fused with those that follow

    def bitwise(self, p: Tensor, width: int) -> bool:
        """Where vectors are of float32 and whole; with others Inductor goes through memory."""
        return p.dtype == torch.float32 and width % _VECTOR == 0

    def realized(self, x: Tensor) -> Tensor:
        """A view that fixes its strides makes Inductor store `x`."""
        if x.dtype == torch.bool:  # vectors of it cost more than the memory that they save
            return self.realized(x.to(torch.int32)) != 0
        return x.as_strided(x.shape, x.stride())

    def separate_loop(self, x: Tensor, count: int, dim: int = 0) -> Tensor:
        return self.realized(x).narrow(dim, 0, count)

    def scalar_loop(self, x: Tensor, words: Tensor) -> Tensor:
        """Inductor makes no vectors of int16, nor of anything in a loop where there is one. The C++ compiler sees that
        the condition always holds.
        """
        return torch.where(words[:, 0].to(torch.int16) <= 32767, x, 0)


def hinted(spec: UpdateSpec, device: torch.device) -> UpdateSpec:
    """What a graph of tensors on `device` is traced from."""
    return spec._replace(hints=CpuHints()) if device.type == "cpu" else spec
