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


def encode_rows(signed: Tensor, load: float | Tensor) -> tuple[Tensor, Tensor]:
    """mu and q, both (R,): the rows of `signed`, (R, c), are the s(i) g_i of R buckets; `load` is c, or (R,) loads."""
    return signed.sum(1) / load, (signed * signed).sum(1) / load


def add_scattered(mu: Tensor, q: Tensor, bucket: Tensor, signed: Tensor, load: float) -> None:
    """Adds s(i) g_i = `signed`, (n,), at buckets (n,) int64, into mu and q, both (K,), in place.

    `load` is N / K, the load every bucket is expected to have.
    """
    mu.index_add_(0, bucket, signed / load)
    q.index_add_(0, bucket, signed * signed / load)


def decay(
    table: Tensor,
    mean: Tensor,
    beta: float | Tensor,
    one_minus_beta: float | Tensor,
    resets: Tensor | None = None,
    finite: Tensor | None = None,
) -> Tensor:
    """beta * table + one_minus_beta * mean in the dtype of `mean`, where one_minus_beta = 1 - beta.

    The table counts as 0 where `resets`, and stays as it then is where not `finite`.
    """
    table = table.to(mean.dtype)
    if resets is not None:
        table = torch.where(resets, torch.zeros_like(table), table)
    average = beta * table + one_minus_beta * mean
    return average if finite is None else torch.where(finite, average, table)
