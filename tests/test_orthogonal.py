"""decode="orthogonal": whole matrices, stepped by the Newton-Schulz iteration of a sketched first moment."""

import io
import math

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    Allocations,
    bits,
    give_gradients,
    moments,
    parameters,
    same,
    same_snapshots,
    snapshot,
    weights_and_moments,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import Block, OrthogonalReference, quantised
from test_sharding import rank_of
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from collins import Collins, convert
from collins.compile import matrices as matrix_steps
from collins.offload.shapes import llama
from collins.orthogonal import matrices_of, newton_schulz, step_flops, tokens_for_share

OPTIONS = {"decode": "orthogonal", "lr": 1e-2, "betas": (0.95, 0.999), "min_K": 16, "rehash_period": 3}
# Matrices: wide, tall and two of one shape; a stack; a convolution; odd sizes; and vectors.
SHAPES = [(32, 64), (64, 32), (32, 64), (3, 16, 32), (8, 4, 3, 3), (33, 37), (12,)]


def train(steps=4, dtype=torch.float32, shapes=SHAPES, scale=1.0, **options):
    """Weights and moments after some steps, and the optimizer."""
    ps = parameters(dtype, shapes)
    opt = Collins(ps, **{**OPTIONS, **options})
    take_steps(ps, opt, range(steps), scale)
    return weights_and_moments(ps, opt), opt


def take_steps(ps, opt, steps, scale=1.0):
    for step in steps:
        give_gradients(step, ps)
        grads = [p.grad * scale for p in ps]
        opt.zero_grad()
        if opt.in_backward:
            sum((p * g).sum() for p, g in zip(ps, grads, strict=True)).backward()
        else:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g
        opt.step()


def limit_batches(monkeypatch, elements):
    """Limits the elements of a batch of matrices."""
    monkeypatch.setattr(matrix_steps, "BATCH_CPU" if DEVICE == "cpu" else "BATCH", elements)


def record_products(monkeypatch):
    """A list to which each call of the Newton-Schulz iteration appends the shape of its matrices."""
    shapes, original = [], matrix_steps.orthogonalised
    monkeypatch.setattr(
        matrix_steps, "orthogonalised", lambda X, own: (shapes.append(tuple(X.shape)), original(X, own))[1]
    )
    return shapes


# The formula.

CUTS = {
    "matrix": ((24, 40), 1, lambda x: [x]),
    "tall": ((40, 24), 1, lambda x: [x]),
    "odd": ((17, 23), 1, lambda x: [x]),
    "stack": ((3, 16, 24), 1, list),
    "convolution": ((8, 4, 3, 3), 1, lambda x: [x.reshape(8, 36)]),
    "three equal parts": ((48, 24), 3, lambda x: np.split(x, 3)),
    "unequal parts": ((40, 24), (24, 8, 8), lambda x: np.split(x, [24, 32])),
    "unequal parts in a stack": ((2, 40, 24), (32, 8), lambda x: [part for each in x for part in np.split(each, [32])]),
}
TABLES = {
    "load 1": {"compress_ratio": 2},
    "load 4": {"compress_ratio": 4, "table_dtype": torch.float64},
    "int4": {"compress_ratio": 2, "table_dtype": "int4"},
    "by bytes": {"compress_ratio": 32},
}


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("cut", CUTS)
def test_steps_equal_the_float64_reference(cut, tables):
    shape, row_parts, cut = CUTS[cut]
    (p,) = parameters(torch.float64, [shape], "cpu")
    opt = Collins([p], **{**OPTIONS, **TABLES[tables]}, weight_decay=0.1, role="matrix", row_parts=row_parts)
    hash = opt.hash_of(p)
    reference_hash = None if hash is None else Block(p.numel(), hash.block, 0, 0, 3)
    assert hash is None if tables == "load 1" else hash.block == {"load 4": 4}.get(tables, 2)
    rounded_M = {"int4": quantised(4), "by bytes": quantised(4, 128)}.get(tables)
    reference = OrthogonalReference(
        p.detach().numpy(), reference_hash, cut, lr=1e-2, betas=(0.95, 0.999), weight_decay=0.1, kept=rounded_M
    )
    for step in range(5):
        give_gradients(step, [p])
        opt.step()
        reference.step(p.grad.numpy())
        # Scales are float32: values near the middle between two integers may be rounded either way.
        torch.testing.assert_close(
            p.detach().view(-1), torch.from_numpy(reference.p), rtol=0, atol=1e-12 if rounded_M is None else 1e-5
        )
        assert set(opt.state[p]) <= {"step", "layout", "exp_avg", "m_table", "m_table_scale"}


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_at_load_1_it_equals_torchs_muon_without_nesterov(shape):
    ps, qs = parameters(torch.float32, [shape]), parameters(torch.float32, [shape])
    opt = Collins(ps, **OPTIONS, compress_ratio=2, role="matrix", weight_decay=0.1)
    muon = torch.optim.Muon(
        qs, lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    start = ps[0].detach().clone()
    for step in range(5):
        give_gradients(step, ps, qs)
        opt.step()
        muon.step()
        qs[0].grad = None
    moved, difference = (ps[0] - start).float().norm(), (ps[0] - qs[0]).float().norm()
    assert difference < 0.02 * moved  # products in bfloat16, in another order, round differently


@pytest.mark.parametrize("power", [-20, 10, 40])
def test_the_scale_of_gradients_does_not_matter(power):
    plain, _ = train(shapes=SHAPES[:5])
    scaled, _ = train(shapes=SHAPES[:5], scale=2.0**power)
    assert same(plain[::3], scaled[::3])  # weights; of moments, integers and scales follow each


@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("shape", [(1, 200), (8, 24), (128, 512), (512, 128), (96, 192)])
def test_products_in_bfloat16_stay_bounded_for_ill_conditioned_matrices(shape, power):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        U, _, V = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
        values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
        X = ((U * values) @ V)[None]
        rounded, _ = newton_schulz(X.bfloat16())
        exact, _ = newton_schulz(X.clone())
        assert torch.linalg.matrix_norm(rounded.double(), 2).item() < 1.25
        assert torch.nn.functional.cosine_similarity(rounded.double().flatten(), exact.flatten(), dim=0) > 0.95


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.floats(0.05, 1),
    st.integers(0, 2**31),
    st.sampled_from([torch.bfloat16, torch.float64]),
)
def test_singular_values_end_near_1_and_singular_vectors_stay(shape, smallest, seed, dtype):
    stacked, rows, cols = shape
    generator = torch.Generator().manual_seed(seed)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1, smallest, min(rows, cols), dtype=torch.float64).expand(stacked, -1)
    Q, norms = newton_schulz(((U * values[:, None]) @ V).to(dtype))
    torch.testing.assert_close(norms.double(), values.norm(dim=1), rtol=1e-2, atol=0)
    rotated = U.mT @ Q.double() @ V.mT  # diagonal where the vectors are the same
    singular_values = rotated.diagonal(dim1=1, dim2=2)
    assert singular_values.min() > 0.65
    assert singular_values.max() < 1.25
    assert (rotated - torch.diag_embed(singular_values)).abs().max() < (1e-12 if dtype == torch.float64 else 0.06)


def test_zeros_stay_zeros():
    ps = parameters(torch.float32, [(32, 64)])
    before = ps[0].detach().clone()
    opt = Collins(ps, **OPTIONS, weight_decay=0)
    ps[0].grad = torch.zeros_like(ps[0])
    opt.step()
    assert torch.equal(ps[0], before)


def test_row_parts_are_stepped_as_separate_matrices():
    whole, parts = parameters(torch.float32, [(48, 32)]), parameters(torch.float32, [(16, 32)] * 3)
    with torch.no_grad():
        for part, rows in zip(parts, whole[0].split(16), strict=True):
            part.copy_(rows)
    fused_opt, parts_opt = (
        Collins(whole, **OPTIONS, compress_ratio=2, row_parts=3),
        Collins(parts, **OPTIONS, compress_ratio=2),
    )
    for step in range(3):
        give_gradients(step, whole)
        for part, g in zip(parts, whole[0].grad.split(16), strict=True):
            part.grad = g
        fused_opt.step()
        parts_opt.step()
    torch.testing.assert_close(whole[0].detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=2e-5)


def test_parameters_that_are_not_matrices_keep_their_rule():
    kinds = [{"role": "matrix"}, {"role": "tokens"}, {"role": "exact"}]
    results = []
    for decode in ("orthogonal", "least_squares"):
        ps = parameters(torch.float32, [(32, 64)] * 3 + [(12,)])
        groups = [{"params": [p], **kind} for p, kind in zip(ps, [*kinds, {}], strict=True)]
        opt = Collins(groups, **{**OPTIONS, "decode": decode})
        take_steps(ps, opt, range(3))
        results.append([(p.detach(), *moments(opt, p)) for p in ps])
    assert [same(a, b) for a, b in zip(*results, strict=True)] == [False, True, True, True]


# Every way to step.

WAYS = {
    "batches of one": {},
    "host": {"memory": {"tier": "host", "transfer_size": 900, "staging_slots": 2}},
    "in backward": {"in_backward": True},
    "host in backward": {"memory": {"tier": "host", "transfer_size": 900, "staging_slots": 2}, "in_backward": True},
    "capturable": {"capturable": True},
}


def assert_close(actual, expected, atol):
    """Weights and moments agree; a few integers may be rounded to the other of the two nearest values."""
    for a, b in zip(actual, expected, strict=True):
        if a.dtype in (torch.uint8, torch.int8):
            assert (a != b).float().mean() < 0.02
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_step_gives_the_same_result(way, dtype, monkeypatch):
    eager, _ = train(dtype=dtype, compile=False)
    if way == "batches of one":
        limit_batches(monkeypatch, 1)
    other, opt = train(dtype=dtype, compile=False, **WAYS[way])
    if DEVICE == "cpu" and way != "batches of one":
        assert same(eager, other)
    else:  # batched products round differently from single ones
        assert_close(eager, other, 2e-4 if dtype == torch.float32 else 0.05)
    if "memory" in WAYS[way]:
        assert sum(plan.host_bytes for plan in opt.placement) == opt.memory_report().state_bytes - 4 * len(SHAPES)


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {}), (torch.bfloat16, {"nonfinite": "skip", "row_parts": 2})], ids=str
)
def test_compiled_steps_equal_eager_ones(dtype, options):
    shapes = [(32, 64), (32, 64), (64, 32), (2, 32, 32), (12,)]
    eager, _ = train(dtype=dtype, shapes=shapes, compile=False, **options)
    compiled, opt = train(dtype=dtype, shapes=shapes, compile=True, **options)
    assert opt._stepper.engine.graphs >= 3  # X, the new weights, and the vector's
    # Random bits are the same: an element differs by a step of bf16 where its sum was at the edge of one.
    assert_close(eager, compiled, 2e-4 if dtype == torch.float32 else 2.0**-6)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [None, False])
def test_a_captured_step_equals_an_ordinary_one(compile):
    plain, _ = train(9, compile=compile, capturable=True, shapes=SHAPES[:4])
    ps = parameters(torch.float32, SHAPES[:4])
    opt = Collins(ps, **OPTIONS, compile=compile, capturable=True)
    static = [torch.empty_like(p) for p in ps]

    def set_static_gradients(step):
        give_gradients(step, ps)
        for p, g in zip(ps, static, strict=True):
            g.copy_(p.grad)
            p.grad = g

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in range(3):
            set_static_gradients(step)
            opt.step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        set_static_gradients(3)
        with torch.cuda.graph(graph, stream=stream):
            opt.step()
        for step in range(3, 9):
            set_static_gradients(step)
            graph.replay()
        stream.synchronize()
    assert_close(plain, weights_and_moments(ps, opt), 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_parameters_and_gradients_do_not_matter(dtype):
    plain, _ = train(dtype=dtype, shapes=SHAPES[:5])
    ps = parameters(dtype, SHAPES[:5])
    transposed = [torch.nn.Parameter(p.detach().mT.contiguous().mT) for p in ps]
    opt = Collins(transposed, **OPTIONS)
    take_steps(transposed, opt, range(4))
    assert same(plain, weights_and_moments(transposed, opt))


def test_a_large_stack_is_stepped_in_batches(monkeypatch):
    plain, _ = train(shapes=[(7, 16, 32)], nonfinite="skip")
    limit_batches(monkeypatch, 2 * 16 * 32)
    shapes = record_products(monkeypatch)
    in_batches, _ = train(shapes=[(7, 16, 32)], nonfinite="skip")
    assert [count for count, _, _ in shapes] == [2, 2, 2, 1] * 4
    assert_close(plain, in_batches, 0 if DEVICE == "cpu" else 2e-4)


def test_matrices_of_one_shape_share_a_product(monkeypatch):
    shapes = record_products(monkeypatch)
    train(1)
    assert sorted(shapes) == [(1, 8, 36), (1, 33, 37), (1, 64, 32), (2, 32, 64), (3, 16, 32)]


def test_temporaries_do_not_grow_with_the_number_of_matrices(monkeypatch):
    monkeypatch.setattr(matrix_steps, "BATCH_CPU", 1 << 14)
    peaks = []
    for count in (2, 8):
        ps = parameters(torch.float32, [(128, 128)] * count, "cpu")
        opt = Collins(ps, **OPTIONS, compile=False)
        for step in range(2):
            give_gradients(step, ps)
            with Allocations() as allocations:
                opt.step()
        peaks.append(allocations.peak)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("options", [{"memory": None}, {"memory": "host"}, {"in_backward": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_is_bitwise(options, dtype):
    uninterrupted, _ = train(8, dtype=dtype, **options)
    ps = parameters(dtype, SHAPES)
    opt = Collins(ps, **OPTIONS, **options)
    take_steps(ps, opt, range(4))
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    ps = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    resumed = Collins(ps, **OPTIONS, **options)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    take_steps(ps, resumed, range(4, 8))
    assert same(uninterrupted, weights_and_moments(ps, resumed))


def test_autocast_changes_nothing():
    plain, _ = train()
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        cast, _ = train()
        exact, _ = train(dtype=torch.float64)
    assert same(plain, cast)
    assert same(exact, train(dtype=torch.float64)[0])


def test_maximizing_equals_stepping_with_the_negated_gradient():
    assert same(train(maximize=True)[0][0], train(scale=-1.0)[0][0])


def test_clipping_equals_clipped_gradients():
    ps, qs = (parameters(torch.float32, SHAPES) for _ in range(2))
    opt, other = Collins(ps, **OPTIONS, max_grad_norm=1.0), Collins(qs, **OPTIONS)
    for step in range(3):
        give_gradients(step, ps, qs)
        torch.nn.utils.clip_grad_norm_(qs, 1.0)
        opt.step()
        other.step()
    assert_close([p.detach() for p in ps], [q.detach() for q in qs], 2e-4)


# Gradients that are not finite.


def step_with_nonfinite(value, **options):
    """A stack of four matrices and a matrix, after a step with one nonfinite element in the stack."""
    ps = parameters(torch.float32, [(4, 16, 32), (16, 32)])
    opt = Collins(ps, **OPTIONS, **options)
    take_steps(ps, opt, range(2))
    before = snapshot(ps, opt)
    give_gradients(2, ps)
    ps[0].grad[1, 3, 5] = value
    opt.step()
    return ps, opt, before


@pytest.mark.parametrize(("value", "compile"), [(math.nan, False), (math.inf, False), (1e30, False), (math.nan, True)])
def test_skip_skips_one_matrix_and_steps_all_others(value, compile):
    ps, opt, before = step_with_nonfinite(value, nonfinite="skip", compile=compile)
    rows = {name: t.view(4, -1) for name, t in before[0][1].items() if name in ("m_table", "m_table_scale")}
    for number in range(4):
        kept = torch.equal(ps[0][number], before[0][0][number])
        same_table = all(torch.equal(opt.state[ps[0]][name].view(4, -1)[number], t[number]) for name, t in rows.items())
        assert (kept, same_table) == (number == 1, number == 1)
    assert not torch.equal(ps[1], before[1][0])
    assert torch.isfinite(ps[0]).all()


def test_skip_skips_a_whole_stack_whose_matrices_share_a_scale():
    ps = parameters(torch.float32, [(4, 5, 7)])
    opt = Collins(ps, **OPTIONS, nonfinite="skip")
    take_steps(ps, opt, range(2))
    before = snapshot(ps, opt)
    give_gradients(2, ps)
    ps[0].grad[1, 3, 5] = math.nan
    opt.step()
    state = {**opt.state_dict()["state"][0], "step": before[0][1]["step"]}
    assert same_snapshots((ps[0], state), before[0])


@pytest.mark.parametrize("in_backward", [False, True])
def test_skipped_buckets_are_counted(in_backward):
    ps = parameters(torch.float32, [(4, 16, 32), (4, 5, 7)])
    opt = Collins(ps, **OPTIONS, nonfinite="skip", in_backward=in_backward)
    skips = opt._stepper.statistics.skips
    take_steps(ps, opt, range(2))
    assert (int(skips.buckets), int(skips.steps)) == (0, 0)
    for matrices, buckets, steps in (([1, 2], 2 * 16 * 32 // 2 + 4 * 5 * 7 // 2, 0), ([0, 1, 2, 3], 1024 + 70, 1)):
        before = int(skips.buckets)
        factor = torch.ones(4, 1, 1, device=DEVICE)
        factor[matrices] = math.nan
        opt.zero_grad()
        sum((p * factor).sum() for p in ps).backward()
        opt.step()
        assert (int(skips.buckets) - before, int(skips.steps)) == (buckets, steps)


def test_propagate_spreads_within_a_matrix():
    ps, _, _ = step_with_nonfinite(math.nan, nonfinite="propagate")
    assert [bool(torch.isfinite(ps[0][number]).all()) for number in range(4)] == [True, False, True, True]
    assert torch.isfinite(ps[1]).all()
    assert torch.isnan(ps[0][1]).all()


def test_error_changes_nothing():
    ps = parameters(torch.float32, [(4, 16, 32), (16, 32)])
    opt = Collins(ps, **OPTIONS, nonfinite="error")
    take_steps(ps, opt, range(2))
    before = snapshot(ps, opt)
    give_gradients(2, ps)
    ps[1].grad[3, 5] = math.inf
    with pytest.raises(FloatingPointError, match="parameter 1"):
        opt.step()
    assert all(map(same_snapshots, before, snapshot(ps, opt)))


# Steps that fail.


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_stack_in_several_batches_is_stepped_completely_or_not_at_all(fails_at, monkeypatch):
    limit_batches(monkeypatch, 16 * 32)
    shapes = [(3, 16, 32), (16, 32)]
    expected, _ = train(2, shapes=shapes)
    ps = parameters(torch.float32, shapes)
    opt = Collins(ps, **OPTIONS)
    take_steps(ps, opt, range(1))
    before, calls, original = snapshot(ps, opt), [], matrix_steps.orthogonalised

    def failing_product(X, own):
        calls.append(1)
        if len(calls) == fails_at:
            raise MemoryError
        return original(X, own)

    monkeypatch.setattr(matrix_steps, "orthogonalised", failing_product)
    with pytest.raises(MemoryError):
        take_steps(ps, opt, range(1, 2))
    after = snapshot(ps, opt)
    monkeypatch.setattr(matrix_steps, "orthogonalised", original)
    stack, matrix = map(same_snapshots, before, after)
    assert (stack, matrix) == (fails_at == 1, True)
    if stack:
        take_steps(ps, opt, range(1, 2))
    else:
        ps[0].grad = None
        opt.step()
    assert same(expected, weights_and_moments(ps, opt))


# Bytes.


def test_the_state_of_a_7b_llama_is_at_most_0_30_bytes_per_parameter():
    named = [
        (name, torch.nn.Parameter(torch.empty(shape, device="meta")))
        for name, shape in llama(32, 4096, 11008, 4096, 32000).parameters()
    ]
    total = sum(p.numel() for _, p in named)
    for ratio, most, load in ((32, 0.30, 2), (64, 0.16, 4)):
        report = Collins(named, decode="orthogonal", compress_ratio=ratio).memory_report()
        assert report.state_bytes <= most * total
        kinds = {(row.role, row.load, row.v_format) for row in report.rows if row.role == "matrix"}
        assert kinds == {("matrix", load, "none")}
        assert "none" in str(report)


def test_the_report_equals_the_state():
    _, opt = train(1)
    state_bytes = sum(t.nbytes for state in opt.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    assert state_bytes == opt.memory_report().state_bytes


def test_the_cost_of_a_step_in_floating_point_operations():
    assert step_flops([(4096, 4096)]) == 5 * 6 * 4096**3
    assert step_flops([(11008, 4096)]) == step_flops([(4096, 11008)]) == 12 * 4096**2 * 11008 + 22 * 4096**3
    assert step_flops([(8, 64, 32)]) == 8 * step_flops([(64, 32)])
    assert tokens_for_share([(4096, 4096)], 4096**2) == pytest.approx(4096 * 5 / 0.03)
    assert matrices_of((8, 4, 3, 3))[:3] == (1, 8, 36)


# Converted state.


def stepped_adamw(shapes, steps=3):
    ps = parameters(torch.float32, shapes)
    adamw = torch.optim.AdamW(ps, betas=(0.95, 0.999))
    for step in range(steps):
        give_gradients(step, ps)
        adamw.step()
    return adamw


@pytest.mark.parametrize("ratio", [2, 32])
def test_moments_of_adamw_are_encoded(ratio):
    adamw = stepped_adamw(SHAPES)
    ps = parameters(torch.float32, SHAPES)
    opt = Collins(ps, **OPTIONS, compress_ratio=ratio)
    opt.load_state_dict(convert(adamw.state_dict(), opt))
    for p, adamw_state in zip(ps[:-1], adamw.state.values(), strict=False):
        m, hash = adamw_state["exp_avg"].view(-1), opt.hash_of(p)
        entry = next(entry for entry in opt._members() if entry.p is p)
        parts = [opt.state[p][name].view(-1) for name in entry.known_spec.tensors]
        if hash is not None:
            index = torch.arange(p.numel(), device=p.device)
            m = torch.zeros(hash.buckets, device=p.device).index_add_(0, hash.bucket(index), m * hash.sign(index, 3))
            m = m / hash.load(torch.arange(hash.buckets, device=p.device))
        M = entry.known_spec.update.formats[0].load(parts, len(m), torch.float32)
        torch.testing.assert_close(M, m, rtol=0, atol=1e-6 if hash is None else float(m.abs().max()) / 13)
    take_steps(ps, opt, range(3, 5))


def tables(opt):
    return [{name: t for name, t in state.items() if name.startswith("m_table")} for state in opt.state.values()]


def test_tables_of_the_same_hash_are_kept_and_others_restart():
    same_load = {"compress_ratio": 2, "table_dtype": "int4"}
    _, elementwise_opt = train(decode="least_squares", role="matrix", shapes=SHAPES[:4], **same_load)
    ps = parameters(torch.float32, SHAPES[:4])
    opt = Collins(ps, **OPTIONS, role="matrix", **same_load)
    opt.load_state_dict(convert(elementwise_opt.state_dict(), opt))
    assert same(tables(opt), tables(elementwise_opt))
    with pytest.raises(ValueError, match="state_dict holds"):
        opt.load_state_dict(elementwise_opt.state_dict())
    other = Collins(ps, **OPTIONS, role="matrix", compress_ratio=64)
    other.load_state_dict(convert(opt.state_dict(), other))
    assert all((table["m_table_scale"] == 0).all() for table in tables(other))
    coarse = Collins(ps, **OPTIONS, role="matrix", compress_ratio=32)
    coarse.load_state_dict(convert(opt.state_dict(), coarse))
    assert [len(t["m_table_scale"].view(-1)) for t in tables(coarse)] == [-(-p.numel() // 256) for p in ps]
    assert all((table["m_table_scale"] != 0).any() for table in tables(coarse))
    with pytest.raises(ValueError, match="keeps a second moment here"):
        convert(opt.state_dict(), elementwise_opt)


def test_dense_first_moments_without_second_ones_are_converted():
    _, opt = train(compress_ratio=2)
    ps = parameters(torch.float32, SHAPES)
    other = Collins(ps, **OPTIONS, compress_ratio=32)
    other.load_state_dict(convert(opt.state_dict(), other))
    assert all((opt_state["m_table_scale"] > 0).any() for p, opt_state in other.state.items() if p.dim() > 1)
    with pytest.raises(ValueError, match="keeps a second moment here"):
        convert(opt.state_dict(), Collins(ps, min_K=16, compress_ratio=1))


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hash": "universal"}, "hash must be 'block' for decode='orthogonal'"),
        ({"row_parts": 0}, "row_parts must be an int of at least 1"),
        ({"row_parts": "x"}, "row_parts must be an int of at least 1"),
        ({"row_parts": 2.0}, "row_parts must be an int of at least 1"),
        ({"row_parts": True}, "row_parts must be an int of at least 1"),
        ({"row_parts": (32,)}, "row_parts must be an int of at least 1"),
        ({"row_parts": (31, 0)}, "row_parts must be an int of at least 1"),
        ({"role": "matrix", "row_parts": 5}, "row_parts must divide the 32 rows of parameter 0, got 5"),
        (
            {"role": "matrix", "row_parts": [16, 8]},
            r"row_parts must add up to the 32 rows of parameter 0, got \(16, 8\)",
        ),
    ],
    ids=str,
)
def test_inconsistent_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Collins(parameters(torch.float32, [(32, 64)]), **{**OPTIONS, **options})


@pytest.mark.parametrize(("text", "expected"), [("4", 4), ("16, 8,8", (16, 8, 8)), ("[16,16]", (16, 16))])
def test_row_parts_are_accepted_as_strings(text, expected):
    opt = Collins(parameters(torch.float32, [(32, 64)]), **OPTIONS, row_parts=text)
    assert opt.param_groups[0]["row_parts"] == expected


def test_parameters_without_matrices_are_rejected_and_nothing_changes():
    ps = parameters(torch.float32, [(16, 32), (1024,)])
    with pytest.raises(ValueError, match=r"parameter 1 has the shape \(1024,\), and decode is 'orthogonal'"):
        Collins(ps, **OPTIONS, role="matrix")
    opt = Collins(ps, **OPTIONS)
    opt.param_groups[0]["role"] = "matrix"
    before = [bits(p) for p in ps]
    give_gradients(0, ps)
    with pytest.raises(ValueError, match=r"parameter 1 has the shape \(1024,\), and decode is 'orthogonal'"):
        opt.step()
    assert not opt.state
    assert all(map(torch.equal, before, map(bits, ps)))


@pytest.mark.parametrize(
    ("sizes", "placements", "accepted"),
    [
        ((2,), (Shard(0),), False),
        ((2,), (Replicate(),), True),
        ((1,), (Shard(0),), True),
        ((2, 2), (Replicate(), Shard(0)), False),
    ],
    ids=str,
)
def test_a_matrix_that_is_sharded_over_ranks_is_rejected_by_name(sizes, placements, accepted):
    whole = parameters(torch.float32, [(16, 32)], "cpu")[0].detach()
    with rank_of(0, *sizes) as mesh:
        p = torch.nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None))
        if not accepted:
            with pytest.raises(ValueError, match=r"'weight' is a DTensor placed as .* needs the whole matrix"):
                Collins([("weight", p)], **OPTIONS)
            return
        opt, unsharded = Collins([("weight", p)], **OPTIONS), torch.nn.Parameter(whole.clone())
        other = Collins([("weight", unsharded)], **OPTIONS)
        for step in range(2):
            give_gradients(step, [unsharded])
            p.grad = distribute_tensor(unsharded.grad, mesh, placements, src_data_rank=None)
            opt.step()
            other.step()
        assert torch.equal(p.to_local(), unsharded)
