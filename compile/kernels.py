"""Steps many tensors in one launch: a Triton kernel, which is called through the operator `collins::step_`.

The kernel computes `collins.update.update_` for dense moments and for hash="block", in float32. One launch steps all
tensors of one dtype, load and set of flags, of any shapes: the kernel reads the addresses of its tensors from a table,
so that hundreds of small tensors take no more launches than one large tensor.

A Triton program steps a span of a tensor, in tiles of rows. A row is a bucket, or 32 neighbouring elements where
buckets are larger or moments are dense. So each hash is computed once per row, and each gradient is read once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from collins._torch_internals import current_raw_stream
from collins.compile.device_functions import (
    add_count,
    along,
    flipped,
    load_integers,
    mix,
    noise,
    quotient,
    rounded,
    scaled,
    store_integers,
    widened,
)
from collins.formats import FORMATS, IntFormat, second_format
from collins.hashing import GOLDEN, TICK_STRIDE
from collins.rounding import (
    FIRST,
    PARAM,
    ROUNDED,
    SECOND,
)
from collins.rule import DECODES, PART_STRIDE, StepScalars
from collins.update import UpdateSpec

_STRIDE = tl.constexpr(TICK_STRIDE)
_GOLDEN = tl.constexpr(GOLDEN)
_PART = tl.constexpr(PART_STRIDE)
_PARAM, _FIRST, _SECOND = tl.constexpr(PARAM), tl.constexpr(FIRST), tl.constexpr(SECOND)
_SMALLEST_ROOT = tl.constexpr(1e-6)  # moments are divided by sqrt(kappa), which may be 0

WIDE = 16  # bytes that a thread reads or copies at once
_COPIES = 4  # copies of `WIDE` bytes of a parameter that a thread makes for a tile
SPAN = 32768  # bytes of a parameter that a program steps, one tile after another

# The columns of the table, which has one row per tensor: addresses, sizes and hash constants, all int64.
COLUMNS = (
    "p", "m", "v", "local", "program", "start", "numel", "sign0", "sign1", "round0", "round1", "period", "row",
    "scales",
)  # fmt: skip
_WIDTH = tl.constexpr(len(COLUMNS))
# The scalars of a step: a row for each set of hyperparameters, all float64.
_SCALARS = tl.constexpr(len(StepScalars._fields))


@triton.jit(do_not_specialize_on_alignment=["owners", "table", "grads", "scalars", "skipped"])
def _step(  # type: ignore[no-untyped-def]
    owners, table, grads, scalars, skipped,
    P: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr,
    LOAD: tl.constexpr, V_LOAD: tl.constexpr,
    M_SCALE: tl.constexpr, V_SCALE: tl.constexpr, RESIDUAL: tl.constexpr,
    REHASH: tl.constexpr, ROUND_P: tl.constexpr, ROUND_T: tl.constexpr, MAXIMIZE: tl.constexpr,
    SKIP: tl.constexpr, EVEN: tl.constexpr, FILLED: tl.constexpr, SCALED: tl.constexpr, ONE: tl.constexpr,
    FAST: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(owners + program).to(tl.int64)
    entry = table + tensor * _WIDTH
    offset = (program - tl.load(entry + 4)).to(tl.int64) * SPAN
    end = tl.minimum(tl.load(entry + 3) - offset, SPAN).to(tl.int32)
    p_base = tl.multiple_of(tl.load(entry).to(tl.pointer_type(P)) + offset, 16)
    if ONE:
        g_base = tl.multiple_of(grads + offset, 16)
    else:
        g_base = tl.multiple_of(tl.load(grads + tensor).to(tl.pointer_type(P)) + offset, 16)
    if BITS == 0:
        m_base = tl.load(entry + 1).to(tl.pointer_type(T))
    else:
        m_base = tl.load(entry + 1).to(tl.pointer_type(tl.int8 if BITS == 8 else tl.uint8))
        scales = tl.load(entry + 13).to(tl.pointer_type(tl.float32)) + offset // LOAD // BLOCK
    v_base = tl.load(entry + 2).to(tl.pointer_type(T))
    m_base, v_base = m_base + offset // LOAD * (BITS if BITS else 8) // 8, v_base + offset // V_LOAD
    if DENSE:
        m_base, v_base = tl.multiple_of(m_base, 16), tl.multiple_of(v_base, 16)
    start = tl.load(entry + 5) + offset
    round0, round1 = tl.load(entry + 9).to(tl.uint32), tl.load(entry + 10).to(tl.uint32)
    scalars += tl.load(entry + 12) * _SCALARS
    step = tl.load(scalars + 0).to(tl.uint32)
    lr = tl.load(scalars + 1).to(tl.float32)
    decay_factor = tl.load(scalars + 2).to(tl.float32)
    beta1 = tl.load(scalars + 3).to(tl.float32)
    one_minus_beta1 = tl.load(scalars + 4).to(tl.float32)
    beta2 = tl.load(scalars + 5).to(tl.float32)
    one_minus_beta2 = tl.load(scalars + 6).to(tl.float32)
    step1 = tl.load(scalars + 7).to(tl.float32) * lr
    inv_bias_correction2 = tl.load(scalars + 8).to(tl.float32)
    eps = tl.load(scalars + 9).to(tl.float32)
    own1 = tl.load(scalars + 12).to(tl.float32) * lr
    part = tl.load(scalars + 13).to(tl.uint32)
    grad_scale = tl.load(scalars + 14).to(tl.float32)
    tick = (step + part * _PART) * _STRIDE
    if RESIDUAL:
        # Numerator and denominator of the quotient are divided by sqrt(kappa), so that r^2 needs no factor.
        inverse = 1 / tl.maximum(tl.sqrt(tl.load(scalars + 11).to(tl.float32)), _SMALLEST_ROOT)
        step1, own1, eps = step1 * inverse, own1 * inverse, eps * inverse
        lr_rho = tl.load(scalars + 10).to(tl.float32) * lr * inverse
        inv_bias_correction2 *= inverse * inverse

    LANES: tl.constexpr = 32 if DENSE or LOAD > 32 else LOAD
    ROWS: tl.constexpr = TILE // LANES
    BUCKETS: tl.constexpr = TILE // LOAD
    WORDS: tl.constexpr = LOAD // LANES  # rows in a bucket
    V_BUCKETS: tl.constexpr = TILE // V_LOAD
    V_WORDS: tl.constexpr = V_LOAD // LANES
    element = tl.arange(0, TILE)
    bucket, v_bucket = tl.arange(0, BUCKETS), tl.arange(0, V_BUCKETS)
    first_bucket = (start // LOAD).to(tl.uint32)
    beyond = tl.load(entry + 6) - start
    m_end = tl.cdiv(end, LOAD)
    if not DENSE:
        row, lane = tl.arange(0, ROWS), tl.arange(0, LANES)
        sign0, sign1 = tl.load(entry + 7).to(tl.uint32), tl.load(entry + 8).to(tl.uint32)
        if REHASH:
            period = tl.load(entry + 11).to(tl.uint32)
            begun = step // period
            remaining = period - (step - begun * period)  # in (0, period]
            old_tick = begun * _STRIDE + sign1
            # The phase of the buckets that begin a period in this step; partial steps after the first begin none.
            resetting = tl.where(part == 0, tl.where(remaining == period, 0, remaining), period)

    # Triton's interpreter supports only constant bounds, so its tiles are never FILLED: those past the end are masked.
    for at in tl.range(0, end if FAST else SPAN, TILE, num_stages=STAGES):
        # Elements are loaded in wide words, independently of the rows of the computation. For tensors of whole 32-bit
        # sign words the mask is constant within a word, so that these loads stay wide.
        inside = (element // 32 * 32 < end - at if EVEN else element < end - at) | FILLED
        g = widened(tl.load(g_base + at + element, mask=inside, other=0.0), FAST)
        if SCALED:
            g *= grad_scale
        p = widened(tl.load(p_base + at + element, mask=inside, other=0.0), FAST)
        if MAXIMIZE:
            g = -g
        held = inside if LOAD == 1 else (bucket * LOAD < end - at) | FILLED
        v_held = inside if V_LOAD == 1 else (v_bucket * V_LOAD < end - at) | FILLED
        m_here, v_here = m_base + at // LOAD + bucket, v_base + at // V_LOAD + v_bucket
        if BITS == 0:
            old_m = tl.load(m_here, mask=held, other=0.0).to(tl.float32)
        else:
            old_m = load_integers(m_base, scales, at // LOAD, m_end, BITS, BUCKETS, BLOCK, EVEN, FILLED)
        old_v = tl.load(v_here, mask=v_held, other=0.0).to(tl.float32)
        number = first_bucket + (at // LOAD + bucket).to(tl.uint32)
        v_number = (start // V_LOAD).to(tl.uint32) + (at // V_LOAD + v_bucket).to(tl.uint32)
        if EVEN:
            load: tl.constexpr = LOAD * 1.0
            root: tl.constexpr = LOAD**0.5
            v_load: tl.constexpr = V_LOAD * 1.0
            v_root: tl.constexpr = V_LOAD**0.5
        else:
            left = tl.minimum(beyond - at, TILE).to(tl.int32)
            size = (left - bucket * LOAD).to(tl.float32)
            load = tl.minimum(tl.maximum(size, 1.0), LOAD * 1.0)
            root = tl.sqrt(load)
            v_load = tl.minimum(tl.maximum((left - v_bucket * V_LOAD).to(tl.float32), 1.0), V_LOAD * 1.0)
            v_root = tl.sqrt(v_load)
        if DENSE:
            mu, q = g, g * g
            if V_LOAD > 1:
                q = tl.sum(tl.reshape(q, (V_BUCKETS, V_LOAD)), axis=1) * (1 / v_load)
        else:
            if REHASH:
                phase = tl.umulhi((number + sign0) * _GOLDEN, period)  # in [0, period)
                ticks = tl.where(phase >= remaining, old_tick + _STRIDE, old_tick)
                resets = phase == resetting
                if not EVEN:  # an element that has a bucket to itself keeps its sign
                    ticks, resets = tl.where(size > 1.0, ticks, sign1), resets & (size > 1.0)
                old_m = tl.where(resets, 0.0, old_m)
                ticks = along(ticks, ROWS, WORDS)
            else:
                ticks = sign1
            of_row = (start // LANES).to(tl.uint32) + (at // LANES + row).to(tl.uint32) if WORDS > 1 else number
            word = mix((of_row + sign0) ^ ticks)
            column = lane.to(tl.uint32)[None, :]
            if LANES < 32:  # several rows share the 32 bits; tiles begin at a multiple of 32 elements
                word = word << (bucket * LOAD & 32 - LANES ^ 32 - LANES)
            flips = word[:, None] << (LANES - 1 - column)
            g = tl.reshape(g, (ROWS, LANES))
            signed = flipped(g, flips, FAST)
            total, squares = tl.sum(signed, axis=1), tl.sum(g * g, axis=1)
            if WORDS > 1:
                total = tl.sum(tl.reshape(total, (BUCKETS, WORDS)), axis=1)
            if V_WORDS > 1:
                squares = tl.sum(tl.reshape(squares, (V_BUCKETS, V_WORDS)), axis=1)
            mu, q = total * (1 / load), squares * (1 / v_load)
        M = beta1 * old_m + one_minus_beta1 * mu
        V = beta2 * old_v + one_minus_beta2 * q
        if SKIP:
            v_finite = q < float("inf")
            V = tl.where(v_finite, V, old_v)
            M = tl.where(along(v_finite, BUCKETS, V_LOAD // LOAD), M, old_m)
            finite = along(v_finite, TILE, V_LOAD)
            add_count(skipped, v_held & ~v_finite)
        if BITS != 0:
            # Buckets past the end have no elements and the mean 0, which does not change the largest value of a block.
            store_integers(m_base, scales, at // LOAD, m_end, M, BITS, BUCKETS, BLOCK, EVEN, FILLED, FAST)
        elif ROUND_T:
            index, spot = number // 32, number & 31
            tl.store(m_here, rounded(M, noise(index, spot, tick, round0, round1, _FIRST), T), mask=held)
        else:
            tl.store(m_here, M.to(T), mask=held)
        if ROUND_T:
            index, spot = v_number // 32, v_number & 31
            tl.store(v_here, rounded(V, noise(index, spot, tick, round0, round1, _SECOND), T), mask=v_held)
        else:
            tl.store(v_here, V.to(T), mask=v_held)
        if DENSE:
            change = quotient(M * step1 + mu * own1, along(V * inv_bias_correction2, TILE, V_LOAD), eps, FAST)
        else:
            # All values are multiplied by the sign s: s r = s g - mu.
            m_b = M * scaled(step1, load, root, M_SCALE) + mu * scaled(own1, load, root, M_SCALE)
            v_b = V * scaled(inv_bias_correction2, v_load, v_root, V_SCALE)
            if RESIDUAL:
                m_b, v_b = along(m_b, ROWS, WORDS)[:, None], along(v_b, ROWS, V_WORDS)[:, None]
                r = signed - along(mu, ROWS, WORDS)[:, None]
                change = quotient(m_b + lr_rho * r, v_b + r * r, eps, FAST)
            else:
                change = quotient(m_b, along(v_b, BUCKETS, V_LOAD // LOAD), eps, FAST)
                change = tl.broadcast_to(along(change, ROWS, WORDS)[:, None], (ROWS, LANES))
            change = tl.reshape(flipped(change, flips, FAST), (TILE,))

        new = p * decay_factor - change
        if SKIP:
            new = tl.where(finite, new, p)
        if ROUND_P:
            index = (start // 32).to(tl.uint32) + (at // 32 + element // 32).to(tl.uint32)
            spot = (element & 31).to(tl.uint32)
            tl.store(p_base + at + element, rounded(new, noise(index, spot, tick, round0, round1, _PARAM), P), inside)
        else:
            tl.store(p_base + at + element, new.to(P), mask=inside)


_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
PARAMETERS = (torch.float32, torch.bfloat16, torch.float16)
# Supported formats of the first moment.
MOMENTS = ("float32", "bfloat16", *(name for name, format in FORMATS.items() if isinstance(format, IntFormat)))
TILE = 1024  # elements; a tile holds whole buckets and whole blocks of integers

# Inline PTX needs an NVIDIA compiler; ROCm and the interpreter use Triton's own operations.
_FAST = torch.version.hip is None and os.environ.get("TRITON_INTERPRET", "0") != "1"


class Tiling(NamedTuple):
    """How a program computes its tiles.

    Attributes:
        stages: the number of tiles that are pipelined.
        options: launch options: the number of warps, and the limit of registers per thread.
    """

    stages: int
    options: dict[str, int]


def int_constants(format: str) -> tuple[int, int]:
    """The bits of an integer format, and the number of entries that share a scale; (0, 1) for floating point."""
    found = FORMATS[format]
    return (found.bits, found.block) if isinstance(found, IntFormat) else (0, 1)


def takes(spec: UpdateSpec) -> bool:
    """Whether the kernel supports such moments. A tile must hold whole blocks of integers."""
    known = spec.m_format in MOMENTS and spec.v_format == second_format(spec.m_format)
    return known and int(spec.load) * FORMATS[spec.m_format].unit <= TILE


def decode_constants(decode: str) -> tuple[float, float, bool]:
    """The kernel's arguments for a decode: the powers of the load in m_hat and v_hat; whether there is a residual."""
    found = DECODES[decode]
    return float(found.m_scale), float(found.v_scale), found.residual


def tiling(itemsize: int, even: bool) -> Tiling:
    """The tiling for parameters of `itemsize` bytes per element.

    Where tensors are even, the next two tiles are copied ahead to shared memory, which takes no registers. A thread
    then computes many elements of a tile, which spreads the instructions that a tile and its sums need, and a program
    has one or two warps, which hardly wait for each other. For other tensors a thread loads 8 elements and computes
    them, and the latency of memory is hidden by other programs. The numbers of warps, registers, stages and copies are
    the fastest of those that were tried on an H200, for tables in int4.
    """
    if not even:
        return Tiling(1, _options(4, 80))
    return Tiling(3, _options(TILE * itemsize // (_COPIES * WIDE * 32), 168))


def _options(warps: int, registers: int) -> dict[str, int]:
    return {"num_warps": warps, **({"maxnreg": registers} if _FAST else {})}


def step_(
    p: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    owners: Tensor,
    table: Tensor,
    grads: Tensor,
    scalars: Tensor,
    skipped: Tensor,
    bits: int,
    block: int,
    load: int,
    v_load: int,
    m_scale: float,
    v_scale: float,
    residual: bool,
    rehash: bool,
    rounding: bool,
    maximize: bool,
    skip: bool,
    even: bool,
    filled: bool,
    scaled: bool,
) -> None:
    """Steps many tensors of one kind: the implementation of the operator `collins::step_`.

    It is called directly where possible: the dispatcher would examine every tensor of the lists, which takes host time.

    Args:
        p, m, v: parameters and moments; gradients are passed by address.
        owners: the index of the tensor that each program steps, int32.
        table: a row of `COLUMNS` for each tensor.
        grads: addresses of the gradients, int64; or, for a single tensor, the gradient itself.
        scalars: rows of `collins.rule.StepScalars`, float64.
        skipped: counts skipped buckets, as in `collins.update.UpdateTask`; without `skip`, any int64 tensor.
        bits, block: the bits of the integers that store the first moment, and the number of entries that share a scale;
            0 and 1 if it is stored in floating point, in the dtype of the second moment.
        load, v_load: c of both moments' buckets; 1 for dense moments.
        m_scale, v_scale, residual: as in `collins.rule.Decode`.
        rehash, rounding, maximize, skip: as in `collins.update.UpdateSpec`.
        even: whether every tensor consists of whole buckets and whole words.
        filled: whether every tensor consists of whole tiles, so that nothing is masked.
        scaled: whether gradients are multiplied by `grad_scale`.
    """
    param, moment, one = p[0].dtype, v[0].dtype, grads.dtype is not torch.int64
    decode = m_scale, v_scale, residual
    options = rehash, rounding, maximize, skip, even, filled, scaled, one
    key = (owners.device, param, bits, block, moment, load, v_load, decode, options)
    grid = (owners.numel(), 1, 1)
    with _HERE if _is_current(owners.device) else torch.cuda.device_of(owners):
        if key in _COMPILED:
            constants, kernel = _COMPILED[key]
            stream = current_raw_stream(owners.device.index)
            kernel[grid](owners, table, grads, scalars, skipped, *constants, stream=stream)
            return
        stages, launch_options = tiling(param.itemsize, even)
        constants = (
            _DTYPES[param], _DTYPES[moment], bits, block, load == 1, load, v_load, *decode, rehash,
            rounding and param in ROUNDED, rounding and moment in ROUNDED, maximize, skip, even,
            filled and _FAST, scaled, one, _FAST, TILE, SPAN // param.itemsize, stages,
        )  # fmt: skip
        kernel = _step[grid](owners, table, grads, scalars, skipped, *constants, **launch_options)
        if isinstance(kernel, CompiledKernel):
            _COMPILED[key] = constants, kernel


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.current_device() == device.index


_HERE = contextlib.nullcontext()  # entering the context of the current device takes as long as finding the kernel

# Compiled kernels by everything that selects one. Triton's own search takes longer than the launch itself.
_COMPILED: dict[tuple[Any, ...], tuple[tuple[Any, ...], CompiledKernel]] = {}

_LIBRARY = torch.library.Library("collins", "DEF")
_LIBRARY.define(
    "step_(Tensor(a!)[] p, Tensor(b!)[] m, Tensor(c!)[] v, Tensor owners, Tensor table, Tensor grads, "
    "Tensor scalars, Tensor(d!) skipped, int bits, int block, int load, int v_load, float m_scale, float v_scale, "
    "bool residual, bool rehash, bool rounding, bool maximize, bool skip, bool even, bool filled, bool scaled) -> ()"
)
for _key in ("CUDA", "CPU"):  # on the CPU under Triton's interpreter only
    _LIBRARY.impl("step_", step_, _key)
torch.library.register_fake("collins::step_", lambda *_: None, lib=_LIBRARY)
