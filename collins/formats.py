"""Storage formats of moments, and the tensors that each format keeps.

A format defines the tensors that it keeps for a table of a given shape, how they are read into floating point, and what
is written for new values. Eager and compiled steps call `load` and `written`; state names, checkpoints, host memory,
reports and sharding use `parts`. An entry in `FORMATS` is all that eager, compiled and offloaded steps need of a new
format; the Triton kernel supports those in `collins.compile.kernels.MOMENTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from collins.rounding import ROUNDED, stochastic_round


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor of a state."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Bits = Callable[[], Tensor]  # random bits, int32 in [0, 65536), shaped like the values to be stored


class TableFormat(Protocol):
    """The storage format of a table or a dense moment.

    Attributes:
        dtype: the widest floating dtype in which entries are computed before they are stored: float32 or float64.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def second(self) -> str | None:
        """The format of the second moment if this is the format of the first one; None for the same format."""

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors that are kept for entries of this shape, by the suffix of their name; "" for the first one.

        Dimension 0 of each is that of `shape`, so that all of them are sharded in the same way.
        """

    @property
    def unit(self) -> int:
        """The number of neighbouring entries that are stored together: pieces of a table begin at multiples of it."""

    @property
    def rounds(self) -> bool:
        """Whether `written` needs random bits, unless rounding is to nearest."""

    def cut(self, parts: Sequence[Tensor], first: int, count: int) -> tuple[Tensor, ...]:
        """Slices of flat parts, which store `count` entries from number `first` on, a multiple of `unit`."""

    def load(self, parts: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """The first `count` entries, flat, in `dtype`, from flat parts."""

    def written(self, parts: Sequence[Tensor], values: Tensor, bits: Bits | None) -> Sequence[Tensor]:
        """The new contents of each of the parts for entries of these `values`, flat or as rows of the first part.

        Copying them to the parts allocates nothing, because no error may occur once a parameter's parts are written.

        Args:
            bits: makes random bits for stochastic rounding; None rounds to nearest. They are a hash of seed, step,
                parameter and element, so that a resumed run stores the same bits.
        """


@dataclass(frozen=True)
class FloatFormat:
    """Each entry as one floating-point number: float64, float32 or, stochastically rounded, bfloat16 and float16."""

    stored: torch.dtype

    @property
    def second(self) -> str | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.stored, torch.float32)

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"": TensorSpec(shape, self.stored)}

    @property
    def unit(self) -> int:
        return 1

    @property
    def rounds(self) -> bool:
        return self.stored in ROUNDED

    def cut(self, parts: Sequence[Tensor], first: int, count: int) -> tuple[Tensor, ...]:
        return (parts[0][first : first + count],)

    def load(self, parts: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)

    def written(self, parts: Sequence[Tensor], values: Tensor, bits: Bits | None) -> Sequence[Tensor]:
        (target,) = parts
        if bits is not None and self.rounds:
            values = stochastic_round(values.to(torch.float32), target.dtype, bits())
        return (values.view(target.shape),)


BLOCK = 64  # entries that share a scale, by default
SMALLEST = 1e-30  # a block whose entries are all smaller is stored as zeros: its scale could not be inverted


@dataclass(frozen=True)
class IntFormat:
    """Each entry as a signed integer of 8 or 4 bits, with a scale in float32 for each `block` neighbours:

        M_b = q_b scale        scale = max |M| / L over the block        L = 127 or 7

    Entries are rounded to nearest. One step changes an entry of M by several times the distance of two integers, so
    averages do not stall; at LLaMA 60M nearest rounding lost less than stochastic rounding did, and as much as
    subtractive dithering (examples/results). Entries of the second moment differ too much in size to share a scale.
    """

    bits: int
    block: int = BLOCK

    @property
    def limit(self) -> int:
        """L, the largest integer."""
        return (1 << self.bits - 1) - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def second(self) -> str | None:
        return "float32"

    @property
    def unit(self) -> int:
        return self.block

    @property
    def rounds(self) -> bool:
        return False

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        row = math.prod(shape[1:])
        whole = len(shape) > 1 and row % self.block == 0  # a row consists of whole blocks
        lead, count = ((shape[0],), row) if whole else ((), math.prod(shape))
        stored = torch.int8 if self.bits == 8 else torch.uint8
        return {
            "": TensorSpec((*lead, -(-count * self.bits // 8)), stored),
            "_scale": TensorSpec((*lead, -(-count // self.block)), torch.float32),
        }

    def cut(self, parts: Sequence[Tensor], first: int, count: int) -> tuple[Tensor, ...]:
        integers, scales = parts
        end = first + count
        return integers[first * self.bits // 8 : -(-end * self.bits // 8)], scales[
            first // self.block : -(-end // self.block)
        ]

    def load(self, parts: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
        integers, scales = parts
        if self.bits == 4:
            pairs = torch.stack((integers & 15, integers >> 4), -1).view(-1).to(torch.int32)
            integers = (pairs ^ 8) - 8  # two's complement
        blocks = _in_blocks(integers.to(dtype), self.block) * scales.to(dtype)[:, None]
        return blocks.view(-1)[:count]

    def written(self, parts: Sequence[Tensor], values: Tensor, bits: Bits | None) -> Sequence[Tensor]:
        integers, scales = parts
        blocks = _in_blocks(values.reshape(-1), self.block)
        largest = blocks.abs().amax(1)
        q = torch.round(blocks * (self.limit / largest.clamp(min=SMALLEST))[:, None]).to(torch.int32).view(-1)
        if self.bits == 4:
            low, high = (q & 15).view(-1, 2).unbind(1)
            q = low | high << 4
        q = q[: integers.numel()].to(integers.dtype)
        return q.view(integers.shape), (largest / self.limit).view(scales.shape)


def _in_blocks(entries: Tensor, block: int) -> Tensor:
    """Flat entries as rows of one block each; the last row is padded with zeros."""
    missing = -len(entries) % block
    return (torch.nn.functional.pad(entries, (0, missing)) if missing else entries).view(-1, block)


@dataclass(frozen=True)
class NoFormat:
    """Keeps nothing: the format of the second moment of a decode that has none."""

    dtype, second, unit, rounds = torch.float32, None, 1, False

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {}

    def cut(self, parts: Sequence[Tensor], first: int, count: int) -> tuple[Tensor, ...]:
        return ()

    def load(self, parts: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, device="cpu")

    def written(self, parts: Sequence[Tensor], values: Tensor, bits: Bits | None) -> Sequence[Tensor]:
        return ()


NONE = "none"  # the key of `NoFormat`
SMALLEST_BLOCK = 16  # the smallest block in `FORMATS`

FORMATS: dict[str, TableFormat] = {
    "float64": FloatFormat(torch.float64),
    "float32": FloatFormat(torch.float32),
    "bfloat16": FloatFormat(torch.bfloat16),
    "float16": FloatFormat(torch.float16),
    "int8": IntFormat(8),
    "int4": IntFormat(4),
    "int4_128": IntFormat(4, block=128),
    **{f"int{bits}_{block}": IntFormat(bits, block) for bits in (8, 4) for block in (32, 16)},
    NONE: NoFormat(),
}


def second_format(name: str) -> str:
    """The format of the second moment beside a first moment in the format `name`."""
    return FORMATS[name].second or name


def whole_blocks(name: str, entries: int) -> str:
    """The variant of a format whose blocks divide `entries`, which must be a multiple of `SMALLEST_BLOCK`."""
    format = FORMATS[name]
    if not isinstance(format, IntFormat) or entries % format.block == 0:
        return name
    return f"int{format.bits}_{math.gcd(entries, format.block)}"


def format_name(table_dtype: torch.dtype | str) -> str:
    """The key in `FORMATS` for a group's `table_dtype`: "float32" for torch.float32."""
    return str(table_dtype).removeprefix("torch.")


def dense_format(dtype: torch.dtype, table_dtype: torch.dtype | str) -> str:
    """The format of dense moments of a parameter of `dtype`: never narrower than the parameter.

    Frozen parameters may have dtypes that moments do not support; these are treated as float32.
    """
    if format_name(dtype) not in FORMATS:
        dtype = torch.float32
    stored = table_dtype if isinstance(table_dtype, torch.dtype) else FORMATS[table_dtype].dtype
    return format_name(torch.promote_types(dtype, stored))
