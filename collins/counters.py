"""The steps that each parameter has taken, in one tensor, so that hundreds of them are counted in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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

    def count(self, places: Sequence[int | None]) -> list[float]:
        """Counts one step at each of these different places, and returns what they stand at now."""
        if len(places) == len(self._every) and places == self._every:
            self._steps += 1
            return cast(list[float], self._steps.tolist()[: len(places)])
        if len(places) == 1:
            self._numbers[places[0]] += 1
            return [float(self._numbers[places[0]])]
        index = torch.tensor(places)
        self._steps[index] += 1
        return cast(list[float], self._steps[index].tolist())
