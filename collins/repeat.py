"""A step like the last one: the same parameters, options and moments; only gradients and numbers are new.

Looking at each of hundreds of parameters in Python costs more than launching their step. So once a step has been taken
through kernels alone, the next one asks of whole columns, in C, whether anything but gradients has changed. Where
anything has, the ordinary way finds out what, and says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from collins.rule import StepScalars

if TYPE_CHECKING:
    from collins.compile.multi_tensor import Course


def _guards_of(tensors: Sequence[Tensor]) -> Any:
    """What guards torch.compile's own code: of type, dtype, device, sizes and strides. They keep no tensor."""
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def _possible() -> bool:
    """Whether this torch has such guards, which are private: without them every step goes the ordinary way."""
    sample = [torch.empty(1, device="cpu")]
    try:
        return bool(_guards_of(sample).check(*sample))
    except Exception:
        return False


POSSIBLE = _possible()

_grad = attrgetter("grad")


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
        course: what steps `params`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        others: Sequence[Tensor],
        kept: Sequence[Kept],
        state: Mapping[Tensor, dict[str, Any]],
        course: Course,
    ) -> None:
        self._params, self._others, self._course, self._state = [params[i] for i in course.order], others, course, state
        self._guards = _guards_of([*map(_grad, self._params), *self._params])
        self._entries = list(state.values())
        columns: dict[str, tuple[list[dict[str, Any]], list[Tensor]]] = {}
        for p, one in zip(params, kept, strict=True):
            for name, tensor in zip(one.names, one.tensors, strict=True):
                entries, held = columns.setdefault(name, ([], []))
                entries.append(state[p])
                held.append(tensor)
        self._kept = [(itemgetter(name), *column) for name, column in columns.items()]

    def ready(
        self, state: Mapping[Tensor, dict[str, Any]]
    ) -> Callable[[Sequence[StepScalars], Sequence[int]], None] | None:
        """What performs the step, given its numbers and which of them each parameter takes; None if anything has
        changed.
        """
        params = self._params
        grads: list[Any] = list(map(_grad, params))
        same = (
            self._guards.check(*grads, *params)
            and all(p.grad is None for p in self._others)
            and self._same_state(state)
        )
        return self._course.ready(grads) if same else None

    def _same_state(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        if state is not self._state or len(state) != len(self._entries):
            return False
        try:
            return all(map(is_, state.values(), self._entries)) and all(
                all(map(is_, map(getter, entries), tensors)) for getter, entries, tensors in self._kept
            )
        except KeyError:
            return False
