"""Where each parameter's moments live, and how those that live on the host are stepped.

`Housing` turns a `MemoryPolicy` into memory: at the first step it measures what is free, places all parameters, and
allocates. Moments on the device tier are ordinary tensors there. Those on the host tier lie in slabs, one for each
bucket of parameters, and are staged on the device through a `Pipeline` whenever they are stepped.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from collins.offload.memory import device_figures, host_memory_free, host_memory_total
from collins.offload.pipeline import Pipeline
from collins.offload.plan import PlacementPlan, Request, place, ring_bytes
from collins.offload.policy import MemoryPolicy
from collins.offload.sizes import size_text
from collins.offload.slabs import Part, Slab, grouped, set_pin_limit
from collins.offload.streams import streams_for
from collins.update import Work

_log = logging.getLogger("collins")

Compute = Callable[[Sequence[Work]], None]
Moments = tuple[Tensor, Tensor]


class Tenant(NamedTuple):
    """A parameter whose two moments need a home."""

    name: str
    p: Tensor
    moment: Part  # of each of the two


class Housing:
    """The homes of an optimizer's moments.

    Args:
        policy: where they may live.

    Attributes:
        plans: what was decided, for each device and each time that parameters were new.
    """

    def __init__(self, policy: MemoryPolicy) -> None:
        self._policy = policy
        self._moments: dict[Tensor, Moments] = {}
        self._hosts: dict[Tensor, tuple[_Host, int]] = {}
        self.plans: list[PlacementPlan] = []

    def __contains__(self, p: Tensor) -> bool:
        return p in self._moments

    def serves(self, p: Tensor) -> bool:
        """Whether a settled parameter is still on the device that its moments are for."""
        home = self._hosts.get(p)
        device = self._moments[p][0].device if home is None else home[0].pipeline.streams.device
        return device == p.device

    @property
    def waits(self) -> bool:
        """Whether what is decided depends on the device's peak, which only a step has seen."""
        return self._policy.tier == "auto"

    def settle(self, tenants: Sequence[Tenant], *, early: bool = False) -> None:
        """Finds a home, filled with zeros, for each parameter that has none yet.

        Args:
            early: within the first backward, which has still to show how much it takes: see `device_room`.

        Raises:
            MemoryError: when neither tier can hold them; nobody has moved in then.
        """
        by_device: dict[torch.device, list[Tenant]] = {}
        for tenant in tenants:
            if tenant.p not in self._moments:
                by_device.setdefault(tenant.p.device, []).append(tenant)
        if not by_device:
            return
        plans, host_free = [], host_memory_free()
        for device, group in by_device.items():
            plan, leave = _planned(self._policy, device, group, host_free, early)
            host_free -= plan.host_bytes + (plan.device_bytes if device.type == "cpu" else 0)
            plans.append((device, group, plan, leave))
        built = [_built(*planned) for planned in plans]
        for plan, moments, host, on_host in built:
            self.plans.append(plan)
            _log.info("Where the tables are, and why:\n%s", plan.summary())
            self._moments.update(moments)
            if host is not None:
                self._hosts.update((p, (host, number)) for number, p in enumerate(on_host))

    def moments(self, p: Tensor) -> Moments:
        """The moments of a settled parameter; read or write those on the host after `drain` only."""
        return self._moments[p]

    def run(self, works: Sequence[Work], params: Sequence[Tensor], compute: Compute) -> None:
        """A whole step, or what backward has left of one: what is on the device at once, the rest bucket after bucket,
        in the order of the parameters.
        """
        resident: list[Work] = []
        hosts: dict[_Host, list[tuple[int, Work]]] = {}
        for work, p in zip(works, params, strict=True):
            if p in self._hosts:
                host, number = self._hosts[p]
                hosts.setdefault(host, []).append((number, work))
            else:
                resident.append(work)
        compute(resident)
        for host, items in hosts.items():
            host.run(items, compute)

    def run_one(self, p: Tensor, compute: Callable[[Moments | None], None]) -> None:
        """Steps one parameter while others are still to come; `finish` ends the step.

        Args:
            compute: takes the moments as they are staged; None for those on the device tier, where they are.
        """
        home = self._hosts.get(p)
        if home is None:
            compute(None)
        else:
            host, number = home
            host.run_one(number, compute)

    def finish(self) -> None:
        """Ends a step. What the next one should need first is on its way to the device from here on."""
        for host in self._all_hosts():
            host.finish()

    def drain(self) -> None:
        """Waits until the host's memory holds what has been computed."""
        for host in self._all_hosts():
            host.pipeline.drain()

    def _all_hosts(self) -> list[_Host]:
        return list(dict.fromkeys(host for host, _ in self._hosts.values()))


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


def _planned(
    policy: MemoryPolicy, device: torch.device, tenants: Sequence[Tenant], host_free: int, early: bool
) -> tuple[PlacementPlan, int]:
    """The plan for one device, and the bytes of it that are free now and must be so when all tables are there."""
    requests = [Request(t.name, tuple(t.p.shape), 2 * t.moment.nbytes) for t in tenants]
    free, total, leave = None, None, 0
    if device.type == "cuda":
        figures = device_figures(device)
        free, total = figures.spare, figures.total
        if early:
            free = device_room(free, total, policy, requests, max(t.p.nbytes for t in tenants))
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


class _Built(NamedTuple):
    """A plan that has come true, and the parameters whose moments are on the host, in order."""

    plan: PlacementPlan
    moments: dict[Tensor, Moments]
    host: _Host | None
    on_host: list[Tensor]


def _built(device: torch.device, tenants: Sequence[Tenant], plan: PlacementPlan, leave: int) -> _Built:
    """Allocates what a plan says; where the device runs out of memory, more goes to the host, with a warning, until
    `leave` bytes are free.
    """
    made: dict[Tensor, Moments] = {}
    for row, tenant in enumerate(tenants):
        if plan.rows[row].tier == "host":
            break
        try:
            made[tenant.p] = _zeros(tenant.moment, device), _zeros(tenant.moment, device)
        except torch.OutOfMemoryError:
            plan = _spilled(plan, row, leave)
    while True:
        cut = sum(row.tier == "device" for row in plan.rows)
        made = dict(list(made.items())[:cut])
        if cut == len(tenants):
            return _Built(plan, made, None, [])
        try:
            host = _Host(tenants[cut:], plan, device)
        except torch.OutOfMemoryError as error:
            if cut == 0:
                raise MemoryError(
                    f"{device} has no room for the staging ring of {size_text(plan.staging_bytes)}"
                    f" ({plan.policy.staging_slots} slots of {size_text(plan.slot_bytes)}): free memory, or lower"
                    f" staging_slots or bucket_size\n{plan.totals()}"
                ) from error
            plan = _spilled(plan, 0, leave)
            continue
        made.update((tenant.p, host.moments(number)) for number, tenant in enumerate(tenants[cut:]))
        return _Built(plan, made, host, [tenant.p for tenant in tenants[cut:]])


def _spilled(plan: PlacementPlan, row: int, leave: int) -> PlacementPlan:
    plan = plan.spilled(row, leave=leave)
    warnings.warn(
        f"Collins moves tables to the host: the device ran out of memory for them\n{plan.totals()}", stacklevel=2
    )
    return plan


def _zeros(part: Part, device: torch.device) -> Tensor:
    return torch.zeros(part.shape, dtype=part.dtype, device=device)


def _compute_staged(compute: Compute, work: Work, staged: Moments) -> None:
    compute([work._replace(m=staged[0], v=staged[1])])


class _Host:
    """Parameters of one device whose moments live in slabs."""

    def __init__(self, tenants: Sequence[Tenant], plan: PlacementPlan, device: torch.device) -> None:
        set_pin_limit(plan.pin_limit)
        pairs = [(tenant.moment, tenant.moment) for tenant in tenants]
        buckets = grouped(pairs, plan.policy.bucket_bytes)
        self._slabs = [
            Slab([part for number in bucket for part in pairs[number]], pin=device.type != "cpu") for bucket in buckets
        ]
        # Of each tenant: its bucket, and the places of its moments there.
        self._where = {
            number: (b, (2 * i, 2 * i + 1)) for b, bucket in enumerate(buckets) for i, number in enumerate(bucket)
        }
        self._sizes = [len(bucket) for bucket in buckets]
        self._arrived: dict[int, int] = {}
        slots = min(plan.policy.staging_slots, len(buckets))
        self.pipeline = Pipeline(self._slabs, streams_for(device), slots=slots)

    def moments(self, number: int) -> Moments:
        bucket, (first, second) = self._where[number]
        tensors = self._slabs[bucket].tensors
        return tensors[first], tensors[second]

    def run(self, items: Sequence[tuple[int, Work]], compute: Compute) -> None:
        if self._arrived:  # the rest of a step: the order in which gradients arrived stays the prediction for the next
            for number, work in items:
                self.run_one(number, partial(_compute_staged, compute, work))
            return
        buckets: dict[int, list[tuple[tuple[int, int], Work]]] = {}
        for number, work in items:
            bucket, parts = self._where[number]
            buckets.setdefault(bucket, []).append((parts, work))

        def step(bucket: int, staged: list[Tensor]) -> None:
            compute([work._replace(m=staged[first], v=staged[second]) for (first, second), work in buckets[bucket]])

        self.pipeline.run(list(buckets), step)

    def run_one(self, number: int, compute: Callable[[Moments], None]) -> None:
        bucket, parts = self._where[number]
        arrived = self._arrived[bucket] = self._arrived.get(bucket, 0) + 1
        with self.pipeline.using(bucket, parts, more=arrived < self._sizes[bucket]) as (m, v):
            compute((m, v))

    def finish(self) -> None:
        self._arrived.clear()
        self.pipeline.finish()
        self.pipeline.prefetch_first()
