"""Steps in backward: the gradients that have arrived, partial steps, and the uses that are refused."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from collins.clipping import warn_of_lost_clipping
from collins.entries import ParamEntry
from collins.offload.backward import refuse_replicas
from collins.rule import ORTHOGONAL, StepScalars
from collins.stepper import Groups, Part, States, Stepper


class BackwardSteps:
    """A step in backward of one optimizer: begins with the first gradient that arrives, and ends with `step`.

    Args:
        parts: the largest number of gradients of each parameter in one step.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._lock = threading.Lock()  # gradients on several devices arrive in as many threads
        self._pending: dict[int, ParamEntry] | None = None
        self._stepped: dict[int, ParamEntry] = {}
        self._arrived: dict[int, int] = {}  # the number of gradients in this step, by the parameter's identity
        self._number = 0  # of the latest partial step that a parameter has taken
        self._scalars: dict[tuple[int, int, int], StepScalars] = {}
        self._alone = False  # whether parameters have been checked for replicas
        self._begun = False  # whether a step has been ended

    def receive(self, p: Tensor, stepper: Stepper, groups: Groups, states: States) -> None:
        """Steps a parameter whose gradient is complete, and frees the gradient."""
        with self._lock:
            g = p.grad
            if g is None:  # an earlier hook has taken it
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
            if entry is None:  # removed from its group since
                return
            number = self._arrived.get(id(p), 0)
            if number == self._parts:
                p.grad = None
                raise RuntimeError(_once_too_often(entry.name, self._parts))
            if number > self._number:  # another backward pass: all tables are used again, in the same order
                self._number = number
                stepper.store.finish()
            stepper.update_one(entry, g, states, self._scalars, self._mark_stepped, Part(number, self._parts))

    def _mark_stepped(self, entry: ParamEntry) -> None:
        self._stepped[id(entry.p)] = entry
        self._arrived[id(entry.p)] = self._arrived.get(id(entry.p), 0) + 1
        entry.p.grad = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(self, owner: object, closure: object) -> None:
        """Called by `step`: raises a RuntimeError for uses that steps in backward do not support."""
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
        for entry in self._stepped.values():
            if entry.p.grad is not None:
                raise RuntimeError(_once_too_often(entry.name, self._parts))

    def refuse_within_step(self, what: str) -> None:
        """Raises a RuntimeError where some of several backward passes of a step have been used, but no `step` yet."""
        if self._parts > 1 and self._arrived:
            raise RuntimeError(
                f"{what} in the middle of a step, after {max(self._arrived.values())} of accumulation_steps="
                f"{self._parts} backward passes: how far a step has come is no part of the state. Call step() first"
            )

    def end(self) -> None:
        """Ends the step."""
        self._stepped.clear()
        self._arrived.clear()
        self._number = 0
        self._pending = None

    def invalidate(self) -> None:
        """Called when groups or state have been replaced: the next gradient checks them again."""
        self._pending = None


def refuse_accumulation(group: Mapping[str, Any], parts: int) -> None:
    """Raises a ValueError for a group whose update cannot be divided into partial ones."""
    if parts > 1 and group["decode"] == ORTHOGONAL:
        raise ValueError(
            f"accumulation_steps must be 1 for decode='{ORTHOGONAL}', got {parts}: what is orthogonalised is the whole"
            " gradient, not its parts. Call backward on the whole batch, or build Collins with in_backward=False"
        )


def _once_too_often(name: str, parts: int) -> str:
    often = "twice" if parts == 1 else f"{parts + 1} times"
    accepted = (
        "with in_backward=True gradients are accumulated over as many backward passes as accumulation_steps says, and"
        " it is 1"
        if parts == 1
        else f"accumulation_steps is {parts}"
    )
    return (
        f"the gradient of {name} arrived {often} before step(), and the last one is not used: {accepted}. A reentrant"
        f" checkpoint is a backward pass of its own. Call step() after each{'' if parts == 1 else f' {parts}'}, also"
        " after one that failed; checkpoint with use_reentrant=False, set accumulation_steps, or build Collins with"
        " in_backward=False"
    )
