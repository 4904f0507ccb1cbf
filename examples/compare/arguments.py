"""Arguments of commands: what texts mean, and the errors that say what they may be."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def checker(parser: argparse.ArgumentParser) -> Callable[[str, Callable[[], Any]], Any]:
    """What calls a function for the argument of a name, and ends the command by name where it raises."""

    def checked(name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (ValueError, OSError) as error:
            parser.error(f"argument --{name}: {error}")

    return checked


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collins-compare"


def decay(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and less than 1, got {text}")
    return value


def at_least(least: float, value: float) -> None:
    if value < least:
        raise ValueError(f"must be at least {least:g}, got {value:g}")


def pairs(texts: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE, each."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"must be NAME=VALUE, got {text!r}")
        found[name] = value
    return found


def rates(texts: Iterable[str], names: list[str]) -> dict[str | None, list[float]]:
    """`3e-3` for every optimizer that has none of its own, `collins=8e-3` for that one."""
    found: dict[str | None, list[float]] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if name and name not in names:
            raise ValueError(f"{text!r} is of an optimizer that is not compared; {', '.join(dict.fromkeys(names))} are")
        try:
            rate = float(value)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < float("inf"):
            raise ValueError(f"must be a number above 0, or NAME=NUMBER, got {text!r}")
        found.setdefault(name or None, []).append(rate)
    return found


def folders(paths: list[Path]) -> tuple[Path, ...]:
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"must be a folder, got {path}")
    return tuple(path.resolve() for path in paths)
