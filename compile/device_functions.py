"""The kernel's building blocks, as Triton functions: hashing, rounding and integer tables.

Each one is the counterpart of a function in `collins/`, whose docstring says what it computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from collins.formats import SMALLEST
from collins.hashing import FIRST_MULTIPLIER, SECOND_MULTIPLIER
from collins.rounding import HALF_MAX, HALF_NORMAL, HALF_OVERFLOW, HALF_QUANTUM, SECOND_WORD

_M1 = tl.constexpr(FIRST_MULTIPLIER)
_M2 = tl.constexpr(SECOND_MULTIPLIER)
_WORD_B = tl.constexpr(SECOND_WORD)
_SMALLEST = tl.constexpr(SMALLEST)
_HALF_MAX, _HALF_OVERFLOW = tl.constexpr(HALF_MAX), tl.constexpr(HALF_OVERFLOW)
_HALF_NORMAL, _HALF_QUANTUM = tl.constexpr(HALF_NORMAL), tl.constexpr(HALF_QUANTUM)


@triton.jit
def mix(x):  # type: ignore[no-untyped-def]
    x = x ^ (x >> 16)
    x = x * _M1
    x = x ^ (x >> 15)
    x = x * _M2
    return x ^ (x >> 15)


@triton.jit
def widened(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """x in float32. Two neighbours in bfloat16 share a register, and each is widened by one instruction."""
    if FAST and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def quotient(x, y, eps, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / (sqrt(y) + eps) to about 3 ulp, without the instructions that the plain operations spend on denormals."""
    if FAST:
        x, y = tl.broadcast(x, y)
        x, eps = tl.broadcast(x, eps)
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; sqrt.approx.ftz.f32 t, $2; add.f32 t, t, $3; div.approx.ftz.f32 $0, $1, t; }",
            "=f,f,f,f", [x, y, eps], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return x / (tl.sqrt(y) + eps)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / x to 1 ulp, for normal x."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def flipped(x, flips, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """x with its sign changed where the top bit of `flips` is set: one instruction, x ^ (flips & top bit)."""
    if FAST:
        x, flips = tl.broadcast(x, flips)
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x80000000, 0x78;", "=r,r,r", [x, flips], dtype=tl.float32, is_pure=True, pack=1
        )
    return (x.to(tl.uint32, bitcast=True) ^ (flips & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def noise(index, spot, tick, low, high, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Random bits in the upper half of a word; callers must ignore the lower half. `tick` is the tick of the step."""
    a = mix((index + low) ^ (tick + (high ^ STREAM))) & 0xFFFFFF00
    b = mix((index + low) ^ (tick + (high ^ (STREAM ^ _WORD_B)))) & 0xFFFFFF00
    return a + b * spot


@triton.jit
def rounded(x, noise, TO: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = x.to(tl.int32, bitcast=True)
    if tl.bfloat16 == TO:  # only a NaN wraps around, to a negative integer
        raised = tl.maximum(bits, bits + (noise >> 16).to(tl.int32))
        result = (raised >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        part = (noise >> 19).to(tl.int32)
        normal = ((bits + part) & -8192).to(tl.float32, bitcast=True)
        tiny = tl.floor(x / _HALF_QUANTUM + part.to(tl.float32) / 8192) * _HALF_QUANTUM
        near = tl.where(tl.abs(x) < _HALF_NORMAL, tiny, normal)
        near = tl.minimum(tl.maximum(near, -_HALF_MAX), _HALF_MAX)
        result = tl.where(tl.abs(x) < _HALF_OVERFLOW, near, x).to(tl.float16)
    return result


@triton.jit
def add_count(counter, x):  # type: ignore[no-untyped-def]
    """Adds the number of true elements of x to a counter. Integer sums do not depend on the order of the atomics."""
    count = tl.sum(tl.ravel(x).to(tl.int32), axis=0).to(tl.int64)
    tl.atomic_add(counter, count, mask=count > 0, sem="relaxed")


@triton.jit
def along(x, ROWS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Repeats a value per bucket for each row of the bucket."""
    if WORDS > 1:
        x = tl.reshape(tl.broadcast_to(x[:, None], (ROWS // WORDS, WORDS)), (ROWS,))
    return x


@triton.jit
def scaled(x, load, root, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x * load^SCALE, given the square root of the load, as `collins.rule.Decode.scaled`."""
    if SCALE == 1.0:
        x = x * load
    elif SCALE == 0.5:
        x = x * root
    elif SCALE != 0.0:
        x = x * tl.exp2(SCALE * tl.log2(root * root))
    return x


@triton.jit
def low_bits(x):  # type: ignore[no-untyped-def]
    """The nearest integer to x, ties to even, in the lower 22 bits of the result; |x| must be less than 2^21."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23, whose unit in the last place is 1


@triton.jit
def load_integers(  # type: ignore[no-untyped-def]
    base,
    scales,
    first,
    end,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    FILLED: tl.constexpr,
):
    """Loads entries `first` to `first + COUNT`, in the storage of `collins.formats.IntFormat`; zeros from `end` on.

    Args:
        WHOLE: whether the table consists of whole 32-bit words and is aligned to four bytes.
    """
    block = tl.arange(0, COUNT // BLOCK)
    scale = tl.load(scales + first // BLOCK + block, mask=(first + block * BLOCK < end) | FILLED, other=0.0)
    if WHOLE:
        PER_WORD: tl.constexpr = 32 // BITS
        place = tl.arange(0, COUNT // PER_WORD)
        words = base.to(tl.pointer_type(tl.int32)) + first // PER_WORD
        word = tl.load(words + place, mask=(first + place * PER_WORD < end) | FILLED, other=0)
        above = 32 - BITS - BITS * tl.arange(0, PER_WORD)  # bits above an entry; the shift back extends its sign
        q = tl.reshape((word[:, None] << above[None, :]) >> (32 - BITS), (COUNT,))
    else:
        entry = first + tl.arange(0, COUNT)
        if BITS == 8:
            q = tl.load(base + entry, mask=entry < end, other=0).to(tl.int32)
        else:
            pair = tl.load(base + entry // 2, mask=entry < end, other=0).to(tl.int32)
            q = (((pair >> ((entry & 1) * 4)) & 15) ^ 8) - 8  # two's complement
    return q.to(tl.float32) * along(scale, COUNT, BLOCK)


@triton.jit
def store_integers(  # type: ignore[no-untyped-def]
    base,
    scales,
    first,
    end,
    M,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    FILLED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Writes the entries M to where `load_integers` reads them, and the scale of each block."""
    LIMIT: tl.constexpr = 127.0 if BITS == 8 else 7.0
    blocks = tl.reshape(M, (COUNT // BLOCK, BLOCK))
    largest = tl.max(tl.abs(blocks), axis=1)
    inverse = LIMIT * reciprocal(tl.maximum(largest, _SMALLEST), FAST)
    q = low_bits(blocks * inverse[:, None])
    block = tl.arange(0, COUNT // BLOCK)
    tl.store(scales + first // BLOCK + block, largest / LIMIT, mask=(first + block * BLOCK < end) | FILLED)
    # Tables of whole words are written word by word, others byte by byte: one 8-bit entry or two 4-bit entries.
    WIDTH: tl.constexpr = 32 if WHOLE else 8
    PER_WORD: tl.constexpr = WIDTH // BITS
    place = tl.arange(0, COUNT // PER_WORD)
    if PER_WORD > 1:
        low = tl.reshape(q, (COUNT // PER_WORD, PER_WORD)) & ((1 << BITS) - 1)
        q = tl.sum(low << (tl.arange(0, PER_WORD) * BITS)[None, :], axis=1)
    if WHOLE:
        base = base.to(tl.pointer_type(tl.int32))
    else:
        q = tl.reshape(q, (COUNT // PER_WORD,)).to(base.dtype.element_ty)
    tl.store(base + first // PER_WORD + place, q, mask=(first + place * PER_WORD < end) | FILLED)
