"""The steps that each parameter has taken, in one tensor, so that hundreds of them are counted in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


class Counters:
    """Counters on the host. Each is also a 0-d tensor of its own, which is what an optimizer's state shows."""

    def __init__(self) -> None:
        self._steps = torch.zeros(0)
        self._numbers = self._steps.numpy()  # the same memory
        self._views: list[Tensor] = []
        self._every: list[int | None] = []

    def adopt(self, place: int | None, value: int) -> tuple[int, Tensor]:
        """The place and the tensor of a counter that stands at `value`: the one at `place`, or a new one for None."""
        if place is None:
            place = len(self._views)
            if place == self._steps.numel():
                grown = torch.zeros(max(2 * place, 64))
                grown[:place] = self._steps
                # The tensors that were handed out stay what they are: only their memory moves.
                for view, new in zip(self._views, grown.unbind(), strict=False):
                    view.data = new
                self._steps, self._numbers = grown, grown.numpy()
            self._views.append(self._steps[place])
            self._every.append(place)
        self._views[place].fill_(value)
        return place, self._views[place]

    def count(self, places: Sequence[int | None]) -> np.ndarray:
        """Counts one step at each of these different places, at least one.

        Returns:
            What they stand at now, in order: float32, shape (len(places),).
        """
        index: Any = slice(len(places)) if places == self._every else places
        self._numbers[index] += 1
        return cast(np.ndarray, self._numbers[index].copy())

    def count_one(self, place: int) -> int:
        """Counts one step there, and returns what it stands at now."""
        self._numbers[place] += 1
        return int(self._numbers[place])
