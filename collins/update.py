"""One parameter's whole step, in place: hash, encode, decay, decode, write. The only code that changes a parameter.

Eager and compiled steps call the same `update_`. It works through the parameter in pieces of `chunk`
elements, so that an eager step needs a few small temporaries; compiled code takes the parameter as one piece and fuses
it. Every number that differs between parameters of one `UpdateSpec` may be a 0-d tensor: one compiled graph serves them
all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

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
from collins.rounding import FIRST, PARAM, ROUNDED, SECOND, random_bits, stochastic_round
from collins.rule import StepScalars, direction, updated
from collins.sketch import add_scattered, decay, encode_rows


class UpdateSpec(NamedTuple):
    """What is fixed when a step is compiled. Hashable: together with the tensors' shapes it is a signature."""

    hash: str | None  # as in Bucketing
    load: float
    decode: str  # "residual" or "sketch"
    rehash: bool  # whether signs are ever drawn anew
    rounding: bool  # stochastic, for whatever is stored in 16 bits
    maximize: bool
    skip: bool = False  # whatever shares a moment with a gradient that is not finite
    hints: Hints = NO_HINTS  # for the compiler


class HashKeys(NamedTuple):
    """The hash constants of one parameter: ints, or 0-d int64 tensors."""

    sign: HashKey
    rounding: HashKey
    universal: tuple[int | Tensor, int | Tensor, int | Tensor, int | Tensor]  # a, b, c, d
    period: int | Tensor


class UpdateTask(NamedTuple):
    """One parameter's part of a step: what `update_` needs to know.

    p, g: the parameter and its gradient: any shape and strides, one dtype and device; i counts in row-major order.
    m, v: contiguous moments, shaped like `p` when dense, else one entry per bucket in any shape.
    spec, keys, hp: the static part, the parameter's constants, the step's numbers.
    numel: N, of the whole parameter.
    start: the number of the first element, where p, g, m and v are slices of the parameter's, at a whole bucket; a 0-d
        tensor in compiled code, whose slices hold whole buckets only.
    launch: the engine's own: what `Engine.launch_of` returned, None for what no kernel takes.
    """

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    spec: UpdateSpec
    keys: HashKeys
    hp: StepScalars
    numel: int
    start: int | Tensor = 0
    launch: Any = None


def update_(work: UpdateTask, chunk: int | None = None) -> None:
    """Updates p, m and v in place, about `chunk` elements at a time; None takes the tensor whole."""
    p, g = work.p, work.g
    if p.is_contiguous() and g.is_contiguous():
        work = work._replace(p=p.view(-1), g=g.view(-1))
    _UPDATES[work.spec.hash](work._replace(m=work.m.view(-1), v=work.v.view(-1)), chunk)


class _Piece(NamedTuple):
    """Slices of p and g along their first dimension that are consecutive elements in row-major order."""

    offset: int  # of the first element from the start of the work
    p: Tensor
    g: Tensor


def _pieces(work: UpdateTask, chunk: int | None, unit: int = 1) -> Iterator[_Piece]:
    """The parameter in pieces of about `chunk` elements, each but the last a multiple of `unit`."""
    p, g = work.p, work.g
    if chunk is None:
        yield _Piece(0, p, g)
        return
    width = p[0].numel()
    aligned = unit // math.gcd(unit, width)  # the fewest rows that make whole units
    rows = max(chunk // (width * aligned), 1) * aligned
    for row in range(0, p.shape[0], rows):
        yield _Piece(row * width, p[row : row + rows], g[row : row + rows])


def _dense_(work: UpdateTask, chunk: int | None) -> None:
    m, v = work.m, work.v
    for offset, p, g in _pieces(work, chunk):
        first, part = work.start + offset, slice(offset, offset + p.numel())
        _store_dense((p, m[part], v[part]), _dense(p, g, m[part], v[part], work.hp, work.spec), first, work)


def update_rows_(rows: UpdateTask) -> None:
    """As `update_`, for many dense parameters of one `UpdateSpec`, each a row of p, g, m and v, (n, N).

    What else is not static is columns, (n, 1).
    """
    hp = StepScalars(*(cast(Tensor, column)[:, 0] for column in rows.hp))
    dense = torch.vmap(lambda p, g, m, v, hp: _dense(p, g, m, v, hp, rows.spec))
    new = dense(rows.p, rows.g, rows.m, rows.v, hp)
    _store_dense((rows.p, rows.m, rows.v), new, rows.start, rows)


def _dense(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, hp: StepScalars, spec: UpdateSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The new p, m and v, flat and before they are rounded."""
    grad = _gradient(g, spec)
    finite = _finite(grad * grad, spec)
    first_moment = decay(m, grad, hp.beta1, hp.one_minus_beta1, finite=finite)
    second_moment = decay(v, grad * grad, hp.beta2, hp.one_minus_beta2, finite=finite)
    old = _flat(p, grad.dtype)
    new = updated(
        old, direction(first_moment * hp.inv_bias_correction1, second_moment * hp.inv_bias_correction2, None, hp), hp
    )
    return _where(finite, new, old), first_moment, second_moment


def _store_dense(targets: Sequence[Tensor], values: Sequence[Tensor], first: int | Tensor, work: UpdateTask) -> None:
    for target, value, stream in zip(targets, values, (PARAM, FIRST, SECOND), strict=True):
        _store(target, value, first, stream, work)


def _block_(work: UpdateTask, chunk: int | None) -> None:
    spec, keys, hp, hints = work.spec, work.keys, work.hp, work.spec.hints
    load = int(spec.load)
    last, tail = (work.numel - 1) // load, (work.numel - 1) % load + 1
    for offset, p, g in _pieces(work, chunk, load):
        count = p.numel()
        first, rows = (work.start + offset) // load, -(-count // load)
        table = slice(offset // load, offset // load + rows)
        bucket = torch.arange(rows + hints.padding, device=p.device) + first
        epoch, resets = epoch_of(bucket, hp.step, keys.sign, keys.period) if spec.rehash else (0, None)
        loads: float | Tensor = load
        grad, old = _gradient(g, spec), _flat(p, torch.promote_types(p.dtype, torch.float32))
        if count % load:  # the tail bucket is padded with zeros, which add nothing to its sums
            grad, old = (torch.nn.functional.pad(t, (0, rows * load - count)) for t in (grad, old))
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
        mu, q = (hints.scalar_loop(mean, words) for mean in encode_rows(grad, loads))
        finite = _finite(q, spec)
        finite = None if finite is None else hints.realized(finite)
        first_moment = decay(work.m[table], mu, hp.beta1, hp.one_minus_beta1, resets, finite)
        second_moment = decay(work.v[table], q, hp.beta2, hp.one_minus_beta2, finite=finite)
        _store(work.m[table], first_moment, first, FIRST, work)
        _store(work.v[table], second_moment, first, SECOND, work)
        m_b, v_b = map(hints.realized, _scaled(first_moment, second_moment, loads, work))
        r = grad - hints.realized(mu)[:, None] if spec.decode == "residual" else None
        new = updated(old, signed(direction(m_b[:, None], v_b[:, None], r, hp), masks, bitwise=bitwise), hp)
        new = _where(None if finite is None else finite[:, None], new, old)
        _store(p, new.view(-1)[:count], work.start + offset, PARAM, work)


def _universal_(work: UpdateTask, chunk: int | None) -> None:
    spec, hp = work.spec, work.hp
    buckets, load = work.m.numel(), spec.load
    a, b, c, d = work.keys.universal
    bitwise = spec.hints.bitwise(work.p, WORD)

    def hashed(first: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(g.numel(), device=g.device) + first
        masks = universal_sign_masks(index, c, d)
        return signed(_gradient(g, spec), masks, bitwise=bitwise), universal_bucket(index, a, b, buckets), masks

    mu = torch.zeros_like(work.m, dtype=torch.promote_types(work.p.dtype, torch.float32))
    q = torch.zeros_like(mu)
    for first, _, g in _pieces(work, chunk):
        signed_grad, bucket, _ = hashed(first, g)
        add_scattered(mu, q, bucket, signed_grad, load)
    finite = _finite(q, spec)
    first_moment = decay(work.m, mu, hp.beta1, hp.one_minus_beta1, finite=finite)
    second_moment = decay(work.v, q, hp.beta2, hp.one_minus_beta2, finite=finite)
    m_b, v_b = _scaled(first_moment, second_moment, load, work)
    for first, p, g in _pieces(work, chunk):
        signed_grad, bucket, masks = hashed(first, g)
        r = signed_grad - mu[bucket] if spec.decode == "residual" else None
        old = _flat(p, signed_grad.dtype)
        new = updated(old, signed(direction(m_b[bucket], v_b[bucket], r, hp), masks, bitwise=bitwise), hp)
        _store(p, _where(None if finite is None else finite[bucket], new, old), first, PARAM, work)
    _store(work.m, first_moment, 0, FIRST, work)
    _store(work.v, second_moment, 0, SECOND, work)


_UPDATES = {None: _dense_, "block": _block_, "universal": _universal_}


def _flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.reshape(-1).to(dtype)


def _gradient(g: Tensor, spec: UpdateSpec) -> Tensor:
    g = _flat(g, torch.promote_types(g.dtype, torch.float32))
    return -g if spec.maximize else g


def _finite(q: Tensor, spec: UpdateSpec) -> Tensor | None:
    """Where all gradients behind a mean of squares are finite, if that is asked for."""
    return torch.isfinite(q) if spec.skip else None


def _where(finite: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if finite is None else torch.where(finite, new, old)


def _scaled(M: Tensor, V: Tensor, load: float | Tensor, work: UpdateTask) -> tuple[Tensor, Tensor]:
    """What each bucket contributes to m_hat, up to the sign, and to v_hat."""
    m, v = M * work.hp.inv_bias_correction1, V * work.hp.inv_bias_correction2
    return (m * load, v * load) if work.spec.decode == "sketch" else (m * load**0.5, v)


def _store(target: Tensor, value: Tensor, first: int | Tensor, stream: int, work: UpdateTask) -> None:
    """Writes `value`, flat or in rows, over `target`; the first element, or that of each row, is number `first`."""
    if work.spec.rounding and target.dtype in ROUNDED:
        key, hints = work.keys.rounding, work.spec.hints
        bits = random_bits(first, value.shape[-1], work.hp.step, key, stream, target.device, hints)
        value = stochastic_round(value.to(torch.float32), target.dtype, bits)
    target.copy_(value.view(target.shape))
