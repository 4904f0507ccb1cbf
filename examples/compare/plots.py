"""Figures of the results: loss over steps, over bytes of state, and over the learning rate."""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compare.report import Cell, Group, grouped
from compare.runs import Record

MOST_NAMES = 6  # in a figure


def missing() -> str | None:
    """The reason why no figures can be drawn, or None if they can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed (pip install matplotlib)"
    return None


def figures(records: Iterable[Record], stem: Path) -> list[Path]:
    """Draws a PNG file for each group of results, named `stem`-TASK.png, with the three figures side by side."""
    plt = _pyplot()
    paths: list[Path] = []
    for group in grouped(records):
        name = f"{stem.name}-{re.sub(r'[^a-z0-9]+', '-', group.task)}"
        earlier = sum(path.stem.startswith(name) for path in paths)
        path = stem.with_name(f"{name}{f'-{earlier + 1}' if earlier else ''}.png")
        figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
        curves(axes[0], group)
        against_bytes(axes[1], group)
        against_rates(axes[2], group)
        figure.savefig(path, dpi=120)
        plt.close(figure)
        paths.append(path)
    return paths


def curves_alone(records: Iterable[Record], path: Path, title: str) -> None:
    """Draws the loss over steps for the results of one group, each optimizer at its best learning rate."""
    plt = _pyplot()
    (group,) = grouped(records)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    curves(axes, group)
    axes.set(title=title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(axes: Any, group: Group) -> None:
    for cell in _best(group):
        axes.plot(cell.records[0]["steps"], _mean_curve(cell), marker="o", markersize=3, label=_label(cell))
    axes.set(xlabel="step", ylabel="validation loss (nats)", title=group.task)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def against_bytes(axes: Any, group: Group) -> None:
    for cell in _best(group):
        record = cell.records[-1]
        axes.plot(record["state_bytes"] / record["parameters"], cell.mean, marker="o", linestyle="")
        axes.annotate(
            cell.optimizer,
            (record["state_bytes"] / record["parameters"], cell.mean),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize="small",
        )
    axes.set_xscale("symlog", linthresh=0.01, subs=(2, 5))  # some optimizers have almost no state
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="bytes of state per parameter", ylabel="validation loss (nats), best rate")
    axes.grid(alpha=0.3)


def against_rates(axes: Any, group: Group) -> None:
    for name in drawn(group):
        best = group.best(name)
        cells = [cell for cell in group.cells_of(name) if cell.beta2 == best.beta2 and cell.mean < float("inf")]
        axes.plot(
            [cell.lr for cell in cells], [cell.mean for cell in cells], marker="o", label=_label(best, rate=False)
        )
    axes.set_xscale("log")
    rates = sorted({cell.lr for name in drawn(group) for cell in group.cells_of(name)})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel="validation loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def drawn(group: Group) -> list[str]:
    """The names of the optimizers in a figure: of more than `MOST_NAMES`, only the best options of each optimizer."""
    names = group.optimizers
    if len(names) <= MOST_NAMES:
        return names
    best: dict[str, str] = {}
    for name in sorted(names, key=lambda name: group.best(name).mean):
        best.setdefault(re.sub(r":[^@]*", "", name), name)
    return [name for name in names if name in best.values()]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _best(group: Group) -> list[Cell]:
    """The best cell of each optimizer, without those that diverged."""
    cells = [group.best(name) for name in drawn(group)]
    return [cell for cell in cells if cell.mean < float("inf")]


def _mean_curve(cell: Cell) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(r["validation"] for r in cell.records), strict=True)]


def _label(cell: Cell, *, rate: bool = True) -> str:
    beta2 = "" if cell.beta2 is None else f", beta2 {cell.beta2:g}"
    return f"{cell.optimizer}{f', lr {cell.lr:g}' if rate else ''}{beta2}"
