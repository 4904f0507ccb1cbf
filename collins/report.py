"""The bytes of optimizer state per parameter, computed before any of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from collins.entries import ParamEntry
from collins.formats import NONE
from collins.parameter import scheme_of, state_tensors
from collins.roles import Role
from collins.table import as_table, shape_text


@dataclass(frozen=True)
class ParameterRow:
    """The state of one parameter. Bytes include the step counter, as AdamW's do."""

    name: str
    shape: tuple[int, ...]
    role: str | None  # "matrix", "tokens" or "exact"; None for a frozen parameter
    reason: str  # how the role was found
    hash: str | None  # None if the first moment has an entry for each element
    load: float  # c, elements per bucket of the first moment
    v_load: float  # elements per bucket of the second moment
    m_format: str  # keys of `collins.formats.FORMATS`, "none" for no moment; empty for a frozen parameter
    v_format: str
    state_bytes: int
    adamw_bytes: int  # the state of torch.optim.AdamW: two moments in the parameter's dtype


@dataclass(frozen=True)
class MemoryReport:
    """The state of all parameters. `str()` returns a table of it."""

    rows: tuple[ParameterRow, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of state that this optimizer keeps."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes of state that torch.optim.AdamW keeps for the same parameters."""
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """adamw_bytes / state_bytes."""
        return self.adamw_bytes / self.state_bytes if self.state_bytes else 1.0

    @staticmethod
    def _moments(row: ParameterRow) -> tuple[str, ...]:
        """Formats and loads of both moments, as text."""
        pairs = ((row.m_format, row.load), (row.v_format, row.v_load))
        return tuple(f"{format} / {load:g}" if load > 1 and format != NONE else format for format, load in pairs)

    def __str__(self) -> str:
        heads = ("parameter", "shape", "role", "found by", "M", "V", "bytes", "AdamW bytes")
        lines = [
            (
                row.name,
                shape_text(row.shape),
                row.role or "frozen",
                row.reason,
                *self._moments(row),
                f"{row.state_bytes:,}",
                f"{row.adamw_bytes:,}",
            )
            for row in self.rows
        ]
        lines.append(
            ("total", "", "", "", "", f"{self.ratio:.2f}x less", f"{self.state_bytes:,}", f"{self.adamw_bytes:,}")
        )
        return as_table(heads, lines, left=6)


def report_row(entry: ParamEntry, role: Role) -> ParameterRow:
    """The state of a parameter of this role; a frozen parameter is never stepped, and has none."""
    p, step_bytes = entry.p, torch.float32.itemsize
    if not (p.requires_grad or p.grad is not None):
        return ParameterRow(entry.name, tuple(p.shape), None, "", None, 1, 1, "", "", 0, 0)
    scheme = scheme_of(p, entry.group, role.kind)
    tensors, _ = state_tensors(p.shape, scheme)
    return ParameterRow(
        name=entry.name,
        shape=tuple(p.shape),
        role=role.kind,
        reason=role.reason,
        hash=scheme.m.hash,
        load=scheme.m.load,
        v_load=scheme.v.load,
        m_format=scheme.m_format,
        v_format=scheme.v_format,
        state_bytes=step_bytes + sum(spec.nbytes for spec in tensors.values()),
        adamw_bytes=step_bytes + 2 * p.numel() * p.dtype.itemsize,
    )
