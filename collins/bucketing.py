"""The number of buckets of each compressed parameter, computed from the whole parameter, never from a rank's part."""

from __future__ import annotations

import math
from typing import NamedTuple

HASHES = ("block", "universal")
NONFINITE = ("propagate", "skip", "error")


class Bucketing(NamedTuple):
    """The layout of one parameter's moments.

    `hash` is None for dense moments, which have the shape of the parameter. Otherwise there are two tables of
    `buckets` = K entries, with the load c = `load`: an exact power of two for "block", the expected N / K for
    "universal".
    """

    hash: str | None
    numel: int
    buckets: int
    load: float


def bucketing_of(numel: int, *, compress_ratio: float, min_K: int, hash: str) -> Bucketing:
    """The layout of a parameter of N = `numel` elements.

    N <= min_K, or compress_ratio = 1: dense. "universal": K = max(N // compress_ratio, min_K). "block": c is the
    largest power of two <= compress_ratio that leaves at least min_K buckets, and K = ceil(N / c); c = 1 means dense.
    The bucket of a parameter that has a single one is not made larger than it has to be.
    """
    dense = Bucketing(None, numel, numel, 1)
    if numel <= min_K or compress_ratio == 1:
        return dense
    if hash == "universal":
        buckets = max(int(numel // compress_ratio), min_K)
        return Bucketing(hash, numel, buckets, numel / buckets)
    load = 1
    while load < numel and 2 * load <= compress_ratio and -(-numel // (2 * load)) >= min_K:
        load *= 2
    return Bucketing(hash, numel, -(-numel // load), load) if load > 1 else dense


def within_rows(layout: Bucketing, shape: tuple[int, ...]) -> Bucketing:
    """`layout` for a parameter of `shape` that may be sharded along its first dimension, over any number of ranks.

    No bucket crosses from one row into the next: c is halved until it divides the size of a row. A parameter whose rows
    have an odd size, such as a vector, stays dense.
    """
    if layout.hash != "block":
        return layout
    load = math.gcd(int(layout.load), layout.numel // shape[0])
    if load == 1:
        return Bucketing(None, layout.numel, layout.numel, 1)
    return Bucketing(layout.hash, layout.numel, layout.numel // load, load)


def moment_shape(layout: Bucketing, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of each moment of a parameter of `shape`.

    Dense moments have the parameter's shape. Where no bucket crosses rows, a table keeps the first dimension, (d0, N /
    d0 / c): sharding parameter and table along it keeps each bucket on the rank of its elements. Otherwise a table has
    the shape (K,).
    """
    if layout.hash is None:
        return shape
    if layout.hash == "block" and shape and layout.numel // shape[0] % int(layout.load) == 0:
        return shape[0], layout.numel // shape[0] // int(layout.load)
    return (layout.buckets,)
