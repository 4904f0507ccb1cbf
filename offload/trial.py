"""Decides whether a training run fits, and which is the largest one that does, for `python -m collins plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from collins.offload.budget import Budget, Training, budget_of
from collins.offload.models import MOST_PARAMETERS, NAMED, family_of
from collins.offload.plan import PlacementPlan, Request, place
from collins.offload.policy import MemoryPolicy
from collins.offload.shapes import Transformer, of_count
from collins.offload.sizes import size_text

MOST_LAYERS = 1024  # the most layers of a model in a configuration's family


@dataclass(frozen=True)
class Machine:
    """Free and total bytes of the device and of host memory."""

    device_free: int
    device_total: int
    host_free: int
    host_total: int


@dataclass(frozen=True)
class Outcome:
    """The outcome of one way to step: the plan, or the reason why there is none."""

    in_backward: bool
    left: int  # bytes of the device, for tables and staging; negative when all else does not fit
    plan: PlacementPlan | None
    reason: str  # empty where there is a plan


@dataclass(frozen=True)
class Trial:
    """A model, its training settings, and the machine.

    Args:
        tables: returns the requests for the tables of a model: `requests_of`, with the options of `Collins`.
        modes: the ways to step to try, in this order: in backward (True) or after it.
    """

    model: Transformer
    training: Training
    machine: Machine
    policy: MemoryPolicy
    tables: Callable[[Transformer], Iterable[Request]]
    modes: tuple[bool, ...] = (False, True)

    @cached_property
    def budget(self) -> Budget:
        """The memory of everything but tables and staging."""
        return budget_of(self.model, self.training)

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The tables to place, one request for each parameter."""
        return tuple(self.tables(self.model))

    def outcomes(self) -> list[Outcome]:
        """The outcome of each way to step."""
        return [self._tried(in_backward) for in_backward in self.modes]

    def fits(self) -> bool:
        """Whether any way to step fits."""
        return any(self._tried(in_backward).plan is not None for in_backward in self.modes)

    def _tried(self, in_backward: bool) -> Outcome:
        machine = self.machine
        left = machine.device_free - self.budget.held(in_backward)
        if left < 0:
            reason = f"weights, gradients and activations alone exceed the device by {size_text(-left)}"
            return Outcome(in_backward, left, None, reason)
        try:
            plan = place(
                self.requests,
                self.policy,
                device_free=left,
                device_total=machine.device_total,
                host_free=machine.host_free,
                host_total=machine.host_total,
            )
        except MemoryError as error:
            return Outcome(in_backward, left, None, str(error))
        return Outcome(in_backward, left, plan, "")


@dataclass(frozen=True)
class Largest:
    """The largest value of each setting that fits with all others unchanged; 0 or None if none does."""

    seq_len: int  # tokens
    batch_size: int  # sequences
    model_name: str | None
    model: Transformer | None


def largest(trial: Trial, name: str) -> Largest:
    """The longest sequence, the largest batch and the largest model of the family that fit.

    The family of a named shape is all named shapes with the same first word; that of a configuration, the same model
    with 1 to `MOST_LAYERS` layers; that of a count, all counts.

    Args:
        name: the name of the trial's model, as for `model_of`.
    """
    training = trial.training
    model_name, model = _largest_model(trial, name)
    return Largest(
        seq_len=_most(lambda tokens: replace(trial, training=replace(training, seq_len=tokens)).fits()),
        batch_size=_most(lambda batch: replace(trial, training=replace(training, batch_size=batch)).fits()),
        model_name=model_name,
        model=model,
    )


def _largest_model(trial: Trial, name: str) -> tuple[str | None, Transformer | None]:
    model = trial.model
    if family := family_of(name):
        own = NAMED[name](None).vocabulary
        vocabulary = None if model.vocabulary == own else model.vocabulary
        for member in reversed(family):
            if replace(trial, model=NAMED[member](vocabulary)).fits():
                return member, NAMED[member](vocabulary)
        return None, None
    if model.counted:
        count = _most(lambda n: replace(trial, model=of_count(n, model.vocabulary)).fits(), MOST_PARAMETERS)
        return (f"{count}", of_count(count, model.vocabulary)) if count else (None, None)
    layers = _most(lambda n: replace(trial, model=model.with_layers(n)).fits(), MOST_LAYERS) if model.layers else 0
    return (f"{name} with {layers:,} layers", model.with_layers(layers)) if layers else (None, None)


def _most(fits: Callable[[int], bool], limit: int = 2**40) -> int:
    """The largest n in [1, limit] that fits, 0 if none does, by bisection: if n does not fit, no larger one does."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, min(2 * high, limit)
    high = limit + 1 if high == limit and fits(limit) else high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
