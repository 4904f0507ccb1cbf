"""Where the update may be told how its compiler should arrange it. No hint changes a result.

The update asks `UpdateSpec.hints` at the places where arrangement matters. `Hints` itself asks for nothing, as eager
steps need; code that is compiled for a backend gets a subclass of it (`collins.compile.cpu_codegen`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)  # all of one class are equal: an `UpdateSpec` is part of a graph's signature
class Hints:
    """No hints."""

    padding: ClassVar[int] = 0  # how many more entries than are needed `separate_loop` has to be given

    def bitwise(self, p: Tensor, width: int) -> bool:
        """Whether signs are changed fast on the bits of numbers like those of `p`, in rows of `width`."""
        return True

    def realized(self, x: Tensor) -> Tensor:
        """`x`, which is better stored than computed anew wherever it is used."""
        return x

    def separate_loop(self, x: Tensor, count: int, dim: int = 0) -> Tensor:
        """The first `count` entries of `x`, which has `padding` more, better computed before all that uses them."""
        return x

    def scalar_loop(self, x: Tensor, words: Tensor) -> Tensor:
        """`x`, of one value a bucket, better computed one bucket after another.

        Args:
            x: shape (R,).
            words: any integers, shape (R, n).
        """
        return x


NO_HINTS = Hints()
