"""The whole step of one parameter, in place: hash, encode, decay, decode, write.

Compiled steps call `update_`, which processes the parameter as one piece, for the compiler to fuse. Eager steps are an
`EagerUpdate`, which processes it in pieces, so that temporaries are small. All values of a piece are computed before
the first of them is written. Every number that differs between parameters of one `UpdateSpec` may be a 0-d tensor, so
that they share one compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import foreach_copy_
from collins.formats import FloatFormat
from collins.hashing import WORD, signed, universal_bucket, universal_sign_masks
from collins.rounding import FIRST, PARAM, SECOND
from collins.rule import DECODES, StepScalars, direction, updated
from collins.sketch import add_scattered, decay, encode_rows
from collins.task import (
    HashKeys,
    Piece,
    UpdateSpec,
    UpdateTask,
    Write,
    bucket_signs,
    flat,
    pieces,
    scaled_gradient,
    unit_of,
    used_gradient,
    writes_of,
)

__all__ = [
    "EagerUpdate",
    "HashKeys",
    "PiecewiseUpdate",
    "UpdateSpec",
    "UpdateTask",
    "Values",
    "update_",
    "update_rows_",
]


def update_(task: UpdateTask, g: Tensor, hp: StepScalars) -> None:
    """Updates p, m and v in place.

    Args:
        task: the parameter and its moments.
        g: the gradient, of the parameter's shape, dtype and device, with any strides.
        hp: the step's scalars.
    """
    for piece in _pieces_of(task, g, hp, None):
        values = piece()
        for target, value in values.writes:
            target.copy_(value)
        _count(task.skipped, values)


class PiecewiseUpdate:
    """A step in pieces, which is performed completely or not at all.

    An error while the first piece is computed leaves everything unchanged. Once writing has begun, the step can only be
    completed: `finish` computes and writes the remaining pieces, including the one whose writes may be incomplete.

    Args:
        pieces: functions that compute the values of each piece; none depends on the writes of another one.
        skipped: as in `UpdateTask`.
    """

    def __init__(self, pieces: Sequence[Callable[[], Values]], skipped: Tensor | None) -> None:
        self._pieces, self._skipped = pieces, skipped
        self._next = 0
        self._values: Values | None = None  # the values of the next piece, if they have been computed
        self.begun = False  # whether writing has begun

    def prepare(self) -> None:
        """Computes the next piece without writing it."""
        if self._values is None and self._next < len(self._pieces):
            self._values = self._pieces[self._next]()

    def run(self) -> None:
        """Performs the remaining pieces of the step."""
        while self._next < len(self._pieces):
            self.prepare()
            assert self._values is not None
            self.begun = True
            values = self._values
            foreach_copy_([target for target, _ in values.writes], [value for _, value in values.writes])
            self._next, self._values = self._next + 1, None
            _count(self._skipped, values)

    def finish(self) -> None:
        """Completes the step after an error; a failed allocation may succeed now, since other temporaries are freed.

        Raises:
            RuntimeError: if that fails too. Then only some pieces of the parameter have been stepped.
        """
        try:
            self.run()
        except Exception as error:
            raise RuntimeError(
                f"an error in the middle of a step, and {type(error).__name__} while the step was being completed, left"
                f" a parameter stepped in part, {self._next} of {len(self._pieces)} pieces: load a checkpoint"
            ) from error


class EagerUpdate(PiecewiseUpdate):
    """One parameter's eager step.

    Args:
        task, g, hp: as for `update_`.
        chunk: the approximate number of elements of a piece; None for one piece.
    """

    def __init__(self, task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None = None) -> None:
        super().__init__(_pieces_of(task, g, hp, chunk), task.skipped)


class Values(NamedTuple):
    """The results of one piece."""

    writes: list[Write]
    finite: Tensor | None = None  # under `skip`, flags of what is not skipped
    left_out: Tensor | None = None  # or the number of what is skipped


_Compute = Callable[[], Values]  # computes one piece


def _count(skipped: Tensor | None, values: Values) -> None:
    if skipped is None:
        return
    if values.finite is not None:
        skipped.add_((~values.finite).sum(-1))
    if values.left_out is not None:
        skipped.add_(values.left_out)


def _pieces_of(task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None) -> list[_Compute]:
    """The step in pieces, none of which depends on the writes of another one; one piece if `chunk` is None."""
    if task.p.is_contiguous() and g.is_contiguous():
        task, g = task._replace(p=task.p.view(-1)), g.view(-1)
    m, v = (tuple(part.view(-1) for part in parts) for parts in (task.m, task.v))
    return _UPDATES[task.spec.hash](task._replace(m=m, v=v), g, hp, chunk)


def _dense_pieces(task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None) -> list[_Compute]:
    unit = unit_of(task.spec)
    return [partial(_dense_piece, piece, task, hp) for piece in pieces(task, g, chunk, unit)]


def _dense_piece(piece: Piece, task: UpdateTask, hp: StepScalars) -> Values:
    offset, p, grad = piece
    (m_format, v_format), count, v_load = task.spec.formats, p.numel(), int(task.spec.loads[1])
    v_count = -(-count // v_load)
    m, v = m_format.cut(task.m, offset, count), v_format.cut(task.v, offset // v_load, v_count)
    old, grad = flat(p, torch.promote_types(p.dtype, torch.float32)), used_gradient(grad, task.spec, hp)
    values = _dense(old, grad, m_format.load(m, count, old.dtype), v_format.load(v, v_count, old.dtype), hp, task.spec)
    return _dense_writes(p, m, v, values, task.start + offset, task, hp)


def update_rows_(task: UpdateTask, g: Tensor, hp: StepScalars) -> None:
    """As `update_`, for many dense parameters of one `UpdateSpec`, each a row of p, g and the parts of m and v, (n, N).

    The other values that are not static (hash keys, scalars, `start`) are columns, (n, 1).
    """
    dtype = torch.promote_types(task.p.dtype, torch.float32)
    m, v = (parts[0].to(dtype) for parts in (task.m, task.v))  # dense moments have one part
    values = _dense(task.p.to(dtype), scaled_gradient(g.to(dtype), task.spec, hp), m, v, hp, task.spec)
    written = _dense_writes(task.p, task.m, task.v, values, task.start, task, hp)
    for target, value in written.writes:
        target.copy_(value)
    _count(task.skipped, written)


def _dense(old: Tensor, grad: Tensor, m: Tensor, v: Tensor, hp: StepScalars, spec: UpdateSpec) -> tuple[Tensor, ...]:
    """The new p, m and v before rounding; under `spec.skip` also the flags of finite gradients, or of finite buckets of
    the second moment.

    All are flat, in one dtype. If v has an entry for each element, they may be rows, with scalars in columns.
    """
    v_load, count = int(spec.loads[1]), len(grad)
    q = grad * grad if v_load == 1 else _means(grad * grad, v_load)
    finite = _finite(q, spec)
    own = None if finite is None else _each(finite, v_load, count)
    first_moment = decay(m, grad, hp.beta1, hp.one_minus_beta1, finite=own)
    second_moment = decay(v, q, hp.beta2, hp.one_minus_beta2, finite=finite)
    m_hat = _m_hat(first_moment, grad, hp)
    v_hat = _each(second_moment * hp.inv_bias_correction2, v_load, count)
    new = updated(old, direction(m_hat, v_hat, None, hp), hp)
    changed = _where(own, new, old), first_moment, second_moment
    return changed if finite is None else (*changed, finite)


def _means(squares: Tensor, load: int) -> Tensor:
    """q for dense first moments: means over `load` neighbours, the last over those that remain."""
    missing = -len(squares) % load
    if not missing:
        return squares.view(-1, load).sum(1) / load
    sums = torch.nn.functional.pad(squares, (0, missing)).view(-1, load).sum(1)
    last = torch.arange(len(sums), device=squares.device) == len(sums) - 1
    return sums / torch.where(last, load - missing, load).to(sums.dtype)


def _each(x: Tensor, load: int, count: int) -> Tensor:
    """Repeats a value per bucket of the second moment for each of `count` elements."""
    return x if load == 1 else x[:, None].expand(-1, load).reshape(-1)[:count]


def _dense_writes(
    p: Tensor,
    m: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    first: int | Tensor,
    task: UpdateTask,
    hp: StepScalars,
) -> Values:
    new, first_moment, second_moment, *finite = values
    m_format, v_format = task.spec.formats
    writes = [
        *writes_of(FloatFormat(p.dtype), (p,), new, first, PARAM, task, hp),
        *writes_of(m_format, m, first_moment, first, FIRST, task, hp),
        *writes_of(v_format, v, second_moment, first // int(task.spec.loads[1]), SECOND, task, hp),
    ]
    return Values(writes, *finite)


def _block_pieces(task: UpdateTask, g: Tensor, hp: StepScalars, chunk: int | None) -> list[_Compute]:
    unit = unit_of(task.spec)
    return [partial(_block_piece, piece, task, hp) for piece in pieces(task, g, chunk, unit)]


def _block_piece(piece: Piece, task: UpdateTask, hp: StepScalars) -> Values:
    offset, p, g_piece = piece
    spec, hints = task.spec, task.spec.hints
    m_format, v_format = spec.formats
    load, v_load = map(int, spec.loads)
    count = p.numel()
    padded = -(-count // v_load) * v_load
    first, rows, v_rows = (task.start + offset) // load, padded // load, padded // v_load
    grad, old = used_gradient(g_piece, spec, hp), flat(p, torch.promote_types(p.dtype, torch.float32))
    if count % v_load:  # pad the last buckets with zeros, which do not change their sums
        grad, old = (torch.nn.functional.pad(t, (0, padded - count)) for t in (grad, old))
    elif p.is_contiguous():
        p = p.view(rows, load)  # in compiled code, reads, sums and writes then share one loop over rows
    grad, old = grad.view(rows, load), old.view(rows, load)
    words, masks, resets, loads = bucket_signs(task, hp, first, rows, grad, tail=count % v_load > 0)
    bitwise = hints.bitwise(p, load)
    grad = signed(grad, masks, bitwise=bitwise)  # from here on grad is s g
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
    if m_count < rows:  # the last rows consist of padding
        old_m = torch.nn.functional.pad(old_m, (0, rows - m_count))
    first_moment = decay(old_m, mu, hp.beta1, hp.one_minus_beta1, resets, m_finite)
    second_moment = decay(old_v, q, hp.beta2, hp.one_minus_beta2, finite=finite)
    writes = [
        *writes_of(m_format, m, first_moment[:m_count], first, FIRST, task, hp),
        *writes_of(v_format, v, second_moment, (task.start + offset) // v_load, SECOND, task, hp),
    ]
    m_b, v_b = map(hints.realized, _scaled(first_moment, mu, second_moment, (loads, v_loads), spec, hp))
    r = grad - hints.realized(mu)[:, None] if DECODES[spec.decode].residual else None
    change = direction(m_b[:, None], _along(v_b, rows)[:, None], r, hp)
    new = updated(old, signed(change, masks, bitwise=bitwise), hp)
    new = _where(None if m_finite is None else m_finite[:, None], new, old)
    writes += writes_of(FloatFormat(p.dtype), (p,), new.view(-1)[:count], task.start + offset, PARAM, task, hp)
    return Values(writes, finite)


def _along(x: Tensor, rows: int) -> Tensor:
    """Repeats a value per bucket of the second moment for each of the first moment's `rows` buckets."""
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
        return signed(used_gradient(g, spec, hp), masks, bitwise=bitwise), universal_bucket(index, a, b, buckets), masks

    dtype = torch.promote_types(task.p.dtype, torch.float32)
    mu, q = torch.zeros(2, buckets, dtype=dtype, device=task.p.device)
    for first, _, grad in pieces(task, g, chunk):
        signed_grad, bucket, _ = hashed(first, grad)
        add_scattered(mu, q, bucket, signed_grad, load)
    finite = _finite(q, spec)
    first_moment = decay(m_format.load(task.m, buckets, dtype), mu, hp.beta1, hp.one_minus_beta1, finite=finite)
    second_moment = decay(v_format.load(task.v, buckets, dtype), q, hp.beta2, hp.one_minus_beta2, finite=finite)
    m_b, v_b = _scaled(first_moment, mu, second_moment, (load, load), spec, hp)

    def piece_of(piece: Piece) -> Values:
        first, p, grad = piece
        signed_grad, bucket, masks = hashed(first, grad)
        r = signed_grad - mu[bucket] if DECODES[spec.decode].residual else None
        old = flat(p, signed_grad.dtype)
        new = updated(old, signed(direction(m_b[bucket], v_b[bucket], r, hp), masks, bitwise=bitwise), hp)
        own = None if finite is None else finite[bucket]
        new = _where(own, new, old)
        return Values(writes_of(FloatFormat(p.dtype), (p,), new, first, PARAM, task, hp), own)

    def tables() -> Values:
        writes = [
            *writes_of(m_format, task.m, first_moment, 0, FIRST, task, hp),
            *writes_of(v_format, task.v, second_moment, 0, SECOND, task, hp),
        ]
        return Values(writes)

    return [*(partial(piece_of, piece) for piece in pieces(task, g, chunk)), tables]


_UPDATES = {None: _dense_pieces, "block": _block_pieces, "universal": _universal_pieces}


def _finite(q: Tensor, spec: UpdateSpec) -> Tensor | None:
    """Under `spec.skip`, whether all gradients in each mean of squares are finite; else None."""
    return torch.isfinite(q) if spec.skip else None


def _where(finite: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if finite is None else torch.where(finite, new, old)


def _m_hat(M: Tensor, mu: Tensor, hp: StepScalars) -> Tensor:
    """The first moment without its bias, before the load's power."""
    own = M * hp.inv_bias_correction1
    return own if isinstance(hp.part, int) and hp.part == 0 else own + mu * hp.mu_weight


def _scaled(
    M: Tensor, mu: Tensor, V: Tensor, loads: tuple[float | Tensor, float | Tensor], spec: UpdateSpec, hp: StepScalars
) -> tuple[Tensor, Tensor]:
    """The value of each bucket in m_hat, without the sign, and in v_hat."""
    decode = DECODES[spec.decode]
    m, v = _m_hat(M, mu, hp), V * hp.inv_bias_correction2
    return decode.scaled(m, decode.m_scale, loads[0]), decode.scaled(v, decode.v_scale, loads[1])
