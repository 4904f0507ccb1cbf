"""Steps in backward: the gradients that have arrived, partial steps, and checks for unsupported uses."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from collins.clipping import warn_of_lost_clipping
from collins.entries import ParamEntry
from collins.offload.backward import refuse_replicas
from collins.rule import ORTHOGONAL, StepScalars
from collins.stepper import Groups, Part, States, Stepper


class BackwardSteps:
    """The steps in backward of one optimizer. A step begins when the first gradient arrives, and ends with `step`.

    Args:
        parts: the maximum number of gradients per parameter in one step, `accumulation_steps`.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._lock = threading.Lock()  # gradients on several devices arrive in as many threads
        self._pending: dict[int, ParamEntry] | None = None
        # By the parameter's identity: its entry, and how many of its gradients have been used in this step.
        self._stepped: dict[int, tuple[ParamEntry, int]] = {}
        self._number = 0  # the number of the current partial step, from 0
        self._scalars: dict[tuple[int, int, int], StepScalars] = {}
        self._alone = False  # whether parameters have been checked for replicas
        self._begun = False  # whether `step` has been called before

    def receive(self, p: Tensor, stepper: Stepper, groups: Groups, states: States) -> None:
        """Steps a parameter whose gradient is complete, and frees the gradient."""
        with self._lock:
            g = p.grad
            if g is None:  # an earlier hook has freed it
                return
            if self._pending is None:
                self._scalars.clear()
                if not self._alone:
                    refuse_replicas(entry.p for entry in stepper.entries(groups, states))
                    self._alone = True
                for group in groups:
                    refuse_accumulation(group, self._parts)
                self._pending = stepper.begin(groups, states)
            entry = self._pending.get(id(p))
            if entry is None:  # the parameter is no longer in a group
                return
            _, number = self._stepped.get(id(p), (entry, 0))
            if number == self._parts:
                p.grad = None
                raise RuntimeError(_once_too_often(entry.name, self._parts))
            if number > self._number:  # the next backward pass has begun, which uses all tables again in the same order
                self._number = number
                stepper.store.finish()
            mark = partial(self._mark_stepped, number + 1)
            stepper.update_one(entry, g, states, self._scalars, mark, Part(number, self._parts))

    def _mark_stepped(self, used: int, entry: ParamEntry) -> None:
        self._stepped[id(entry.p)] = entry, used
        entry.p.grad = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(self, owner: object, closure: object) -> None:
        """Raises a RuntimeError for uses that steps in backward do not support; called by `step`."""
        if closure is not None:
            raise RuntimeError(
                "closure must be None with in_backward=True, where parameters are stepped during backward: evaluate the"
                " model before step(), or build Collins with in_backward=False"
            )
        if not self._begun and getattr(owner, "max_grad_norm", None) is None:
            warn_of_lost_clipping()
        self._begun = True
        if hasattr(owner, "found_inf"):
            owner.__dict__.pop("found_inf", None)
            owner.__dict__.pop("grad_scale", None)
            raise RuntimeError(
                "a GradScaler cannot be used with in_backward=True: parameters have been stepped with gradients that"
                " were still scaled. Train in bfloat16 without one, or build Collins with in_backward=False"
            )
        for entry, _ in self._stepped.values():
            if entry.p.grad is not None:
                raise RuntimeError(_once_too_often(entry.name, self._parts))

    def refuse_within_step(self, what: str) -> None:
        """Raises a RuntimeError for `what` between the first of several backward passes of a step and `step`."""
        if self._parts > 1 and self._stepped:
            most = max(number for _, number in self._stepped.values())
            raise RuntimeError(
                f"{what} is not possible in the middle of a step, after {most} of"
                f" accumulation_steps={self._parts} backward passes: the state does not contain the progress of a step."
                " Call step() first"
            )

    def end(self) -> None:
        """Ends the step."""
        self._stepped.clear()
        self._number = 0
        self._pending = None

    def invalidate(self) -> None:
        """Marks groups and state as replaced, so that they are checked again when the next gradient arrives."""
        self._pending = None


def refuse_accumulation(group: Mapping[str, Any], parts: int) -> None:
    """Raises a ValueError for a group whose step cannot be divided into partial steps."""
    if parts > 1 and group["decode"] == ORTHOGONAL:
        raise ValueError(
            f"accumulation_steps must be 1 for decode='{ORTHOGONAL}', got {parts}: this update needs the whole gradient"
            " at once. Call backward once on the whole batch, or build Collins with in_backward=False"
        )


def _once_too_often(name: str, parts: int) -> str:
    often = "twice" if parts == 1 else f"{parts + 1} times"
    passes = "every backward pass" if parts == 1 else f"every {parts} backward passes"
    return (
        f"the gradient of {name} arrived {often} before step(), and the last one is not used: with in_backward=True a"
        " step uses at most accumulation_steps gradients of each parameter, and accumulation_steps is"
        f" {parts}. A reentrant checkpoint runs a separate backward pass. Call step() after {passes}, including failed"
        " ones; use checkpoints with use_reentrant=False, set accumulation_steps, or build Collins with"
        " in_backward=False"
    )
