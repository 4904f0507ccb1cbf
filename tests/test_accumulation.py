"""Partial steps: several backward passes in one step, compared with their definition for every executor and tier."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from helpers import OPTIONS, bits, moments, parameters, same, weights_and_moments, with_kernel
from reference import DECODES, Block, Reference, Universal
from training import TIERS, backward, make_model, same_bits

from collins import Collins
from collins.clipping import LAST_NORM
from collins.hashing import UniversalHash

SHAPES, PARTS = [(32, 64), (33, 37), (12,)], 3
PARTIAL_STEPS = {**OPTIONS, "in_backward": True, "accumulation_steps": PARTS}


def gradients(step, ps, parts=PARTS):
    """For each micro-batch, the gradients of all parameters."""
    seeds = range(1000 * step, 1000 * step + parts)
    return [[torch.randn(p.shape, generator=torch.Generator().manual_seed(s)).to(p) for p in ps] for s in seeds]


def backward_with(ps, grads):
    """A backward pass with the given gradients; None for no gradient."""
    sum((p * g).sum() for p, g in zip(ps, grads, strict=True) if g is not None).backward()


def run_steps(steps=4, dtype=torch.float32, kernel=False, shapes=SHAPES, **options):
    ps = parameters(dtype, shapes)
    opt = Collins(ps, **{**PARTIAL_STEPS, **options})
    opt = with_kernel(opt) if kernel else opt
    for step in range(steps):
        for grads in gradients(step, ps):
            backward_with(ps, grads)
        assert all(p.grad is None for p in ps)
        opt.step()
    return ps, opt


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("hash", ["block", "universal"])
def test_partial_steps_equal_the_float64_reference(hash, decode):
    ps = parameters(torch.float64, SHAPES)
    options = {"hash": hash, "decode": decode, "compress_ratio": 8, "table_dtype": torch.float64, "weight_decay": 0.1}
    opt = Collins(ps, **{**PARTIAL_STEPS, **options})
    references = []
    for key, p in enumerate(ps):
        hash_of_p, reference_hash = opt.hash_of(p), None
        if isinstance(hash_of_p, UniversalHash):
            reference_hash = Universal(p.numel(), hash_of_p.buckets, *hash_of_p.coefficients)
        elif hash_of_p is not None:
            reference_hash = Block(p.numel(), 8, 0, key, 3)
        references.append(Reference(p.detach().numpy(), reference_hash, decode, lr=1e-2, weight_decay=0.1))
    assert sum(reference.hash is None for reference in references) == 1
    for step in range(5):
        micro_batches = gradients(step, ps)
        if step == 3:
            micro_batches = micro_batches[:-1]  # a step of fewer backward passes than were expected
        for grads in micro_batches:
            backward_with(ps, grads)
        opt.step()
        for number, reference in enumerate(references):
            reference.accumulate([grads[number].numpy() for grads in micro_batches], PARTS)
    assert all(state["step"] == 5 for state in opt.state.values())
    for p, reference in zip(ps, references, strict=True):
        np.testing.assert_allclose(p.detach().numpy().reshape(-1), reference.p, rtol=1e-9, atol=1e-12)


def test_first_moments_and_numerators_equal_those_of_the_whole_gradient():
    """A large eps gives all passes the same denominator; the weights then equal those of true accumulation, too."""
    options = {"eps": 1e9, "lr": 1e8, "weight_decay": 1e-10, "compress_ratio": 8, "table_dtype": torch.float64}
    ps, opt = run_steps(dtype=torch.float64, **options)
    other_ps = parameters(torch.float64, SHAPES)
    other = Collins(other_ps, **{**OPTIONS, **options})
    for step in range(4):
        for p, parts in zip(other_ps, zip(*gradients(step, other_ps), strict=True), strict=True):
            p.grad = sum(parts)
        other.step()
    assert all((p - old).abs().max() > 1e-2 for p, old in zip(ps, parameters(torch.float64, SHAPES), strict=True))
    for p, q in zip(ps, other_ps, strict=True):
        torch.testing.assert_close(moments(opt, p)[0], moments(other, q)[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_with_independent_noise_second_moments_equal_those_of_the_sum_on_average():
    p, q = (torch.nn.Parameter(torch.zeros(256, 256)) for _ in range(2))
    opt, other = Collins([p], **PARTIAL_STEPS), Collins([q], **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        q.grad = torch.zeros_like(q)
        for _ in range(PARTS):
            g = torch.randn(q.shape, generator=generator)
            backward_with([p], [g])
            q.grad += g
        opt.step()
        other.step()
    sums = [moments(o, t)[-1].sum().item() for o, t in ((opt, p), (other, q))]
    assert sums[0] == pytest.approx(sums[1], rel=0.01)


@pytest.mark.parametrize("way", [{"compile": True}, {"kernel": True}], ids=["compiled", "kernel"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, {}), (torch.float32, {"table_dtype": torch.float32, "compress_ratio": 8})],
    ids=["bfloat16", "float32"],
)
def test_partial_steps_of_kernel_and_graphs_equal_eager_ones(dtype, options, way):
    if "kernel" in way:
        pytest.importorskip("triton")
    same_runs = {"shapes": [(64, 64), (40,)], "dtype": dtype, "steps": 3, **options}
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2e-6
    for actual, expected in zip(
        weights_and_moments(*run_steps(**same_runs, **way)),
        weights_and_moments(*run_steps(**same_runs, compile=False)),
        strict=True,
    ):
        if actual.dtype in (torch.int8, torch.uint8):
            assert (actual != expected).float().mean() < 0.02
        else:
            torch.testing.assert_close(actual, expected, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("memory", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tier_gives_bitwise_the_same_result(memory, dtype):
    results = []
    for policy in (None, memory):
        model = make_model(dtype)
        opt = Collins(model.parameters(), **PARTIAL_STEPS, memory=policy)
        for step in range(5):
            for part in range(PARTS):  # every second one leaves some parameters without a gradient
                backward(model, PARTS * step + part)
            opt.step()
        results.append((model, opt))
    assert same_bits(*results)
    counts = {int(state["step"]) for state in results[0][1].state.values()}
    assert counts == {5}


def test_a_counter_on_the_device_gives_bitwise_the_same_result():
    assert same(weights_and_moments(*run_steps(capturable=True)), weights_and_moments(*run_steps()))


def test_a_step_of_one_backward_pass_equals_an_ordinary_step():
    assert same(
        weights_and_moments(*run_steps(accumulation_steps=1, steps=0)), weights_and_moments(*run_steps(steps=0))
    )
    results = []
    for options in ({}, {"accumulation_steps": 1}, {"accumulation_steps": "1"}):
        ps = parameters(torch.float32, SHAPES)
        opt = Collins(ps, **OPTIONS, in_backward=True, **options)
        for step in range(3):
            backward_with(ps, gradients(step, ps)[0])
            opt.step()
        results.append(weights_and_moments(ps, opt))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_rounding_is_independent_between_partial_steps():
    """With the same random bits, k equal updates would be rounded in the same direction, with k times the error."""
    p = torch.nn.Parameter(torch.full((1 << 14,), 1.0, dtype=torch.bfloat16))
    opt = Collins([p], lr=2.0**-10, betas=(0.0, 0.0), weight_decay=0, role="exact", in_backward=True,
                  accumulation_steps=4)  # fmt: skip
    for _ in range(4):
        backward_with([p], [torch.ones_like(p)])
    opt.step()
    assert len(p.detach().unique()) > 2


def test_training_resumes_bitwise_from_a_state_dict():
    uninterrupted, interrupted = run_steps(steps=4), run_steps(steps=2)
    saved = io.BytesIO()
    torch.save(interrupted[1].state_dict(), saved)
    saved.seek(0)
    ps = [torch.nn.Parameter(p.detach().clone()) for p in interrupted[0]]
    opt = Collins(ps, **PARTIAL_STEPS)
    opt.load_state_dict(torch.load(saved, weights_only=True))
    opt = copy.deepcopy({"opt": opt, "ps": ps})
    ps, opt = opt["ps"], opt["opt"]
    for step in (2, 3):
        for grads in gradients(step, ps):
            backward_with(ps, grads)
        opt.step()
    assert same(weights_and_moments(ps, opt), weights_and_moments(*uninterrupted))


def test_saving_copying_and_loading_are_rejected_in_the_middle_of_a_step():
    ps, opt = run_steps(steps=1)
    saved = opt.state_dict()
    backward_with(ps, gradients(1, ps)[0])
    before = [bits(p).clone() for p in ps]
    for call in (opt.state_dict, lambda: copy.deepcopy(opt), lambda: opt.load_state_dict(saved)):
        with pytest.raises(RuntimeError, match=r"in the middle of a step, after 1 of accumulation_steps=3.*step\(\)"):
            call()
    assert all(map(torch.equal, map(bits, ps), before))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert all(state["step"] == 2 for state in opt.state.values())


def test_more_backward_passes_than_accumulation_steps_are_rejected():
    ps, opt = run_steps(steps=1)
    first = gradients(1, ps)
    for grads in first:
        backward_with(ps, grads)
    before = [bits(p).clone() for p in ps]
    with pytest.raises(RuntimeError, match=r"arrived 4 times before step\(\).*accumulation_steps is 3.*in_backward=F"):
        backward_with(ps, first[0])
    assert all(map(torch.equal, map(bits, ps), before))
    opt.step()
    ps_after, opt_after = run_steps(steps=2)
    assert same(weights_and_moments(ps, opt), weights_and_moments(ps_after, opt_after))


def test_nonfinite_gradients_are_skipped_in_their_backward_pass_only():
    results = []
    for nonfinite in (False, True):
        ps = parameters(torch.float32, SHAPES)
        opt = Collins(ps, **PARTIAL_STEPS, nonfinite="skip", table_dtype=torch.float32, compress_ratio=8)
        for step in range(2):
            micro_batches = gradients(step, ps)
            if step == 1:
                for grads in micro_batches[1:]:
                    for g in grads:
                        g.view(-1)[:8] = math.nan if nonfinite else 0
            for grads in micro_batches:
                backward_with(ps, grads)
            opt.step()
        results.append((weights_and_moments(ps, opt), opt.statistics()["skipped_buckets"]))
    assert int(results[0][1]) == 0
    assert int(results[1][1]) == 2 * (1 + 1 + 8)  # two backward passes; a bucket of each table, 8 exact elements
    for actual, expected in zip(results[1][0], results[0][0], strict=True):  # without and with skipped gradients
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_norms_of_passes_add_as_if_orthogonal_and_clip_each_gradient_on_arrival():
    ps = parameters(torch.float64, [(12,)])
    opt = Collins(ps, **PARTIAL_STEPS, max_grad_norm=0.5)
    reference = Reference(ps[0].detach().numpy(), lr=1e-2)
    last_norm = 0.0
    for step in range(3):
        norm = 0.0
        for part, (g,) in enumerate(gradients(step, ps)):
            backward_with(ps, [g])
            norm = math.hypot(norm, g.norm().item())
            reference.step(g.numpy(), min(1, 0.5 / (max(last_norm, norm) + 1e-6)), part, PARTS)
        opt.step()
        assert float(opt.grad_norm) == pytest.approx(norm)
        last_norm = norm
    assert float(opt.param_groups[0][LAST_NORM]) == pytest.approx(last_norm)
    np.testing.assert_allclose(ps[0].detach().numpy(), reference.p, rtol=1e-9)


def test_a_cleared_state_starts_from_zero():
    ps, opt = run_steps(steps=1)
    backward_with(ps, gradients(1, ps)[0])
    opt.step()
    opt.state.clear()
    for grads in gradients(2, ps):
        backward_with(ps, grads)
    opt.step()
    assert all(state["step"] == 1 for state in opt.state.values())
    assert all(p.isfinite().all() for p in ps)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "two", 257], ids=str)
def test_an_invalid_accumulation_steps_is_rejected(value):
    with pytest.raises(ValueError, match="accumulation_steps must be"):
        Collins(parameters(torch.float32, SHAPES), in_backward=True, accumulation_steps=value)


def test_accumulation_steps_is_rejected_where_it_has_no_meaning():
    ps = parameters(torch.float32, SHAPES)
    with pytest.raises(ValueError, match=r"accumulation_steps must be 1 without in_backward=True.*add up.*got 3"):
        Collins(ps, accumulation_steps=3)
    with pytest.raises(ValueError, match=r"accumulation_steps must be 1 for decode='orthogonal', got 3"):
        Collins(ps, **{**PARTIAL_STEPS, "decode": "orthogonal"})
    opt = Collins(ps, **PARTIAL_STEPS)
    with pytest.raises(ValueError, match="accumulation_steps must be 1 for decode='orthogonal'"):
        opt.add_param_group({"params": parameters(torch.float32, [(64, 64)]), "decode": "orthogonal"})
    with pytest.raises(ValueError, match="accumulation_steps is an option of the whole optimizer"):
        opt.add_param_group({"params": parameters(torch.float32, [(4,)]), "accumulation_steps": 3})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["decode"] = "orthogonal"
    before = [bits(p).clone() for p in ps]
    with pytest.raises(ValueError, match="accumulation_steps must be 1 for decode='orthogonal'"):
        backward_with(ps, gradients(0, ps)[0])
    assert all(map(torch.equal, map(bits, ps), before))
    assert not opt.state


def test_tables_on_the_host_are_copied_once_for_each_backward_pass():
    """Every pass uses all tables in the order of the first: they are prefetched, and written back once per pass."""
    link_bytes = []
    for parts in (1, PARTS):
        model = make_model()
        opt = Collins(model.parameters(), **{**PARTIAL_STEPS, "accumulation_steps": parts}, memory=TIERS["host"])
        counts = []
        for step in range(3):
            for part in range(parts):
                backward(model, 2 * (parts * step + part))
            opt.step()
            opt.state_dict()
            counts.append(opt.statistics()["link_bytes"])
        link_bytes.append(counts[2] - counts[1])
    assert link_bytes[1] <= PARTS * link_bytes[0]
