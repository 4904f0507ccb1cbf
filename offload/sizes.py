"""Sizes in bytes: parses those of policies and the command line, and formats them for reports."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from collins.options import shown

_UNITS = {"B": 1} | {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_FACTORS = {unit.lower(): factor for unit, factor in _UNITS.items()}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+|%)", re.IGNORECASE)

_LIMIT = 2**63  # bytes: more than any memory has; below it no arithmetic here overflows
_BARE = re.compile(r"[0-9]{1,30}")

BYTES = "an int of bytes or a string with digits alone or a unit such as '2GiB', '512 MiB' or '1.5GB'"
ACCEPTED = f"{BYTES}, or a share of the total such as '10%'"


class Size(NamedTuple):
    """A fixed number of bytes plus a share, in [0, 1], of a total that is known later."""

    fixed: int
    share: Fraction

    def of(self, total: int) -> int:
        """The size in bytes, given the `total`."""
        return self.fixed + int(self.share * total)


def parse_size(name: str, value: object, *, relative: bool = True) -> Size:
    """Parses `value`: an int or digits, in bytes; "2GiB", "1.5GB" (powers of 1024 and of 1000); or "10%".

    Raises:
        ValueError: naming `name`, `value` and what is accepted; shares are refused if `relative` is False.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LIMIT:
        return Size(value, Fraction(0))
    if isinstance(value, str) and _BARE.fullmatch(value.strip()):
        value = int(value)
        return parse_size(name, value, relative=relative)
    written = _WRITTEN.fullmatch(value.strip()) if isinstance(value, str) else None
    if written:
        amount, unit = Fraction(written[1]), written[2].lower()
        if unit in _FACTORS and amount * _FACTORS[unit] < _LIMIT:
            return Size(int(amount * _FACTORS[unit]), Fraction(0))
        if unit == "%" and relative and amount <= 100:
            return Size(0, amount / 100)
        if unit not in (*_FACTORS, "%"):
            raise ValueError(f"{name} must be in one of the units {', '.join(_UNITS)}, got {value!r}")
    raise ValueError(f"{name} must be {ACCEPTED if relative else BYTES}, below 2**63, got {shown(value)}")


def size_text(count: int) -> str:
    """`count` bytes in the largest binary unit in which it is at least 1: "16.42 GiB"."""
    for unit, digits in (("GiB", 2), ("MiB", 1), ("KiB", 1)):
        if abs(count) >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:,.{digits}f} {unit}"
    return f"{count} B"
