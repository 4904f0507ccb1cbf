"""Where each parameter's moments live, and how those that live on the host are stepped.

Two stores have one interface. `ResidentStore` keeps moments beside their parameters. `TieredStore` turns a
`MemoryPolicy` into memory: when parameters are first stepped it measures what is free, places them, and allocates.
Moments on the device tier are ordinary tensors there. Those on the host tier lie in slabs, one for each transfer, and
are staged on the device through a `Pipeline` whenever they are stepped.

What an optimizer's state holds is the truth: moments that were edited, replaced or removed there are taken over before
the next step.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from collins.compile import Engine
from collins.compile.program import Executor
from collins.formats import TensorSpec
from collins.offload.memory import DeviceFigures, device_figures, host_memory_free, host_memory_total
from collins.offload.pipeline import Pipeline
from collins.offload.plan import PlacementPlan, Request, place, ring_bytes
from collins.offload.policy import MemoryPolicy
from collins.offload.sizes import size_text
from collins.offload.slabs import Slab, grouped, set_pin_limit
from collins.offload.streams import Streams, streams_for
from collins.rule import StepScalars
from collins.update import UpdateTask

_log = logging.getLogger("collins")
_version = attrgetter("_version")


class StateRequest(NamedTuple):
    """A parameter whose moments are to be placed."""

    name: str
    p: Tensor
    tensors: tuple[TensorSpec, ...]  # in which both moments are stored

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


def zeros(spec: TensorSpec, device: torch.device) -> Tensor:
    """A tensor of zeros."""
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device)


@dataclass(frozen=True)
class Backend:
    """What a store asks of the machine; tests give their own.

    Args:
        allocate: makes a tensor of zeros on a device, or raises torch.OutOfMemoryError.
        measure: the figures of a CUDA device.
        host_free: bytes of host memory that this process can still take.
        streams: of a device.
    """

    allocate: Callable[[TensorSpec, torch.device], Tensor] = zeros
    measure: Callable[[torch.device], DeviceFigures] = device_figures
    host_free: Callable[[], int] = host_memory_free
    streams: Callable[[torch.device], Streams] = streams_for


class Store(Protocol):
    """Where the moments of an optimizer live.

    Attributes:
        plans: what was decided, for each device and each time that parameters were new.
    """

    @property
    def plans(self) -> Sequence[PlacementPlan]: ...

    def place(self, requests: Sequence[StateRequest], *, early: bool = False, loading: bool = False) -> None:
        """Finds memory for the moments of parameters that have none yet.

        Args:
            requests: what is to be placed.
            early: within the first backward, which has still to show how much it takes: see `device_room`.
            loading: before any step: what depends on the peak is left for the first step to decide.

        Raises:
            MemoryError: when neither tier can hold them; nothing has been placed then.
        """

    def serves(self, p: Tensor, moment: Tensor) -> bool:
        """Whether a step of `p` can go on from this moment."""

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors that are to be kept as the state of `p`, with the values of `given`, zeros for None."""

    def room(self, p: Tensor, specs: Sequence[TensorSpec], present: Sequence[Tensor | None]) -> list[Tensor]:
        """Tensors to load the state of `p` into: those that are present, as far as they fit."""

    def retain(self, params: Iterable[Tensor]) -> None:
        """Lets go of the moments of all parameters but these."""

    def refresh(self) -> None:
        """Takes over what was edited in place since the last step; call it before a step begins."""

    def executor(
        self, engine: Engine, tasks: Sequence[UpdateTask], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Executor:
        """What steps these tasks, of `params`, with gradients that lie in memory as these do."""

    def executor_of_one(self, engine: Engine, task: UpdateTask, p: Tensor) -> Executor:
        """What steps one task, which others follow as their gradients arrive in backward."""

    def finish(self) -> None:
        """Ends a step. What the next one should need first is on its way to the device from here on."""

    def drain(self) -> None:
        """Waits until the tensors of the state hold what has been computed."""


class ResidentStore:
    """Moments beside their parameters, owned by the optimizer's state."""

    plans: Sequence[PlacementPlan] = ()

    def place(self, requests: Sequence[StateRequest], *, early: bool = False, loading: bool = False) -> None:
        pass

    def serves(self, p: Tensor, moment: Tensor) -> bool:
        return moment.device == p.device

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        return [zeros(spec, p.device) if t is None else t for spec, t in zip(specs, given, strict=True)]

    def room(self, p: Tensor, specs: Sequence[TensorSpec], present: Sequence[Tensor | None]) -> list[Tensor]:
        return _fitting(specs, present, p.device)

    def retain(self, params: Iterable[Tensor]) -> None:
        pass

    def refresh(self) -> None:
        pass

    def executor(
        self, engine: Engine, tasks: Sequence[UpdateTask], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Executor:
        return engine.executor(tasks, grads)

    def executor_of_one(self, engine: Engine, task: UpdateTask, p: Tensor) -> Executor:
        return engine.executor_of_one(task)

    def finish(self) -> None:
        pass

    def drain(self) -> None:
        pass


def _fitting(specs: Sequence[TensorSpec], present: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
    """The tensors that are present, new ones in place of those that do not fit."""
    return [
        zeros(spec, device) if t is None or (tuple(t.shape), t.dtype, t.device) != (*spec, device) else t
        for spec, t in zip(specs, present, strict=True)
    ]


class _Placed(NamedTuple):
    """Where the moments of one parameter are."""

    tensors: tuple[Tensor, ...]
    host: _HostTier | None  # None for the device tier
    region: int  # the number of the parameter on its host tier
    device: torch.device  # where they are stepped


class TieredStore:
    """Moments on the device and in host memory, as a policy says.

    Args:
        policy: where they may live.
        backend: the machine.
    """

    def __init__(self, policy: MemoryPolicy, backend: Backend = Backend()) -> None:
        self._policy = policy
        self._backend = backend
        self._placed: dict[Tensor, _Placed] = {}
        self._hosts: weakref.WeakSet[_HostTier] = weakref.WeakSet()
        self._plans: list[PlacementPlan] = []

    @property
    def plans(self) -> Sequence[PlacementPlan]:
        return self._plans

    def place(self, requests: Sequence[StateRequest], *, early: bool = False, loading: bool = False) -> None:
        if loading and self._policy.tier == "auto":
            return
        by_device: dict[torch.device, list[StateRequest]] = {}
        for request in requests:
            placed = self._placed.get(request.p)
            if placed is not None and not _holds(placed, request):
                self._release(request.p)
            if request.p not in self._placed and not self._reuse(request):
                by_device.setdefault(request.p.device, []).append(request)
        if not by_device:
            return
        plans, host_free = [], self._backend.host_free()
        for device, group in by_device.items():
            plan, leave = planned(self._policy, device, group, host_free, early, self._backend)
            host_free -= plan.host_bytes + (plan.device_bytes if device.type == "cpu" else 0)
            plans.append((device, group, plan, leave))
        for plan, on_device, host, group in [_built(*each, self._backend) for each in plans]:
            self._plans.append(plan)
            _log.info("Where the tables are, and why:\n%s", plan.summary())
            for request, tensors in zip(group, on_device, strict=False):
                self._placed[request.p] = _Placed(tensors, None, 0, request.p.device)
            if host is not None:
                self._hosts.add(host)
                for region, request in enumerate(group[len(on_device) :]):
                    self._placed[request.p] = _Placed(host.tensors(region), host, region, request.p.device)

    def serves(self, p: Tensor, moment: Tensor) -> bool:
        placed = self._placed.get(p)
        return placed is None or placed.device == p.device

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        placed = self._placed[p]
        pairs = list(zip(placed.tensors, given, strict=True))
        if any(own is not t for own, t in pairs):
            if placed.host is not None:
                placed.host.drain()
            for own, t in pairs:
                if t is None:
                    own.zero_()
                elif t is not own:
                    own.copy_(t)
            if placed.host is not None:
                placed.host.take_versions(placed.region)
        return list(placed.tensors)

    def room(self, p: Tensor, specs: Sequence[TensorSpec], present: Sequence[Tensor | None]) -> list[Tensor]:
        placed = self._placed.get(p)
        if placed is None:
            return _fitting(specs, present, torch.device("cpu"))
        if placed.host is not None:
            placed.host.drain()
        return list(placed.tensors)

    def retain(self, params: Iterable[Tensor]) -> None:
        kept = set(map(id, params))
        for p in [p for p in self._placed if id(p) not in kept]:
            self._release(p)

    def refresh(self) -> None:
        for host in self._hosts:
            host.refresh()

    def executor(
        self, engine: Engine, tasks: Sequence[UpdateTask], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Executor:
        return _TieredExecutor(engine, tasks, [self._placed[p] for p in params], grads)

    def executor_of_one(self, engine: Engine, task: UpdateTask, p: Tensor) -> Executor:
        placed = self._placed[p]
        if placed.host is None:
            return engine.executor_of_one(task)
        return _StagedOneExecutor(engine, task, placed.host, placed.region)

    def finish(self) -> None:
        for host in self._hosts:
            host.finish()

    def drain(self) -> None:
        for host in self._hosts:
            host.drain()

    def _release(self, p: Tensor) -> None:
        placed = self._placed.pop(p)
        if placed.host is not None:
            placed.host.release(placed.region)

    def _reuse(self, request: StateRequest) -> bool:
        """Whether memory was found that a parameter which is gone has left."""
        for host in self._hosts:
            region = host.free_region(request) if host.device == request.p.device else None
            if region is not None:
                self._placed[request.p] = _Placed(host.tensors(region), host, region, request.p.device)
                return True
        return False


def _holds(placed: _Placed, request: StateRequest) -> bool:
    found = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in placed.tensors)
    return found == request.tensors and placed.device == request.p.device


def device_room(spare: int, total: int, policy: MemoryPolicy, requests: Sequence[Request], largest: int) -> int:
    """What to plan with on a device in the midst of its first backward.

    The first gradient arrives when forward's activations are at their peak, but the gradients that will be there
    together are still to come: of one tensor in eager code, of one block where blocks are compiled. A block of a
    transformer has up to `_TO_COME` times the elements of its largest matrix, so that many times the largest gradient
    is kept free. Where a checkpointed block takes more to recompute than that, a `device_reserve` has to say so. The
    staging ring goes before this margin: without it nothing can be stepped.

    Args:
        spare: what no forward has used so far, in bytes.
        total: bytes of the device.
        policy: whose tier decides: only "auto" leaves a choice.
        requests: what is to be placed.
        largest: bytes of the largest parameter.
    """
    if policy.tier != "auto":
        return spare
    ring = ring_bytes([request.bytes for request in requests], policy) + policy.device_reserve_of(total)
    return max(spare - _TO_COME * largest, min(spare, ring))


_TO_COME = 5


def planned(
    policy: MemoryPolicy,
    device: torch.device,
    state_requests: Sequence[StateRequest],
    host_free: int,
    early: bool,
    backend: Backend,
) -> tuple[PlacementPlan, int]:
    """The plan for one device, and the bytes of it that are free now and must be so when all tables are there."""
    requests = [Request(t.name, tuple(t.p.shape), t.nbytes) for t in state_requests]
    free, total, leave = None, None, 0
    if device.type == "cuda":
        figures = backend.measure(device)
        free, total = figures.spare, figures.total
        if early:
            free = device_room(free, total, policy, requests, max(t.p.nbytes for t in state_requests))
        leave = figures.free - free + policy.device_reserve_of(total)
    plan = place(
        requests,
        policy,
        device_free=free,
        device_total=total,
        host_free=max(host_free, 0),
        host_total=host_memory_total(),
    )
    return plan, leave


def _spilled(plan: PlacementPlan, row: int, leave: int) -> PlacementPlan:
    plan = plan.spilled(row, leave=leave)
    warnings.warn(
        f"Collins moves tables to the host: the device ran out of memory for them\n{plan.totals()}", stacklevel=2
    )
    return plan


class _Built(NamedTuple):
    """A plan that has come true."""

    plan: PlacementPlan
    on_device: list[tuple[Tensor, ...]]  # the moments of the first parameters
    host: _HostTier | None  # those of the others
    requests: Sequence[StateRequest]


def _built(
    device: torch.device, requests: Sequence[StateRequest], plan: PlacementPlan, leave: int, backend: Backend
) -> _Built:
    """Allocates what a plan says; where the device runs out of memory, more goes to the host, with a warning, until
    `leave` bytes are free.
    """
    made: list[tuple[Tensor, ...]] = []
    for row, request in enumerate(requests):
        if plan.rows[row].tier == "host":
            break
        try:
            made.append(tuple(backend.allocate(spec, device) for spec in request.tensors))
        except torch.OutOfMemoryError:
            plan = _spilled(plan, row, leave)
    while True:
        cut = sum(row.tier == "device" for row in plan.rows)
        del made[cut:]
        if cut == len(requests):
            return _Built(plan, made, None, requests)
        try:
            return _Built(plan, made, _HostTier(requests[cut:], plan, device, backend), requests)
        except torch.OutOfMemoryError as error:
            if cut == 0:
                raise MemoryError(
                    f"{device} has no room for the staging ring of {size_text(plan.staging_bytes)}"
                    f" ({plan.policy.staging_slots} slots of {size_text(plan.slot_bytes)}): free memory, or lower"
                    f" staging_slots or transfer_size\n{plan.totals()}"
                ) from error
            plan = _spilled(plan, 0, leave)


class _HostTier:
    """Parameters of one device whose moments live in slabs. Each has a region: its tensors in one slab."""

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
        slots = min(plan.policy.staging_slots, len(transfers))
        self.pipeline = Pipeline(self._slabs, backend.streams(device), slots=slots)
        self._free: set[int] = set()  # regions whose parameters need them no more
        self._versions: list[list[int]] = [[] for _ in requests]
        for region in range(len(requests)):
            self.take_versions(region)

    def tensors(self, region: int) -> tuple[Tensor, ...]:
        """The moments of a region; read or write them after `drain` only."""
        transfer, parts = self._where[region]
        found = self._slabs[transfer].tensors
        return tuple(found[part] for part in parts)

    def free_region(self, request: StateRequest) -> int | None:
        """A region whose parameter is gone and into which the request's moments fit exactly: now the request's."""
        for region in sorted(self._free):
            found = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in self.tensors(region))
            if found == request.tensors:
                self._free.remove(region)
                return region
        return None

    def release(self, region: int) -> None:
        """The region's parameter needs it no more."""
        self._free.add(region)

    def take_versions(self, region: int) -> None:
        """The region's tensors, which nothing staged is older than, count as they are."""
        self._versions[region] = list(map(_version, self.tensors(region)))

    def refresh(self) -> None:
        """Drops what was staged of regions that have been edited in place since."""
        for region, known in enumerate(self._versions):
            transfer, parts = self._where[region]
            tensors = self._slabs[transfer].tensors
            if any(tensors[part]._version != version for part, version in zip(parts, known, strict=True)):
                self.pipeline.drop(transfer)
                self.take_versions(region)

    def run(self, items: Sequence[tuple[int, int]], step: _Step) -> None:
        """Steps tasks, given by number and region: transfer by transfer, in the order of the tasks."""
        if self._arrived:  # the rest of a step: the order in which gradients arrived stays the prediction for the next
            for number, region in items:
                self.run_one(region, lambda staged, number=number: step(self, [number], [staged], []))  # type: ignore[misc]
            return
        transfers: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for number, region in items:
            transfer, parts = self._where[region]
            transfers.setdefault(transfer, []).append((number, parts))
        self.pipeline.expect(list(transfers))
        for transfer, members in transfers.items():
            with self.pipeline.using(transfer) as use:
                done: list[int] = []
                try:
                    step(
                        self,
                        [number for number, _ in members],
                        [tuple(use.tensors[part] for part in parts) for _, parts in members],
                        done,
                    )
                except BaseException:
                    stepped = set(done)
                    use.keep([part for number, parts in members if number in stepped for part in parts])
                    raise
        self.pipeline.finish()

    def run_one(self, region: int, step: Callable[[tuple[Tensor, ...]], None]) -> None:
        """Steps one region while others are still to come; `finish` ends the step."""
        transfer, parts = self._where[region]
        arrived = self._arrived[transfer] = self._arrived.get(transfer, 0) + 1
        with self.pipeline.using(transfer, parts, more=arrived < self._sizes[transfer]) as use:
            step(tuple(use.tensors))

    def finish(self) -> None:
        self._arrived.clear()
        self.pipeline.finish()
        self.pipeline.prefetch_first()

    def drain(self) -> None:
        self.pipeline.drain()


# Steps tasks, by number, of a host tier over staged moments; takes the numbers of those that have been stepped.
_Step = Callable[[_HostTier, list[int], list[tuple[Tensor, ...]], list[int]], None]


def _over(task: UpdateTask, staged: Sequence[Tensor]) -> UpdateTask:
    """The task over staged moments."""
    cut = len(task.m)
    return task._replace(m=tuple(staged[:cut]), v=tuple(staged[cut:]))


class _TieredExecutor:
    """Steps tasks of both tiers: what is on the device at once, the rest transfer by transfer."""

    def __init__(
        self, engine: Engine, tasks: Sequence[UpdateTask], placed: Sequence[_Placed], grads: Sequence[Tensor]
    ) -> None:
        self._engine, self._tasks = engine, tasks
        self._resident: list[int] = []
        self._hosts: dict[_HostTier, list[tuple[int, int]]] = {}
        for number, (_, host, region, _) in enumerate(placed):
            if host is None:
                self._resident.append(number)
            else:
                self._hosts.setdefault(host, []).append((number, region))
        own = [grads[number] for number in self._resident]
        self._executor = engine.executor([tasks[number] for number in self._resident], own)
        self._staged: dict[Any, Executor] = {}

    def bind(self, grads: Sequence[Tensor]) -> Any:
        bound = self._executor.bind([grads[number] for number in self._resident])
        return None if bound is None else (grads, bound)

    def run(self, bound: Any, scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]) -> None:
        grads, resident = bound
        _run_as(self._executor, resident, self._resident, scalars, rows, done)

        def step(host: _HostTier, numbers: list[int], staged: list[tuple[Tensor, ...]], now: list[int]) -> None:
            executor, own = self._over_staged(host, numbers, staged, [grads[number] for number in numbers])
            try:
                _run_as(executor, own, numbers, scalars, rows, now)
            finally:
                done.extend(now)

        for host, items in self._hosts.items():
            host.run(items, step)

    def _over_staged(
        self, host: _HostTier, numbers: list[int], staged: list[tuple[Tensor, ...]], grads: list[Tensor]
    ) -> tuple[Executor, Any]:
        """What steps tasks over moments that are staged where these are, and what it takes for these gradients."""
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
    """Runs an executor whose tasks have these numbers among others."""
    own: list[int] = []
    try:
        executor.run(bound, scalars, [rows[number] for number in numbers], own)
    finally:
        done.extend(numbers[place] for place in own)


class _StagedOneExecutor:
    """Steps one task of the host tier."""

    def __init__(self, engine: Engine, task: UpdateTask, host: _HostTier, region: int) -> None:
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

        self._host.run_one(self._region, step)
