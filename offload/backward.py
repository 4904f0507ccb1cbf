"""Hooks that hand each parameter to its optimizer as soon as its gradient has arrived in backward.

A parameter never keeps its optimizer alive: hooks know it weakly, and go when it goes. Copies of parameters, by
`deepcopy` or pickle, come without hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Receive = Callable[[Any, Tensor], None]


class Arrivals:
    """The hooks of one optimizer.

    Args:
        owner: the optimizer.
        receive: called as `receive(owner, p)` when the gradient of `p` is complete in `p.grad`: in the thread and under
            the stream that autograd runs it with. In one backward pass that is once for each parameter, tied ones
            included; a reentrant checkpoint is a backward pass of its own.
    """

    def __init__(self, owner: object, receive: Receive) -> None:
        self._hook = _Hook(owner, receive)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        weakref.finalize(owner, _remove, self._handles).atexit = False

    def watch(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Hooks every (name, parameter) that takes a gradient and is not hooked yet.

        Raises:
            ValueError: when another live optimizer steps one of them in backward; none has been hooked then.
        """
        new = []
        for name, p in params:
            hooks = [hook for hook in (p._post_accumulate_grad_hooks or {}).values() if isinstance(hook, _Hook)]
            if self._hook in hooks:
                continue
            if any(hook.owner() is not None for hook in hooks):
                raise ValueError(
                    f"{name} is stepped in backward by another optimizer already, which would take its gradients:"
                    " delete that one first (and call gc.collect(), if a scheduler refers to it)"
                )
            if p.requires_grad:
                new.append(p)
        self._handles += [p.register_post_accumulate_grad_hook(self._hook) for p in new]


class _Hook:
    """Calls its owner, for as long as there is one."""

    def __init__(self, owner: object, receive: Receive) -> None:
        self.owner = weakref.ref(owner)
        self._receive = receive

    def __call__(self, p: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            self._receive(owner, p)


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
