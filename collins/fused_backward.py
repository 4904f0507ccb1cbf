"""The interface for training programs that step each parameter in hooks of their own, when its gradient has arrived.

OneTrainer, and optimizers written for it, use a property `supports_fused_back_pass` and a method
`step_parameter(p, group, i)`. The program registers the hooks, clips or unscales each gradient, and frees it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collins.compile.tracing import untraced
from collins.entries import ParamEntry

if TYPE_CHECKING:
    from collins.in_backward import BackwardSteps
    from collins.stepper import Stepper


class FusedBackward:
    """`supports_fused_back_pass` and `step_parameter`, for an optimizer that has a `Stepper`."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    in_backward: bool
    accumulation_steps: int = 1  # also of what an earlier version has pickled
    max_grad_norm: float | None
    _stepper: Stepper
    _backward: BackwardSteps | None

    @property
    def supports_fused_back_pass(self) -> bool:
        """Whether `step_parameter` may be called."""
        return not self.in_backward and self.max_grad_norm is None

    def _drain(self, what: str) -> None:
        """Waits for moments on their way to the host.

        Raises:
            RuntimeError: where a step of several backward passes has been begun and not been ended; `what` is refused.
        """
        if self._backward is not None:
            self._backward.refuse_within_step(what)
        self._stepper.store.drain()

    @torch.no_grad()
    @untraced
    def step_parameter(self, p: Tensor, group: dict[str, Any] | None = None, i: int | None = None) -> None:
        """Steps one parameter with its current gradient, to the same bits as `step` would.

        It is for programs that call it in hooks of their own and free the gradient afterwards; other programs use
        `in_backward=True`. A parameter without a gradient is left unchanged. `step` may follow, for parameters that
        still have a gradient.

        Args:
            p: the parameter.
            group, i: the parameter's group and its index there, which such programs pass; they are not used.

        Raises:
            RuntimeError: with in_backward=True, where the optimizer has hooks of its own, and with `max_grad_norm`.
            ValueError, TypeError: as `step` does, and for a parameter that is not in this optimizer.
        """
        if self.in_backward:
            raise RuntimeError(
                "step_parameter cannot be used with in_backward=True, where Collins steps parameters in hooks of its"
                " own: build the optimizer with in_backward=False"
            )
        if self.max_grad_norm is not None:
            raise RuntimeError(
                f"max_grad_norm must be None for step_parameter, got {self.max_grad_norm}: the norm of all gradients is"
                " not known yet. Clip each gradient in the hook that calls step_parameter, or use in_backward=True"
            )
        if p.grad is not None:
            self._stepper.single_steps.step(p, p.grad, self._stepper, self.param_groups, self.state)


class SingleSteps:
    """A step whose parameters are stepped one by one, by calls of `step_parameter`.

    It begins with the first such call, and ends with the optimizer's `step` or the second call for a parameter.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # autograd has a thread per device, in which gradients arrive
        self._known: dict[int, ParamEntry] = {}
        self._stepped: set[int] = set()

    def step(
        self,
        p: Tensor,
        g: Tensor,
        stepper: Stepper,
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, Any],
    ) -> None:
        """Steps a parameter with its gradient."""
        with self._lock:
            if id(p) not in self._known or id(p) in self._stepped:
                if self.end():
                    stepper.end(groups, states)
                self._known = stepper.begin(groups, states)
            if id(p) not in self._known:
                raise ValueError(f"p must be a parameter of this optimizer, got a {tuple(p.shape)} tensor that is not")
            entry = self._known[id(p)]
            stepper.check(entry, states)
            # Scalars are computed for each parameter, since nothing signals a change of the learning rate.
            stepper.update_one(entry, g, states, {}, self._note)

    def _note(self, entry: ParamEntry) -> None:
        self._stepped.add(id(entry.p))

    def end(self) -> bool:
        """Ends the step, after which parameters, groups and states may change. Returns whether any was stepped."""
        any_stepped = bool(self._stepped)
        self._known = {}
        self._stepped.clear()
        return any_stepped
