"""Where each parameter's moments live, and how those that live on the host are stepped.

`Housing` turns a `MemoryPolicy` into memory: at the first step it measures what is free, places all parameters, and
allocates. Moments on the device tier are ordinary tensors there. Those on the host tier lie in slabs, one for each
bucket of parameters, and are staged on the device through a `Pipeline` whenever they are stepped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from collins.offload.memory import device_figures, host_memory_free, host_memory_total
from collins.offload.pipeline import Pipeline
from collins.offload.plan import PlacementPlan, Request, place
from collins.offload.policy import MemoryPolicy
from collins.offload.slabs import Part, Slab, grouped, set_pin_limit
from collins.offload.streams import streams_for
from collins.update import Work

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

    def settle(self, tenants: Sequence[Tenant]) -> None:
        """Finds a home, filled with zeros, for each parameter that has none yet.

        Raises:
            MemoryError: when neither tier can hold them; nothing has been allocated then.
        """
        new = [tenant for tenant in tenants if tenant.p not in self._moments]
        by_device: dict[torch.device, list[Tenant]] = {}
        for tenant in new:
            by_device.setdefault(tenant.p.device, []).append(tenant)
        for device, group in by_device.items():
            self.plans.append(self._settle_on(device, group))

    def moments(self, p: Tensor) -> Moments:
        """The moments of a settled parameter; read or write those on the host after `drain` only."""
        return self._moments[p]

    def houses(self, p: Tensor) -> bool:
        """Whether a parameter is settled."""
        return p in self._moments

    def is_on_host(self, p: Tensor) -> bool:
        return p in self._hosts

    def run(self, works: Sequence[Work], params: Sequence[Tensor], compute: Compute) -> None:
        """A whole step: what is on the device at once, the rest bucket after bucket, in the order of the parameters."""
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

    def run_one(self, work: Work, p: Tensor, compute: Compute) -> None:
        """Steps one parameter while others are still to come; `finish` ends the step."""
        if p in self._hosts:
            host, number = self._hosts[p]
            host.run_one(number, work, compute)
        else:
            compute([work])

    def finish(self) -> None:
        """Ends a step of `run_one`."""
        for host in self._all_hosts():
            host.finish()

    def drain(self) -> None:
        """Waits until the host's memory holds what has been computed."""
        for host in self._all_hosts():
            host.pipeline.drain()

    def _all_hosts(self) -> list[_Host]:
        return list(dict.fromkeys(host for host, _ in self._hosts.values()))

    def _settle_on(self, device: torch.device, tenants: Sequence[Tenant]) -> PlacementPlan:
        requests = [Request(t.name, tuple(t.p.shape), 2 * t.moment.nbytes) for t in tenants]
        figures = device_figures(device) if device.type == "cuda" else None
        plan = place(
            requests,
            self._policy,
            device_free=figures.spare if figures else None,
            device_total=figures.total if figures else None,
            host_free=host_memory_free(),
            host_total=host_memory_total(),
        )
        made: dict[Tensor, Moments] = {}
        row = 0
        while row < len(tenants) and plan.rows[row].tier == "device":
            tenant = tenants[row]
            try:
                shape, dtype = tenant.moment
                made[tenant.p] = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))  # type: ignore[assignment]
                row += 1
            except torch.OutOfMemoryError:
                plan = plan.spilled(row)
                warnings.warn(f"Collins moves tables to the host: {plan.rows[row].why}\n{plan.totals()}", stacklevel=2)
                row = sum(r.tier == "device" for r in plan.rows)
                for spilled in tenants[row:]:
                    made.pop(spilled.p, None)
        on_host = tenants[row:]
        if on_host:
            host = _Host(on_host, plan, device)
            for number, tenant in enumerate(on_host):
                made[tenant.p] = host.moments(number)
                self._hosts[tenant.p] = host, number
        self._moments.update(made)
        return plan


class _Host:
    """Parameters of one device whose moments live in slabs."""

    def __init__(self, tenants: Sequence[Tenant], plan: PlacementPlan, device: torch.device) -> None:
        if plan.pin_limit is not None:
            set_pin_limit(plan.pin_limit)
        pairs = [(tenant.moment, tenant.moment) for tenant in tenants]
        buckets = grouped(pairs, plan.policy.bucket_bytes)
        self._slabs = [
            Slab([part for number in bucket for part in pairs[number]], pin=device.type != "cpu") for bucket in buckets
        ]
        self._where = {number: (b, i) for b, bucket in enumerate(buckets) for i, number in enumerate(bucket)}
        self._sizes = [len(bucket) for bucket in buckets]
        self._arrived: dict[int, int] = {}
        slots = min(plan.policy.staging_slots, len(buckets))
        self.pipeline = Pipeline(self._slabs, streams_for(device), slots=slots)

    def moments(self, number: int) -> Moments:
        bucket, i = self._where[number]
        m, v = self._slabs[bucket].tensors[2 * i : 2 * i + 2]
        return m, v

    def run(self, items: Sequence[tuple[int, Work]], compute: Compute) -> None:
        buckets: dict[int, list[tuple[int, Work]]] = {}
        for number, work in items:
            bucket, i = self._where[number]
            buckets.setdefault(bucket, []).append((i, work))

        def step(bucket: int, staged: list[Tensor]) -> None:
            compute([w._replace(m=staged[2 * i], v=staged[2 * i + 1]) for i, w in buckets[bucket]])

        self.pipeline.run(list(buckets), step)

    def run_one(self, number: int, work: Work, compute: Compute) -> None:
        bucket, i = self._where[number]
        self._arrived[bucket] = self._arrived.get(bucket, 0) + 1
        more = self._arrived[bucket] < self._sizes[bucket]
        with self.pipeline.using(bucket, (2 * i, 2 * i + 1), more=more) as (m, v):
            compute([work._replace(m=m, v=v)])

    def finish(self) -> None:
        self._arrived.clear()
        self.pipeline.finish()
