"""Tables of the results in Markdown: each optimizer at its best learning rate, and the loss at every learning rate."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compare.runs import Record

_REFERENCE = "adamw"


@dataclass(frozen=True)
class Cell:
    """Runs that differ only in their seeds."""

    optimizer: str
    beta2: float | None
    lr: float
    records: tuple[Record, ...]

    @property
    def losses(self) -> list[float]:
        """The validation loss of each seed; infinite if it diverged."""
        losses = [record["validation_loss"] for record in self.records]
        return [float("inf") if loss is None else loss for loss in losses]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def loss_text(self) -> str:
        return "diverged" if self.mean == float("inf") else f"{self.mean:.3f}"

    @property
    def spread(self) -> str:
        """The standard deviation over seeds, if there are several."""
        has_spread = len(self.losses) > 1 and self.mean < float("inf")
        return f"{statistics.stdev(self.losses):.3f}" if has_spread else ""


@dataclass(frozen=True)
class Group:
    """Results that can be compared: of one task, with the same settings and the same data."""

    task: str
    settings: Record
    data: str
    cells: tuple[Cell, ...]
    runs_left_out: int = 0  # the runs with other options, or another precision, than the optimizer's last run

    @property
    def optimizers(self) -> list[str]:
        """The names of the optimizers, in the order of their first runs."""
        return list(dict.fromkeys(cell.optimizer for cell in self.cells))

    def cells_of(self, optimizer: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.optimizer == optimizer]

    def best(self, optimizer: str) -> Cell:
        """The cell with the lowest mean among those with the most seeds: fewer seeds may be lower by chance."""
        cells = self.cells_of(optimizer)
        most_seeds = max(len(cell.records) for cell in cells)
        return min((cell for cell in cells if len(cell.records) == most_seeds), key=lambda cell: cell.mean)

    @property
    def title(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.task} ({settings}{f'; data {self.data}' if self.data else ''})"


def grouped(records: Iterable[Record]) -> list[Group]:
    """Groups in the order of their first records; the last record of each run is used."""
    runs: dict[str, Record] = {}
    for record in records:
        runs.pop(record["key"], None)  # the run moves to the position of its last record
        runs[record["key"]] = record
    groups: dict[str, list[Record]] = {}
    for record in runs.values():
        identity = json.dumps([record["task"], record["settings"], record["data"]], sort_keys=True)
        groups.setdefault(identity, []).append(record)
    return [_group(members) for members in groups.values()]


def _group(records: Sequence[Record]) -> Group:
    latest = {record["optimizer"]: _variant(record) for record in records}  # those of the last run of each optimizer
    cells: dict[tuple[str, float | None, float], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if _variant(record) == latest[record["optimizer"]]:
            cells.setdefault((record["optimizer"], record["beta2"], record["lr"]), []).append(record)
    cell_list = [Cell(*cell, tuple(members)) for cell, members in cells.items()]
    order = list(latest)
    cell_list.sort(key=lambda cell: (order.index(cell.optimizer), cell.beta2 or 0.0, cell.lr))
    count = sum(len(cell.records) for cell in cell_list)
    first = records[0]
    return Group(first["task"], first["settings"], first["data"], tuple(cell_list), len(records) - count)


def _variant(record: Record) -> tuple[Record, str]:
    """The options and the precision of a run, which may differ between versions for the same name of an optimizer."""
    return record["options"], record["precision"]


def tables(records: Iterable[Record]) -> str:
    """A heading and two tables for each group: each optimizer at its best, and all learning rates."""
    return "\n".join(_tables(group) for group in grouped(records))


def _tables(group: Group) -> str:
    count = group.runs_left_out
    note = f"\nNot shown, since their options or precision differ from those of the last run: {count} runs.\n"
    return f"## {group.title}\n\n{best_table(group)}\n{rates_table(group)}{note if count else ''}"


def best_table(group: Group) -> str:
    """The table of each optimizer at its best learning rate and beta2, by ascending loss."""
    header = (
        "optimizer",
        "beta2",
        "lr",
        "seeds",
        "validation loss",
        "standard deviation",
        f"minus {_REFERENCE}",
        "state bytes",
        "per parameter",
        "for a 7B LLaMA",
        "weights, bytes per parameter",
        "ms per optimizer step",
    )
    best = sorted((group.best(name) for name in group.optimizers), key=lambda cell: cell.mean)
    reference = next((cell.mean for cell in best if cell.optimizer == _REFERENCE), None)
    rows = []
    for cell in best:
        record = cell.records[-1]
        comparable = reference is not None and max(cell.mean, reference) < float("inf")
        rows.append(
            (
                cell.optimizer,
                "" if cell.beta2 is None else f"{cell.beta2:g}",
                f"{cell.lr:g}",
                str(len(cell.records)),
                cell.loss_text,
                cell.spread,
                f"{cell.mean - (reference or 0):+.3f}" if comparable else "",
                f"{record['state_bytes']:,}",
                f"{record['state_bytes'] / record['parameters']:.2f}",
                "" if record["state_bytes_7b"] is None else f"{record['state_bytes_7b'] / 1e9:.2f} GB",
                f"{record['weight_bytes'] / record['parameters']:.2f}",
                f"{statistics.median(record['optimizer_ms'] for record in cell.records):.1f}",
            )
        )
    return markdown(header, rows)


def rates_table(group: Group) -> str:
    """The table of the mean loss of each optimizer and beta2 at each learning rate, the optimizer's best in bold."""
    rates = sorted({cell.lr for cell in group.cells})
    rows = []
    for name in group.optimizers:
        best = group.best(name)
        for beta2 in dict.fromkeys(cell.beta2 for cell in group.cells_of(name)):
            row = {cell.lr: cell for cell in group.cells_of(name) if cell.beta2 == beta2}
            texts = {lr: f"**{cell.loss_text}**" if cell is best else cell.loss_text for lr, cell in row.items()}
            rows.append((name, "" if beta2 is None else f"{beta2:g}", *(texts.get(lr, "") for lr in rates)))
    return markdown(("optimizer", "beta2", *(f"{lr:g}" for lr in rates)), rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    all_rows = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in all_rows)
