"""A step inside code that torch.compile traces: one operator, which performs the whole step when the graph runs.

`torch.compile(function, fullgraph=True)` traces what `function` calls, and a step looks at addresses, streams and host
memory, which a graph cannot hold. So a traced step is one call of `collins::optimizer_step_`. It says that it changes
the parameters and reads the gradients; the optimizer behind it is found by a number.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """`torch.compiler.disable`, with types: a class whose constructor it decorates would be of any type to others."""
    kept: F = torch.compiler.disable(function)
    return kept


class Steps(Protocol):
    """An optimizer, as far as a traced step is concerned."""

    param_groups: list[dict[str, Any]]
    step_number: int  # what `register` returned

    def perform(self) -> None:
        """Performs a step with the gradients that parameters have."""


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(optimizer: Steps) -> int:
    """The number by which graphs find an optimizer, for as long as it lives."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def trace_step(optimizer: Steps) -> None:
    """Records a step of the optimizer in the graph that is being traced."""
    params: list[Tensor] = []
    places: list[int] = []
    place = 0
    # Not optimizer.param_groups: Dynamo then guards every option, so that a rate that changes compiles anew, and sets
    # capturable=True in groups on CUDA devices that have no state yet (torch/_dynamo/variables/optimizer.py).
    for group in optimizer.__dict__["param_groups"]:
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                places.append(place)
            place += 1
    if params:
        torch.ops.collins.optimizer_step_(params, [p.grad for p in params], places, optimizer.step_number)


def _perform(params: Sequence[Tensor], grads: Sequence[Tensor], places: Sequence[int], number: int) -> None:
    optimizer = _optimizers.get(number)
    if optimizer is None:
        raise RuntimeError("the optimizer of a compiled step is gone: compile the function anew for another one")
    own = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.grad for p in own]
    try:
        # What the graph has computed is not in .grad before it has ended.
        for p in own:
            p.grad = None
        for place, g in zip(places, grads, strict=True):
            own[place].grad = g.detach()
        optimizer.perform()
    finally:
        for p, g in zip(own, before, strict=True):
            p.grad = g
    for given, place in zip(params, places, strict=True):
        if given.data_ptr() != own[place].data_ptr():  # a graph may work on copies, which it then copies back
            given.copy_(own[place])


_LIBRARY = torch.library.Library("collins", "FRAGMENT")
# A captured CUDA graph would replay one step's kernels, and not what the host does for the next one.
_LIBRARY.define(
    "optimizer_step_(Tensor(a!)[] params, Tensor[] grads, int[] places, int optimizer) -> ()",
    tags=tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)),
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("optimizer_step_", torch.no_grad()(_perform), _key)
_fake: Callable[..., None] = lambda *_: None  # noqa: E731
torch.library.register_fake("collins::optimizer_step_", _fake, lib=_LIBRARY)
