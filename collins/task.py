"""What one parameter's step is given, and what its arithmetic has in common for every decode.

A step goes through a parameter in pieces: gradients are read flat, in row-major order, in the dtype of the moments, and
new values are stored in the format of what they replace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins.formats import FORMATS, Bits, TableFormat
from collins.hashing import HashKey, epoch_of, sign_masks, sign_words
from collins.hints import NO_HINTS, Hints
from collins.rounding import random_bits
from collins.rule import StepScalars

Write = tuple[Tensor, Tensor]  # where, and what


class UpdateSpec(NamedTuple):
    """What is fixed when a step is compiled. Hashable: together with the tensors' shapes it is a signature."""

    hash: str | None  # as in Bucketing
    load: float  # c, of the first moment's buckets
    decode: str  # a key of `collins.rule.DECODES`, or "orthogonal"
    rehash: bool  # whether signs are ever drawn anew
    rounding: bool  # stochastic, for whatever is stored in 16 bits
    maximize: bool
    skip: bool = False  # whatever shares a moment with a gradient that is not finite
    m_format: str = "float32"  # a key of `collins.formats.FORMATS`, as the next
    v_format: str = "float32"
    v_load: float | None = None  # of the second moment's buckets, where it differs
    hints: Hints = NO_HINTS  # for the compiler
    row_parts: tuple[int, ...] = ()  # rows of the matrices that lie one below another, under decode="orthogonal"

    @property
    def loads(self) -> tuple[float, float]:
        """The loads of both moments' buckets."""
        return self.load, self.load if self.v_load is None else self.v_load

    @property
    def formats(self) -> tuple[TableFormat, TableFormat]:
        """The formats of both moments."""
        return FORMATS[self.m_format], FORMATS[self.v_format]


class HashKeys(NamedTuple):
    """The hash constants of one parameter: ints, or 0-d int64 tensors."""

    sign: HashKey
    rounding: HashKey
    universal: tuple[int | Tensor, int | Tensor, int | Tensor, int | Tensor]  # a, b, c, d
    period: int | Tensor


class UpdateTask(NamedTuple):
    """One parameter's part of every step: what `update_` needs beside a gradient and the step's scalars.

    p: the parameter: any shape and strides; element number i counts in row-major order.
    m, v: the tensors that each moment is stored in, contiguous; entries are shaped like `p` when dense, else one a
        bucket in any shape.
    spec, keys: the static part, the parameter's constants.
    numel: N, of the whole parameter.
    start: the number of the first element, where p, m and v are slices of the parameter's, at a whole bucket; a 0-d
        tensor in compiled code, whose slices hold whole buckets only.
    launch: the engine's own: what `Engine.launch_of` returned, None for what no kernel takes.
    skipped: with `spec.skip`, what counts the buckets of v that steps leave out - of hash="universal", where some are
        empty, the elements; of decode="orthogonal" those of m, all of a matrix -: int64, shape (1,), on the device of
        p; for `update_rows_`, (n,). None to count nothing.
    """

    p: Tensor
    m: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    spec: UpdateSpec
    keys: HashKeys
    numel: int
    start: int | Tensor = 0
    launch: Any = None
    skipped: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a step changes: p, then what m and v are stored in."""
        return (self.p, *self.m, *self.v)


class Piece(NamedTuple):
    """Slices of p and g along their first dimension that are consecutive elements in row-major order."""

    offset: int  # of the first element from the start of the task
    p: Tensor
    g: Tensor


def pieces(task: UpdateTask, g: Tensor, chunk: int | None, unit: int = 1) -> Iterator[Piece]:
    """The parameter in pieces of about `chunk` elements, each but the last a multiple of `unit`."""
    p = task.p
    if chunk is None:
        yield Piece(0, p, g)
        return
    width = p[0].numel()
    aligned = unit // math.gcd(unit, width)  # the fewest rows that make whole units
    rows = max(chunk // (width * aligned), 1) * aligned
    for row in range(0, p.shape[0], rows):
        yield Piece(row * width, p[row : row + rows], g[row : row + rows])


def unit_of(spec: UpdateSpec) -> int:
    """Pieces of a parameter begin at multiples of it: of whole buckets, and of entries that are stored together."""
    return math.lcm(*(int(load) * format.unit for load, format in zip(spec.loads, spec.formats, strict=True)))


class BucketSigns(NamedTuple):
    """The signs of R buckets of hash="block" at one step, and their loads; of n parameters with n before R."""

    words: Tensor  # as `collins.hashing.sign_words` returns them, (R, ...)
    masks: Tensor  # (R, c): negative where s = -1
    resets: Tensor | None  # which buckets draw new signs in this step, (R,); None where none ever does
    loads: float | Tensor  # c, or (R,) loads


def bucket_signs(
    task: UpdateTask, hp: StepScalars, first: int | Tensor, rows: int, like: Tensor, *, tail: bool
) -> BucketSigns:
    """The signs of `rows` buckets from number `first` on.

    Args:
        task, hp: the parameter's task, the step's scalars. Keys may be columns, (n, 1), of n parameters.
        first, rows: of the buckets; with such keys `first` is a column too.
        like: a tensor on the device and in the dtype that the step is computed in.
        tail: whether the parameter's last bucket may be among them, with fewer elements than others.
    """
    spec, keys, hints, load = task.spec, task.keys, task.spec.hints, int(task.spec.load)
    bucket = torch.arange(rows + hints.padding, device=like.device) + first
    epoch, resets = epoch_of(bucket, hp.step, keys.sign, keys.period) if spec.rehash else (0, None)
    loads: float | Tensor = load
    if tail:
        last, count = (task.numel - 1) // load, (task.numel - 1) % load + 1
        is_tail = bucket == last
        loads = torch.where(is_tail, count, load).to(like.dtype)
        if count == 1 and resets is not None:  # alone, an element keeps its sign: the sketch is exact there
            epoch, resets = torch.where(is_tail, 0, epoch), resets & ~is_tail
    lead = bucket.dim() - 1
    resets = None if resets is None else hints.separate_loop(resets, rows, lead)
    words = hints.separate_loop(sign_words(bucket, load, epoch, keys.sign), rows, lead)
    return BucketSigns(words, sign_masks(words, bucket[..., :rows], load), resets, loads)


def flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    """All elements in row-major order, in `dtype`."""
    return t.reshape(-1).to(dtype)


def used_gradient(g: Tensor, spec: UpdateSpec, hp: StepScalars) -> Tensor:
    """The gradient as it is used, flat."""
    return scaled_gradient(flat(g, torch.promote_types(g.dtype, torch.float32)), spec, hp)


def scaled_gradient(g: Tensor, spec: UpdateSpec, hp: StepScalars) -> Tensor:
    """The gradient scaled, and of the sign that descends."""
    scale = hp.grad_scale
    g = -g if spec.maximize else g
    if isinstance(scale, Tensor):
        return g * scale.to(g.device)
    return g if scale == 1 else g * scale


def writes_of(
    format: TableFormat,
    parts: tuple[Tensor, ...],
    values: Tensor,
    first: int | Tensor,
    stream: int,
    task: UpdateTask,
    hp: StepScalars,
) -> list[Write]:
    """What is written over `parts` for `values`, flat or in rows; the first, or that of each row, is number `first`."""
    bits: Bits | None = None
    if task.spec.rounding and format.rounds:
        bits = partial(
            random_bits,
            first,
            values.shape[-1],
            hp.step,
            task.keys.rounding,
            stream,
            parts[0].device,
            task.spec.hints,
        )
    return list(zip(parts, format.written(parts, values, bits), strict=True))
