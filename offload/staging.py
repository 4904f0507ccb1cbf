"""Moments on the host: their slabs, and executors that step them on the device.

Each parameter has a region, which is its tensors in one slab; the regions of a slab are copied together. To step
parameters, a `Pipeline` stages the transfers that contain their regions on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import version_of
from collins.compile import Engine
from collins.compile.program import Executor, moment_guards
from collins.formats import TensorSpec
from collins.offload.memory import DeviceFigures, device_figures, host_memory_free
from collins.offload.pipeline import Pipeline
from collins.offload.plan import PlacementPlan
from collins.offload.slabs import Slab, grouped, set_pin_limit
from collins.offload.streams import Streams, streams_for
from collins.roles import Role
from collins.rule import StepScalars
from collins.update import UpdateTask


class StateRequest(NamedTuple):
    """A parameter whose moments must be placed."""

    name: str
    p: Tensor
    tensors: tuple[TensorSpec, ...]  # in which both moments are stored
    role: Role | None = None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


def zeros(spec: TensorSpec, device: torch.device) -> Tensor:
    """A tensor of zeros."""
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device)


@dataclass(frozen=True)
class Backend:
    """The functions of a machine that a store calls; tests replace them.

    Args:
        allocate: makes a tensor of zeros on a device, or raises torch.OutOfMemoryError.
        measure: returns the figures of a CUDA device.
        host_free: returns the bytes of host memory that this process can still allocate.
        streams: returns the streams of a device.
    """

    allocate: Callable[[TensorSpec, torch.device], Tensor] = zeros
    measure: Callable[[torch.device], DeviceFigures] = device_figures
    host_free: Callable[[], int] = host_memory_free
    streams: Callable[[torch.device], Streams] = streams_for


MACHINE = Backend()


class Placed(NamedTuple):
    """The location of the moments of one parameter."""

    tensors: tuple[Tensor, ...]
    host: HostTier | None  # None for the device tier
    region: int  # the number of the parameter on its host tier
    device: torch.device  # where they are stepped
    plan: PlacementPlan


class HostTier:
    """The parameters of one device whose moments are in slabs. Each has a region: its tensors in one slab."""

    def __init__(
        self, requests: Sequence[StateRequest], plan: PlacementPlan, device: torch.device, backend: Backend
    ) -> None:
        set_pin_limit(plan.pin_limit)
        self.device = device
        parts = [request.tensors for request in requests]
        transfers = grouped(parts, plan.policy.transfer_bytes)
        self._slabs = [
            Slab([spec for region in regions for spec in parts[region]], pin=device.type != "cpu")
            for regions in transfers
        ]
        self._where: dict[int, tuple[int, tuple[int, ...]]] = {}  # of each region: its transfer, its parts of the slab
        for transfer, regions in enumerate(transfers):
            first = 0
            for region in regions:
                self._where[region] = transfer, tuple(range(first, first + len(parts[region])))
                first += len(parts[region])
        self._sizes = [len(regions) for regions in transfers]
        self._arrived: dict[int, int] = {}  # in backward: how many regions of each transfer have been used
        self.pipeline = Pipeline(self._slabs, backend.streams(device), slots=plan.policy.staging_slots)
        self._free: set[int] = set()  # regions whose parameters no longer need them
        self._versions: list[list[int]] = [[] for _ in requests]
        for region in range(len(requests)):
            self.take_versions(region)

    def tensors(self, region: int) -> tuple[Tensor, ...]:
        """The moments of a region; read or write them after `drain` only."""
        transfer, parts = self._where[region]
        found = self._slabs[transfer].tensors
        return tuple(found[part] for part in parts)

    def reattach(self, region: int) -> None:
        """Moves the moments of a region back into their slab, if an assignment to `.data` has given them other memory.

        Programs that move the state of an optimizer to a device assign so.
        """
        transfer, parts = self._where[region]
        slab = self._slabs[transfer]
        others = {part: other for part in parts if (other := slab.reattach(part)) is not None}
        if not others:
            return
        self.drain()
        for part, other in others.items():
            if other.shape == slab.parts[part].shape:
                slab.tensors[part].copy_(other)
        self.take_versions(region)

    def free_region(self, request: StateRequest) -> int | None:
        """Assigns a free region that the request's moments fit exactly; None if there is none."""
        for region in sorted(self._free):
            self.reattach(region)
            found = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in self.tensors(region))
            if found == request.tensors:
                self._free.remove(region)
                return region
        return None

    def release(self, region: int) -> None:
        """Marks a region as free, because its parameter no longer needs it."""
        self._free.add(region)

    def take_versions(self, region: int) -> None:
        """Makes the current values of a region's tensors valid: staged copies of them are dropped."""
        self._versions[region] = list(map(version_of, self.tensors(region)))

    def refresh(self) -> None:
        """Drops staged copies of regions that have been edited in place since."""
        for region, known in enumerate(self._versions):
            transfer, parts = self._where[region]
            tensors = self._slabs[transfer].tensors
            if any(version_of(tensors[part]) != version for part, version in zip(parts, known, strict=True)):
                self.pipeline.drop(transfer)
                self.take_versions(region)

    def run(self, items: Sequence[tuple[int, int]], step: _Step) -> None:
        """Steps tasks, given by number and region: transfer by transfer, in the order of the tasks."""
        if self._arrived:  # the rest of a step: the order in which gradients arrived stays the prediction for the next
            for number, region in items:
                own: list[int] = []
                self.run_one(
                    region,
                    lambda staged, number=number, own=own: step(self, [number], [staged], own),  # type: ignore[misc]
                    own,
                )
            return
        transfers: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for number, region in items:
            transfer, parts = self._where[region]
            transfers.setdefault(transfer, []).append((number, parts))
        self.pipeline.expect(list(transfers))
        for transfer, members in transfers.items():
            done: list[int] = []
            try:
                staged = self.pipeline.acquire(transfer)
                step(
                    self,
                    [number for number, _ in members],
                    [tuple(staged[part] for part in parts) for _, parts in members],
                    done,
                )
                self.pipeline.release(transfer)
            except BaseException:
                stepped = set(done)
                self.pipeline.abandon(
                    transfer, [part for number, parts in members if number in stepped for part in parts]
                )
                raise
        self.pipeline.finish()

    def run_one(self, region: int, step: Callable[[tuple[Tensor, ...]], None], done: Sequence[int]) -> None:
        """Steps one region of a step in backward, which `finish` ends.

        Args:
            region: the number of the region.
            step: steps it over staged moments.
            done: not empty once the region has been stepped.
        """
        transfer, parts = self._where[region]
        arrived = self._arrived[transfer] = self._arrived.get(transfer, 0) + 1
        try:
            step(tuple(self.pipeline.acquire(transfer, parts)))
            self.pipeline.release(transfer, more=arrived < self._sizes[transfer])
        except BaseException:
            self.pipeline.abandon(transfer, parts if done else ())
            raise

    def finish(self) -> None:
        self._arrived.clear()
        self.pipeline.finish()
        if self.pipeline.streams.asynchronous:
            self.pipeline.prefetch_first()

    def drain(self) -> None:
        self.pipeline.drain()


# Steps tasks of a host tier, given by number, over staged moments, and appends the numbers of the stepped tasks.
_Step = Callable[[HostTier, list[int], list[tuple[Tensor, ...]], list[int]], None]


def _over(task: UpdateTask, staged: Sequence[Tensor]) -> UpdateTask:
    """The task over staged moments."""
    cut = len(task.m)
    return task._replace(m=tuple(staged[:cut]), v=tuple(staged[cut:]))


class TieredExecutor:
    """Steps tasks of both tiers: those of the device tier together, the others transfer by transfer."""

    def __init__(
        self, engine: Engine, tasks: Sequence[UpdateTask], placed: Sequence[Placed], grads: Sequence[Tensor]
    ) -> None:
        self._engine, self._tasks = engine, tasks
        self._resident: list[int] = []
        self._hosts: dict[HostTier, list[tuple[int, int]]] = {}
        for number, (_, host, region, *_) in enumerate(placed):
            if host is None:
                self._resident.append(number)
            else:
                self._hosts.setdefault(host, []).append((number, region))
        self._on_host = [t for each in placed if each.host is not None for t in each.tensors]
        self._addresses, self._guards = list(map(Tensor.data_ptr, self._on_host)), moment_guards(self._on_host)
        own = [grads[number] for number in self._resident]
        self._executor = engine.executor([tasks[number] for number in self._resident], own)
        self._staged: dict[Any, Executor] = {}

    def bind(self, grads: Sequence[Tensor]) -> Any:
        same = self._guards is None or self._guards.check(*self._on_host)
        if not same or list(map(Tensor.data_ptr, self._on_host)) != self._addresses:
            return None
        bound = self._executor.bind([grads[number] for number in self._resident])
        return None if bound is None else (grads, bound)

    def run(self, bound: Any, scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]) -> None:
        grads, resident = bound
        _run_as(self._executor, resident, self._resident, scalars, rows, done)

        def step(host: HostTier, numbers: list[int], staged: list[tuple[Tensor, ...]], now: list[int]) -> None:
            executor, own = self._over_staged(host, numbers, staged, [grads[number] for number in numbers])
            try:
                _run_as(executor, own, numbers, scalars, rows, now)
                _add(done, now)
            except BaseException:
                _add(done, now)
                raise

        for host, items in self._hosts.items():
            host.run(items, step)

    def _over_staged(
        self, host: HostTier, numbers: list[int], staged: list[tuple[Tensor, ...]], grads: list[Tensor]
    ) -> tuple[Executor, Any]:
        """An executor for tasks over moments at these staged addresses, and these gradients as it prepares them."""
        key = host, numbers[0], len(numbers), staged[0][0].data_ptr()
        executor = self._staged.get(key)
        bound = None if executor is None else executor.bind(grads)
        if executor is None or bound is None:
            tasks = [_over(self._tasks[number], moments) for number, moments in zip(numbers, staged, strict=True)]
            executor = self._staged[key] = self._engine.executor(tasks, grads)
            bound = executor.bind(grads)
        return executor, bound


def _run_as(
    executor: Executor,
    bound: Any,
    numbers: Sequence[int],
    scalars: Sequence[StepScalars],
    rows: Sequence[int],
    done: list[int],
) -> None:
    """Runs an executor for a subset of the tasks, which has these numbers."""
    own: list[int] = []
    try:
        executor.run(bound, scalars, [rows[number] for number in numbers], own)
        _add(done, [numbers[place] for place in own])
    except BaseException:
        _add(done, [numbers[place] for place in own])
        raise


def _add(done: list[int], more: Sequence[int]) -> None:
    """Appends the numbers that `done` does not contain yet."""
    known = set(done)
    done += [number for number in more if number not in known]


class StagedOneExecutor:
    """Steps one task of the host tier."""

    def __init__(self, engine: Engine, task: UpdateTask, host: HostTier, region: int) -> None:
        self._engine, self._task, self._host, self._region = engine, task, host, region
        self._staged: dict[int, Executor] = {}

    def bind(self, grads: Sequence[Tensor]) -> Any:
        return grads

    def run(self, bound: Any, scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]) -> None:
        def step(staged: tuple[Tensor, ...]) -> None:
            at = staged[0].data_ptr()
            if at not in self._staged:
                self._staged[at] = self._engine.executor_of_one(_over(self._task, staged))
            executor = self._staged[at]
            executor.run(executor.bind(bound), scalars, rows, done)

        self._host.run_one(self._region, step, done)
