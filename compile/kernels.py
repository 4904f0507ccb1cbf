"""The whole step of many tensors in one launch: a Triton kernel behind the operator `collins::step_`.

It computes what `collins.update.update_` computes for dense moments and for hash="block", in float32. One launch serves
all tensors of one dtype, load and set of flags, whatever their shapes: the kernel finds its tensors through a table of
addresses, so that hundreds of small tensors cost no more launches than one large one.

A tensor's elements are dealt with in tiles of rows; a row is a bucket, or 32 neighbours where buckets are larger or
moments are dense. So every hash is computed once a row, and every gradient is read once.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from collins.hashing import FIRST_MULTIPLIER, GOLDEN, SECOND_MULTIPLIER, TICK_STRIDE
from collins.rounding import FIRST, PARAM, ROUNDED, SECOND, SECOND_WORD

_M1 = tl.constexpr(FIRST_MULTIPLIER)
_M2 = tl.constexpr(SECOND_MULTIPLIER)
_STRIDE = tl.constexpr(TICK_STRIDE)
_GOLDEN = tl.constexpr(GOLDEN)
_PARAM, _FIRST, _SECOND = tl.constexpr(PARAM), tl.constexpr(FIRST), tl.constexpr(SECOND)
_WORD_B = tl.constexpr(SECOND_WORD)

TILE_BYTES = 8192  # of the parameter, in one program
CHUNK = 16  # tiles that share an entry of the map from tiles to tensors

# The columns of the table, one row a tensor: addresses, sizes and hash constants, all int64.
COLUMNS = ("p", "m", "v", "local", "chunk", "start", "numel", "sign0", "sign1", "round0", "round1", "period", "row")
_WIDTH = tl.constexpr(len(COLUMNS))
# The columns of the numbers that change with every step, one row for each set of hyperparameters, all float64.
NUMBERS = ("step", "lr", "shrink", "beta1", "rest1", "beta2", "rest2", "inverse1", "inverse2", "eps", "rho")
_NUMBERS = tl.constexpr(len(NUMBERS))


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = x ^ (x >> 16)
    x = x * _M1
    x = x ^ (x >> 15)
    x = x * _M2
    return x ^ (x >> 15)


@triton.jit
def _word(index, tick, low, high):  # type: ignore[no-untyped-def]
    return _mix((index + low) ^ (tick * _STRIDE + high))


@triton.jit
def _divided(x, y, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / y to about 2 ulp; y is a positive normal number. The plain quotient spends four instructions on other y."""
    if FAST:
        x, y = tl.broadcast(x, y)
        return tl.inline_asm_elementwise(
            "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return x / y


@triton.jit
def _root(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if FAST:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.sqrt(x)


@triton.jit
def _flipped(x, flips):  # type: ignore[no-untyped-def]
    """x with its sign changed where the top bit is set: one instruction, where a product of signs takes four."""
    return (x.to(tl.uint32, bitcast=True) ^ flips).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, bits):  # type: ignore[no-untyped-def]
    raised = ((x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, raised, x).to(tl.bfloat16)


@triton.jit
def _noise(word, spot, step, low, high, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    a = _word(word, step, low, high ^ STREAM) >> 8
    b = _word(word, step, low, high ^ (STREAM ^ _WORD_B)) >> 8
    return ((a + b * spot) & 0xFFFFFF) >> 8


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    owners, table, grads, numbers,
    P: tl.constexpr, T: tl.constexpr, DENSE: tl.constexpr, LOAD: tl.constexpr, RESIDUAL: tl.constexpr,
    REHASH: tl.constexpr, ROUND_P: tl.constexpr, ROUND_T: tl.constexpr, MAXIMIZE: tl.constexpr,
    SKIP: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(owners + program // CHUNK).to(tl.int64)
    entry = table + tensor * _WIDTH
    local = tl.load(entry + 3)
    offset = (program - tl.load(entry + 4) * CHUNK).to(tl.int64) * TILE
    if offset >= local:
        return
    p_base = tl.multiple_of(tl.load(entry).to(tl.pointer_type(P)) + offset, 16)
    g_base = tl.multiple_of(tl.load(grads + tensor).to(tl.pointer_type(P)) + offset, 16)
    m_base = tl.load(entry + 1).to(tl.pointer_type(T))
    v_base = tl.load(entry + 2).to(tl.pointer_type(T))
    if DENSE:
        m_base, v_base = tl.multiple_of(m_base + offset, 16), tl.multiple_of(v_base + offset, 16)
    else:
        m_base, v_base = m_base + offset // LOAD, v_base + offset // LOAD
    first = tl.load(entry + 5) + offset
    round0, round1 = tl.load(entry + 9).to(tl.uint32), tl.load(entry + 10).to(tl.uint32)
    numbers += tl.load(entry + 12) * _NUMBERS
    step = tl.load(numbers + 0).to(tl.uint32)
    lr = tl.load(numbers + 1).to(tl.float32)
    shrink = tl.load(numbers + 2).to(tl.float32)
    beta1 = tl.load(numbers + 3).to(tl.float32)
    rest1 = tl.load(numbers + 4).to(tl.float32)
    beta2 = tl.load(numbers + 5).to(tl.float32)
    rest2 = tl.load(numbers + 6).to(tl.float32)
    inverse1 = tl.load(numbers + 7).to(tl.float32)
    inverse2 = tl.load(numbers + 8).to(tl.float32)
    eps = tl.load(numbers + 9).to(tl.float32)
    rho = tl.load(numbers + 10).to(tl.float32)

    LANES: tl.constexpr = 32 if DENSE or LOAD > 32 else LOAD
    ROWS: tl.constexpr = TILE // LANES
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    place = row[:, None] * LANES + lane[None, :]
    if EVEN:  # noqa: SIM108 - whole rows: a mask that is the same along a row lets it be read in wide words
        inside = tl.broadcast_to((row * LANES < local - offset)[:, None], (ROWS, LANES))
    else:
        inside = place < local - offset
    g = tl.load(g_base + place, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(p_base + place, mask=inside, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g

    if DENSE:
        old_m = tl.load(m_base + place, mask=inside, other=0.0).to(tl.float32)
        old_v = tl.load(v_base + place, mask=inside, other=0.0).to(tl.float32)
        M = beta1 * old_m + rest1 * g
        V = beta2 * old_v + rest2 * g * g
        if SKIP:
            fine = g * g < float("inf")
            M, V = tl.where(fine, M, old_m), tl.where(fine, V, old_v)
        m_hat = M * inverse1
        direction = _divided(m_hat, _root(V * inverse2, FAST) + eps, FAST)
        if ROUND_T:
            word = (first // 32).to(tl.uint32) + row.to(tl.uint32)[:, None]
            spot = lane.to(tl.uint32)[None, :]
            new_m = _rounded(M, _noise(word, spot, step, round0, round1, _FIRST))
            new_v = _rounded(V, _noise(word, spot, step, round0, round1, _SECOND))
            tl.store(m_base + place, new_m, mask=inside)
            tl.store(v_base + place, new_v, mask=inside)
        else:
            tl.store(m_base + place, M.to(T), mask=inside)
            tl.store(v_base + place, V.to(T), mask=inside)
    else:
        sign0, sign1 = tl.load(entry + 7).to(tl.uint32), tl.load(entry + 8).to(tl.uint32)
        BUCKETS: tl.constexpr = TILE // LOAD
        WORDS: tl.constexpr = LOAD // LANES  # rows in a bucket
        bucket = tl.arange(0, BUCKETS)
        number = first // LOAD + bucket
        held = bucket * LOAD < local - offset
        size = tl.minimum(tl.load(entry + 6) - number * LOAD, LOAD)
        load = tl.maximum(size, 1).to(tl.float32)
        if REHASH:
            period = tl.load(entry + 11).to(tl.uint32)
            begun = step // period
            phase = tl.umulhi((number.to(tl.uint32) + sign0) * _GOLDEN, period)
            past = phase + (step - begun * period)
            moves = size > 1  # alone, an element keeps its sign
            epoch = tl.where(moves, begun + (past >= period).to(tl.uint32), 0)
            fresh = ((past == period) | (past == 0)) & moves
        else:
            epoch = tl.zeros((BUCKETS,), tl.uint32)
            fresh = tl.zeros((BUCKETS,), tl.int1)
        if WORDS == 1:
            word = _word(number.to(tl.uint32), epoch, sign0, sign1)
            shift = (number * LOAD & 31).to(tl.uint32)[:, None] + lane.to(tl.uint32)[None, :]
        else:
            of_row = first // LANES + row
            ticks = tl.reshape(tl.broadcast_to(epoch[:, None], (BUCKETS, WORDS)), (ROWS,))
            word = _word(of_row.to(tl.uint32), ticks, sign0, sign1)
            shift = tl.broadcast_to(lane.to(tl.uint32)[None, :], (ROWS, LANES))
        flips = (word[:, None] << (31 - shift)) & 0x80000000
        total, squares = tl.sum(_flipped(g, flips), axis=1), tl.sum(g * g, axis=1)
        if WORDS > 1:
            total = tl.sum(tl.reshape(total, (BUCKETS, WORDS)), axis=1)
            squares = tl.sum(tl.reshape(squares, (BUCKETS, WORDS)), axis=1)
        mu, q = total * (1 / load), squares * (1 / load)
        old_m = tl.where(fresh, 0.0, tl.load(m_base + bucket, mask=held, other=0.0).to(tl.float32))
        old_v = tl.load(v_base + bucket, mask=held, other=0.0).to(tl.float32)
        M = beta1 * old_m + rest1 * mu
        V = beta2 * old_v + rest2 * q
        if SKIP:
            fine_b = q < float("inf")
            M, V = tl.where(fine_b, M, old_m), tl.where(fine_b, V, old_v)
            if WORDS > 1:
                fine_b = tl.reshape(tl.broadcast_to(fine_b[:, None], (BUCKETS, WORDS)), (ROWS,))
            fine = tl.broadcast_to(fine_b[:, None], (ROWS, LANES))
        if ROUND_T:
            group, spot = (number // 32).to(tl.uint32), (number & 31).to(tl.uint32)
            tl.store(m_base + bucket, _rounded(M, _noise(group, spot, step, round0, round1, _FIRST)), mask=held)
            tl.store(v_base + bucket, _rounded(V, _noise(group, spot, step, round0, round1, _SECOND)), mask=held)
        else:
            tl.store(m_base + bucket, M.to(T), mask=held)
            tl.store(v_base + bucket, V.to(T), mask=held)
        m_b, v_b = M * inverse1, V * inverse2
        if RESIDUAL:
            m_b = m_b * tl.sqrt(load)
        else:
            m_b, v_b = m_b * load, v_b * load
        if WORDS > 1:
            mu = tl.reshape(tl.broadcast_to(mu[:, None], (BUCKETS, WORDS)), (ROWS,))
            m_b = tl.reshape(tl.broadcast_to(m_b[:, None], (BUCKETS, WORDS)), (ROWS,))
            v_b = tl.reshape(tl.broadcast_to(v_b[:, None], (BUCKETS, WORDS)), (ROWS,))
        if RESIDUAL:
            r = g - _flipped(mu[:, None], flips)
            direction = _divided(_flipped(m_b[:, None], flips) + rho * r, _root(v_b[:, None] + r * r, FAST) + eps, FAST)
        else:
            direction = _flipped(m_b[:, None] / (tl.sqrt(v_b[:, None]) + eps), flips)

    new = p * shrink - lr * direction
    if SKIP:
        new = tl.where(fine, new, p)
    if ROUND_P:
        at = first + row[:, None] * LANES
        spot = (at & 31).to(tl.uint32) + lane.to(tl.uint32)[None, :]
        new = _rounded(new, _noise((at // 32).to(tl.uint32), spot, step, round0, round1, _PARAM))
        tl.store(p_base + place, new, mask=inside)
    else:
        tl.store(p_base + place, new.to(P), mask=inside)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
DTYPES = tuple(_DTYPES)
LARGEST_LOAD = 1024

# PTX for division and square root; other compilers and the interpreter spell them out.
_FAST = torch.version.hip is None and os.environ.get("TRITON_INTERPRET", "0") != "1"

# Gradients come as addresses alone: they are only read, and looking at each once more would cost the host its time.
_LIBRARY = torch.library.Library("collins", "DEF")
_LIBRARY.define(
    "step_(Tensor(a!)[] p, Tensor(b!)[] m, Tensor(c!)[] v, Tensor owners, Tensor table, Tensor grads, "
    "Tensor numbers, int load, bool residual, bool rehash, bool rounding, bool maximize, bool skip, bool even) -> ()"
)


def tile_of(dtype: torch.dtype) -> int:
    """Elements of one program."""
    return TILE_BYTES // dtype.itemsize


def _launch(
    p: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    owners: Tensor,
    table: Tensor,
    grads: Tensor,
    numbers: Tensor,
    load: int,
    residual: bool,
    rehash: bool,
    rounding: bool,
    maximize: bool,
    skip: bool,
    even: bool,
) -> None:
    param, moment = p[0].dtype, m[0].dtype
    with torch.cuda.device_of(p[0]):
        _step[(owners.numel() * CHUNK,)](
            owners, table, grads, numbers,
            P=_DTYPES[param], T=_DTYPES[moment], DENSE=load == 1, LOAD=load, RESIDUAL=residual, REHASH=rehash,
            ROUND_P=rounding and param in ROUNDED, ROUND_T=rounding and moment in ROUNDED, MAXIMIZE=maximize,
            SKIP=skip, EVEN=even, FAST=_FAST, TILE=tile_of(param), CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip


for _key in ("CUDA", "CPU"):  # on the CPU under Triton's interpreter only
    _LIBRARY.impl("step_", _launch, _key)
torch.library.register_fake("collins::step_", lambda *_: None, lib=_LIBRARY)
