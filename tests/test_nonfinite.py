"""Nonfinite gradients: their effect, skipping and errors. Also loss scaling and averaged models."""

import copy

import pytest
import torch
from helpers import give_gradients, moments, parameters, same, threads

from collins import Collins

CASES = [
    {},
    {"hash": "universal"},
    {"decode": "sketch"},
    {"compress_ratio": 1},
    {"compress_ratio": 128},
    {"rehash_period": None, "table_dtype": torch.bfloat16},
    {"rehash_period": 1},
]
NONFINITE = [float("nan"), float("inf"), -float("inf"), 1e30]
SHAPES = ((64, 64), (5,), (47, 61), (96, 33))


def bits_of_each(t):
    """A copy of the bits of each element, as an integer."""
    return t.detach().clone().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@pytest.fixture
def one_thread():
    """Compiled scatters add atomically, in an order that depends on the threads."""
    with threads(1):
        yield


@pytest.mark.usefixtures("one_thread", "reproducible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("options", "compile"), [*((case, False) for case in CASES), *((case, True) for case in CASES[:2])], ids=str
)
def test_skip_skips_only_the_buckets_of_nonfinite_gradients(options, dtype, compile, device):
    """These stay bitwise unchanged, and everything else is as it would be without the nonfinite gradients."""
    options = {"table_dtype": torch.float32, **options}  # integers of a block share a scale
    shapes = ((64, 64), (5,), (3, 1367)) if compile else SHAPES  # hash="block": one graph takes 4,096 elements of both
    reference_ps, nonfinite_ps = parameters(dtype, shapes, device), parameters(dtype, shapes, device)
    reference_opt, opt = (
        Collins(ps, lr=0.1, min_K=16, compile=compile, nonfinite="skip", **options)
        for ps in (reference_ps, nonfinite_ps)
    )
    for step in range(3):
        give_gradients(step, reference_ps, nonfinite_ps)
        for o in (reference_opt, opt):
            o.step()
    before = [(bits_of_each(p), [bits_of_each(t) for t in moments(opt, p)]) for p in nonfinite_ps]
    give_gradients(3, reference_ps, nonfinite_ps)
    positions = []
    for i, p in enumerate(nonfinite_ps):
        position = [(7 * i + 2) % p.numel(), p.numel() - 1]
        for index, value in zip(position, (NONFINITE[i], NONFINITE[-1 - i]), strict=True):
            p.grad.view(-1)[index] = value
        positions.append(torch.tensor(position, device=device))
    reference_opt.step()
    opt.step()
    for p, q, (old, old_moments), position in zip(nonfinite_ps, reference_ps, before, positions, strict=True):
        hash = opt.hash_of(p)
        elements = torch.arange(p.numel(), device=device)
        bucket = elements if hash is None else hash.bucket(elements)
        skipped = torch.isin(bucket, bucket[position])
        assert skipped.any()
        assert torch.equal(bits_of_each(p).view(-1)[skipped], old.view(-1)[skipped])
        assert torch.equal(bits_of_each(p).view(-1)[~skipped], bits_of_each(q).view(-1)[~skipped])
        entries = moments(opt, p)[0].numel()
        table = torch.zeros(entries, dtype=torch.bool, device=device)
        table[bucket[position]] = True
        fresh = torch.zeros_like(table)
        if hash is not None:
            fresh = hash.fresh(torch.arange(entries, device=device), 4)
        for name, current, before_step, other in zip(
            "mv", moments(opt, p), old_moments, moments(reference_opt, q), strict=True
        ):
            # Signs are redrawn in a skipped step, too.
            expected = torch.where(fresh, 0, before_step.view(-1)) if name == "m" else before_step.view(-1)
            assert torch.equal(bits_of_each(current).view(-1)[table], expected[table])
            assert torch.equal(bits_of_each(current).view(-1)[~table], bits_of_each(other).view(-1)[~table])


@pytest.mark.parametrize("options", CASES, ids=str)
def test_skip_and_propagate_are_the_same_for_finite_gradients(options):
    results = []
    for nonfinite in ("skip", "propagate"):
        ps = parameters(torch.bfloat16, SHAPES, "cpu")
        opt = Collins(ps, lr=0.1, min_K=16, nonfinite=nonfinite, **options)
        for step in range(5):
            give_gradients(step, ps)
            opt.step()
        results.append([bits_of_each(t) for p in ps for t in (p, *moments(opt, p))])
    assert all(map(torch.equal, *results))


def test_propagate_is_the_default_and_spreads_to_the_bucket():
    p = torch.nn.Parameter(torch.ones(64, 64))
    opt = Collins([p], min_K=16)
    p.grad = torch.ones(64, 64)
    p.grad[0, 3] = float("nan")
    opt.step()
    assert p.isnan().sum() == 64  # of the second moment's bucket


def test_training_continues_after_a_skipped_step():
    p = torch.nn.Parameter(torch.ones(64, 64))
    opt = Collins([p], min_K=16, nonfinite="skip", lr=0.01)
    for step in range(20):
        p.grad = 2 * p.detach() if step % 3 else torch.full_like(p, float("inf"))
        opt.step()
    assert p.isfinite().all()
    assert p.square().mean() < 0.95


@pytest.mark.parametrize("in_backward", [False, True])
def test_error_names_the_parameters_and_changes_nothing(in_backward):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, bias=False))
    opt = Collins(net.named_parameters(), min_K=16, nonfinite="error", in_backward=in_backward)
    net(torch.randn(4, 64)).sum().backward()
    opt.step()
    opt.zero_grad()
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict()["state"])
    loss = net(torch.full((4, 64), float("nan"))).sum()
    name = "1.weight" if in_backward else "0.weight'"
    with pytest.raises(FloatingPointError, match=f"the gradient of parameter '{name}.* is not finite"):  # noqa: PT012
        loss.backward()
        opt.step()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert same(opt.state_dict()["state"], state)


def test_error_gives_the_number_of_parameters():
    ps = [torch.nn.Parameter(torch.ones(3)) for _ in range(8)] + [torch.nn.Parameter(torch.ones(0))]
    opt = Collins(ps, nonfinite="error")
    for p in ps:
        p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(FloatingPointError, match=r"parameter 0, parameter 1, .*parameter 4 and 3 more is not finite"):
        opt.step()
    assert not opt.state


def test_error_cannot_be_captured():
    with pytest.raises(ValueError, match="nonfinite must be propagate or skip with capturable=True"):
        Collins([torch.nn.Parameter(torch.ones(3))], nonfinite="error", capturable=True)
    with pytest.raises(ValueError, match="nonfinite must be propagate, skip or error, got 'ignore'"):
        Collins([torch.nn.Parameter(torch.ones(3))], nonfinite="ignore")


@pytest.mark.parametrize("memory", [None, "host"])
def test_a_grad_scaler_skips_the_step_that_overflows(memory):
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 64)
    opt = Collins(net.parameters(), lr=0.01, min_K=16, memory=memory)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=100)

    def step(x):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()

    step(torch.randn(8, 64))
    assert scaler.get_scale() == 2.0**16
    weights = [p.detach().clone() for p in net.parameters()]
    before = copy.deepcopy(opt.state_dict()["state"])
    step(torch.full((8, 64), float("inf")))
    assert scaler.get_scale() == 2.0**15
    assert all(map(torch.equal, weights, (p.detach() for p in net.parameters())))
    assert same(opt.state_dict()["state"], before)
    step(torch.randn(8, 64))
    assert scaler.get_scale() == 2.0**15
    assert not torch.equal(weights[0], net.weight.detach())
    assert opt.state[net.weight]["step"] == 2


def test_unscaled_gradients_give_the_same_steps_as_gradients_without_scaling():
    results = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        net = torch.nn.Linear(64, 64)
        opt = Collins(net.parameters(), lr=0.01, min_K=16)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(net(torch.randn(8, 64)).square().mean()).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
        results.append([p.detach() for p in net.parameters()])
    assert all(map(torch.equal, *results))  # a power of two leaves no rounding


def test_averaged_models_and_their_schedule():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    opt = Collins(net.parameters(), lr=0.01, min_K=16)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    schedule = torch.optim.swa_utils.SWALR(opt, swa_lr=0.001, anneal_epochs=4)
    data = [torch.randn(16, 64) for _ in range(8)]
    weights = []
    for x in data:
        opt.zero_grad()
        net(x).tanh().square().mean().backward()
        opt.step()
        averaged.update_parameters(net)
        schedule.step()
        weights.append(net[0].weight.detach().clone())
    assert opt.param_groups[0]["lr"] == pytest.approx(0.001)
    torch.testing.assert_close(averaged.module[0].weight.detach(), torch.stack(weights).mean(0))
    torch.optim.swa_utils.update_bn(data, averaged)
    expected = torch.cat([averaged.module[0](x) for x in data]).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, expected.detach(), rtol=1e-4, atol=1e-5)
