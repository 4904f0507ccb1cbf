"""The state of parameters: step counters, and creating, adopting and dropping moments."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from collins.entries import ParamEntry
from collins.fingerprint import LAYOUT
from collins.formats import TensorSpec
from collins.parameter import has_moments, mark_of
from collins.sharding import local, placed


class StepCounters:
    """Counters on the host. Each is also a 0-d tensor of its own, which is what an optimizer's state shows."""

    def __init__(self) -> None:
        self._steps = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._numbers = self._steps.numpy()  # the same memory
        self._views: list[Tensor | None] = []  # None where a counter has been let go of
        self._free: list[int] = []  # the places of these
        self._kept: set[ParamEntry] = set()
        self._every: list[int | None] = []  # all places, once `_index` has been asked

    def adopt(self, place: int | None, value: int) -> tuple[int, Tensor]:
        """The place and the tensor of a counter that stands at `value`: the one at `place`, or a new one for None."""
        if place is None and self._free:
            place = self._free.pop()
            self._views[place] = self._steps[place]
        elif place is None:
            place = len(self._views)
            if place == self._steps.numel():
                grown = torch.zeros(max(2 * place, 64), dtype=torch.float32, device="cpu")
                grown[:place] = self._steps
                self._move(grown)
            self._views.append(self._steps[place])
        view = cast(Tensor, self._views[place])
        view.fill_(value)
        return place, view

    def retain(self, entries: Iterable[ParamEntry]) -> None:
        """Lets go of the counters of all entries but these. What was handed out of them keeps its value."""
        kept = set(entries)
        for entry in self._kept - kept:
            place, entry.counter = entry.counter, None
            if place is not None:
                entry.forget()
                view = cast(Tensor, self._views[place])
                view.data = view.clone()
                self._views[place] = None
                self._free.append(place)
        self._kept = kept

    def _move(self, grown: Tensor) -> None:
        """The tensors that were handed out stay what they are: only their memory moves, of all or of none."""
        before = self._steps
        try:
            for view, new in zip(self._views, grown.unbind(), strict=False):
                if view is not None:
                    view.data = new
            self._numbers, self._steps = grown.numpy(), grown
        except BaseException:
            self._numbers, self._steps = before.numpy(), before
            for view, old in zip(self._views, before.unbind(), strict=False):
                if view is not None:
                    view.data = old
            raise

    def read(self, places: Sequence[int | None]) -> np.ndarray:
        """What the counters at these places stand at: float32, shape (len(places),)."""
        return cast(np.ndarray, self._numbers[self._index(places)].copy())

    def read_one(self, place: int) -> int:
        """What the counter at this place stands at."""
        return int(self._numbers[place])

    def set(self, places: Sequence[int | None], counts: Any) -> None:
        """Sets the counters at these different places."""
        if len(places) == 1:
            self._numbers[places[0]] = counts[0]
        else:
            self._numbers[self._index(places)] = counts

    def _index(self, places: Sequence[int | None]) -> Any:
        if len(self._every) != len(self._views):
            self._every = list(range(len(self._views)))
        return slice(len(places)) if places == self._every else list(places)


class Store(Protocol):
    """Where moments live, as far as adopting them is concerned; see `collins.offload.tiers`."""

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors that are to be kept as the state of `p`, with the values of `given`, zeros for None."""


def adopt(
    entry: ParamEntry, states: MutableMapping[Tensor, Any], store: Store, counters: StepCounters, seed: int
) -> bool:
    """Takes a parameter's state, which has been checked, as its entry's own; makes it if there is none.

    Returns:
        Whether it was made.
    """
    spec, p = entry.known_spec, entry.p
    state = states.get(p) or {}
    made = not has_moments(state)
    given = [None if made else local(state[name]) for name in spec.tensors]
    kept = store.adopt(p, spec.local_tensors, given)
    step = torch.zeros((), dtype=torch.float32, device=p.device) if made else state["step"]
    if entry.group["capturable"]:
        own = {"step": step.to(p.device)}
    else:
        entry.counter, counter = counters.adopt(entry.counter, 0 if made else int(step))
        own = {"step": counter}
    for (name, due), tensor, old in zip(spec.tensors.items(), kept, given, strict=True):
        own[name] = state[name] if tensor is old else placed(tensor, p, due.shape)
    if p not in states:
        states[p] = {}
    states[p].update(own)
    if made or spec.hash is None:  # dense moments mean the same whatever key they come from
        mark(entry, states[p], seed)
    entry.adopt(states[p])
    return made


def drop(entries: Iterable[ParamEntry], states: MutableMapping[Tensor, Any]) -> None:
    """Takes back what `adopt` made for parameters that were not stepped after all."""
    for entry in entries:
        state = states.get(entry.p, {})
        for name in ("step", LAYOUT, *entry.known_spec.tensors):
            state.pop(name, None)
        if not state:
            states.pop(entry.p, None)
        entry.forget()


def mark(entry: ParamEntry, state: MutableMapping[str, Any], seed: int) -> None:
    """Writes into a state what its tables are encoded with, or what its parameter is rounded with."""
    own = mark_of(entry, seed)
    if own is not None:
        state[LAYOUT] = own.packed()
