"""Results: one line of JSON for each finished run, in a file that is only added to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from compare.optimizers import identifying
from compare.runs import IDENTITY, Record, key_of


class ResultsError(ValueError):
    """A results file holds something else."""


def read(path: Path) -> list[Record]:
    """The records of a file, in their order; none where there is no file. A last line that was cut off is not one.

    Raises:
        ResultsError: for a line that is not the record of a run.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line's end is empty, or was cut off
    return [_record(path, number, line) for number, line in enumerate(lines, 1)]


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{path}, line {number}: not JSON: {error}") from None
    if not isinstance(record, dict) or not {*IDENTITY, "validation_loss"} <= record.keys():
        raise ResultsError(f"{path}, line {number}: not the record of a run; give another file for results")
    record["options"] = identifying(record["optimizer"], record["options"])
    return {**record, "key": key_of(record)}


def mend(path: Path) -> int:
    """Takes a last line that was cut off away, so that lines can be added; returns its bytes."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return len(content) - whole


def add(path: Path, record: Record) -> None:
    """Adds a line, in one write, and sees it to the disk: a process that is killed leaves whole lines."""
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(records: Iterable[Record]) -> list[Record]:
    """One record for each key, the last one there is."""
    return list({record["key"]: record for record in records}.values())
