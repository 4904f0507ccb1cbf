"""One parameter's whole step, in place: hash, encode, decay, decode, write. The only code that changes a parameter.

Compiled steps call `update_`, which takes the parameter as one piece for the compiler to fuse. Eager steps are an
`EagerUpdate`, which works through it in pieces, so that a step needs a few small temporaries. All values of a piece are
computed before the first of them is written. Every number that differs between parameters of one `UpdateSpec` may be a
0-d tensor: one compiled graph serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import foreach_copy_
from collins.formats import FORMATS, Bits, FloatFormat, TableFormat
from collins.hashing import (
    WORD,
    HashKey,
    epoch_of,
    sign_masks,
    sign_words,
    signed,
    universal_bucket,
    universal_sign_masks,
)
from collins.hints import NO_HINTS, Hints
from collins.rounding import FIRST, PARAM, SECOND, random_bits
from collins.rule import DECODES, StepScalars, direction, updated
from collins.sketch import add_scattered, decay, encode_rows


class UpdateSpec(NamedTuple):
    """What is fixed when a step is compiled. Hashable: together with the tensors' shapes it is a signature."""

    hash: str | None  # as in Bucketing
    load: float  # c, of the first moment's buckets
    decode: str  # a key of `collins.rule.DECODES`
    rehash: bool  # whether signs are ever drawn anew
    rounding: bool  # stochastic, for whatever is stored in 16 bits
    maximize: bool
    skip: bool = False  # whatever shares a moment with a gradient that is not finite
    m_format: str = "float32"  # a key of `collins.formats.FORMATS`, as the next
    v_format: str = "float32"
    v_load: float | None = None  # of the second moment's buckets, where it differs
    hints: Hints = NO_HINTS  # for the compiler

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
        empty, the elements -: int64, shape (1,), on the device of p; for `update_rows_`, (n,). None to count nothing.
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


def update_(task: UpdateTask, g: Tensor, hp: StepScalars) -> None:
    """Updates p, m and v in place.

    Args:
        task: the parameter and its moments.
        g: the gradient, of the parameter's shape, dtype and device, of any strides.
        hp: the step's scalars.
    """
    for piece in _pieces_of(task, g, hp, None):
        values = piece()
        for target, value in values.writes:
            target.copy_(value)
        _count(task, values)


class EagerUpdate:
    """One parameter's eager step, which is made as a whole or not at all.

    An error while the first piece is computed leaves everything as it was. Once a piece is being written, the step can
    only be finished: `finish` computes what is missing, and writes again what may have been written already.

    Args:
        task, g, hp: as for `update_`.
        chunk: about how many elements to work on at a time; None takes the tensor whole.
    """

    def __init__(self, task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None = None) -> None:
        self._task, self._pieces = task, _pieces_of(task, g, hp, chunk)
        self._next = 0
        self._values: _Values | None = None  # of the next piece, once they are computed
        self.begun = False  # whether anything has been written, or is about to be

    def prepare(self) -> None:
        """Computes the next piece, and writes nothing."""
        if self._values is None and self._next < len(self._pieces):
            self._values = self._pieces[self._next]()

    def run(self) -> None:
        """Performs the step, or what is left of it."""
        while self._next < len(self._pieces):
            self.prepare()
            assert self._values is not None
            self.begun = True
            values = self._values
            foreach_copy_([target for target, _ in values.writes], [value for _, value in values.writes])
            self._next, self._values = self._next + 1, None
            _count(self._task, values)

    def finish(self) -> None:
        """Performs what is left after an error: temporaries that found no memory may find it now that others are gone.

        Raises:
            RuntimeError: when that fails, too. The parameter is stepped in part then.
        """
        try:
            self.run()
        except Exception as error:
            raise RuntimeError(
                f"an error in the middle of a step, and {type(error).__name__} when it was to be finished, left a"
                f" parameter stepped in part, {self._next} of {len(self._pieces)} pieces: load a checkpoint"
            ) from error


_Write = tuple[Tensor, Tensor]  # where, and what


class _Values(NamedTuple):
    """What one piece comes to."""

    writes: list[_Write]
    finite: Tensor | None = None  # what of it is not left out, where something may be


_Compute = Callable[[], _Values]  # of one piece


def _count(task: UpdateTask, values: _Values) -> None:
    if values.finite is not None and task.skipped is not None:
        task.skipped.add_((~values.finite).sum(-1))


def _pieces_of(task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None) -> list[_Compute]:
    """The step in pieces, none of which depends on what another one writes; None for one piece."""
    if task.p.is_contiguous() and g.is_contiguous():
        task, g = task._replace(p=task.p.view(-1)), g.view(-1)
    m, v = (tuple(part.view(-1) for part in parts) for parts in (task.m, task.v))
    return _UPDATES[task.spec.hash](task._replace(m=m, v=v), g, hp, chunk)


class _Piece(NamedTuple):
    """Slices of p and g along their first dimension that are consecutive elements in row-major order."""

    offset: int  # of the first element from the start of the task
    p: Tensor
    g: Tensor


def _pieces(task: UpdateTask, g: Tensor, chunk: int | None, unit: int = 1) -> Iterator[_Piece]:
    """The parameter in pieces of about `chunk` elements, each but the last a multiple of `unit`."""
    p = task.p
    if chunk is None:
        yield _Piece(0, p, g)
        return
    width = p[0].numel()
    aligned = unit // math.gcd(unit, width)  # the fewest rows that make whole units
    rows = max(chunk // (width * aligned), 1) * aligned
    for row in range(0, p.shape[0], rows):
        yield _Piece(row * width, p[row : row + rows], g[row : row + rows])


def _unit(spec: UpdateSpec) -> int:
    """Pieces of a parameter begin at multiples of it: of whole buckets, and of entries that are stored together."""
    return math.lcm(*(int(load) * format.unit for load, format in zip(spec.loads, spec.formats, strict=True)))


def _dense_pieces(task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None) -> list[_Compute]:
    unit = _unit(task.spec)
    return [partial(_dense_piece, piece, task, hp) for piece in _pieces(task, g, chunk, unit)]


def _dense_piece(piece: _Piece, task: UpdateTask, hp: StepScalars) -> _Values:
    offset, p, grad = piece
    (m_format, v_format), count, v_load = task.spec.formats, p.numel(), int(task.spec.loads[1])
    v_count = -(-count // v_load)
    m, v = m_format.cut(task.m, offset, count), v_format.cut(task.v, offset // v_load, v_count)
    old, grad = _flat(p, torch.promote_types(p.dtype, torch.float32)), _gradient(grad, task.spec, hp)
    values = _dense(old, grad, m_format.load(m, count, old.dtype), v_format.load(v, v_count, old.dtype), hp, task.spec)
    return _dense_writes(p, m, v, values, task.start + offset, task, hp)


def update_rows_(task: UpdateTask, g: Tensor, hp: StepScalars) -> None:
    """As `update_`, for many dense parameters of one `UpdateSpec`, each a row of p, g and the parts of m and v, (n, N).

    What else is not static, the hash keys, the scalars and `start`, is columns, (n, 1).
    """
    dtype = torch.promote_types(task.p.dtype, torch.float32)
    m, v = (parts[0].to(dtype) for parts in (task.m, task.v))  # dense moments have one part
    values = _dense(task.p.to(dtype), _descending(g.to(dtype), task.spec, hp), m, v, hp, task.spec)
    written = _dense_writes(task.p, task.m, task.v, values, task.start, task, hp)
    for target, value in written.writes:
        target.copy_(value)
    _count(task, written)


def _dense(old: Tensor, grad: Tensor, m: Tensor, v: Tensor, hp: StepScalars, spec: UpdateSpec) -> tuple[Tensor, ...]:
    """The new p, m and v before they are rounded; and which gradients, or buckets of the second moment, are finite, if
    that is asked for. All are flat, in one dtype; or rows of as many elements, with scalars in columns, where each
    element of v is one element's.
    """
    v_load, count = int(spec.loads[1]), len(grad)
    q = grad * grad if v_load == 1 else _means(grad * grad, v_load)
    finite = _finite(q, spec)
    own = None if finite is None else _each(finite, v_load, count)
    first_moment = decay(m, grad, hp.beta1, hp.one_minus_beta1, finite=own)
    second_moment = decay(v, q, hp.beta2, hp.one_minus_beta2, finite=finite)
    m_hat, v_hat = first_moment * hp.inv_bias_correction1, _each(second_moment * hp.inv_bias_correction2, v_load, count)
    new = updated(old, direction(m_hat, v_hat, None, hp), hp)
    changed = _where(own, new, old), first_moment, second_moment
    return changed if finite is None else (*changed, finite)


def _means(squares: Tensor, load: int) -> Tensor:
    """q of dense first moments: means over `load` neighbours, of which the last may be fewer."""
    missing = -len(squares) % load
    if not missing:
        return squares.view(-1, load).sum(1) / load
    sums = torch.nn.functional.pad(squares, (0, missing)).view(-1, load).sum(1)
    last = torch.arange(len(sums), device=squares.device) == len(sums) - 1
    return sums / torch.where(last, load - missing, load).to(sums.dtype)


def _each(x: Tensor, load: int, count: int) -> Tensor:
    """What holds for each bucket of the second moment, for each of `count` elements."""
    return x if load == 1 else x[:, None].expand(-1, load).reshape(-1)[:count]


def _dense_writes(
    p: Tensor,
    m: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    first: int | Tensor,
    task: UpdateTask,
    hp: StepScalars,
) -> _Values:
    new, first_moment, second_moment, *finite = values
    m_format, v_format = task.spec.formats
    writes = [
        *_writes(FloatFormat(p.dtype), (p,), new, first, PARAM, task, hp),
        *_writes(m_format, m, first_moment, first, FIRST, task, hp),
        *_writes(v_format, v, second_moment, first // int(task.spec.loads[1]), SECOND, task, hp),
    ]
    return _Values(writes, *finite)


def _block_pieces(task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None) -> list[_Compute]:
    unit = _unit(task.spec)
    return [partial(_block_piece, piece, task, hp) for piece in _pieces(task, g, chunk, unit)]


def _block_piece(piece: _Piece, task: UpdateTask, hp: StepScalars) -> _Values:
    offset, p, g_piece = piece
    spec, keys, hints = task.spec, task.keys, task.spec.hints
    m_format, v_format = spec.formats
    load, v_load = map(int, spec.loads)
    last, tail = (task.numel - 1) // load, (task.numel - 1) % load + 1
    count = p.numel()
    padded = -(-count // v_load) * v_load
    first, rows, v_rows = (task.start + offset) // load, padded // load, padded // v_load
    bucket = torch.arange(rows + hints.padding, device=p.device) + first
    epoch, resets = epoch_of(bucket, hp.step, keys.sign, keys.period) if spec.rehash else (0, None)
    loads: float | Tensor = load
    grad, old = _gradient(g_piece, spec, hp), _flat(p, torch.promote_types(p.dtype, torch.float32))
    if count % v_load:  # what is missing of the last buckets is zeros, which add nothing to their sums
        grad, old = (torch.nn.functional.pad(t, (0, padded - count)) for t in (grad, old))
        is_tail = bucket == last
        loads = torch.where(is_tail, tail, load).to(grad.dtype)
        if tail == 1 and resets is not None:  # alone, an element keeps its sign: the sketch is exact there
            epoch, resets = torch.where(is_tail, 0, epoch), resets & ~is_tail
    elif p.is_contiguous():
        p = p.view(rows, load)  # compiled, reads, sums and writes then share one loop over rows
    grad, old = grad.view(rows, load), old.view(rows, load)
    resets = None if resets is None else hints.separate_loop(resets, rows)
    words = hints.separate_loop(sign_words(bucket, load, epoch, keys.sign), rows)
    masks = sign_masks(words, bucket[:rows], load)
    bitwise = hints.bitwise(p, load)
    grad = signed(grad, masks, bitwise=bitwise)  # s g from here on
    if load == v_load:
        mu, q = (hints.scalar_loop(mean, words) for mean in encode_rows(grad, loads))
        v_loads = loads
    else:
        v_last, v_tail = (task.numel - 1) // v_load, (task.numel - 1) % v_load + 1
        v_bucket = torch.arange(v_rows, device=p.device) + (task.start + offset) // v_load
        v_loads = torch.where(v_bucket == v_last, v_tail, v_load).to(grad.dtype)
        mu, q = encode_rows(grad, loads)[0], encode_rows(grad.view(v_rows, v_load), v_loads)[1]
    finite = _finite(q, spec)
    finite = None if finite is None else hints.realized(finite)
    m_finite = None if finite is None else _along(finite, rows)
    m_count, v_count = -(-count // load), v_rows
    m = m_format.cut(task.m, offset // load, m_count)
    v = v_format.cut(task.v, offset // v_load, v_count)
    old_m, old_v = m_format.load(m, m_count, mu.dtype), v_format.load(v, v_count, q.dtype)
    if m_count < rows:  # buckets of padding alone
        old_m = torch.nn.functional.pad(old_m, (0, rows - m_count))
    first_moment = decay(old_m, mu, hp.beta1, hp.one_minus_beta1, resets, m_finite)
    second_moment = decay(old_v, q, hp.beta2, hp.one_minus_beta2, finite=finite)
    writes = [
        *_writes(m_format, m, first_moment[:m_count], first, FIRST, task, hp),
        *_writes(v_format, v, second_moment, (task.start + offset) // v_load, SECOND, task, hp),
    ]
    m_b, v_b = map(hints.realized, _scaled(first_moment, second_moment, (loads, v_loads), spec, hp))
    r = grad - hints.realized(mu)[:, None] if DECODES[spec.decode].residual else None
    change = direction(m_b[:, None], _along(v_b, rows)[:, None], r, hp)
    new = updated(old, signed(change, masks, bitwise=bitwise), hp)
    new = _where(None if m_finite is None else m_finite[:, None], new, old)
    writes += _writes(FloatFormat(p.dtype), (p,), new.view(-1)[:count], task.start + offset, PARAM, task, hp)
    return _Values(writes, finite)


def _along(x: Tensor, rows: int) -> Tensor:
    """What holds for each bucket of the second moment, for each of the first moment's `rows`."""
    return x if len(x) == rows else _each(x, rows // len(x), rows)


def _universal_pieces(task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None) -> list[_Compute]:
    spec = task.spec
    m_format, v_format = spec.formats
    buckets, load = task.m[0].numel(), spec.load
    a, b, c, d = task.keys.universal
    bitwise = spec.hints.bitwise(task.p, WORD)

    def hashed(first: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(g.numel(), device=g.device) + first
        masks = universal_sign_masks(index, c, d)
        return signed(_gradient(g, spec, hp), masks, bitwise=bitwise), universal_bucket(index, a, b, buckets), masks

    dtype = torch.promote_types(task.p.dtype, torch.float32)
    mu, q = torch.zeros(2, buckets, dtype=dtype, device=task.p.device)
    for first, _, grad in _pieces(task, g, chunk):
        signed_grad, bucket, _ = hashed(first, grad)
        add_scattered(mu, q, bucket, signed_grad, load)
    finite = _finite(q, spec)
    first_moment = decay(m_format.load(task.m, buckets, dtype), mu, hp.beta1, hp.one_minus_beta1, finite=finite)
    second_moment = decay(v_format.load(task.v, buckets, dtype), q, hp.beta2, hp.one_minus_beta2, finite=finite)
    m_b, v_b = _scaled(first_moment, second_moment, (load, load), spec, hp)

    def piece_of(piece: _Piece) -> _Values:
        first, p, grad = piece
        signed_grad, bucket, masks = hashed(first, grad)
        r = signed_grad - mu[bucket] if DECODES[spec.decode].residual else None
        old = _flat(p, signed_grad.dtype)
        new = updated(old, signed(direction(m_b[bucket], v_b[bucket], r, hp), masks, bitwise=bitwise), hp)
        own = None if finite is None else finite[bucket]
        new = _where(own, new, old)
        return _Values(_writes(FloatFormat(p.dtype), (p,), new, first, PARAM, task, hp), own)

    def tables() -> _Values:
        writes = [
            *_writes(m_format, task.m, first_moment, 0, FIRST, task, hp),
            *_writes(v_format, task.v, second_moment, 0, SECOND, task, hp),
        ]
        return _Values(writes)

    return [*(partial(piece_of, piece) for piece in _pieces(task, g, chunk)), tables]


_UPDATES = {None: _dense_pieces, "block": _block_pieces, "universal": _universal_pieces}


def _flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.reshape(-1).to(dtype)


def _gradient(g: Tensor, spec: UpdateSpec, hp: StepScalars) -> Tensor:
    """The gradient as it is used, flat."""
    return _descending(_flat(g, torch.promote_types(g.dtype, torch.float32)), spec, hp)


def _descending(g: Tensor, spec: UpdateSpec, hp: StepScalars) -> Tensor:
    """The gradient scaled, and of the sign that descends."""
    scale = hp.grad_scale
    g = -g if spec.maximize else g
    if isinstance(scale, Tensor):
        return g * scale.to(g.device)
    return g if scale == 1 else g * scale


def _finite(q: Tensor, spec: UpdateSpec) -> Tensor | None:
    """Where all gradients behind a mean of squares are finite, if that is asked for."""
    return torch.isfinite(q) if spec.skip else None


def _where(finite: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if finite is None else torch.where(finite, new, old)


def _scaled(
    M: Tensor, V: Tensor, loads: tuple[float | Tensor, float | Tensor], spec: UpdateSpec, hp: StepScalars
) -> tuple[Tensor, Tensor]:
    """What each bucket contributes to m_hat, up to the sign, and to v_hat."""
    decode = DECODES[spec.decode]
    m, v = M * hp.inv_bias_correction1, V * hp.inv_bias_correction2
    return decode.scaled(m, decode.m_scale, loads[0]), decode.scaled(v, decode.v_scale, loads[1])


def _writes(
    format: TableFormat,
    parts: tuple[Tensor, ...],
    values: Tensor,
    first: int | Tensor,
    stream: int,
    task: UpdateTask,
    hp: StepScalars,
) -> list[_Write]:
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
