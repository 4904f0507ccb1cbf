"""Hash families: exact formulas, and the statistical properties that the sketch requires."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Block, Universal, mix

from collins import BlockHash, UniversalHash
from collins.hashing import PRIME, hash_key, mix32, mixed_word

FAR = [0, 1, 31, 32, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 12345, 2**33 + 7, 2**35 - 1]


def family(name, numel, buckets, seed=0, key=0):
    if name == "universal":
        return UniversalHash(numel, buckets, seed=seed, key=key)
    return BlockHash(numel, numel // buckets, seed=seed, key=key)


@given(
    index=st.lists(st.integers(0, 2**40), min_size=1, max_size=50),
    a=st.integers(1, PRIME - 1),
    b=st.integers(0, PRIME - 1),
    buckets=st.integers(1, PRIME),
)
@settings(deadline=None, derandomize=True)
def test_universal_hash_is_the_carter_wegman_formula(index, a, b, buckets):
    hash = UniversalHash(2**41, buckets)
    hash.a, hash.b, hash.c, hash.d = a, b, a, b
    reference = Universal(2**41, buckets, a, b, a, b)
    assert hash.bucket(torch.tensor(index)).tolist() == [reference.h(i) for i in index]
    assert hash.sign(torch.tensor(index)).tolist() == [reference.s(i, 1) for i in index]


@pytest.mark.parametrize("name", "abcd")
def test_universal_coefficients_are_readable_settable_and_bounded(name):
    hash = UniversalHash(1000, 10)
    assert 0 <= getattr(hash, name) < PRIME
    setattr(hash, name, 5)
    assert getattr(hash, name) == 5
    for value in (-1, PRIME, 0.5):
        with pytest.raises(ValueError, match=rf"{name} must be an int in .*, got {value}"):
            setattr(hash, name, value)
    assert getattr(hash, name) == 5


@pytest.mark.parametrize("block", [1, 2, 8, 32, 64, 128])
@pytest.mark.parametrize("period", [None, 1, 7])
@pytest.mark.parametrize("tail", [0, 1, 5])
def test_block_hash_is_the_formula(block, period, tail):
    numel = 6 * block + min(tail, block - 1)
    hash, reference = BlockHash(numel, block, 3, 4, period), Block(numel, block, 3, 4, period)
    index, bucket = torch.arange(numel), torch.arange(hash.buckets)
    assert hash.buckets == reference.K
    assert hash.bucket(index).tolist() == [reference.h(i) for i in range(numel)]
    assert hash.load(bucket).tolist() == [reference.load(b) for b in range(reference.K)]
    for step in range(1, 16):
        assert hash.sign(index, step).tolist() == [reference.s(i, step) for i in range(numel)]
        assert hash.fresh(bucket, step).tolist() == [reference.fresh(b, step) for b in range(reference.K)]


@pytest.mark.parametrize("block", [32, 128])
def test_tensors_of_more_than_2_31_elements_hash_correctly(block):
    index = torch.tensor(FAR)
    hash, reference = BlockHash(2**35, block), Block(2**35, block)
    assert hash.bucket(index).tolist() == [reference.h(i) for i in FAR]
    assert hash.sign(index, 1000).tolist() == [reference.s(i, 1000) for i in FAR]
    universal = UniversalHash(2**35, 2**30)
    reference = Universal(2**35, 2**30, universal.a, universal.b, universal.c, universal.d)
    assert universal.bucket(index).tolist() == [reference.h(i) for i in FAR]
    assert universal.sign(index).tolist() == [reference.s(i, 1) for i in FAR]


@pytest.mark.parametrize("name", ["block", "universal"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_index_of_any_shape(name, dtype):
    hash = family(name, 4096, 128)
    index = torch.tensor([[0, 1, 2], [33, 64, 127]])
    assert torch.equal(hash.bucket(index.to(dtype)), hash.bucket(index))
    assert torch.equal(hash.sign(index.to(dtype), 5), hash.sign(index, 5))
    assert hash.load(index.to(dtype)).shape == hash.fresh(index.to(dtype), 3).shape == (2, 3)
    assert hash.bucket(torch.tensor(7)).shape == ()
    with pytest.raises(TypeError, match=r"index must be a tensor of integers, got dtype torch\.float32"):
        hash.bucket(index.float())


@pytest.mark.parametrize("name", ["block", "universal"])
def test_pairwise_collision_rate_is_at_most_one_in_k(name):
    numel, buckets, pairs, seeds = 4096, 128, 400, 250
    generator = torch.Generator().manual_seed(0)
    collisions = 0
    for seed in range(seeds):
        i = torch.randint(numel, (pairs,), generator=generator)
        j = (i + torch.randint(1, numel, (pairs,), generator=generator)) % numel
        hash = family(name, numel, buckets, seed=seed)
        collisions += int((hash.bucket(i) == hash.bucket(j)).sum())
    count = pairs * seeds
    assert collisions / count <= 1 / buckets + 4 * math.sqrt(1 / buckets / count)


@pytest.mark.parametrize("name", ["block", "universal"])
def test_signs_are_balanced(name):
    signs = torch.cat([family(name, 2**14, 512, seed=seed).sign(torch.arange(2**14)) for seed in range(16)])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 4 / math.sqrt(signs.numel())


@pytest.mark.parametrize("name", ["block", "universal"])
@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 31), (5, 37), (0, 32), (100, 1000), (31, 32), (7, 4095)])
def test_signs_of_a_pair_are_independent(name, i, j):
    seeds = 4000
    products = [family(name, 4096, 128, seed=seed).sign(torch.tensor([i, j])).prod().item() for seed in range(seeds)]
    assert abs(sum(products)) < 4 * math.sqrt(seeds)


@pytest.mark.parametrize("name", ["block", "universal"])
def test_signs_of_parameters_seeds_and_epochs_are_independent(name):
    index, size = torch.arange(2**16), 2**16
    hashes = [family(name, size, 2048, seed=seed, key=key) for seed in range(3) for key in range(3)]
    signs = [hash.sign(index) for hash in hashes]
    if name == "block":  # and from one epoch to the next
        signs += [hashes[0].sign(index, step) for step in (401, 801, 1201)]
    for first, second in itertools.combinations(signs, 2):
        assert abs((first * second).mean().item()) < 5 / math.sqrt(size)
    if name == "universal":
        for first, second in itertools.combinations(hashes, 2):
            agreeing = (first.bucket(index) == second.bucket(index)).float().mean().item()
            assert agreeing < 1 / 2048 + 5 * math.sqrt(1 / 2048 / size)


def test_each_bucket_redraws_once_per_period_at_its_own_phase():
    hash = BlockHash(2**15, 8, period=50)
    bucket, index = torch.arange(hash.buckets), torch.arange(2**15)
    fresh = torch.stack([hash.fresh(bucket, step) for step in range(1, 151)])
    assert torch.equal(fresh.sum(0), torch.full((hash.buckets,), 3))
    fraction = fresh.float().mean(1)  # of buckets, at each step
    assert (fraction - 1 / 50).abs().max() < 5 * math.sqrt(1 / 50 / hash.buckets)
    for step in range(2, 60):
        changed = hash.sign(index, step) != hash.sign(index, step - 1)
        renewed = hash.fresh(hash.bucket(index), step)
        assert not changed[~renewed].any()
        assert abs(changed[renewed].float().mean().item() - 0.5) < 2.5 / math.sqrt(int(renewed.sum()))


def test_signs_never_change_without_a_period_and_in_a_bucket_of_one():
    index = torch.arange(33)
    constant = BlockHash(33, 32, period=None)
    assert all(torch.equal(constant.sign(index, step), constant.sign(index)) for step in range(1, 300))
    assert not any(constant.fresh(torch.tensor([0, 1]), step).any() for step in range(1, 300))
    rolling = BlockHash(33, 32, period=3)  # bucket 1 holds element 32 alone
    assert len({rolling.sign(torch.tensor(32), step).item() for step in range(1, 300)}) == 1
    assert not any(rolling.fresh(torch.tensor(1), step) for step in range(1, 300))
    assert not UniversalHash(64, 2).fresh(torch.tensor([0, 1]), 100).any()


def test_mix32_is_the_reference_and_avalanches(device):
    x = torch.randint(2**32, (20000,), generator=torch.Generator().manual_seed(0))
    mixed = mix32(x.to(device)).cpu()
    assert mixed.tolist() == [mix(v) for v in x.tolist()]
    for bit in range(32):
        difference = mix32(x ^ (1 << bit)) ^ mixed
        ones = torch.stack([(difference >> out) & 1 for out in range(32)]).float().mean(1)
        assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(x))


def test_sign_words_of_adjacent_indices_epochs_and_keys_differ():
    index = torch.arange(1000)
    words = [mixed_word(index, tick, hash_key(0, key, "sign")) for tick in range(3) for key in range(3)]
    assert len(torch.cat(words).unique()) > 8990  # of 9000


def test_wrong_constructor_arguments_are_named():
    with pytest.raises(ValueError, match="block must be a power of two, got 12"):
        BlockHash(100, 12)
    with pytest.raises(ValueError, match="period must be None or at least 1, got 0"):
        BlockHash(100, 4, period=0)
    with pytest.raises(ValueError, match=r"buckets must be in \[1, 2\*\*31 - 1\], got 0"):
        UniversalHash(100, 0)
