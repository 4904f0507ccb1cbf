"""Text tables, as reports and plans print them."""

from __future__ import annotations

from collections.abc import Sequence


def as_table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """`lines` under `heads` and a rule, in columns as wide as their widest cell.

    Args:
        heads: one for each column.
        lines: cells, as many in each line as there are heads.
        left: how many of the first columns are set flush left; the others, figures, are set flush right.
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
