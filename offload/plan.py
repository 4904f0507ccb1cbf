"""`place` assigns the tables of each parameter to the device or the host. It only computes with measured sizes.

Rows are in the order of the parameters and are cut at one point: the rows before it are on the device, the others on
the host. If any row is on the host, a ring of staging slots takes device memory too: the plan groups the rows into the
transfers of the host tier, and counts the bytes that its pipeline will allocate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from collins.offload.policy import MemoryPolicy
from collins.offload.ring import Ring, rings
from collins.offload.sizes import size_text
from collins.roles import Role
from collins.table import as_table, shape_text

_ROOM = "makes room on the device"
_RAN_OUT = "the device ran out of memory while placing"


class Request(NamedTuple):
    """The tables of one parameter to place: `bytes` of both moments, without the step counter."""

    name: str
    shape: tuple[int, ...]  # the parameter's
    bytes: int
    role: Role | None = None  # the parameter's, where it is known
    slab_bytes: int | None = None  # with the gaps between them in a slab; None for `bytes`


class PlacementRow(NamedTuple):
    """The tables of one parameter, placed on tier "device" or "host"."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    role: Role | None
    tier: str
    why: str
    slab_bytes: int | None = None  # as in `Request`


@dataclass(frozen=True)
class PlacementPlan:
    """The placement of every parameter's tables, in the order of the parameters. `str()` is a table with the reasons.

    The free and total figures, in bytes, are the input of the plan; those of the device are None if the parameters are
    on the CPU.
    """

    rows: tuple[PlacementRow, ...]
    policy: MemoryPolicy
    device_free: int | None
    device_total: int | None
    host_free: int
    host_total: int

    @property
    def device_bytes(self) -> int:
        """Bytes of tables on the device."""
        return sum(row.bytes for row in self.rows if row.tier == "device")

    @property
    def host_bytes(self) -> int:
        """Bytes of tables on the host."""
        return sum(row.bytes for row in self.rows if row.tier == "host")

    @property
    def bytes(self) -> int:
        """Bytes of all tables."""
        return self.device_bytes + self.host_bytes

    @property
    def ring(self) -> Ring:
        """The staging slots, on the device; none when nothing is on the host."""
        return _rings([row for row in self.rows if row.tier == "host"], self.policy)[0]

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest staging slot. 0 when nothing is on the host."""
        return self.ring.first

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging ring, on the device."""
        return self.ring.nbytes

    @property
    def pin_limit(self) -> int | None:
        """Bytes of host memory that may be page-locked; None for no limit."""
        return self.policy.pin_limit_of(self.host_total)

    @property
    def limits(self) -> Limits:
        """The bytes of each memory that tables and staging may take."""
        return _limits(self.policy, self.device_free, self.device_total, self.host_free, self.host_total)

    def spilled(self, from_row: int, *, leave: int = 0) -> PlacementPlan:
        """The new plan after the device ran out of memory for row number `from_row`.

        All rows from that one on go to the host. The rows before it show how much memory the device really has; if the
        staging ring and the memory to be left free do not fit into that, rows before `from_row` move to the host as
        well. Allocate the ring of the new plan after those rows have been freed. If no row had been placed, nothing
        stays on the device.

        Args:
            from_row: the number of the row.
            leave: bytes of the device that must stay free.

        Raises:
            IndexError: for a row that the plan does not have.
            MemoryError: if the policy forces the device, or the rest does not fit on the host.
        """
        if not 0 <= from_row < len(self.rows):
            raise IndexError(f"from_row must be in [0, {len(self.rows) - 1}], got {from_row}")
        if self.policy.tier == "device":
            name = self.rows[from_row].name
            raise MemoryError(
                f"{_RAN_OUT} {name} of {size_text(self.bytes)} of tables under tier='device'; tier='auto' would put the"
                " rest on the host"
            )
        before, staging = [0, *accumulate(row.bytes for row in self.rows)], _rings(self.rows, self.policy)
        shown = sum(row.bytes for row in self.rows[:from_row] if row.tier == "device") + self.staging_bytes
        cut = min(from_row, sum(row.tier == "device" for row in self.rows))
        while cut and before[cut] + staging[cut].nbytes > shown - leave:
            cut -= 1
        if self.bytes - before[cut] > self.limits.host:
            raise MemoryError(f"{_RAN_OUT}. {_shortage(self.rows, self)}")
        moved = [
            row._replace(tier="host", why=_ROOM if index < from_row else _RAN_OUT) if row.tier == "device" else row
            for index, row in enumerate(self.rows[cut:], start=cut)
        ]
        return replace(self, rows=(*self.rows[:cut], *moved))

    def __str__(self) -> str:
        lines = [(row.name, *_cells(row), f"{row.bytes:,}") for row in self.rows]
        lines.append(("total", *[""] * len(_CELLS), f"{self.bytes:,}"))
        heads = ("parameter", *_CELLS, "bytes")
        return f"{as_table(heads, lines, left=1 + len(_CELLS))}\n{self.totals()}"

    def summary(self) -> str:
        """The table with one line for all parameters that differ only in their names, in order of first appearance."""
        groups: dict[tuple[str, ...], list[PlacementRow]] = {}
        for row in self.rows:
            groups.setdefault(_cells(row), []).append(row)
        lines = [
            (
                rows[0].name + (" ..." if len(rows) > 1 else ""),
                *key,
                f"{len(rows):,}",
                f"{sum(r.bytes for r in rows):,}",
            )
            for key, rows in groups.items()
        ]
        lines.append(("total", *[""] * len(_CELLS), f"{len(self.rows):,}", f"{self.bytes:,}"))
        heads = ("parameter", *_CELLS, "count", "bytes")
        return f"{as_table(heads, lines, left=1 + len(_CELLS))}\n{self.totals()}"

    def totals(self) -> str:
        """Two lines: the bytes used and allowed in each memory, and the staging ring."""
        policy, limits = self.policy, self.limits
        ring = f"{size_text(self.staging_bytes)} ({self.ring})"
        where = "device"
        if self.device_free is None or self.device_total is None:
            where, kept = "device (the CPU)", f"{size_text(self.host_free)} free"
        else:
            kept = _kept(self.device_free, "device_reserve", policy.device_reserve)
        if policy.device_budget is not None:
            kept += f", device_budget {_written(policy.device_budget)}"
        pinned = "" if policy.pin_limit is None else f", pin_limit {_written(policy.pin_limit)}"
        return "\n".join(
            (
                f"{where}: {size_text(self.device_bytes)} of tables, {ring if self.host_bytes else 'no'} staging;"
                f" may take {size_text(limits.device)} ({kept})",
                f"host: {size_text(self.host_bytes)} of tables; may take {size_text(limits.host)}"
                f" ({_kept(self.host_free, 'host_reserve', policy.host_reserve)}){pinned}",
            )
        )


_CELLS = ("shape", "role", "found by", "tier", "why")


def _cells(row: PlacementRow) -> tuple[str, ...]:
    """The text of a row in the columns `_CELLS`."""
    return shape_text(row.shape), *(row.role or ("", "")), row.tier, row.why


class Limits(NamedTuple):
    """The most that tables and staging may take, in bytes, never negative."""

    device: int
    host: int
    shared: int | None  # of both together, where the parameters are on the CPU


def place(
    requests: Sequence[Request],
    policy: MemoryPolicy,
    *,
    device_free: int | None,
    device_total: int | None,
    host_free: int,
    host_total: int,
) -> PlacementPlan:
    """The plan with the most rows on the device that keeps every limit of the policy.

    The plan depends on the arguments only. For parameters on the CPU (both device figures None) the device is host
    memory: tables stay on tier "device" until `host_free` or a `device_budget` is used up, and no reserve is kept. A
    plan that puts some of them on the host copies within the same memory, which is useful to test the pipeline.

    Args:
        requests: the tables to place, in the order of the parameters.
        policy: tier, reserves, budget, and the staging ring.
        device_free: bytes of the device that are free for tables and staging, after everything else that a step needs.
        device_total: bytes of the device, to which shares such as "10%" refer.
        host_free: bytes of host memory that this process can still allocate.
        host_total: bytes of host memory, to which shares refer.

    Raises:
        ValueError: for a figure below 0, or one device figure without the other.
        MemoryError: if no cut satisfies the limits, with all the numbers.
    """
    figures = {"device_free": device_free, "device_total": device_total, "host_free": host_free}
    for name, figure in (figures | {"host_total": host_total}).items():
        if figure is not None and figure < 0:
            raise ValueError(f"{name} must be at least 0, got {figure}")
    if (device_free is None) != (device_total is None):
        raise ValueError(
            f"device_free and device_total must both be given or both None, got {device_free=}, {device_total=}"
        )
    plan = PlacementPlan((), policy, device_free, device_total, host_free, host_total)
    cut = _cut(requests, policy, plan.limits)
    if cut is None:
        raise MemoryError(_shortage(requests, plan))
    on_device, on_host = _reasons(policy, plan, cut, len(requests))
    rows = (
        PlacementRow(*request[:4], *(("device", on_device) if index < cut else ("host", on_host)), request.slab_bytes)
        for index, request in enumerate(requests)
    )
    return replace(plan, rows=tuple(rows))


def _limits(
    policy: MemoryPolicy, device_free: int | None, device_total: int | None, host_free: int, host_total: int
) -> Limits:
    host = max(host_free - policy.host_reserve_of(host_total), 0)
    shared = None
    if device_free is None or device_total is None:
        device_total, device, shared = host_total, host_free, host_free
    else:
        device = max(device_free - policy.device_reserve_of(device_total), 0)
    budget = policy.device_budget_of(device_total)
    return Limits(device if budget is None else min(device, budget), host, shared)


def _cut(requests: Sequence[Request], policy: MemoryPolicy, limits: Limits) -> int | None:
    """The largest number of leading rows that fit on the device with the staging ring of the others; None if none."""
    before, staging = [0, *accumulate(request.bytes for request in requests)], _rings(requests, policy)
    cuts = {"auto": range(len(requests), -1, -1), "device": (len(requests),), "host": (0,)}[policy.tier]
    for cut in cuts:
        on_host = before[-1] - before[cut]
        device = before[cut] + staging[cut].nbytes
        within_shared = limits.shared is None or device + on_host <= (limits.host if on_host else limits.shared)
        if device <= limits.device and on_host <= limits.host and within_shared:
            return cut
    return None


def ring_bytes(requests: Sequence[Request], policy: MemoryPolicy) -> int:
    """The device memory that staging takes if all these tables are on the host."""
    return _rings(requests, policy)[0].nbytes


def _rings(rows: Sequence[Request | PlacementRow], policy: MemoryPolicy) -> list[Ring]:
    """For each cut, the ring if the rows from there on are on the host."""
    members = [row.bytes if row.slab_bytes is None else row.slab_bytes for row in rows]
    return rings(members, policy.transfer_bytes, policy.staging_slots)


def _reasons(policy: MemoryPolicy, plan: PlacementPlan, cut: int, count: int) -> tuple[str, str]:
    if policy.tier != "auto":
        forced = f"tier={policy.tier!r}"
        return forced, forced
    if plan.device_free is None and policy.device_budget is None:
        return "its parameter is on the CPU", ""
    budget = size_text(plan.limits.device)
    if cut == count:
        return f"all fit into the {budget} left", ""
    rest = f"the device's {budget} are spent" if cut else f"the device's {budget} hold staging alone"
    return f"first within the device's {budget}", rest


def _written(size: int | str) -> str:
    """A policy's size as the user wrote it, a bare number of bytes in a unit that can be read."""
    return size_text(size) if isinstance(size, int) else size


def _kept(free: int, name: str, reserve: int | str) -> str:
    return f"{size_text(free)} free less {name} {_written(reserve)}"


def _shortage(rows: Sequence[Request | PlacementRow], plan: PlacementPlan) -> str:
    """The error of a failed placement, with all its numbers and the possible remedies."""
    policy, limits, ring = plan.policy, plan.limits, _rings(rows, plan.policy)[0]
    if plan.device_free is None:
        device = f"they are on the CPU, with {size_text(plan.host_free)} free"
    else:
        device = _kept(plan.device_free, "device_reserve", policy.device_reserve)
    if policy.device_budget is not None:
        device += f" and device_budget {_written(policy.device_budget)}"
    host = _kept(plan.host_free, "host_reserve", policy.host_reserve)
    forced = "" if policy.tier == "auto" else ", or use tier='auto'"
    tables = size_text(sum(row.bytes for row in rows))
    return (
        f"{tables} of tables fit neither on the device nor on the host under tier={policy.tier!r}."
        f" The device may give {size_text(limits.device)} ({device}); all tables on the host would need"
        f" {size_text(ring.nbytes)} of it for staging ({ring})."
        f" The host may give {size_text(limits.host)} ({host})."
        " Free memory, lower a reserve, raise compress_ratio, choose table_dtype=torch.bfloat16, lower staging_slots or"
        f" transfer_size{forced}."
    )
