"""Count-Sketch tables of bucket means: encode, decay, and the signed decode. Pure functions, no state.

A table holds, for each bucket b of load c_b, an exponential moving average of

    mu_b = (1/c_b) sum_{h(i)=b} s(i) g_i          q_b = (1/c_b) sum_{h(i)=b} g_i^2

(Charikar, Chen & Farach-Colton, "Finding frequent items in data streams", 2002; unsigned as in Count-Min for q.)
Means, not sums: full, partial and differently loaded buckets then share one scale, and c s(i) M_{h(i)} decodes m_i
without bias, because E[s(i) s(j)] = 0 for i != j.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_rows(signs: Tensor, g: Tensor, load: float | Tensor) -> tuple[Tensor, Tensor]:
    """mu and q, both (R,), of R buckets whose elements are the rows of `g`, (R, c); `load` is c, or (R,) true loads."""
    return (signs * g).sum(1) / load, (g * g).sum(1) / load


def add_scattered(mu: Tensor, q: Tensor, bucket: Tensor, signs: Tensor, g: Tensor, load: float) -> None:
    """Adds the elements of flat `g`, (n,), at buckets (n,) int64, into mu and q, both (K,), in place.

    `load` is N / K, the load every bucket is expected to have.
    """
    mu.index_add_(0, bucket, signs * g / load)
    q.index_add_(0, bucket, g * g / load)


def decay(
    table: Tensor, mean: Tensor, beta: float | Tensor, fresh: Tensor | None = None, fine: Tensor | None = None
) -> Tensor:
    """beta * table + (1 - beta) * mean in the dtype of `mean`.

    The table counts as 0 where `fresh`, and stays as it then is where not `fine`.
    """
    table = table.to(mean.dtype)
    if fresh is not None:
        table = torch.where(fresh, torch.zeros_like(table), table)
    average = beta * table + (1 - beta) * mean
    return average if fine is None else torch.where(fine, average, table)
