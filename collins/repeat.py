"""A step like the last one: the same parameters, options and moments; only gradients and numbers are new.

Looking at each of hundreds of parameters in Python costs more than launching their step. So once a step has been taken
through kernels alone, the next one asks of whole columns, in C, whether anything but gradients has changed. Where
anything has, the ordinary way finds out what, and says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from collins.rule import Scalars

if TYPE_CHECKING:
    from collins.compile.launch import Course

# A gradient is where its parameter is: autograd accepts no other. In another layout it has no address.
_FACTS = attrgetter("shape", "dtype")


class Kept(NamedTuple):
    """The moments and the counter of one parameter: what its state holds, and under which names."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]


class Repeat:
    """What must hold for a step to be as the last one was.

    Args:
        params: the parameters that were stepped.
        others: those that had no gradient.
        kept: the state of each of `params`.
        state: of the optimizer.
        course: what steps `params`, in their order.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        others: Sequence[Tensor],
        kept: Sequence[Kept],
        state: Mapping[Tensor, dict[str, Any]],
        course: Course,
    ) -> None:
        self._params, self._others, self._course, self._state = params, others, course, state
        self._facts, self._types = list(map(_FACTS, params)), list(map(type, params))
        self._sizes = list(map(Tensor.numel, params))
        self._entries = list(state.values())
        by_names: dict[tuple[str, ...], list[int]] = {}
        for i, one in enumerate(kept):
            by_names.setdefault(one.names, []).append(i)
        self._kept = [
            (
                itemgetter(*names),
                [state[params[i]] for i in places],
                list(chain.from_iterable(kept[i].tensors for i in places)),
            )
            for names, places in by_names.items()
        ]

    def ready(self, state: Mapping[Tensor, dict[str, Any]]) -> Callable[[Sequence[Scalars]], None] | None:
        """What performs the step, given the numbers of each parameter; None if anything has changed."""
        params = self._params
        grads = [p.grad for p in params]
        if not (
            list(map(type, grads)).count(Tensor) == len(grads)
            and list(map(_FACTS, grads)) == self._facts
            and list(map(Tensor.numel, params)) == self._sizes  # autograd sees to the rest, and the course to addresses
            and list(map(type, params)) == self._types
            and all(p.grad is None for p in self._others)
            and self._same_state(state)
        ):
            return None
        return self._course.ready(grads)  # type: ignore[arg-type]

    def _same_state(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        if state is not self._state or len(state) != len(self._entries):
            return False
        if not all(map(is_, state.values(), self._entries)):
            return False
        try:
            return all(
                all(map(is_, chain.from_iterable(map(getter, entries)), tensors))
                for getter, entries, tensors in self._kept
            )
        except KeyError:
            return False
