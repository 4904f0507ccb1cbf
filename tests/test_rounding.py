"""Stochastic rounding: unbiased, to the nearest values above and below, reproducible, and without generator state."""

import math

import pytest
import torch

from collins import Collins
from collins.hashing import hash_key
from collins.rounding import FIRST, PARAM, SECOND, random_bits, stochastic_round

KEY = hash_key(0, 0, "round")
ALL_BITS = torch.arange(2**16, dtype=torch.int32)
VALUES = [1.0, 1.001, -1.003, 3.14159, -2.7e-3, 6.1e-5, 5.9e-5, 1e-6, 3e-8, 1e-9, -1e-9, 65503.0, -65519.0, 0.0, 300.7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_expectation_over_all_bits_is_the_value(value, dtype):
    x = torch.full((2**16,), value)
    rounded = stochastic_round(x, dtype, ALL_BITS).double()
    near = x[:1].to(dtype)
    neighbours = {near.item(), *(torch.nextafter(near, torch.tensor([end], dtype=dtype)).item() for end in (1e9, -1e9))}
    assert set(rounded.unique().tolist()) <= neighbours
    ulp = max(neighbours) - min(neighbours)
    if dtype == torch.float16 and abs(value) > 65504:
        assert rounded.abs().max() == 65504  # nearest rounding keeps it finite, so this does
    else:
        assert abs(rounded.mean().item() - x[0].item()) <= ulp * 2**-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_representable_and_special_values_are_kept(dtype):
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        rounded = stochastic_round(exact, dtype, torch.full(exact.shape, bits, dtype=torch.int32))
        torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0, equal_nan=True)
    huge = torch.tensor([1e30, -1e30])
    assert torch.equal(stochastic_round(huge, torch.float16, torch.zeros(2, dtype=torch.int32)), huge.half())
    nans = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(nans, dtype, torch.full((2,), 0xFFFF, dtype=torch.int32)).isnan().all()


def test_bits_do_not_depend_on_the_start_of_a_piece():
    all_bits = random_bits(0, 1000, 7, KEY, PARAM, torch.device("cpu"))
    for start, count in ((0, 1), (1, 31), (5, 700), (32, 64), (999, 1)):
        assert torch.equal(
            random_bits(start, count, 7, KEY, PARAM, torch.device("cpu")), all_bits[start : start + count]
        )


def test_bits_are_uniform_and_uncorrelated():
    size = 2**18
    draws = [
        random_bits(0, size, step, hash_key(seed, key, "round"), stream, torch.device("cpu")).double() / 2**16
        for step, seed, key, stream in [(1, 0, 0, PARAM), (2, 0, 0, PARAM), (1, 1, 0, PARAM), (1, 0, 1, PARAM),
                                        (1, 0, 0, FIRST), (1, 0, 0, SECOND)]
    ]  # fmt: skip
    noise = 5 / math.sqrt(size)
    for i, draw in enumerate(draws):
        centred = (draw - draw.mean()) / draw.std()
        assert abs(draw.mean().item() - 0.5) < noise
        assert abs(draw.std().item() - 12**-0.5) < noise
        for other in draws[:i]:
            assert abs((centred * other).mean().item() / 12**-0.5) < noise
        lanes = centred.view(-1, 32)  # the 32 neighbours that share a word
        correlation = (lanes.T @ lanes / len(lanes)) - torch.eye(32, dtype=torch.float64)
        assert correlation.abs().max() < 6 / math.sqrt(len(lanes))


def drift(dtype, stochastic_rounding, **options):
    """Mean movement of 4096 weights at 1.0, in units of the last place, after 10,000 steps of 1/1000 of one."""
    ulp = torch.finfo(dtype).eps
    p = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    # With g = 1 throughout, m_hat = v_hat = 1: each step is exactly -lr.
    opt = Collins([p], lr=ulp / 1000, weight_decay=0, stochastic_rounding=stochastic_rounding, **options)
    p.grad = torch.ones_like(p)
    for _ in range(10_000):
        opt.step()
    return (1 - p.detach().double().mean().item()) / ulp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ten_thousand_tiny_updates_change_the_mean(dtype):
    drift_in_ulps = drift(dtype, None, compress_ratio=1)
    # Below 1.0 the spacing is ulp / 2: each weight's walk has a variance of at most 10 ulp * spacing. The update itself
    # is rounded in float32, by at most 2^-25 of the 10 ulp / 10,000 that it should be.
    assert abs(drift_in_ulps - 10) < 5 * math.sqrt(10 * 0.5 / 4096) + 10_000 * 2**-25 / torch.finfo(dtype).eps


def test_round_to_nearest_changes_nothing():
    with pytest.warns(UserWarning, match="lr is too small to move most 16-bit weights"):
        assert drift(torch.bfloat16, False, compress_ratio=1) == 0


def test_a_bf16_table_follows_its_average_only_with_stochastic_rounding():
    """V under g = 1 is 1 - beta2^t. Nearest rounding sticks where an increment is under half a unit."""
    means = {}
    for rounding in (None, False):
        p = torch.nn.Parameter(torch.zeros(2**14))
        opt = Collins([p], lr=0, role="matrix", table_dtype=torch.bfloat16, stochastic_rounding=rounding)
        for _ in range(700):
            p.grad = torch.ones_like(p)
            opt.step()
        means[rounding] = opt.state[p]["v_table"].double().mean().item()
        assert opt.state[p]["v_table"].dtype == opt.state[p]["m_table"].dtype == torch.bfloat16
    exact = 1 - 0.999**700
    assert abs(means[None] - exact) < 0.01
    assert abs(means[False] - exact) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_repeatable_and_does_not_use_the_global_generator(dtype):
    def train_with(**options):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5000).to(dtype))
        opt = Collins([p], table_dtype=torch.bfloat16, **options)
        for step in range(5):
            p.grad = torch.sin(torch.arange(5000.0) + step).to(dtype)
            opt.step()
        return p.detach()

    before = torch.get_rng_state()
    expected = train_with()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(train_with(), expected)
    assert not torch.equal(train_with(seed=1), expected)
    assert not torch.equal(train_with(stochastic_rounding=False), expected)


def test_half_the_ratio_in_bf16_costs_the_same_bytes():
    p = torch.nn.Parameter(torch.zeros(2**20))
    fine = Collins([p], compress_ratio=16, table_dtype=torch.bfloat16).memory_report()
    coarse = Collins([p], compress_ratio=32).memory_report()
    assert fine.state_bytes == coarse.state_bytes
