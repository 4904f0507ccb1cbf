"""Where each parameter's moments live, and how those that live on the host are stepped.

`TieredStore` turns a `MemoryPolicy` into memory: at the first step it measures what is free, places all parameters, and
allocates. Moments on the device tier are ordinary tensors there. Those on the host tier lie in slabs, one for each
transfer of parameters, and are staged on the device through a `Pipeline` whenever they are stepped.
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
from collins.offload.slabs import Slab, TensorSpec, grouped, set_pin_limit
from collins.offload.streams import streams_for
from collins.update import UpdateTask

_log = logging.getLogger("collins")

Compute = Callable[[Sequence[UpdateTask]], None]
Moments = tuple[Tensor, Tensor]


class StateRequest(NamedTuple):
    """A parameter whose two moments need a home."""

    name: str
    p: Tensor
    moment: TensorSpec  # of each of the two


class TieredStore:
    """The expected_states of an optimizer's moments.

    Args:
        policy: where they may live.

    Attributes:
        plans: what was decided, for each device and each time that parameters were new.
    """

    def __init__(self, policy: MemoryPolicy) -> None:
        self._policy = policy
        self._moments: dict[Tensor, Moments] = {}
        self._hosts: dict[Tensor, tuple[_HostTier, int]] = {}
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

    def settle(self, state_requests: Sequence[StateRequest], *, early: bool = False) -> None:
        """Finds a home, filled with zeros, for each parameter that has none yet.

        Args:
            early: within the first backward, which has still to show how much it takes: see `device_room`.

        Raises:
            MemoryError: when neither tier can hold them; nobody has moved in then.
        """
        by_device: dict[torch.device, list[StateRequest]] = {}
        for state_request in state_requests:
            if state_request.p not in self._moments:
                by_device.setdefault(state_request.p.device, []).append(state_request)
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

    def run(self, works: Sequence[UpdateTask], params: Sequence[Tensor], compute: Compute) -> None:
        """A whole step, or what backward has left of one: what is on the device at once, the rest transfer by transfer,
        in the order of the parameters.
        """
        resident: list[UpdateTask] = []
        hosts: dict[_HostTier, list[tuple[int, UpdateTask]]] = {}
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

    def _all_hosts(self) -> list[_HostTier]:
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
    policy: MemoryPolicy, device: torch.device, state_requests: Sequence[StateRequest], host_free: int, early: bool
) -> tuple[PlacementPlan, int]:
    """The plan for one device, and the bytes of it that are free now and must be so when all tables are there."""
    requests = [Request(t.name, tuple(t.p.shape), 2 * t.moment.nbytes) for t in state_requests]
    free, total, leave = None, None, 0
    if device.type == "cuda":
        figures = device_figures(device)
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


class _Built(NamedTuple):
    """A plan that has come true, and the parameters whose moments are on the host, in order."""

    plan: PlacementPlan
    moments: dict[Tensor, Moments]
    host: _HostTier | None
    on_host: list[Tensor]


def _built(device: torch.device, state_requests: Sequence[StateRequest], plan: PlacementPlan, leave: int) -> _Built:
    """Allocates what a plan says; where the device runs out of memory, more goes to the host, with a warning, until
    `leave` bytes are free.
    """
    made: dict[Tensor, Moments] = {}
    for row, state_request in enumerate(state_requests):
        if plan.rows[row].tier == "host":
            break
        try:
            made[state_request.p] = _zeros(state_request.moment, device), _zeros(state_request.moment, device)
        except torch.OutOfMemoryError:
            plan = _spilled(plan, row, leave)
    while True:
        cut = sum(row.tier == "device" for row in plan.rows)
        made = dict(list(made.items())[:cut])
        if cut == len(state_requests):
            return _Built(plan, made, None, [])
        try:
            host = _HostTier(state_requests[cut:], plan, device)
        except torch.OutOfMemoryError as error:
            if cut == 0:
                raise MemoryError(
                    f"{device} has no room for the staging ring of {size_text(plan.staging_bytes)}"
                    f" ({plan.policy.staging_slots} slots of {size_text(plan.slot_bytes)}): free memory, or lower"
                    f" staging_slots or transfer_size\n{plan.totals()}"
                ) from error
            plan = _spilled(plan, 0, leave)
            continue
        made.update(
            (state_request.p, host.moments(number)) for number, state_request in enumerate(state_requests[cut:])
        )
        return _Built(plan, made, host, [state_request.p for state_request in state_requests[cut:]])


def _spilled(plan: PlacementPlan, row: int, leave: int) -> PlacementPlan:
    plan = plan.spilled(row, leave=leave)
    warnings.warn(
        f"Collins moves tables to the host: the device ran out of memory for them\n{plan.totals()}", stacklevel=2
    )
    return plan


def _zeros(part: TensorSpec, device: torch.device) -> Tensor:
    return torch.zeros(part.shape, dtype=part.dtype, device=device)


def _compute_staged(compute: Compute, work: UpdateTask, staged: Moments) -> None:
    compute([work._replace(m=staged[0], v=staged[1])])


class _HostTier:
    """Parameters of one device whose moments live in slabs."""

    def __init__(self, state_requests: Sequence[StateRequest], plan: PlacementPlan, device: torch.device) -> None:
        set_pin_limit(plan.pin_limit)
        pairs = [(state_request.moment, state_request.moment) for state_request in state_requests]
        transfers = grouped(pairs, plan.policy.transfer_bytes)
        self._slabs = [
            Slab([part for number in transfer for part in pairs[number]], pin=device.type != "cpu")
            for transfer in transfers
        ]
        # Of each state_request: its transfer, and the places of its moments there.
        self._where = {
            number: (b, (2 * i, 2 * i + 1)) for b, transfer in enumerate(transfers) for i, number in enumerate(transfer)
        }
        self._sizes = [len(transfer) for transfer in transfers]
        self._arrived: dict[int, int] = {}
        slots = min(plan.policy.staging_slots, len(transfers))
        self.pipeline = Pipeline(self._slabs, streams_for(device), slots=slots)

    def moments(self, number: int) -> Moments:
        transfer, (first, second) = self._where[number]
        tensors = self._slabs[transfer].tensors
        return tensors[first], tensors[second]

    def run(self, items: Sequence[tuple[int, UpdateTask]], compute: Compute) -> None:
        if self._arrived:  # the rest of a step: the order in which gradients arrived stays the prediction for the next
            for number, work in items:
                self.run_one(number, partial(_compute_staged, compute, work))
            return
        transfers: dict[int, list[tuple[tuple[int, int], UpdateTask]]] = {}
        for number, work in items:
            transfer, parts = self._where[number]
            transfers.setdefault(transfer, []).append((parts, work))

        def step(transfer: int, staged: list[Tensor]) -> None:
            compute([work._replace(m=staged[first], v=staged[second]) for (first, second), work in transfers[transfer]])

        self.pipeline.run(list(transfers), step)

    def run_one(self, number: int, compute: Callable[[Moments], None]) -> None:
        transfer, parts = self._where[number]
        arrived = self._arrived[transfer] = self._arrived.get(transfer, 0) + 1
        with self.pipeline.using(transfer, parts, more=arrived < self._sizes[transfer]) as (m, v):
            compute((m, v))

    def finish(self) -> None:
        self._arrived.clear()
        self.pipeline.finish()
        self.pipeline.prefetch_first()
