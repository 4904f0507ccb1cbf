"""A step as a program: the parameters to step, guards that say whether it may be run again, and an executor.

Checking each of hundreds of parameters in Python takes longer than launching their step. So all parameters are checked
once, when a program is made, and later steps run the same program as long as only gradients and scalars change. The
guards compare whole lists of tensors in C. When a guard fails, a new program is made; making it checks all parameters
again and raises the errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from collins._torch_internals import GUARDS_AVAILABLE, foreach_copy_, tensor_guards
from collins.checkpoint import LARGEST_STEP, invalid_step
from collins.entries import Hash, ParamEntry
from collins.hashing import UniversalHash
from collins.identical import identical
from collins.nonfinite import require_finite
from collins.options import CheckedOptions
from collins.rule import StepScalars, default_rho, step_scalars
from collins.sharding import agreed
from collins.state import Places, StepCounters, places_of

_grad = attrgetter("grad")

ScalarsOf = Callable[[dict[str, Any], int | Tensor], StepScalars]


class Executor(Protocol):
    """Steps a fixed list of tasks: eagerly, by graphs, by kernels, or by a combination of these."""

    def bind(self, grads: Sequence[Tensor]) -> Any:
        """Prepares gradients, one for each task, for `run`; returns None if their memory layout is not supported."""

    def run(self, bound: Any, scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]) -> None:
        """Steps all tasks.

        Args:
            bound: the return value of `bind`.
            scalars: the distinct scalars of the step.
            rows: for each task, an index into `scalars`.
            done: the number of each task is appended when the task has been stepped. If `run` raises, parameters and
                moments of all other tasks are unchanged.
        """


def moment_guards(moments: Sequence[Tensor]) -> Any:
    """Guards that compare the form of the moments of an executor; None where there are none to be compared."""
    distinct = len(set(map(id, moments))) == len(moments)  # the guards reject a tensor that is given twice
    return tensor_guards(moments) if GUARDS_AVAILABLE and moments and distinct else None


class ProgramGroup(NamedTuple):
    """The parameters of one group that a program steps."""

    options: dict[str, Any]  # the group
    settings: tuple[Any, ...]  # the settings with which it was checked
    entries: list[ParamEntry]


class StepProgram:
    """A step of a fixed list of parameters.

    Args:
        groups: the parameters, by group.
        executor: steps their tasks, which are in the same order.
        counters: the step counters on the host.
        roster: all parameters of the optimizer when the program was made.
    """

    def __init__(
        self,
        groups: Sequence[ProgramGroup],
        executor: Executor,
        counters: StepCounters,
        roster: Sequence[Sequence[ParamEntry]],
    ) -> None:
        self.groups = groups
        self.roster = roster
        self.entries = [entry for group in groups for entry in group.entries]
        self._executor = executor
        self._counters = counters
        self._places = [
            places_of([entry.counter for entry in group.entries if entry.counter is not None]) for group in groups
        ]
        self._requires_finite = any(group.options["nonfinite"] == "error" for group in groups)
        self._guards: _Guards | None = None
        self.options: list[CheckedOptions] = []  # of the groups, once `guard` has been called
        self.stepped: list[int] = []  # the indices of the entries that the last run has stepped

    @functools.cached_property
    def skippable(self) -> int:
        """The largest number that nonfinite="skip" can add to the counter; see `ParamSpec.skippable`."""
        groups = [group for group in self.groups if group.options["nonfinite"] == "skip"]
        return sum(entry.known_spec.skippable for group in groups for entry in group.entries)

    def guard(self, grads: Sequence[Tensor], others: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Sets guards, so that `matches` lets later steps run this program again.

        Args:
            grads: the gradients of this step, of which no reference is kept.
            others: the parameters that have no gradient.
            states: the `state` of the optimizer.
        """
        self.options = [CheckedOptions(group.options) for group in self.groups]
        plain = all(entry.p.grad is g for entry, g in zip(self.entries, grads, strict=True))
        on_host = all(not group.options["capturable"] for group in self.groups)
        if GUARDS_AVAILABLE and self.entries and plain and on_host:
            self._guards = _Guards(self.entries, others, states)

    def matches(self, states: Mapping[Tensor, dict[str, Any]]) -> Any:
        """The current gradients, prepared for `run`; None if anything else has changed since the program was made."""
        if self._guards is None:
            return None
        grads = self._guards.gradients(states)
        return None if grads is None else self.bind(grads)

    def bind(self, grads: Sequence[Tensor]) -> Any:
        """Prepares gradients, one for each entry, for `run`; returns None if their memory layout is not supported."""
        bound = self._executor.bind(grads)
        return None if bound is None else (grads, bound)

    def run(self, bound: Any, scalars_of: ScalarsOf, advance: int = 1) -> None:
        """Performs the step.

        If an exception is raised, weights, moments and counter of each parameter are either all stepped or all
        unchanged.

        Args:
            bound: the return value of `matches` or `bind`.
            scalars_of: returns the scalars of a group at a step.
            advance: the number that is added to step counters; 0 in later partial steps of a step.
        """
        grads, prepared = bound
        if self._requires_finite:
            self._require_finite(grads)
        scalars: list[StepScalars] = []
        rows: list[int] = []
        counts: list[Any] = []  # step numbers after this step, by group; a counter may be set to them twice
        self.stepped = []
        for group, places in zip(self.groups, self._places, strict=True):
            own = group.entries
            counts.append(self._add_scalars(group, places, scalars, rows, scalars_of, advance) if own else None)
        try:
            self._executor.run(prepared, scalars, rows, self.stepped)
            for group, places, count in zip(self.groups, self._places, counts, strict=True):
                self._set_counters(group, places, count)
        except BaseException:
            self._set_some(self.stepped, counts)
            raise

    def _add_scalars(
        self,
        group: ProgramGroup,
        places: Places,
        scalars: list[StepScalars],
        rows: list[int],
        scalars_of: ScalarsOf,
        advance: int,
    ) -> Any:
        """Adds the scalars of a group's entries, and the row of each entry.

        Returns:
            The step numbers after the step, or one number if it is the same for all entries.
        """
        options, first, count = group.options, len(scalars), len(group.entries)
        if options["capturable"]:
            steps = torch.stack([entry.step for entry in group.entries if entry.step is not None]) + advance
            columns = [
                x.unbind() if isinstance(x, Tensor) and x.ndim else [x] * count for x in scalars_of(options, steps)
            ]
            scalars += (StepScalars(*row) for row in zip(*columns, strict=True))
            rows += range(first, first + count)
            return steps.unbind()
        counters = self._counters
        common = counters.read_one(cast(int, group.entries[0].counter)) if count == 1 else counters.common(places)
        if common is not None:
            if not 0 <= common <= LARGEST_STEP:  # set to it by the user
                raise invalid_step(group.entries[0].name, "the optimizer", common)
            now = int(common) + advance
            scalars.append(scalars_of(options, now))
            rows += [first] * count
            return now
        numbers = counters.read(places)
        for entry, number in zip(group.entries, numbers.tolist(), strict=True):
            if not 0 <= number <= LARGEST_STEP:
                raise invalid_step(entry.name, "the optimizer", number)
        numbers += advance
        distinct = {t: row for row, t in enumerate(dict.fromkeys(numbers.tolist()), first)}
        scalars += (scalars_of(options, int(t)) for t in distinct)
        rows += map(distinct.__getitem__, numbers.tolist())
        return numbers

    def _set_counters(self, group: ProgramGroup, places: Places, counts: Any) -> None:
        if group.options["capturable"]:
            if group.entries:
                foreach_copy_([entry.step for entry in group.entries if entry.step is not None], list(counts))
        elif group.entries:
            self._counters.set(places, counts)

    def _set_some(self, done: Sequence[int], counts: Sequence[Any]) -> None:
        every: list[Any] = []
        for group, own in zip(self.groups, counts, strict=True):
            every += [own] * len(group.entries) if own is None or isinstance(own, int) else own
        for number in done:
            step = self.entries[number].step
            if step is not None:
                step.copy_(torch.as_tensor(every[number]))

    def _require_finite(self, grads: Sequence[Tensor]) -> None:
        guarded = [
            (entry, g) for entry, g in zip(self.entries, grads, strict=True) if entry.group["nonfinite"] == "error"
        ]
        params = [entry.p for entry, _ in guarded]
        require_finite([(entry.name, g) for entry, g in guarded], lambda finite: agreed(finite, params))


def scalars_under(group: Mapping[str, Any], step: int | Tensor, grad_scale: float | Tensor = 1.0) -> StepScalars:
    """The scalars of a group at a step number, counted from 1; a float tensor of step numbers stays on its device."""
    lr, rho = group["lr"], group["residual_weight"]
    return step_scalars(
        step,
        lr=lr.reshape(()) if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        residual_weight=default_rho(group["decode"], group["betas"][0]) if rho is None else rho,
        residual_square=group["residual_square"],
        grad_scale=grad_scale,
    )


class _Guards:
    """Detects changes since a program was made.

    Args:
        entries: the entries of the parameters that are stepped.
        others: the parameters that had no gradient.
        states: the `state` of the optimizer.
    """

    def __init__(
        self, entries: Sequence[ParamEntry], others: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        self._params, self._others, self._states = [entry.p for entry in entries], others, states
        self._tensors = tensor_guards([*map(_grad, self._params), *self._params])
        self._steps = [entry.step for entry in entries if entry.step is not None]
        self._addresses = list(map(Tensor.data_ptr, self._steps))
        self._owners, self._kept = list(states), list(map(dict, states.values()))
        self._hashes = [(hash, hash.coefficients) for hash in map(_hash, entries) if isinstance(hash, UniversalHash)]

    def gradients(self, states: Mapping[Tensor, dict[str, Any]]) -> list[Tensor] | None:
        """The current gradients, or None if anything else has changed."""
        params = self._params
        grads: list[Any] = list(map(_grad, params))
        same = (
            self._tensors.check(*grads, *params)
            and all(p.grad is None for p in self._others)
            and self._same_states(states)
            and list(map(Tensor.data_ptr, self._steps)) == self._addresses
            and all(hash.coefficients == known for hash, known in self._hashes)
        )
        return grads if same else None

    def _same_states(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        same = states is self._states and identical(list(states), self._owners)
        return same and identical(list(states.values()), self._kept)


def _hash(entry: ParamEntry) -> Hash | None:
    return entry.known_spec.hash
