"""Hints for the compiler of the update. No hint changes a result.

The update calls the methods of `UpdateSpec.hints` where the structure of the generated code matters. Those of `Hints`
do nothing, for eager steps; graphs that are compiled for a backend use a subclass (`collins.compile.cpu_codegen`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)  # instances of a class are equal: hints are part of a graph's signature
class Hints:
    """No hints."""

    padding: ClassVar[int] = 0  # the number of extra entries that `separate_loop` needs

    def bitwise(self, p: Tensor, width: int) -> bool:
        """Whether to change signs on the bits of numbers, for numbers of the dtype of `p` in rows of `width`."""
        return True

    def realized(self, x: Tensor) -> Tensor:
        """`x`; store it instead of recomputing it wherever it is used."""
        return x

    def separate_loop(self, x: Tensor, count: int, dim: int = 0) -> Tensor:
        """The first `count` entries of `x`, which has `padding` more; compute them in a loop of their own."""
        return x

    def scalar_loop(self, x: Tensor, words: Tensor) -> Tensor:
        """`x`, of one value per bucket; compute it in a loop that is not vectorized over buckets.

        Args:
            x: shape (R,).
            words: any integers, shape (R, n).
        """
        return x


NO_HINTS = Hints()
