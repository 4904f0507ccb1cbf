"""Command-line arguments: parsing their values, and errors that tell which values are accepted."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def checker(parser: argparse.ArgumentParser) -> Callable[[str, Callable[[], Any]], Any]:
    """Returns `checked(name, make)`, which calls `make` and reports its error as an error of the argument `--name`."""

    def checked(name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (ValueError, OSError) as error:
            parser.error(f"argument --{name}: {error}")

    return checked


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collins-compare"


def add_text(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--text`, folders with text to train on, whose default is described as `default`."""
    help_ = f"folders with text (default: {default})"
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FOLDER", help=help_)


def decay(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {text}")
    return value


def at_least(least: float, value: float) -> None:
    if value < least:
        raise ValueError(f"must be at least {least:g}, got {value:g}")


def pairs(texts: Iterable[str]) -> dict[str, str]:
    """Parses texts of the form NAME=VALUE."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"must be NAME=VALUE, got {text!r}")
        values[name] = value
    return values


def rates(texts: Iterable[str], names: list[str]) -> dict[str | None, list[float]]:
    """Parses learning rates by optimizer: `collins=8e-3` is for that optimizer, `3e-3` for all without their own."""
    lists: dict[str | None, list[float]] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if name and name not in names:
            accepted = ", ".join(dict.fromkeys(names))
            raise ValueError(f"NAME must be an optimizer that is compared ({accepted}), got {text!r}")
        try:
            rate = float(value)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < float("inf"):
            raise ValueError(f"must be a positive finite number, or NAME=NUMBER, got {text!r}")
        lists.setdefault(name or None, []).append(rate)
    return lists


def folders(paths: list[Path]) -> tuple[Path, ...]:
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"must be a folder, got {path}")
    return tuple(path.resolve() for path in paths)
