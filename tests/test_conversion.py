"""Converted state equals the state of the same gradients by the formulas; other state is rejected."""

import copy
import re

import numpy as np
import pytest
import torch
from reference import Block, Reference, Universal

from collins import BlockHash, Collins, convert

SHAPE = (33, 37)  # neither is a multiple of a bucket
STEPS = 9


def gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) + 0.1 for _ in range(STEPS)]


def run_steps(make, dtype=torch.float64):
    p = torch.nn.Parameter(torch.ones(SHAPE, dtype=dtype))
    opt = make([p])
    for g in gradients():
        p.grad = g.to(dtype)
        opt.step()
    return p, opt


def collins(**options):
    return lambda ps: Collins(ps, **{"min_K": 8, "table_dtype": torch.float64, **options})


def reference_hash(hash, period=None):
    if isinstance(hash, BlockHash):
        return Block(hash.numel, hash.block, hash.seed, hash.key, period)
    return Universal(hash.numel, hash.buckets, hash.a, hash.b, hash.c, hash.d)


def run_reference(hash):
    reference = Reference(np.ones(SHAPE), hash)
    for g in gradients():
        reference.step(g.numpy())
    return reference


def tables(state_dict):
    state = state_dict["state"][0]
    return state["m_table"].numpy().reshape(-1), state["v_table"].numpy().reshape(-1)


HASHES = [{"compress_ratio": c} for c in (2, 32, 128)] + [{"hash": "universal"}]


@pytest.mark.parametrize("options", HASHES, ids=str)
def test_moments_of_adamw_become_the_tables_of_the_same_gradients(options):
    _, adamw = run_steps(torch.optim.AdamW)
    p, opt = run_steps(collins(rehash_period=None, **options))
    M, V = tables(convert(adamw.state_dict(), opt))
    reference = run_reference(reference_hash(opt.hash_of(p)))
    np.testing.assert_allclose(M, reference.M, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(V, reference.V, rtol=1e-9)


@pytest.mark.parametrize("options", HASHES, ids=str)
def test_converted_signs_are_those_of_the_next_step(options):
    q, adamw = run_steps(torch.optim.AdamW)
    p, opt = run_steps(collins(rehash_period=5, **options))
    converted = convert(adamw.state_dict(), opt)
    M, _ = tables(converted)
    hash = reference_hash(opt.hash_of(p), 5)
    m = adamw.state[q]["exp_avg"].reshape(-1).numpy()
    expected, loads = np.zeros(hash.K), [hash.load(b) for b in range(hash.K)]
    for i, value in enumerate(m):
        expected[hash.h(i)] += hash.s(i, STEPS) * value / loads[hash.h(i)]
    np.testing.assert_allclose(M, expected, rtol=1e-9, atol=1e-12)
    unchanged = [i for i in range(m.size) if not hash.fresh(hash.h(i), STEPS + 1)]
    assert unchanged
    assert all(hash.s(i, STEPS) == hash.s(i, STEPS + 1) for i in unchanged)
    # The next steps equal those of the other optimizer.
    reference = Reference(p.detach().numpy(), hash)
    reference.M, reference.V, reference.t = *tables(converted), STEPS
    opt.load_state_dict(converted)
    p.grad = gradients(1)[0]
    opt.step()
    reference.step(p.grad.numpy())
    np.testing.assert_allclose(p.detach().numpy().reshape(-1), reference.p, rtol=1e-9)
    np.testing.assert_allclose(tables(opt.state_dict())[0], reference.M, rtol=1e-9, atol=1e-12)


def test_the_decode_of_a_converted_first_moment_is_unbiased():
    q, adamw = run_steps(torch.optim.AdamW)
    m = adamw.state[q]["exp_avg"].reshape(-1)
    index, decoded = torch.arange(m.numel()), []
    for seed in range(400):
        opt = collins(seed=seed, compress_ratio=8)([q])
        hash = opt.hash_of(q)
        M = convert(adamw.state_dict(), opt)["state"][0]["m_table"].reshape(-1)
        bucket = hash.bucket(index)
        decoded.append(hash.load(bucket) * hash.sign(index, STEPS) * M[bucket])
    decoded = torch.stack(decoded)
    error = decoded.std(0) / 400**0.5
    in_full_bucket = index < hash.block * (hash.buckets - 1)
    assert ((decoded.mean(0) - m).abs() < 5.5 * error + 1e-12)[in_full_bucket].all()
    assert error[in_full_bucket].min() > 0  # or nothing was averaged


@pytest.mark.parametrize(("fine", "coarse"), [(2, 4), (2, 128), (8, 32), (32, 64)])
def test_coarser_second_moments_are_exact_and_first_moments_restart(fine, coarse):
    _, source_opt = run_steps(collins(compress_ratio=fine))
    p, opt = run_steps(collins(compress_ratio=coarse, seed=3, rehash_period=7))
    before = copy.deepcopy(source_opt.state_dict())
    converted = convert(source_opt.state_dict(), opt)
    M, V = tables(converted)
    hash = reference_hash(opt.hash_of(p), 7)
    reference = run_reference(hash)
    np.testing.assert_allclose(V, reference.V, rtol=1e-12)
    assert not M.any()
    assert converted["state"][0]["step"] == STEPS
    assert torch.equal(source_opt.state_dict()["state"][0]["v_table"], before["state"][0]["v_table"])
    opt.load_state_dict(converted)
    reference.M[:] = 0
    reference.p = p.detach().numpy().reshape(-1).copy()
    for g in gradients(2):
        p.grad = g
        opt.step()
        reference.step(g.numpy())
    np.testing.assert_allclose(p.detach().numpy().reshape(-1), reference.p, rtol=1e-9)


def test_encoding_a_decoded_sketch_again_has_noise_of_sqrt_c():
    """Why first moments restart: the result is unbiased, but its noise is sqrt(c) times the moment."""
    c, N = 32, 32 * 4096
    m = np.random.default_rng(0).normal(size=(N // c, c))
    draw = np.random.default_rng(1)
    s, t = (draw.choice([-1.0, 1.0], size=m.shape) for _ in range(2))
    decoded = c * s * (s * m).mean(1, keepdims=True)
    encoded, exact = (t * decoded).mean(1), (t * m).mean(1)
    assert np.sqrt((encoded**2).mean() / (exact**2).mean()) == pytest.approx(np.sqrt(c), rel=0.05)


def test_tables_of_the_same_hash_are_kept_bitwise_and_may_change_their_dtype():
    _, source = run_steps(collins(table_dtype=torch.float32), torch.bfloat16)
    q = torch.nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        opt = collins(table_dtype=dtype)([q])
        converted = convert(source.state_dict(), opt)
        for name in ("m_table", "v_table"):
            assert torch.equal(converted["state"][0][name], source.state_dict()["state"][0][name].to(dtype))
        opt.load_state_dict(converted)


def test_dense_moments_may_change_their_dtype():
    _, adamw = run_steps(torch.optim.AdamW, torch.bfloat16)
    p = torch.nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))
    opt = Collins([p], compress_ratio=1)
    opt.load_state_dict(convert(adamw.state_dict(), opt))
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    assert torch.equal(opt.state[p]["exp_avg"].bfloat16(), adamw.state_dict()["state"][0]["exp_avg"])


def test_groups_and_schedules_are_converted():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 5))
    frozen = net[2].bias.requires_grad_(False)
    groups = [
        {"params": [net[0].weight, net[0].bias], "lr": 0.1},
        {"params": [net[1].weight, net[1].bias, net[2].weight, frozen], "betas": (0.8, 0.99)},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(adamw, 1)
    net(torch.randn(8, 64)).square().mean().backward()
    adamw.step()
    schedule.step()
    opt = Collins([{"params": list(group["params"])} for group in adamw.param_groups], min_K=64, decode="sketch")
    before = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(convert(adamw.state_dict(), opt))
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.01, 0.001])
    assert [group["initial_lr"] for group in opt.param_groups] == [0.1, 0.01]
    assert opt.param_groups[1]["betas"] == (0.8, 0.99)
    assert opt.param_groups[0]["decode"] == "sketch"
    saved = before["param_groups"][0].keys() - {"with_state"}  # which is of the state dict alone
    assert opt.param_groups[0].keys() == saved | {"initial_lr"}
    assert len(opt.state) == 5
    assert torch.equal(opt.state[net[0].bias]["exp_avg"], adamw.state[net[0].bias]["exp_avg"])
    net(torch.randn(8, 64)).square().mean().backward()
    opt.step()
    assert opt.state[net[0].weight]["step"] == 2


def edited_state_dict(change):
    _, adamw = run_steps(torch.optim.AdamW)
    state = copy.deepcopy(adamw.state_dict())
    change(state)
    return state


WRONG_FORMS = [
    (lambda s: s["param_groups"][0].update(amsgrad="no"), "amsgrad must be True or False, got 'no'"),
    (lambda s: s["param_groups"][0].update(maximize=torch.ones(3)), "maximize must be True or False"),
    (lambda s: s["param_groups"][0].update(weight_decay=[0.1]), r"weight_decay must be a number, got \[0.1\]"),
    (lambda s: s["param_groups"][0].update(betas=torch.ones(2)), "betas must be two numbers"),
    (lambda s: s["param_groups"][0].update(lr="fast"), "lr must be finite and at least 0, got 'fast'"),
    (lambda s: s["state"][0].update(exp_avg=[0.0]), "parameter 0 must have a exp_avg .* type list"),
    (lambda s: s["state"][0].update(slow=torch.ones(3, device="meta")), "slow of parameter 0 must hold data"),
]


@pytest.mark.parametrize(("change", "text"), WRONG_FORMS, ids=[text[:30] for _, text in WRONG_FORMS])
def test_a_value_of_the_wrong_type_is_rejected_by_name(change, text):
    _, opt = run_steps(collins())
    with pytest.raises(ValueError, match=text):
        convert(edited_state_dict(change), opt)


def test_the_target_of_a_conversion_must_be_collins():
    _, adamw = run_steps(torch.optim.AdamW)
    with pytest.raises(TypeError, match="optimizer must be a Collins, got AdamW"):
        convert(adamw.state_dict(), adamw)


def test_additional_state_of_a_wrapper_is_converted():
    _, opt = run_steps(collins())
    converted = convert(edited_state_dict(lambda s: s["state"][0].update(slow=torch.arange(3), turn=7)), opt)
    opt.load_state_dict(converted)
    state = next(iter(opt.state.values()))
    assert torch.equal(state["slow"], torch.arange(3))
    assert state["turn"] == 7


def test_an_invalid_fingerprint_is_rejected():
    _, fine = run_steps(collins(compress_ratio=2))
    _, opt = run_steps(collins(compress_ratio=32))
    state_dict = copy.deepcopy(fine.state_dict())
    state_dict["state"][0]["layout"] -= 1 << 64 * 5  # the load c, which no longer makes so many buckets
    with pytest.raises(ValueError, match="parameter 0 in state_dict: layout must be a fingerprint"):
        convert(state_dict, opt)


REFUSED = [
    (
        collins(compress_ratio=32),
        collins(compress_ratio=8),
        "load c 32 where this .* 8.* a mean does not determine its elem",
    ),
    (
        collins(),
        collins(compress_ratio=1),
        "parameter 0 keeps dense moments here; the bucket means in state_dict",
    ),
    (
        collins(),
        collins(hash="universal"),
        "hash 'block' where this optimizer has 'universal'; elements that share a bu",
    ),
    (
        collins(hash="universal"),
        collins(),
        "hash 'universal' where this optimizer has 'block'; elements that share a b",
    ),
    (
        collins(hash="universal"),
        collins(hash="universal", compress_ratio=64),
        "buckets K 38 where this optimizer has 19",
    ),
    (collins(hash="universal"), collins(hash="universal", seed=1), "seed 0 where this optimizer has 1; elements that"),
    (lambda p: torch.optim.AdamW(p, amsgrad=True), collins(), "amsgrad is True in state_dict"),
    (lambda p: torch.optim.Adam(p, weight_decay=0.1), collins(), "weight_decay is 0.1 in state_dict and not decoupled"),
    (lambda p: torch.optim.AdamW(p, maximize=True), collins(), "maximize is True in state_dict and False in this"),
    (lambda p: torch.optim.SGD(p, momentum=0.9), collins(), "parameter 0 must have a step"),
    (
        torch.optim.RMSprop,
        collins(),
        "parameter 0 cannot be converted: it keeps a second moment here, and state_dict holds none",
    ),
]


@pytest.mark.parametrize(("source", "target", "text"), REFUSED, ids=[text[:40] for _, _, text in REFUSED])
def test_impossible_conversions_are_rejected_with_the_reason(source, target, text):
    _, saved = run_steps(source)
    _, opt = run_steps(target)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=text):
        convert(saved.state_dict(), opt)
    assert str(opt.state_dict()) == str(before)


@pytest.mark.parametrize("source", [torch.optim.AdamW, collins()], ids=["dense", "tables"])
def test_an_empty_second_moment_is_rejected(source):
    """A second moment of any load has at least one element."""
    _, saved = run_steps(source)
    _, opt = run_steps(collins())
    saved_state = saved.state_dict()
    (name,) = saved_state["state"][0].keys() & {"exp_avg_sq", "v_table"}
    saved_state["state"][0][name] = torch.zeros(0)
    with pytest.raises(ValueError, match=rf"state_dict holds .*'{name}': \(0,\)"):
        convert(saved_state, opt)


def test_tables_without_a_fingerprint_are_rejected():
    _, saved = run_steps(collins())
    _, opt = run_steps(collins())
    saved_state = saved.state_dict()
    del saved_state["state"][0]["layout"]
    expected = "parameter 0 has tables in state_dict without the 'layout' entry that says how"
    with pytest.raises(ValueError, match=expected):
        convert(saved_state, opt)


def test_a_second_moment_with_a_larger_load_is_rejected():
    """Dense moments with one second moment for four elements, for an optimizer with one for each element."""
    _, adamw = run_steps(torch.optim.AdamW)
    saved_state = adamw.state_dict()
    saved_state["state"][0]["exp_avg_sq"] = torch.ones(-(-SHAPE[0] * SHAPE[1] // 4))
    for target in (collins(compress_ratio=1), collins(hash="universal")):
        _, opt = run_steps(target)
        with pytest.raises(ValueError, match=r"a second moment for each 4 elements.*buckets cannot be divided"):
            convert(saved_state, opt)


def test_tables_of_another_parameter_are_rejected():
    _, saved = run_steps(collins())
    p = torch.nn.Parameter(torch.ones(SHAPE[0] + 1, SHAPE[1], dtype=torch.float64))
    opt = collins()([p])
    p.grad = torch.ones_like(p)
    opt.step()
    with pytest.raises(ValueError, match=r"has the shape|these are different parameters"):
        convert(saved.state_dict(), opt)


def test_universal_tables_of_the_same_hash_are_kept():
    _, saved = run_steps(collins(hash="universal"))
    _, opt = run_steps(collins(hash="universal"))
    opt.load_state_dict(convert(saved.state_dict(), opt))
    for actual, expected in zip(tables(opt.state_dict()), tables(saved.state_dict()), strict=True):
        assert np.array_equal(actual, expected)


def test_another_shape_is_rejected():
    _, adamw = run_steps(torch.optim.AdamW)
    opt = collins(table_dtype=torch.float32)([torch.nn.Parameter(torch.ones(37, 33))])
    with pytest.raises(
        ValueError, match=re.escape("has the shape (37, 33); state_dict holds exp_avg of the shape (33,")
    ):
        convert(adamw.state_dict(), opt)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(37, 33))]})
    with pytest.raises(ValueError, match=re.escape("groups of [1] parameters; this optimizer has [1, 1]")):
        convert(adamw.state_dict(), opt)


def test_adam_without_decay_is_converted_like_adamw():
    _, adam = run_steps(torch.optim.Adam)
    _, opt = run_steps(collins())
    opt.load_state_dict(convert(adam.state_dict(), opt))
