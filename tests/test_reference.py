"""The optimizer follows the formulas: every path is compared with the float64 reference."""

import numpy as np
import pytest
import torch
from helpers import moments
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DECODES, Block, Reference, Universal

from collins import BlockHash, Collins

SPACING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def pair(p, options):
    """An optimizer for `p`, and its reference."""
    opt = Collins([p], lr=1e-2, **{"table_dtype": torch.float32, **options})
    group, hash = opt.param_groups[0], opt.hash_of(p)
    twin_hash = None
    if isinstance(hash, BlockHash):
        twin_hash = Block(p.numel(), hash.block, opt.seed, 0, group["rehash_period"])
    elif hash is not None:
        twin_hash = Universal(p.numel(), hash.buckets, hash.a, hash.b, hash.c, hash.d)
    v_ratio = group["v_compress_ratio"]
    v_hash = None if v_ratio is None or hash is None else Block(p.numel(), int(v_ratio))
    names = ("lr", "betas", "eps", "weight_decay", "residual_weight", "residual_square", "decode")
    return opt, Reference(flat(p), twin_hash, v_hash=v_hash, **{name: group[name] for name in names})


def flat(tensor):
    return tensor.detach().cpu().double().numpy().reshape(-1).copy()


def follow(opt, p, twin, steps, seed=0):
    """Steps both; the reference starts each step from the stored values, so that rounding errors do not accumulate."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1 + 0.02
        p.grad = torch.empty_like(p).copy_(g)
        twin.p = flat(p)
        if opt.state[p]:
            twin.M, twin.V = map(flat, moments(opt, p))
        opt.step()
        twin.step(flat(p.grad))
        for stored, expected in zip((p, *moments(opt, p)), (twin.p, twin.M, twin.V), strict=True):
            # One ulp if values are rounded to 16 bits, a few ulp for sums in float32.
            allowed = SPACING[stored.dtype] * np.abs(expected) + max(SPACING[p.dtype], 1e-13) * 1e-3
            if p.dtype != torch.float64:
                allowed += 2e-6 * np.abs(expected).max(initial=0)
            assert (np.abs(flat(stored) - expected) <= allowed).all()


CASES = [
    pytest.param(hash, decode, ratio, id=f"{hash}-{decode}-{ratio}")
    for hash in ("block", "universal")
    for decode in DECODES
    for ratio in (1, 2, 8, 32, 128)
]


# Compiling takes seconds a case, so compiled steps are shown on the cases that differ in code.
COMPILED = [("block", "least_squares", ratio) for ratio in (1, 8, 32, 128)]
COMPILED += [("block", "residual", 32), ("block", "sketch", 32)]
COMPILED += [("universal", "least_squares", 32), ("universal", "sketch", 32)]


@pytest.mark.parametrize(
    ("hash", "decode", "ratio", "compile"),
    [pytest.param(*case.values, False, id=f"{case.id}-eager") for case in CASES]
    + [pytest.param(*case, True, id="-".join(map(str, case)) + "-compiled") for case in COMPILED],
)
def test_many_steps_in_float64_equal_the_formulas(hash, decode, ratio, compile, device):
    p = torch.nn.Parameter(torch.randn(33, 37, dtype=torch.float64, device=device))
    options = {"compress_ratio": ratio, "min_K": 8, "hash": hash, "decode": decode, "rehash_period": 7}
    opt, twin = pair(p, options | {"table_dtype": torch.float64, "compile": compile})
    assert (opt.hash_of(p) is None) == (ratio == 1)
    for step in range(30):
        g = torch.randn(33, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        p.grad = g.to(device)
        opt.step()
        twin.step(g.numpy())
    np.testing.assert_allclose(flat(p), twin.p, rtol=1e-12, atol=1e-13)
    for stored, expected in zip(moments(opt, p), (twin.M, twin.V), strict=True):
        np.testing.assert_allclose(flat(stored), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hash", "decode", "ratio"), CASES)
def test_every_dtype_follows_the_formulas_within_its_rounding(hash, decode, ratio, dtype, table_dtype, device):
    p = torch.nn.Parameter(torch.randn(33, 37, device=device).to(dtype))
    options = {"compress_ratio": ratio, "min_K": 8, "hash": hash, "decode": decode, "rehash_period": 5}
    opt, twin = pair(p, options | {"table_dtype": table_dtype})
    follow(opt, p, twin, 8)


SHAPES = [(), (0,), (1,), (7,), (1025,), (64, 64), (3, 5, 7, 11), (2, 0, 3), (1, 4096)]


@pytest.mark.parametrize("hash", ["block", "universal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, hash, device):
    p = torch.nn.Parameter(torch.randn(shape, device=device))
    opt, twin = pair(p, {"min_K": 8, "hash": hash, "rehash_period": 3})
    follow(opt, p, twin, 7)


def strided(kind):
    if kind == "transposed":
        return torch.randn(40, 50).t()
    if kind == "every second":
        return torch.randn(4000)[::2]
    return torch.randn(4, 6, 10, 11).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("ratio", [1, 32])
@pytest.mark.parametrize("hash", ["block", "universal"])
@pytest.mark.parametrize(
    ("kind", "compile"),
    [("transposed", False), ("transposed", True), ("every second", False), ("channels last", False)],
)
def test_strides_do_not_matter(kind, compile, hash, ratio):
    """Elements are numbered in row-major order whatever the strides of the parameter or of its gradient."""
    values = strided(kind)
    assert not values.is_contiguous()
    options = {"lr": 1e-2, "min_K": 8, "hash": hash, "compress_ratio": ratio, "compile": compile}
    p, plain = torch.nn.Parameter(values), torch.nn.Parameter(values.contiguous())
    opts = [Collins([q], **options) for q in (p, plain)]
    strides = p.stride()
    for step in range(5):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        p.grad = torch.empty_like(p).copy_(g) if step % 2 else g
        plain.grad = g
        for opt in opts:
            opt.step()
    assert p.stride() == strides
    torch.testing.assert_close(p.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


@given(
    numel=st.integers(1, 3000),
    ratio=st.sampled_from([1, 1.5, 2, 3, 8, 32, 33, 128]),
    min_K=st.sampled_from([1, 2, 16, 300]),
    hash=st.sampled_from(["block", "universal"]),
    decode=st.sampled_from(list(DECODES)),
    period=st.sampled_from([None, 1, 2, 100]),
    rho=st.sampled_from([None, 0.0, 0.5]),
    seed=st.integers(-(2**70), 2**70),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_size_and_setting(numel, ratio, min_K, hash, decode, period, rho, seed):
    p = torch.nn.Parameter(torch.randn(numel, dtype=torch.float64))
    options = {"compress_ratio": ratio, "min_K": min_K, "hash": hash, "decode": decode, "rehash_period": period}
    opt, twin = pair(p, options | {"residual_weight": rho, "seed": seed, "table_dtype": torch.float64})
    follow(opt, p, twin, 3)


def test_an_eager_step_in_pieces_equals_a_whole_one():
    """A tensor of many pieces and an odd remainder, compared with a compiled step without pieces."""
    for hash in ("block", "universal"):
        values = torch.randn(3 * 2**18 + 45)
        p, q = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
        opts = Collins([p], hash=hash, compile=False), Collins([q], hash=hash, compile=True)
        for step in range(3):
            g = torch.randn(values.shape, generator=torch.Generator().manual_seed(step))
            p.grad = q.grad = g
            for opt in opts:
                opt.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def published_step(p, g, M, V, hash, t, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, wd=0.01):
    """Collins v0.1 with sum tables: sketch g and g^2 with scatter_add, EMA, gather, Adam."""
    index = torch.arange(p.numel())
    h, s = hash.bucket(index), hash.sign(index).to(p.dtype)
    M.mul_(betas[0]).add_((1 - betas[0]) * torch.zeros_like(M).scatter_add(0, h, s * g))
    V.mul_(betas[1]).add_((1 - betas[1]) * torch.zeros_like(V).scatter_add(0, h, g * g))
    m_hat, v_hat = s * M[h] / (1 - betas[0] ** t), V[h] / (1 - betas[1] ** t)
    p.mul_(1 - lr * wd).sub_(lr * m_hat / (v_hat.sqrt() + eps))


@pytest.mark.parametrize("coefficients", [None, (12345, 6789, 1011, 1213)], ids=["derived", "set by hand"])
def test_universal_sketch_is_the_published_algorithm(coefficients):
    p = torch.nn.Parameter(torch.randn(5000, dtype=torch.float64))
    opt = Collins([p], lr=1e-2, hash="universal", decode="sketch", min_K=64, table_dtype=torch.float64)
    hash, q = opt.hash_of(p), p.detach().clone()
    if coefficients:
        hash.a, hash.b, hash.c, hash.d = coefficients
    M, V = torch.zeros(hash.buckets, dtype=torch.float64), torch.zeros(hash.buckets, dtype=torch.float64)
    for t in range(1, 51):
        p.grad = torch.randn(5000, dtype=torch.float64)
        published_step(q, p.grad, M, V, hash, t)
        opt.step()
    torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(opt.state[p]["m_table"] * 5000 / hash.buckets, M, rtol=1e-10, atol=1e-13)


def test_one_element_to_a_bucket_is_adamw_exactly():
    """The tail bucket of one element has no residual, keeps its sign, and so follows AdamW."""
    p, q = torch.nn.Parameter(torch.randn(65)), torch.nn.Parameter(torch.empty(1))
    q.data.copy_(p.data[64:])
    opt, adamw = Collins([p], min_K=2, rehash_period=3), torch.optim.AdamW([q])
    for _ in range(50):
        p.grad = torch.randn(65)
        q.grad = p.grad[64:]
        opt.step()
        adamw.step()
    torch.testing.assert_close(p.detach()[64:], q.detach(), rtol=1e-6, atol=1e-7)
