"""Results: one line of JSON for each finished run, in an append-only file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from compare.optimizers import identifying
from compare.runs import IDENTITY, Record, key_of


class ResultsError(ValueError):
    """A results file contains something other than records of runs."""


def read(path: Path) -> list[Record]:
    """The records of a file in order, without an incomplete last line; none if the file does not exist.

    Raises:
        ResultsError: for a line that is not the record of a run.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # the text after the last newline is empty or an incomplete line
    return [_record(path, number, line) for number, line in enumerate(lines, 1)]


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{path}, line {number}: not JSON: {error}") from None
    if not isinstance(record, dict) or not {*IDENTITY, "validation_loss"} <= record.keys():
        raise ResultsError(f"{path}, line {number}: not the record of a run; choose another results file")
    record["options"] = identifying(record["optimizer"], record["options"])
    return {**record, "key": key_of(record)}


def remove_incomplete_line(path: Path) -> int:
    """Removes an incomplete last line, so that lines can be appended; returns the number of bytes removed."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        file.truncate(end)
    return len(content) - end


def append(path: Path, record: Record) -> None:
    """Appends a line in one write and syncs it to disk, so that a killed process leaves only complete lines."""
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each key."""
    return list({record["key"]: record for record in records}.values())
