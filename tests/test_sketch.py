"""Encode, decay and decode: no bias in m, no negative v, and nothing below the true v in the published decode."""

import math

import pytest
import torch

from collins import BlockHash, UniversalHash
from collins.rule import DECODES, Decode
from collins.sketch import add_scattered, decay, encode_rows

NUMEL, BUCKETS = 256, 8


def encoded(hash, g, step=1):
    """mu and q by the library's own encoders, and each element's bucket and sign."""
    index = torch.arange(NUMEL)
    bucket, sign = hash.bucket(index), hash.sign(index, step).to(g.dtype)
    if isinstance(hash, BlockHash):
        mu, q = encode_rows((sign * g).view(BUCKETS, -1), 32)
    else:
        mu, q = torch.zeros(BUCKETS, dtype=g.dtype), torch.zeros(BUCKETS, dtype=g.dtype)
        add_scattered(mu, q, bucket, sign * g, NUMEL / BUCKETS)
    return mu, q, bucket, sign


@pytest.mark.parametrize("family", ["block", "universal"])
def test_signed_decode_is_unbiased_over_seeds(family):
    g = torch.randn(NUMEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seeds, load = 3000, NUMEL / BUCKETS
    total = torch.zeros_like(g)
    for seed in range(seeds):
        hash = BlockHash(NUMEL, 32, seed) if family == "block" else UniversalHash(NUMEL, BUCKETS, seed=seed)
        mu, _, bucket, sign = encoded(hash, g)
        total += load * sign * mu[bucket]
    # The noise of one decode is the other elements of the bucket: about sqrt(load) in standard deviation.
    error = (total / seeds - g) / (g.square().sum() / BUCKETS / seeds).sqrt()
    assert error.abs().max() < 5
    assert abs(error.mean().item()) < 5 / math.sqrt(NUMEL)


@pytest.mark.parametrize("family", ["block", "universal"])
def test_decoded_second_moments(family):
    hash = BlockHash(NUMEL, 32) if family == "block" else UniversalHash(NUMEL, BUCKETS)
    generator = torch.Generator().manual_seed(1)
    table, exact = torch.zeros(BUCKETS, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for _ in range(50):
        g = torch.randn(NUMEL, dtype=torch.float64, generator=generator).exp()
        _, q, bucket, _ = encoded(hash, g)
        table, exact = decay(table, q, 0.99, 0.01), decay(exact, g * g, 0.99, 0.01)
        assert (table >= 0).all()
        assert (NUMEL / BUCKETS * table[bucket] >= exact * (1 - 1e-12)).all()


def test_a_table_is_zero_where_signs_are_redrawn():
    table, mean = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert torch.equal(decay(table, mean, 0.5, 0.5, torch.tensor([False, True])), torch.tensor([5.5, 10.0]))
    poisoned = torch.tensor([float("nan"), float("inf")])
    assert torch.equal(decay(poisoned, mean, 0.5, 0.5, torch.tensor([True, True])), mean / 2)


@pytest.mark.parametrize("hash", ["block", "universal"])
def test_sketched_moment_is_the_least_squares_estimate(hash):
    """Of all multiples of s M, s M itself has the smallest squared distance to AdamW's first moment."""
    numel, ratio = 2**16, 8
    made = BlockHash(numel, ratio) if hash == "block" else UniversalHash(numel, numel // ratio)
    index, generator = torch.arange(numel), torch.Generator().manual_seed(0)
    bucket, sign = made.bucket(index), made.sign(index).double()
    M, m = torch.zeros(numel // ratio, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for _ in range(5):
        g = torch.randn(numel, dtype=torch.float64, generator=generator)
        mu = torch.zeros_like(M).index_add_(0, bucket, sign * g) / ratio
        M, m = decay(M, mu, 0.9, 0.1), decay(m, g, 0.9, 0.1)
    estimate = sign * Decode.scaled(M, DECODES["least_squares"].m_scale, ratio)[bucket]
    assert abs((m @ estimate / estimate.square().sum()).item() - 1) < 0.05
