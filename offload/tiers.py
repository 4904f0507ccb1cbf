"""Stores of moments: where they are allocated, and how moments on the host are stepped.

Both stores have the same interface. `ResidentStore` keeps moments beside their parameters. `TieredStore` implements a
`MemoryPolicy`: at the first step of parameters it measures the free memory, places their moments, and allocates them.
Moments on the device tier are ordinary tensors there. Those on the host tier are in slabs, one for each transfer, and a
`Pipeline` stages them on the device whenever they are stepped.

The optimizer's `state` is authoritative: moments that were edited, replaced or removed there are used from the next
step on.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from collins.compile import Engine
from collins.compile.program import Executor
from collins.formats import TensorSpec
from collins.offload.memory import host_memory_total
from collins.offload.pipeline import Traffic
from collins.offload.plan import PlacementPlan, Request, place, ring_bytes
from collins.offload.policy import MemoryPolicy
from collins.offload.sizes import size_text
from collins.offload.slabs import offsets
from collins.offload.staging import (
    MACHINE,
    Backend,
    HostTier,
    Placed,
    StagedOneExecutor,
    StateRequest,
    TieredExecutor,
    zeros,
)
from collins.update import UpdateTask

_log = logging.getLogger("collins")


class Store(Protocol):
    """The storage of an optimizer's moments.

    Attributes:
        plans: one for each device, and one for each later addition of parameters, as long as one of them is placed.
    """

    @property
    def plans(self) -> Sequence[PlacementPlan]: ...

    @property
    def link_bytes(self) -> int:
        """Bytes of moments that have been copied between host and device, in both directions."""

    def place(self, requests: Sequence[StateRequest], *, early: bool = False, loading: bool = False) -> None:
        """Allocates memory for the moments of parameters that have none yet.

        Args:
            requests: the moments to place.
            early: whether this is during the first backward, whose peak is not known yet: see `device_room`.
            loading: whether this is before any step. Then decisions that need the peak are left to the first step.

        Raises:
            MemoryError: if neither tier can hold them; then nothing has been placed.
        """

    def serves(self, p: Tensor, moment: Tensor) -> bool:
        """Whether a step of `p` can use this moment."""

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors to keep as the state of `p`, with the values of `given`, or zeros for None."""

    def tensors_to_load(self, p: Tensor, specs: Sequence[TensorSpec], present: Sequence[Tensor | None]) -> list[Tensor]:
        """Tensors to load the state of `p` into; those in `present` are reused where they fit."""

    def retain(self, params: Iterable[Tensor]) -> None:
        """Frees the moments of all other parameters."""

    def refresh(self) -> None:
        """Makes in-place edits since the last step take effect; call it before a step begins."""

    def executor(
        self, engine: Engine, tasks: Sequence[UpdateTask], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Executor:
        """An executor for these tasks, of `params`, with gradients of the memory layout of `grads`."""

    def executor_of_one(self, engine: Engine, task: UpdateTask, p: Tensor) -> Executor:
        """An executor for one task of a step in backward, where tasks run one by one as their gradients arrive."""

    def finish(self) -> None:
        """Ends a step, and starts to stage the first transfers of the next one."""

    def drain(self) -> None:
        """Waits until the tensors of the state hold the computed values."""


class ResidentStore:
    """Keeps moments beside their parameters, in the optimizer's state."""

    plans: Sequence[PlacementPlan] = ()
    link_bytes = 0

    def place(self, requests: Sequence[StateRequest], *, early: bool = False, loading: bool = False) -> None:
        pass

    def serves(self, p: Tensor, moment: Tensor) -> bool:
        return moment.device == p.device

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            zeros(spec, p.device) if t is None else t if _is_changeable(t) else t.detach().clone()
            for spec, t in zip(specs, given, strict=True)
        ]

    def tensors_to_load(self, p: Tensor, specs: Sequence[TensorSpec], present: Sequence[Tensor | None]) -> list[Tensor]:
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


def _is_changeable(t: Tensor) -> bool:
    """Whether later code can change a tensor in place: its elements do not share memory, and neither inference mode
    nor autograd forbids it.
    """
    distinct = all(stride or size == 1 for size, stride in zip(t.shape, t.stride(), strict=True))
    return distinct and not t.is_inference() and not t.requires_grad


def _fitting(specs: Sequence[TensorSpec], present: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
    """The tensors that are present, new ones in place of those that do not fit."""
    return [
        zeros(spec, device) if t is None or (tuple(t.shape), t.dtype, t.device) != (*spec, device) else t
        for spec, t in zip(specs, present, strict=True)
    ]


class TieredStore:
    """Keeps moments on the device and in host memory, according to a policy.

    Args:
        policy: the memory policy.
        backend: the functions of the machine.
    """

    def __init__(self, policy: MemoryPolicy, backend: Backend = MACHINE) -> None:
        self._policy = policy
        self._backend = backend
        self._placed: dict[Tensor, Placed] = {}
        self._hosts: weakref.WeakKeyDictionary[HostTier, PlacementPlan] = weakref.WeakKeyDictionary()
        self._traffic = Traffic()  # of all host tiers, including those that no longer exist
        self._plans: list[PlacementPlan] = []

    @property
    def plans(self) -> Sequence[PlacementPlan]:
        used = {*map(id, self._hosts.values()), *(id(placed.plan) for placed in self._placed.values())}
        return [plan for plan in self._plans if id(plan) in used]

    @property
    def link_bytes(self) -> int:
        return self._traffic.nbytes

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
        for plan, on_device, host, placing in [_built(*each, self._backend) for each in plans]:
            self._plans = [*self.plans, plan]
            _log.info("Where the tables are, and why:\n%s", plan.summary())
            for request, tensors in zip(placing, on_device, strict=False):
                self._placed[request.p] = Placed(tensors, None, 0, request.p.device, plan)
            if host is not None:
                self._hosts[host] = plan
                host.pipeline.traffic = self._traffic
                for region, request in enumerate(placing[len(on_device) :]):
                    self._placed[request.p] = Placed(host.tensors(region), host, region, request.p.device, plan)

    def serves(self, p: Tensor, moment: Tensor) -> bool:
        placed = self._placed.get(p)
        has_data = p.is_meta or not moment.is_meta
        return has_data and (placed is None or placed.device == p.device)

    def adopt(self, p: Tensor, specs: Sequence[TensorSpec], given: Sequence[Tensor | None]) -> list[Tensor]:
        placed = self._placed[p]
        _reattach(placed)
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

    def tensors_to_load(self, p: Tensor, specs: Sequence[TensorSpec], present: Sequence[Tensor | None]) -> list[Tensor]:
        placed = self._placed.get(p)
        if placed is None:
            return _fitting(specs, present, torch.device("cpu"))
        _reattach(placed)
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
        return TieredExecutor(engine, tasks, [self._placed[p] for p in params], grads)

    def executor_of_one(self, engine: Engine, task: UpdateTask, p: Tensor) -> Executor:
        placed = self._placed[p]
        if placed.host is None:
            return engine.executor_of_one(task)
        return StagedOneExecutor(engine, task, placed.host, placed.region)

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
        """Whether the region of a removed parameter could be reused."""
        for host, plan in self._hosts.items():
            region = host.free_region(request) if host.device == request.p.device else None
            if region is not None:
                self._placed[request.p] = Placed(host.tensors(region), host, region, request.p.device, plan)
                return True
        return False


def _reattach(placed: Placed) -> None:
    """Moves moments whose `.data` has been replaced back to where they were placed."""
    if placed.host is not None:
        placed.host.reattach(placed.region)
        return
    for t in placed.tensors:
        if t.device != placed.device:
            t.data = t.detach().to(placed.device)


def _holds(placed: Placed, request: StateRequest) -> bool:
    found = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in placed.tensors)
    return found == request.tensors and placed.device == request.p.device


def device_room(spare: int, total: int, policy: MemoryPolicy, requests: Sequence[Request], largest: int) -> int:
    """The device memory to plan with during the first backward.

    When the first gradient arrives, the activations of forward are at their peak, but most gradients do not exist yet.
    Those of one tensor exist together in eager code, those of one block if blocks are compiled. A block of a
    transformer has up to `_TO_COME` times the elements of its largest matrix, so `_TO_COME` times the largest gradient
    is kept free. If the recomputation of a checkpointed block takes more, it needs a `device_reserve`. The staging ring
    has priority over this margin, because no step is possible without it.

    Args:
        spare: bytes that no forward has used so far.
        total: bytes of the device.
        policy: the policy; only tier "auto" leaves a choice.
        requests: the moments to place.
        largest: bytes of the largest parameter.
    """
    if policy.tier != "auto":
        return spare
    ring = ring_bytes(requests, policy) + policy.device_reserve_of(total)
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
    """The plan for one device, and the bytes of it that must be free after all tables have been allocated."""
    requests = [Request(t.name, tuple(t.p.shape), t.nbytes, t.role, offsets(t.tensors)[1]) for t in state_requests]
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
    host: HostTier | None  # those of the others
    requests: Sequence[StateRequest]


def _built(
    device: torch.device, requests: Sequence[StateRequest], plan: PlacementPlan, leave: int, backend: Backend
) -> _Built:
    """Allocates the moments of a plan. If the device runs out of memory, it warns and moves more moments to the host,
    until `leave` bytes are free.
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
            return _Built(plan, made, HostTier(requests[cut:], plan, device, backend), requests)
        except torch.OutOfMemoryError as error:
            if cut == 0:
                raise MemoryError(
                    f"{device} has no room for the staging ring of {size_text(plan.staging_bytes)} ({plan.ring}): free"
                    f" memory, or lower staging_slots or transfer_size\n{plan.totals()}"
                ) from error
            plan = _spilled(plan, 0, leave)
