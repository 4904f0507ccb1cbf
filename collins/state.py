"""The state of parameters: step counters, and allocating, adopting and dropping moments."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from operator import eq
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from collins.entries import ParamEntry
from collins.fingerprint import LAYOUT
from collins.formats import TensorSpec
from collins.parameter import has_moments, mark_of
from collins.sharding import local, placed

Places = slice | np.ndarray | Sequence[int]  # of counters


class StepCounters:
    """Step counters on the host, in one array. Each is also a 0-d tensor, which is stored in the optimizer's state."""

    def __init__(self) -> None:
        self._steps = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._numbers = self._steps.numpy()  # the same memory
        self._views: list[Tensor | None] = []  # None where a counter is no longer in use
        self._free: list[int] = []  # the places of the counters that are not in use
        self._kept: set[ParamEntry] = set()

    def adopt(self, place: int | None, value: int) -> tuple[int, Tensor]:
        """Sets the counter at `place`, or a new one for None, to `value`; returns its place and its tensor."""
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
        if not self.attached(place):
            view.data = self._steps[place]
        view.fill_(value)
        return place, view

    def attached(self, place: int | None) -> bool:
        """Whether the tensor of the counter at `place` still has the counter's memory; also True for None.

        It has other memory after an assignment to its `.data`, as programs move the state of an optimizer to a device.
        """
        if place is None:
            return True
        return cast(Tensor, self._views[place]).data_ptr() == self._steps.data_ptr() + place * self._steps.itemsize

    def retain(self, entries: Iterable[ParamEntry]) -> None:
        """Releases the counters of all other entries; their tensors keep their values, in memory of their own."""
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
        """Moves the memory of all counters, or of none; the tensor objects in the state stay the same."""
        before = self._steps
        views = [
            (view, *memory)
            for place, (view, *memory) in enumerate(zip(self._views, before.unbind(), grown.unbind(), strict=False))
            if view is not None and self.attached(place)
        ]
        try:
            for view, _, new in views:
                view.data = new
            self._numbers, self._steps = grown.numpy(), grown
        except BaseException:
            self._numbers, self._steps = before.numpy(), before
            for view, old, _ in views:
                view.data = old
            raise

    def read(self, places: Places) -> np.ndarray:
        """The values of the counters at these places: float32, 1-d."""
        return self._numbers[places].copy()

    def read_one(self, place: int) -> float:
        """The value of the counter at this place."""
        return float(self._numbers[place])

    def common(self, places: Places) -> float | None:
        """The value of the counters at these places, of which there is at least one; None if they differ."""
        values = self._numbers[places]
        found = values.tobytes()  # compared faster than numpy's operations begin
        return float(values[0]) if found == found[: values.itemsize] * len(values) else None

    def set(self, places: Places, counts: Any) -> None:
        """Sets the counters at these places, which must be distinct, to values of their own or to one number."""
        self._numbers[places] = counts


def places_of(places: Sequence[int]) -> Places:
    """Places, as a slice where they follow one another, which is read and written in a fraction of the time."""
    first = places[0] if places else 0
    follows = all(map(eq, places, range(first, first + len(places))))
    return slice(first, first + len(places)) if follows else np.array(places)


class Store(Protocol):
    """The part of a `collins.offload.tiers.Store` that adopts moments."""

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors to keep as the state of `p`, with the values of `given`, or zeros for None."""


def adopt(
    entry: ParamEntry, states: MutableMapping[Tensor, Any], store: Store, counters: StepCounters, seed: int
) -> bool:
    """Adopts a parameter's state, which has been checked; allocates it if there is none.

    Returns:
        Whether it was allocated.
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
    if states.get(p) is None:
        states[p] = {}
    states[p].update(own)
    if made or spec.hash is None:  # dense moments do not depend on the key
        mark(entry, states[p], seed)
    entry.adopt(states[p])
    return made


def drop(entries: Iterable[ParamEntry], states: MutableMapping[Tensor, Any]) -> None:
    """Removes the state that `adopt` allocated for parameters that were not stepped in the end."""
    for entry in entries:
        state = states.get(entry.p) or {}
        for name in ("step", LAYOUT, *entry.known_spec.tensors):
            state.pop(name, None)
        if not state:
            states.pop(entry.p, None)
        entry.forget()


def mark(entry: ParamEntry, state: MutableMapping[str, Any], seed: int) -> None:
    """Writes the fingerprint of a parameter into its state."""
    own = mark_of(entry, seed)
    if own is not None:
        state[LAYOUT] = own.packed()
