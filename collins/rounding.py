"""Stochastic rounding to bfloat16 and float16 with counter-based random bits.

Rounding to nearest drops every update smaller than half a unit in the last place, so a bf16 weight does not change
under small steps, and a bf16 average with beta2 = 0.999 never does. Rounding up with a probability equal to the
truncated fraction is unbiased (Croci et al., "Stochastic rounding: implementation, error analysis and applications",
2022).

The random bits of element i are a hash of (seed, step, parameter, stream, i). There is no generator state: a resumed
run rounds as the uninterrupted one does, and replicas agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collins.hashing import WORD, HashKey, mixed_word
from collins.hints import NO_HINTS, Hints

ROUNDED = (torch.bfloat16, torch.float16)

# The streams of random bits of the three tensors that a step writes.
PARAM, FIRST, SECOND = 0, 0x3C6EF372, 0x1F83D9AB
SECOND_WORD = 0x510E527F

HALF_MAX = 65504.0  # largest float16
HALF_OVERFLOW = 65520.0  # the smallest number that rounding to nearest turns into infinity
HALF_NORMAL = 2.0**-14  # smallest normal float16
HALF_QUANTUM = 2.0**-24  # the spacing of subnormal float16 numbers


def random_bits(
    first: int | Tensor,
    count: int,
    step: int | Tensor,
    key: HashKey,
    stream: int,
    device: torch.device,
    hints: Hints = NO_HINTS,
) -> Tensor:
    """16 random bits, as int32 in [0, 65536), for each of the elements first, ..., first + count - 1: shape (count,).

    A `first` that is a tensor, as in compiled code, must be a multiple of 32. If `first`, `step` and `key` are columns,
    (n, 1), the bits have the shape (n, count).

    32 neighbours share two hashed words A and B, of 24 bits each, and element j of them uses the upper bits of
    A + j B mod 2^24: uniform, and independent between any two of them (Dietzfelbinger, "Universal hashing and k-wise
    independent random variables via integer arithmetic without primes", 1996).
    """
    start, skip = divmod(first, WORD) if isinstance(first, int) else (first // WORD, 0)
    needed = -(-(skip + count) // WORD)
    index = torch.arange(needed + hints.padding, device=device) + start
    streams = (stream, stream ^ SECOND_WORD)
    words = [mixed_word(index, step, HashKey(key.low, key.high ^ s)) for s in streams]
    A, B = (hints.separate_loop((word >> 8).to(torch.int32), needed, dim=-1)[..., None] for word in words)
    lane = torch.arange(WORD, dtype=torch.int32, device=device)
    return (((A + B * lane) & 0xFFFFFF) >> 8).flatten(-2)[..., skip : skip + count]


def stochastic_round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """`x` (float32) rounded to bf16 or fp16 so that its expectation is x; `bits` int32 in [0, 65536), shaped like x.

    Infinities and NaN are kept; a value stays finite if rounding to nearest keeps it finite.
    """
    if dtype == torch.bfloat16:
        raised = ((x.view(torch.int32) + bits) & -65536).view(torch.float32)
        return torch.where(torch.isfinite(x), raised, x).to(dtype)
    bits = bits >> 3  # float32 carries 13 bits more than float16
    normal = ((x.view(torch.int32) + bits) & -8192).view(torch.float32)
    tiny = torch.floor(x / HALF_QUANTUM + bits.to(torch.float32) / 8192) * HALF_QUANTUM
    rounded = torch.where(x.abs() < HALF_NORMAL, tiny, normal)
    rounded = torch.where(x.abs() < HALF_OVERFLOW, rounded.clamp(-HALF_MAX, HALF_MAX), x)
    return rounded.to(dtype)
