"""Text tables for reports and plans."""

from __future__ import annotations

from collections.abc import Sequence


def as_table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of `lines` under `heads` and a rule; each column is as wide as its widest cell.

    Args:
        heads: the head of each column.
        lines: lists of cells, one cell for each head.
        left: the number of columns that are left-aligned; the others are right-aligned.
    """
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    ruled = [heads, ["-" * width for width in widths], *lines]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in ruled
    )


def shape_text(shape: Sequence[int]) -> str:
    """(4096, 11008) as "4096x11008", () as "scalar"."""
    return "x".join(map(str, shape)) or "scalar"
