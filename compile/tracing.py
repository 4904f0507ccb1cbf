"""Steps inside code that torch.compile traces: one operator, which performs the whole step when the graph runs.

`torch.compile(function, fullgraph=True)` traces everything that `function` calls, but a step uses addresses, streams
and host memory, which a graph cannot represent. So a traced step is one call of the operator
`collins::optimizer_step_`, whose schema declares that it mutates the parameters and reads the gradients. An argument of
the operator is the number under which the optimizer is registered.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from collins._torch_internals import dispatching_to_autograd

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """`torch.compiler.disable` with types: type checkers would see a class with a decorated constructor as Any."""
    kept: F = torch.compiler.disable(function)
    return kept


class Steps(Protocol):
    """The part of an optimizer that a traced step uses."""

    param_groups: list[dict[str, Any]]
    step_number: int  # the return value of `register`

    def perform(self) -> None:
        """Performs a step with the current gradients of the parameters."""


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(optimizer: Steps) -> int:
    """Registers an optimizer, without keeping it alive, and returns the number by which graphs find it."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def trace_step(optimizer: Steps) -> None:
    """Records a step of the optimizer in the graph that is being traced."""
    params: list[Tensor] = []
    places: list[int] = []
    place = 0
    # Not optimizer.param_groups, for which Dynamo guards every option, so that a change of the learning rate causes a
    # recompilation, and sets capturable=True in groups on CUDA devices that have no state yet
    # (torch/_dynamo/variables/optimizer.py).
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
        raise RuntimeError(
            "the optimizer of this compiled step no longer exists: compile the function again with another optimizer"
        )
    own = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.grad for p in own]
    try:
        # Gradients that the graph computes are assigned to .grad only when the graph has ended.
        for p in own:
            p.grad = None
        for place, g in zip(places, grads, strict=True):
            own[place].grad = g.detach()
        with dispatching_to_autograd():
            optimizer.perform()
    finally:
        for p, g in zip(own, before, strict=True):
            p.grad = g
    for given, place in zip(params, places, strict=True):
        if given.data_ptr() != own[place].data_ptr():  # a graph may pass copies, which it copies back afterwards
            given.copy_(own[place])


_LIBRARY = torch.library.Library("collins", "FRAGMENT")
# A captured CUDA graph would replay the kernels of one step, without the host code that every step has to run.
_LIBRARY.define(
    "optimizer_step_(Tensor(a!)[] params, Tensor[] grads, int[] places, int optimizer) -> ()",
    tags=tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)),
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("optimizer_step_", torch.no_grad()(_perform), _key)
_fake: Callable[..., None] = lambda *_: None  # noqa: E731
torch.library.register_fake("collins::optimizer_step_", _fake, lib=_LIBRARY)
