"""Hooks that call the optimizer for each parameter as soon as its gradient has arrived in backward.

Hooks have a weak reference to the optimizer, so a parameter does not keep it alive, and are removed with it. Copies of
parameters, by `deepcopy` or pickle, have no hooks.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from collins._torch_internals import post_accumulate_grad_hooks

Receive = Callable[[Any, Tensor], None]


class GradHooks:
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
            hooks = [hook for hook in post_accumulate_grad_hooks(p) if isinstance(hook, _Hook)]
            if self._hook in hooks:
                continue
            if any(hook.owner() is not None for hook in hooks):
                raise ValueError(
                    f"{name} is stepped in backward by another optimizer already, which would take its gradients:"
                    " delete that one first (and call gc.collect(), if a scheduler refers to it)"
                )
            if p.requires_grad and not is_lazy(p):  # it cannot have hooks before the first forward
                new.append(p)
        if new:
            # A handle refers to the hooks of its parameter weakly.
            self._handles[:] = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
            for p in new:
                self._handles.append(p.register_post_accumulate_grad_hook(self._hook))


def refuse_replicas(params: Iterable[Tensor]) -> None:
    """Raises a RuntimeError if `DistributedDataParallel` averages the gradients of one of these over several ranks.

    It does so behind the hooks that consume them. Its modules are looked for among all objects: call it once.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    own = set(map(id, params))
    for replica in [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]:
        if replica.process_group.size() > 1 and not own.isdisjoint(map(id, replica.parameters())):
            raise RuntimeError(
                "in_backward must be False for parameters of DistributedDataParallel, which averages gradients after"
                " they would have been used: step after backward, or shard the model by"
                " torch.distributed.fsdp.fully_shard instead"
            )


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
