"""`MemoryPolicy`: the memory in which tables are allocated, and how much of each memory they may take."""

from __future__ import annotations

import difflib
import os
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from collins.offload.sizes import parse_size

TIERS = ("auto", "device", "host")


@dataclass(frozen=True)
class MemoryPolicy:
    """The division of tables between device and host memory.

    A size is an int or a string of digits, in bytes; a string with a unit, "2GiB" or "1.5GB" (powers of 1024 and of
    1000); or, where noted, a share such as "10%" of the total memory of the device or host.

    Args:
        tier: "auto" fills the device first and puts the rest on the host; "device" and "host" force one of them.
        device_reserve: device memory that no table or staging slot may take: size or share. For parameters on the CPU
            there is no reserve, since their tables cannot go elsewhere.
        host_reserve: host memory that no table on the host tier may take: size or share.
        device_budget: the most that tables and staging may take of the device: size or share; None for all that is free
            beyond the reserve.
        pin_limit: the most host memory that may be page-locked: size or share; None for no limit. Tables beyond it
            stay in pageable memory, whose copies are slower and do not overlap.
        staging_slots: the most transfers that are staged on the device at once, at least 2. With three, one can be
            copied in and one out during the step of the third. One slot is as large as the largest transfer, the others
            as the third largest: a model has at most two token tables.
        transfer_size: bytes of tables that are copied together: a size. A larger parameter is a transfer of its own.
        bucket_size: the former name of `transfer_size`; deprecated.

    Raises:
        ValueError: naming the argument, its value and what is accepted.

    Example:
        >>> MemoryPolicy(device_budget="2GiB").tier
        'auto'
        >>> MemoryPolicy.of({"tier": "host", "host_reserve": "25%"})
        MemoryPolicy(tier='host', device_reserve='1%', host_reserve='25%', device_budget=None, pin_limit=None, \
staging_slots=3, transfer_size='64MiB')
    """

    tier: str = "auto"
    device_reserve: int | str = "1%"
    host_reserve: int | str = "10%"
    device_budget: int | str | None = None
    pin_limit: int | str | None = None
    staging_slots: int = 3
    transfer_size: int | str = "64MiB"
    bucket_size: InitVar[int | str | None] = None

    def __post_init__(self, bucket_size: int | str | None) -> None:
        if bucket_size is not None:
            warnings.warn("bucket_size is deprecated: it is called transfer_size now", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "transfer_size", bucket_size)
        if self.tier not in TIERS:
            raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {self.tier!r}{_meant(self.tier, TIERS)}")
        for name in ("device_reserve", "host_reserve"):
            parse_size(name, getattr(self, name))
        for name in ("device_budget", "pin_limit"):
            if getattr(self, name) is not None:
                parse_size(name, getattr(self, name))
        slots = self.staging_slots
        if not isinstance(slots, int) or isinstance(slots, bool) or slots < 2:
            raise ValueError(f"staging_slots must be an int of at least 2, got {slots!r}")
        if self.transfer_bytes < 1:
            raise ValueError(f"transfer_size must be at least one byte, got {self.transfer_size!r}")

    @classmethod
    def of(cls, value: object) -> MemoryPolicy:
        """The policy for any accepted `value`.

        Args:
            value: a policy; a tier's name; a mapping of this class's arguments; or a path, as a string that ends in
                ".toml" or a `os.PathLike`, to a TOML file with those arguments in its table `[collins.memory]`. The
                file may have other tables, of other programs.

        Raises:
            ValueError, TypeError: naming the key, its value and what is accepted, and the file if it was one.
            FileNotFoundError: when there is no such file.
        """
        if isinstance(value, MemoryPolicy):
            return value
        if isinstance(value, Mapping):
            return cls._from_mapping(value)
        if isinstance(value, PathLike) or (isinstance(value, str) and value.lower().endswith(".toml")):
            return cls._from_file(Path(os.fsdecode(value)))
        if isinstance(value, str):
            if value in TIERS:
                return cls(tier=value)
            raise ValueError(f"memory must be {_accepted()}, got {value!r}{_meant(value, TIERS)}")
        raise TypeError(f"memory must be {_accepted()}, got {value!r}")

    @classmethod
    def _from_mapping(cls, mapping: Mapping[Any, Any]) -> MemoryPolicy:
        known = (*(field.name for field in fields(cls)), "bucket_size")
        for key in mapping:
            if key not in known:
                raise ValueError(f"unknown key {key!r}{_meant(key, known)}; accepted are {', '.join(known[:-1])}")
        return cls(**mapping)

    @classmethod
    def _from_file(cls, path: Path) -> MemoryPolicy:
        if not path.is_file():
            raise FileNotFoundError(f"memory must be {_accepted()}, got {str(path)!r}, which is not a file")
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not TOML: {error}") from error
        keys = content
        for name in ("collins", "memory"):
            if not isinstance(keys.get(name), dict):
                near = difflib.get_close_matches(name, keys, n=1)
                found = f"; is {near[0]!r} meant for {name!r}?" if near else ""
                raise ValueError(f"{path}: a policy's keys must stand in the table [collins.memory]{found}")
            keys = keys[name]
        try:
            return cls._from_mapping(keys)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def transfer_bytes(self) -> int:
        """`transfer_size` in bytes."""
        return parse_size("transfer_size", self.transfer_size, relative=False).fixed

    def device_reserve_of(self, total: int) -> int:
        """`device_reserve` in bytes, on a device of `total` bytes."""
        return parse_size("device_reserve", self.device_reserve).of(total)

    def host_reserve_of(self, total: int) -> int:
        """`host_reserve` in bytes, on a host of `total` bytes."""
        return parse_size("host_reserve", self.host_reserve).of(total)

    def device_budget_of(self, total: int) -> int | None:
        """`device_budget` in bytes, on a device of `total` bytes."""
        return None if self.device_budget is None else parse_size("device_budget", self.device_budget).of(total)

    def pin_limit_of(self, total: int) -> int | None:
        """`pin_limit` in bytes, on a host of `total` bytes."""
        return None if self.pin_limit is None else parse_size("pin_limit", self.pin_limit).of(total)


def _accepted() -> str:
    return f"a MemoryPolicy, one of {', '.join(TIERS)}, a mapping, or a path to a TOML file"


def _meant(value: object, known: tuple[str, ...]) -> str:
    """A suggestion of the intended value, or an empty string."""
    close = difflib.get_close_matches(str(value), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
