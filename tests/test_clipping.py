"""Clipping by the global norm inside the step: equal to `clip_grad_norm_` after backward, as defined in backward."""

import copy
import io
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    FEW_STEP_SHAPES,
    OPTIONS,
    STEP_SHAPES,
    STEP_WAYS,
    give_gradients,
    moments,
    parameters,
    same,
    weights_and_moments,
    with_kernel,
)
from reference import Block, Reference
from torch import nn

from collins import Collins
from collins.clipping import LAST_NORM

CLIP = 0.5


def make_optimizer(way, ps, **options):
    if way == "kernel":
        pytest.importorskip("triton")
    opt = Collins(ps, **{**OPTIONS, "table_dtype": torch.float32, **STEP_WAYS[way], **options})
    return with_kernel(opt) if way == "kernel" else opt


def shapes(way):
    return FEW_STEP_SHAPES if way in ("compiled", "kernel") else STEP_SHAPES


def norm_of(grads):
    return math.sqrt(sum(g.double().square().sum().item() for g in grads))


@pytest.mark.parametrize("way", STEP_WAYS)
def test_a_step_equals_one_after_clip_grad_norm(way):
    ps, copies = parameters(torch.float32, shapes(way)), parameters(torch.float32, shapes(way))
    opt, reference_opt = (
        make_optimizer(way, ps, max_grad_norm=CLIP),
        make_optimizer("eager", copies, hash=STEP_WAYS[way].get("hash", "block")),
    )
    assert opt.grad_norm is None
    for step in range(3):
        give_gradients(step, ps, copies)
        grads = [p.grad.clone() for p in ps]
        norm = nn.utils.clip_grad_norm_(copies, CLIP)
        opt.step()
        reference_opt.step()
        assert float(norm) > CLIP
        assert torch.equal(opt.grad_norm, norm)
        assert all(torch.equal(p.grad, g) for p, g in zip(ps, grads, strict=True))  # nothing is written to them
    for actual, expected in zip(weights_and_moments(ps, opt), weights_and_moments(copies, reference_opt), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_norm_of_bf16_gradients_is_not_rounded_to_bf16():
    ps = parameters(torch.bfloat16, STEP_SHAPES)
    opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP)
    give_gradients(0, ps)
    opt.step()
    assert opt.grad_norm.dtype == torch.float32
    assert float(opt.grad_norm) == pytest.approx(norm_of([p.grad for p in ps]), rel=1e-6)
    ps = parameters(torch.bfloat16, [(4,)]) + parameters(torch.float64, [(4,)])
    opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP)
    give_gradients(0, ps)
    opt.step()
    assert opt.grad_norm.dtype == torch.float64
    assert float(opt.grad_norm) == pytest.approx(norm_of([p.grad for p in ps]), rel=1e-6)


LIMITS = [(way, 1e6) for way in STEP_WAYS] + [("eager", math.inf)]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("way", "limit"), LIMITS)
def test_a_factor_of_one_changes_no_bit(way, limit, in_backward):
    results = []
    for max_norm in (None, limit):
        # The interpreter is slow for bfloat16.
        ps = parameters(torch.float32 if way == "kernel" else torch.bfloat16, shapes(way))
        opt = make_optimizer(way, ps, max_grad_norm=max_norm, in_backward=in_backward)
        for step in range(2):
            set_gradients(ps, step, in_backward)
            opt.step()
        results.append(weights_and_moments(ps, opt))
    assert same(*results)
    assert float(opt.grad_norm) == pytest.approx(norm_of([gradient(p, 1, i) for i, p in enumerate(ps)]), rel=1e-6)


def gradient(p, step, index, scale=1.0):
    return (scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + index))).to(p)


def set_gradients(ps, step, in_backward=True, scale=1.0):
    """Sets or computes the gradients of step `step` in the order of backward: the last parameter first."""
    if not in_backward:
        for i, p in enumerate(ps):
            p.grad = gradient(p, step, i, scale)
        return
    for i, p in reversed(list(enumerate(ps))):
        (p * gradient(p, step, i, scale)).sum().backward()


@pytest.mark.parametrize("max_norm", [CLIP, 1e3])
@pytest.mark.parametrize("in_backward", [False, True])
def test_steps_equal_the_float64_reference(in_backward, max_norm):
    """The factors are computed here: those of `clip_grad_norm_`, and those defined for backward."""
    ps = parameters(torch.float64, STEP_SHAPES, "cpu")
    opt = Collins(ps, **OPTIONS, table_dtype=torch.float64, max_grad_norm=max_norm, in_backward=in_backward)
    references = []
    for key, p in enumerate(ps):
        hash = opt.hash_of(p)
        reference = None if hash is None else Block(p.numel(), hash.block, 0, key, OPTIONS["rehash_period"])
        references.append(Reference(p.detach().numpy(), reference, lr=OPTIONS["lr"]))
    last, factors = 0.0, []
    for step, scale in enumerate((1.0, 1.0, 30.0, 1.0, 0.001, 1.0)):
        grads = [gradient(p, step, i, scale) for i, p in enumerate(ps)]
        set_gradients(ps, step, in_backward, scale)
        opt.step()
        squares = 0.0
        for p, g, reference in reversed(list(zip(ps, grads, references, strict=True))):
            squares += float(g.square().sum())
            norm = max(last, math.sqrt(squares)) if in_backward else norm_of(grads)
            factors.append(min(1.0, max_norm / (norm + 1e-6)))
            reference.step(g.numpy(), factors[-1])
            np.testing.assert_allclose(p.detach().numpy().reshape(-1), reference.p, rtol=1e-9, atol=1e-12)
        last = norm_of(grads)
        assert opt.grad_norm.dtype == torch.float64
        assert float(opt.grad_norm) == pytest.approx(last)
    assert min(factors) < 1
    assert (1.0 in factors) == (max_norm > 1 or not in_backward)


def test_an_exploding_gradient_is_bounded_in_backward():
    """The norm that is applied is at most C sqrt(1 + 2 ln(n / |g_1|)), without a norm of the previous step."""
    ps = parameters(torch.float64, [(64,)] * 40, "cpu")
    opt = Collins(ps, lr=1.0, weight_decay=0, betas=(0, 0), min_K=1, compress_ratio=1, eps=1.0, max_grad_norm=CLIP,
                  in_backward=True, table_dtype=torch.float64)  # fmt: skip
    set_gradients(ps, 0, scale=1e-3)
    opt.step()
    set_gradients(ps, 1, scale=1e4)
    opt.step()
    applied_norm = math.sqrt(sum(opt.state[p]["exp_avg"].square().sum().item() for p in ps))
    first_norm = norm_of([gradient(ps[-1], 1, len(ps) - 1, 1e4)])
    bound = CLIP * math.sqrt(1 + 2 * math.log(float(opt.grad_norm) / first_norm))
    assert CLIP < applied_norm <= bound < 3 * CLIP


@pytest.mark.parametrize("way", ["compiled", "kernel", "host"])
def test_in_backward_every_executor_equals_the_eager_one(way):
    results = []
    for executor in ("eager", way):
        ps = parameters(torch.float32, shapes(way))
        opt = make_optimizer(executor, ps, max_grad_norm=CLIP, in_backward=True)
        for step in range(3):
            set_gradients(ps, step, scale=10.0**step)
            opt.step()
        results.append([*weights_and_moments(ps, opt), opt.grad_norm])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert way != "host" or same(*results)


def load_from_file(ps, opt, new_opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    new_opt.load_state_dict(torch.load(file))
    return new_opt


def load_with_dcp(ps, opt, new_opt, tmp_path, flat):
    """torch.distributed.checkpoint, in both forms of its state dicts."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = (
        nn.ParameterDict({str(i): p for i, p in enumerate(params)}) for params in (ps, list(parameters_of(new_opt)))
    )
    dcp.save(get_optimizer_state_dict(model, opt, options=options), checkpoint_id=tmp_path, no_dist=True)
    state_dict = get_optimizer_state_dict(other, new_opt, options=options)
    dcp.load(state_dict, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, new_opt, state_dict, options=options)
    return new_opt


def parameters_of(opt):
    return (p for group in opt.param_groups for p in group["params"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process needs none
@pytest.mark.parametrize("way", ["file", "load into a used one", "deepcopy", "pickle", "dcp", "flat dcp"])
def test_training_resumes_bitwise(way, tmp_path):
    """In backward the next factor depends on the last norm."""

    def new_run():
        ps = parameters(torch.float32, STEP_SHAPES)
        groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": 3e-3}]
        return ps, Collins(groups, **OPTIONS, max_grad_norm=CLIP, in_backward=True)

    def run(ps, opt, first, last):
        for step in range(first, last):
            set_gradients(ps, step, scale=3.0 ** (5 - step))
            opt.step()
        return [*weights_and_moments(ps, opt), opt.grad_norm]

    ps, opt = new_run()
    run(ps, opt, 0, 3)
    last = float(opt.grad_norm)
    if way in ("deepcopy", "pickle"):
        resumed_ps, resumed = copy.deepcopy((ps, opt)) if way == "deepcopy" else pickle.loads(pickle.dumps((ps, opt)))
    else:
        resumed_ps, resumed = new_run()
        if way == "load into a used one":
            run(resumed_ps, resumed, 0, 2)
        with torch.no_grad():
            for p, q in zip(resumed_ps, ps, strict=True):
                p.copy_(q)
        if "dcp" in way:
            load_with_dcp(ps, opt, resumed, tmp_path, "flat" in way)
        else:
            load_from_file(ps, opt, resumed)
    assert {float(group[LAST_NORM]) for group in resumed.state_dict()["param_groups"]} == {last}
    assert type(resumed.state_dict()["param_groups"][0][LAST_NORM]) is float
    expected = run(ps, opt, 3, 5)
    assert same(run(resumed_ps, resumed, 3, 5), expected)


def test_after_a_state_dict_without_a_norm_a_step_clips_like_the_first_step():
    """Such as a state dict of version 0.2, or of a run without clipping."""
    results = []
    for has_stepped in (False, True):
        ps = parameters(torch.float32, STEP_SHAPES)
        unclipped = Collins(ps, **OPTIONS)
        set_gradients(ps, 0, in_backward=False)
        unclipped.step()
        saved = copy.deepcopy(unclipped.state_dict())
        assert all(LAST_NORM not in group for group in saved["param_groups"])
        opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP, in_backward=True)
        before = [p.detach().clone() for p in ps]
        if has_stepped:
            for p in ps:
                p.grad = None
            set_gradients(ps, 1, scale=1e3)
            opt.step()
            with torch.no_grad():
                for p, q in zip(ps, before, strict=True):
                    p.copy_(q)
        opt.load_state_dict(saved)
        for p in ps:
            p.grad = None
        set_gradients(ps, 2)
        opt.step()
        results.append(weights_and_moments(ps, opt))
    assert same(*results)


@pytest.mark.parametrize(
    "value", ["1.0", None, -1.0, math.inf, math.nan, True, torch.ones(2), torch.ones((), device="meta")]
)
def test_a_malformed_norm_is_rejected_and_nothing_changes(value):
    ps = parameters(torch.float32, STEP_SHAPES)
    opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP, in_backward=True)
    set_gradients(ps, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    before = weights_and_moments(ps, opt)
    saved["param_groups"][0][LAST_NORM] = value
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=LAST_NORM):
        opt.load_state_dict(saved)
    assert same(weights_and_moments(ps, opt), before)
    assert opt.param_groups[0]["lr"] == OPTIONS["lr"]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("bad_value", [math.inf, math.nan, 1e30])
def test_a_nonfinite_norm_has_no_effect_with_skip(bad_value, in_backward):
    """The step - in backward that of one parameter - is skipped; the next one is unaffected."""
    ps = parameters(torch.float32, STEP_SHAPES)
    opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP, nonfinite="skip", in_backward=in_backward)
    for step in range(2):
        set_gradients(ps, step, in_backward)
        opt.step()
    before, last = [p.detach().clone() for p in ps], float(opt.grad_norm)
    for i, p in reversed(list(enumerate(ps))):
        g = gradient(p, 2, i)
        if i == 1:
            g[5, 7] = bad_value
        if in_backward:
            (p * g).sum().backward()
        else:
            p.grad = g
    opt.step()
    assert not opt.grad_norm.isfinite()
    unchanged = [torch.equal(p, old) for p, old in zip(ps, before, strict=True)]
    assert unchanged == ([False, True, False, False, False] if in_backward else [True] * 5)
    assert all(t.isfinite().all() for t in weights_and_moments(ps, opt))
    if in_backward:
        assert [float(group[LAST_NORM]) for group in opt.param_groups] == [pytest.approx(last)]
    set_gradients(ps, 3, in_backward)
    opt.step()
    assert opt.grad_norm.isfinite()
    assert not any(torch.equal(p, old) for p, old in zip(ps, before, strict=True))
    assert all(t.isfinite().all() for t in weights_and_moments(ps, opt))


@pytest.mark.parametrize("bad_value", [math.inf, math.nan])
def test_without_skip_a_nonfinite_norm_has_the_effect_of_clip_grad_norm(bad_value):
    results = []
    for clips in (False, True):
        ps = parameters(torch.float32, STEP_SHAPES)
        opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP if clips else None)
        give_gradients(0, ps)
        ps[1].grad[5, 7] = bad_value
        if not clips:
            nn.utils.clip_grad_norm_(ps, CLIP)
        opt.step()
        results.append([p.detach().isfinite() for p in ps])
    assert same(*results)
    assert results[0][0].all() == (bad_value == math.inf)


def test_in_backward_a_nonfinite_norm_does_not_affect_the_next_step():
    ps = parameters(torch.float32, [(40,), (40,)])
    opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP, in_backward=True)
    (ps[0] * math.inf).sum().backward()
    (ps[1] * 1.0).sum().backward()
    opt.step()
    assert opt.grad_norm.isinf()
    assert ps[0].isnan().all()
    assert ps[1].isfinite().all()
    before = ps[1].detach().clone()
    (ps[1] * 1.0).sum().backward()
    opt.step()
    assert not torch.equal(before, ps[1])


def test_parameters_without_gradients_and_steps_without_any():
    ps = parameters(torch.float32, [(40,), (40,)])
    opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP)
    opt.step()
    assert opt.grad_norm is None
    ps[1].grad = torch.full_like(ps[1], 2.0)
    opt.step()
    norm = opt.grad_norm
    assert float(norm) == pytest.approx(2 * math.sqrt(40))
    ps[1].grad = torch.zeros_like(ps[1])
    opt.step()
    assert float(norm) == pytest.approx(2 * math.sqrt(40))  # a copy
    assert float(opt.grad_norm) == 0
    ps[1].grad = None
    opt.step()
    assert float(opt.grad_norm) == 0


def test_closures_and_compiled_steps_clip():
    results = []
    for way in ("plain", "closure", "compiled"):
        torch.manual_seed(0)
        net = nn.Linear(32, 64)
        opt = Collins(net.parameters(), **OPTIONS, max_grad_norm=0.01)

        def backward_and_loss(net=net, opt=opt):
            opt.zero_grad()
            loss = net(torch.ones(4, 32)).square().mean()
            loss.backward()
            return loss

        step = torch.compile(lambda opt=opt: opt.step(), backend="eager") if way == "compiled" else opt.step
        for _ in range(3):
            if way == "closure":
                step(backward_and_loss)
            else:
                backward_and_loss()
                step()
        results.append([*weights_and_moments(list(net.parameters()), opt), opt.grad_norm])
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert float(opt.grad_norm) > 0.01


def test_gradients_are_clipped_after_a_grad_scaler_has_unscaled_them():
    results = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        net = nn.Linear(64, 64)
        opt = Collins(net.parameters(), **OPTIONS, max_grad_norm=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for x in torch.randn(3, 8, 64):
            opt.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            scaler.step(opt)
            scaler.update()
        results.append([*weights_and_moments(list(net.parameters()), opt), opt.grad_norm])
    assert same(*results)  # a power of two leaves no rounding
    assert float(opt.grad_norm) > 0.01


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, "one", True, (1.0,), torch.ones(1)], ids=repr)
def test_invalid_limits_are_rejected(value):
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"max_grad_norm must be None or a number above 0.*got"):
        Collins([p], max_grad_norm=value)
    opt = Collins([p], max_grad_norm=np.float32(0.5))
    assert type(opt.max_grad_norm) is float
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        opt.max_grad_norm = value
    assert opt.max_grad_norm == 0.5
    with pytest.raises(ValueError, match="max_grad_norm is an option of the whole optimizer"):
        Collins([{"params": [p], "max_grad_norm": 1.0}])


def test_the_limit_may_change_between_steps():
    results = []
    for way in ("changed", "by hand"):
        ps = parameters(torch.float32, STEP_SHAPES)
        opt = make_optimizer("eager", ps, max_grad_norm=1.0 if way == "changed" else None)
        for step, limit in enumerate((1.0, 0.1, 10.0)):
            give_gradients(step, ps)
            if way == "changed":
                opt.max_grad_norm = limit
            else:
                nn.utils.clip_grad_norm_(ps, limit)
            opt.step()
        results.append(weights_and_moments(ps, opt))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def imitated_trainer(package, **settings):
    """Imitates a trainer of the package: a method that is defined in one of its modules, and its settings."""
    module = {"__name__": f"{package}.trainer"}
    exec("class Trainer:\n    def train(self, opt):\n        opt.step()", module)
    trainer = module["Trainer"]()
    trainer.__dict__.update(settings)
    return trainer


TRAINERS = {
    "transformers": lambda norm: imitated_trainer("transformers", args=SimpleNamespace(max_grad_norm=norm)),
    "torchtitan": lambda norm: imitated_trainer(
        "torchtitan", config=SimpleNamespace(training=SimpleNamespace(max_norm=norm))
    ),
}


@pytest.mark.parametrize("package", TRAINERS)
def test_ineffective_clipping_by_a_trainer_is_warned_of_once(package):
    def take_steps(norm, **options):
        p = nn.Parameter(torch.ones(4))
        opt = Collins([p], in_backward=True, **options)
        trainer = TRAINERS[package](norm)
        for _ in range(2):
            p.sum().backward()
            trainer.train(opt)

    with pytest.warns(UserWarning, match="Trainer clips gradients to the norm 1.5, which does nothing") as warned:
        take_steps(1.5)
    assert len(warned) == 1
    for norm in (0, 0.0, None, math.inf):  # where any warning is an error
        take_steps(norm)
    take_steps(1.5, max_grad_norm=0.5)
    take_steps(1.5, max_grad_norm=math.inf)
    TRAINERS[package](1.5).train(Collins([nn.Parameter(torch.ones(4))]))
    imitated_trainer(package).train(Collins([nn.Parameter(torch.ones(4))], in_backward=True))


def test_the_norm_of_whole_matrices_is_clipped_as_well():
    """With decode="orthogonal", the norm of a gradient matters relative to the momentum."""
    results = []
    for in_step in (True, False):
        ps = parameters(torch.float32, [(64, 64), (32, 64)])
        opt = make_optimizer("eager", ps, decode="orthogonal", max_grad_norm=CLIP if in_step else None)
        for step in range(3):
            set_gradients(ps, step, in_backward=False, scale=10.0**step)
            if not in_step:
                nn.utils.clip_grad_norm_(ps, CLIP)
            opt.step()
        results.append([m for p in ps for m in moments(opt, p)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_a_captured_step_clips_by_the_norm_of_each_replay():
    results = []
    for captured in (False, True):
        ps = parameters(torch.float32, [(96, 64)], "cuda")
        opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP, capturable=True)
        scale = torch.ones_like(ps[0])

        def step(ps=ps, opt=opt, scale=scale):
            opt.zero_grad(set_to_none=False)
            (ps[0] * scale).sum().backward()
            opt.step()

        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side_stream)
        run = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        norms = []
        for number in range(3):
            scale.fill_(10.0**number)
            run()
            norms.append(float(opt.grad_norm))
        assert norms == pytest.approx([10.0**number * math.sqrt(96 * 64) for number in range(3)])
        results.append([t.detach().clone() for t in (ps[0], *moments(opt, ps[0]))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("in_backward", [False, True])
def test_the_norm_is_over_all_devices(in_backward):
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    ps = [parameters(torch.float32, [(64, 64)], device)[0] for device in devices]
    opt = Collins(ps, **OPTIONS, max_grad_norm=CLIP, in_backward=in_backward)
    for number in range(2):
        set_gradients(ps, number, in_backward)
        opt.step()
        exact = norm_of([gradient(p, number, i) for i, p in enumerate(ps)])
        assert float(opt.grad_norm) == pytest.approx(exact, rel=1e-6)
        assert all(p.isfinite().all() for p in ps)
