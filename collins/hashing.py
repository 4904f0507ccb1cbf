"""Position hashes h and sign hashes s: pure, stateless, the same on every device.

A hash maps the row-major index i of an element to one of K buckets and to the sign with which it is added there.
Everything random is derived by `derive(seed, key, ...)`, where the key is that of the parameter's name, or the number
of a parameter without a name. So replicas agree, and two optimizers that are built in the same way step in the same
way.

Two families:

- `UniversalHash`: Carter & Wegman, "Universal classes of hash functions" (1979), over the prime field P = 2^31 - 1.
- `BlockHash`: h(i) = i // c, so that a bucket is c neighbours in memory, with hashed signs that change every
  `rehash_period` steps. It computes one integer hash per bucket, not per element.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

PRIME = 2**31 - 1
WORD = 32  # bits in a word

# A word is an int64 in [0, 2^32). No product below overflows int64: compilers may assume that signed integers never
# overflow, and one of them removed the end of a loop for that reason.
_MASK = 2**32 - 1
_SIGN = -(2**31)  # the sign bit of an int32
FIRST_MULTIPLIER, SECOND_MULTIPLIER = 0x21F0AAAD, 0x735A2D97
TICK_STRIDE = 0x1E3779B9  # odd: neighbouring ticks lie far apart before they are mixed
GOLDEN = 0x61C88647  # 2^32 / (golden ratio)^2


class HashKey(NamedTuple):
    """Two words that select the stream of random words of one parameter: ints, or 0-d int64 tensors."""

    low: int | Tensor
    high: int | Tensor


def derive(seed: int, key: int, purpose: str) -> int:
    """128 bits that depend on all of (seed, key, purpose), as a Python int: a BLAKE2b digest."""
    digest = hashlib.blake2b(f"collins/{purpose}/{seed}/{key}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def hash_key(seed: int, key: int, purpose: str) -> HashKey:
    """The `HashKey` of the parameter of this key for one purpose ("sign" or "round")."""
    bits = derive(seed, key, purpose)
    return HashKey(bits & _MASK, bits >> 32 & _MASK)


def name_key(name: str) -> int:
    """The key of a parameter that has a name: a leading 1 and 63 bits of the digest, so that it is never a number."""
    return derive(0, 0, f"name/{name}") & (2**63 - 1) | 2**63


def mix32(x: Tensor) -> Tensor:
    """A bijection of words in which each input bit flips each output bit half of the time.

    Source: the xorshift-multiply form of C. Wellons, "Prospecting for hash functions" (2018), with multipliers that its
    search found later.
    """
    x = x ^ (x >> 16)
    x = (x * FIRST_MULTIPLIER) & _MASK
    x = x ^ (x >> 15)
    x = (x * SECOND_MULTIPLIER) & _MASK
    return x ^ (x >> 15)


def mixed_word(index: Tensor, tick: int | Tensor, key: HashKey) -> Tensor:
    """One word for each index (int64, any shape) at one tick (an epoch or a step, below 2^31)."""
    return mix32(((index + key.low) & _MASK) ^ ((tick * TICK_STRIDE + key.high) & _MASK))


def epoch_of(bucket: Tensor, step: int | Tensor, key: HashKey, period: int | Tensor) -> tuple[Tensor, Tensor]:
    """epoch_b = floor((t + phi_b) / T) as int64, and (t + phi_b) mod T = 0 as bool, for buckets (int64, any shape).

    phi_b = floor(T frac((b + key) / golden ratio^2)) spreads the buckets evenly over the period (Fibonacci hashing;
    Knuth, "The Art of Computer Programming", 6.4): 1/T of them draw new signs in any step. It needs no division per
    bucket.
    """
    phase = ((((bucket + key.low) & _MASK) * GOLDEN & _MASK) * period) >> 32
    begun = step // period
    past = phase + (step - begun * period)  # in [0, 2 T)
    return begun + (past >= period), (past == period) | (past == 0)


def sign_words(bucket: Tensor, load: int, epoch: Tensor | int, key: HashKey) -> Tensor:
    """The words that hold the signs of whole buckets: int32 of shape (..., R, max(c / 32, 1)).

    A bucket of a load up to 32 has one word; in larger buckets each 32 neighbours have one.

    Args:
        bucket: bucket numbers, int64, shape (R,); or (n, R), those of n parameters.
        load: c, a power of two.
        epoch: int64 of the shape of `bucket`, or 0 for signs that never change.
        key: the parameter's sign key; of n parameters its words are columns, (n, 1).
    """
    index = bucket[..., None]
    key = HashKey(*(word[..., None] if isinstance(word, Tensor) and word.dim() else word for word in key))
    if load > WORD:
        index = torch.arange(load // WORD, device=bucket.device) + index * (load // WORD)
    tick = epoch[..., None] if isinstance(epoch, Tensor) else epoch
    return mixed_word(index, tick, key).to(torch.int32)


def sign_masks(words: Tensor, bucket: Tensor, load: int) -> Tensor:
    """The signs in `sign_words` per element: int32 of shape (..., R, c), negative where s = -1.

    s(i) is bit (i mod 32) of its word.
    """
    lane = WORD - 1 - torch.arange(min(load, WORD), dtype=torch.int32, device=bucket.device)
    if load < WORD:
        lane = lane - (bucket[..., None] * load & (WORD - 1)).to(torch.int32)
    if load > WORD:
        words = words[..., None]
    return (words << lane).view(*bucket.shape, load)


def signed(x: Tensor, masks: Tensor, *, bitwise: bool = True) -> Tensor:
    """s x, for `x` in float32 or float64 and `masks` as `sign_masks` returns them; they broadcast.

    Args:
        bitwise: whether to compute on the bits of numbers; the result does not depend on it.
    """
    if not bitwise:
        return torch.where(masks < 0, -x, x)
    if x.dtype == torch.float64:
        return (x.view(torch.int64) ^ ((masks & _SIGN).to(torch.int64) << 32)).view(x.dtype)
    return (x.view(torch.int32) ^ (masks & _SIGN)).view(x.dtype)


def _as_signs(masks: Tensor) -> Tensor:
    """Masks as signs: -1 or +1, float32."""
    return signed(torch.ones(masks.shape, dtype=torch.float32, device=masks.device), masks)


def universal_bucket(index: Tensor, a: int | Tensor, b: int | Tensor, buckets: int) -> Tensor:
    """((a i + b) mod P) mod K as int64, for `index` int64. The index is reduced first, so that no product overflows."""
    return (a * (index % PRIME) + b) % PRIME % buckets


def universal_sign_masks(index: Tensor, c: int | Tensor, d: int | Tensor) -> Tensor:
    """As `sign_masks`, where s(i) = 2 (((c i + d) mod P) mod 2) - 1 is -1, for `index` int64."""
    return ((1 - (c * (index % PRIME) + d) % PRIME % 2) << 31).to(torch.int32)


def _require_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a tensor of integers, got {got}")


class UniversalHash:
    """The 2-universal (Carter-Wegman) family over P = 2^31 - 1.

        h(i) = ((a i + b) mod P) mod K        s(i) = 2 (((c i + d) mod P) mod 2) - 1

    The coefficients are readable and settable; an optimizer uses what is set on the object that `hash_of` returned.
    Indices may exceed P: they are reduced modulo P first, so that no product leaves int64. The family is 2-universal
    over residues, so i and i + P share bucket and sign in tensors of more than P elements.

    Args:
        numel: N, the number of elements.
        buckets: K.
        seed, key: the coefficients derive from these; `key` is that of the parameter.

    Raises:
        ValueError: for `buckets` outside [1, P], and for a coefficient out of range.
        TypeError: from the methods, for indices or bucket numbers that are not tensors of integers.
    """

    def __init__(self, numel: int, buckets: int, *, seed: int = 0, key: int = 0) -> None:
        if not 1 <= buckets <= PRIME:
            raise ValueError(f"buckets must be in [1, 2**31 - 1], got {buckets}")
        self.numel = numel
        self.buckets = buckets
        self.key = key
        position, sign = derive(seed, key, "position"), derive(seed, key, "parity")
        self.a = 1 + (position & 0xFFFFFFFFFFFFFFFF) % (PRIME - 1)
        self.b = (position >> 64) % PRIME
        self.c = 1 + (sign & 0xFFFFFFFFFFFFFFFF) % (PRIME - 1)
        self.d = (sign >> 64) % PRIME

    def __setattr__(self, name: str, value: int) -> None:
        lowest = {"a": 1, "b": 0, "c": 1, "d": 0}.get(name)
        if lowest is not None and not (isinstance(value, int) and lowest <= value < PRIME):
            raise ValueError(f"{name} must be an int in [{lowest}, 2**31 - 2], got {value!r}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return (
            f"UniversalHash(numel={self.numel}, buckets={self.buckets}, a={self.a}, b={self.b}, c={self.c}, d={self.d})"
        )

    @property
    def coefficients(self) -> tuple[int, int, int, int]:
        """a, b, c and d."""
        return self.a, self.b, self.c, self.d

    def bucket(self, index: Tensor) -> Tensor:
        """h(i): int64 in [0, K), shaped like `index` (any integer dtype)."""
        _require_integers("index", index)
        return universal_bucket(index.long(), self.a, self.b, self.buckets)

    def sign(self, index: Tensor, step: int = 1) -> Tensor:
        """s(i): float32, -1 or +1, shaped like `index`. It is the same at every step."""
        _require_integers("index", index)
        return _as_signs(universal_sign_masks(index.long(), self.c, self.d))

    def fresh(self, bucket: Tensor, step: int) -> Tensor:
        """Which buckets draw new signs in this step: none, ever (bool, shaped like `bucket`)."""
        _require_integers("bucket", bucket)
        return torch.zeros_like(bucket, dtype=torch.bool)

    def load(self, bucket: Tensor) -> Tensor:
        """The expected load N / K of every bucket (float32, shaped like `bucket`); the actual loads vary around it."""
        _require_integers("bucket", bucket)
        return torch.full_like(bucket, self.numel / self.buckets, dtype=torch.float32)


@dataclass(frozen=True)
class BlockHash:
    """Buckets of c neighbours, with hashed signs that change periodically.

        h(i) = floor(i / c)        s(i) = bit (i mod 32) of mix(seed, key, word of i, epoch_b)

    The sign hash makes the decode unbiased for every position hash. Each bucket draws new signs every `period` steps,
    at a phase of its own. A bucket of one element keeps its sign, so that its sketch stays exact.

    Args:
        numel: N, the number of elements.
        block: c, a power of two: the load of every bucket but the last, which holds the remaining elements.
        seed, key: the signs derive from these; `key` is that of the parameter.
        period: steps after which a bucket draws new signs (the `rehash_period` of `Collins`); None for signs that
            never change.

    Raises:
        ValueError: for a `block` that is not a power of two, and a `period` below 1.
        TypeError: from the methods, for indices or bucket numbers that are not tensors of integers.
    """

    numel: int
    block: int
    seed: int = 0
    key: int = 0
    period: int | None = 400

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two, got {self.block}")
        if self.period is not None and self.period < 1:
            raise ValueError(f"period must be None or at least 1, got {self.period}")

    @cached_property
    def sign_key(self) -> HashKey:
        """The key of this parameter's sign words."""
        return hash_key(self.seed, self.key, "sign")

    @property
    def buckets(self) -> int:
        """K = ceil(N / c)."""
        return -(-self.numel // self.block)

    @property
    def tail(self) -> int:
        """The load of the last bucket, in [1, c]."""
        return self.numel - (self.buckets - 1) * self.block

    def bucket(self, index: Tensor) -> Tensor:
        """h(i): int64 in [0, K), shaped like `index` (any integer dtype)."""
        _require_integers("index", index)
        return index.long() // self.block

    def sign(self, index: Tensor, step: int = 1) -> Tensor:
        """s(i) as it is used in `step`: float32, -1 or +1, shaped like `index`."""
        bucket = self.bucket(index)
        epoch, _ = self._epoch(bucket, step)
        word = bucket if self.block <= WORD else index.long() // WORD
        lane = WORD - 1 - (index.long() & (WORD - 1))
        return _as_signs((mixed_word(word, epoch, self.sign_key) << lane).to(torch.int32))

    def fresh(self, bucket: Tensor, step: int) -> Tensor:
        """Which buckets draw new signs in this step (bool, shaped like `bucket`)."""
        _require_integers("bucket", bucket)
        return self._epoch(bucket, step)[1]

    def load(self, bucket: Tensor) -> Tensor:
        """The number of elements c_b in each bucket (float32, shaped like `bucket`)."""
        _require_integers("bucket", bucket)
        return torch.where(bucket == self.buckets - 1, float(self.tail), float(self.block))

    def _epoch(self, bucket: Tensor, step: int) -> tuple[Tensor, Tensor]:
        bucket = bucket.long()
        zero = torch.zeros_like(bucket)
        if self.period is None:
            return zero, zero.bool()
        epoch, fresh = epoch_of(bucket, step, self.sign_key, self.period)
        single = self.load(bucket) == 1
        return torch.where(single, zero, epoch), fresh & ~single
