"""The arguments of one parameter's step, and the arithmetic that all decodes share.

A step processes a parameter in pieces: gradients are read flat, in row-major order, in the dtype of the moments, and
new values are stored in the formats of the values that they replace.
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
from collins.rule import PART_STRIDE, StepScalars

Write = tuple[Tensor, Tensor]  # a target, and the value to copy to it


class UpdateSpec(NamedTuple):
    """The values that are constants of a compiled step. It is hashable; with the tensors' shapes it is a signature."""

    hash: str | None  # as in Bucketing
    load: float  # c of the first moment's buckets
    decode: str  # a key of `collins.rule.DECODES`, or "orthogonal"
    rehash: bool  # whether buckets draw new signs
    rounding: bool  # whether values that are stored in 16 bits are rounded stochastically
    maximize: bool
    skip: bool = False  # whether to skip all elements that share a moment with a gradient that is not finite
    m_format: str = "float32"  # a key of `collins.formats.FORMATS`
    v_format: str = "float32"  # likewise
    v_load: float | None = None  # c of the second moment's buckets, if it differs
    hints: Hints = NO_HINTS  # for the compiler
    row_parts: tuple[int, ...] = ()  # under decode="orthogonal", the rows of each part into which a matrix is cut

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
    """The arguments of `update_` that do not change from step to step: all but a gradient and the step's scalars.

    p: the parameter, of any shape and strides; elements are numbered in row-major order.
    m, v: the tensors that store each moment, contiguous. Dense moments have an entry for each element, in the shape of
        `p`; tables have one for each bucket, in any shape.
    spec, keys: the static values, and the constants of the parameter.
    numel: N of the whole parameter.
    start: the number of the first element if p, m and v are slices, which begin at a whole bucket; in compiled code a
        0-d tensor, and slices hold whole buckets only.
    launch: the return value of `Engine.launch_of`; None if the kernel does not support the parameter.
    skipped: with `spec.skip`, the counter of skipped buckets of v (for hash="universal", which may have empty buckets,
        of elements; for decode="orthogonal" of buckets of m, all those of a matrix): int64, shape (1,), on the device
        of p; for `update_rows_`, (n,). None to count nothing.
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
        """All tensors that a step changes: p, then those that store m and v."""
        return (self.p, *self.m, *self.v)


class Piece(NamedTuple):
    """Slices of p and g along their first dimension, which hold consecutive elements in row-major order."""

    offset: int  # the number of the first element, counted from the start of the task
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
    """The unit at whose multiples pieces begin, so that they hold whole buckets and whole groups of stored entries."""
    return math.lcm(*(int(load) * format.unit for load, format in zip(spec.loads, spec.formats, strict=True)))


class BucketSigns(NamedTuple):
    """The signs of R buckets of hash="block" at one step, and their loads; of n parameters with n before R."""

    words: Tensor  # as `collins.hashing.sign_words` returns them, (R, ...)
    masks: Tensor  # (R, c): negative where s = -1
    resets: Tensor | None  # whether each bucket draws new signs in this step, (R,); None if none ever does
    loads: float | Tensor  # c, or (R,) loads


def bucket_signs(
    task: UpdateTask, hp: StepScalars, first: int | Tensor, rows: int, like: Tensor, *, tail: bool
) -> BucketSigns:
    """The signs of `rows` buckets from number `first` on.

    Args:
        task, hp: the parameter's task, the step's scalars. Keys may be columns, (n, 1), of n parameters.
        first, rows: the number of the first bucket, a column for such keys, and the number of buckets.
        like: a tensor on the device and in the dtype of the computation.
        tail: whether they may include the parameter's last bucket, which may have fewer elements.
    """
    spec, keys, hints, load = task.spec, task.keys, task.spec.hints, int(task.spec.load)
    bucket = torch.arange(rows + hints.padding, device=like.device) + first
    epoch, resets = epoch_of(bucket, hp.step, keys.sign, keys.period) if spec.rehash else (0, None)
    if isinstance(hp.part, Tensor):
        resets = None if resets is None else resets & (hp.part == 0)
    elif hp.part > 0:  # what was to be reset has been
        resets = None
    loads: float | Tensor = load
    if tail:
        last, count = (task.numel - 1) // load, (task.numel - 1) % load + 1
        is_tail = bucket == last
        loads = torch.where(is_tail, count, load).to(like.dtype)
        if count == 1 and resets is not None:  # a bucket of one element keeps its sign, so that its sketch is exact
            epoch, resets = torch.where(is_tail, 0, epoch), resets & ~is_tail
    lead = bucket.dim() - 1
    resets = None if resets is None else hints.separate_loop(resets, rows, lead)
    words = hints.separate_loop(sign_words(bucket, load, epoch, keys.sign), rows, lead)
    return BucketSigns(words, sign_masks(words, bucket[..., :rows], load), resets, loads)


def flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    """All elements in row-major order, in `dtype`."""
    return t.reshape(-1).to(dtype)


def used_gradient(g: Tensor, spec: UpdateSpec, hp: StepScalars) -> Tensor:
    """The gradient with scale and sign applied, flat and in the dtype of the computation."""
    return scaled_gradient(flat(g, torch.promote_types(g.dtype, torch.float32)), spec, hp)


def scaled_gradient(g: Tensor, spec: UpdateSpec, hp: StepScalars) -> Tensor:
    """The gradient times `grad_scale`, negated for `maximize`."""
    scale = hp.grad_scale
    g = -g if spec.maximize else g
    if isinstance(scale, Tensor):
        return g * scale.to(g.device)
    return g if scale == 1 else g * scale


def noise_step(hp: StepScalars) -> int | Tensor:
    """What random bits derive from in place of the step: partial steps of one step have bits of their own."""
    if isinstance(hp.part, Tensor):
        return hp.step + hp.part.to(torch.int64) * PART_STRIDE
    return hp.step + int(hp.part) * PART_STRIDE


def writes_of(
    format: TableFormat,
    parts: tuple[Tensor, ...],
    values: Tensor,
    first: int | Tensor,
    stream: int,
    task: UpdateTask,
    hp: StepScalars,
) -> list[Write]:
    """The writes to `parts` that store `values`, flat or in rows; the first one (in each row) has number `first`."""
    bits: Bits | None = None
    if task.spec.rounding and format.rounds:
        bits = partial(
            random_bits,
            first,
            values.shape[-1],
            noise_step(hp),
            task.keys.rounding,
            stream,
            parts[0].device,
            task.spec.hints,
        )
    return list(zip(parts, format.written(parts, values, bits), strict=True))
