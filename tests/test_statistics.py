"""`statistics`: correct for every way to step, without an effect on results, and without synchronization."""

import copy
import math
import warnings

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
    with_kernel,
)
from torch import nn

from collins import Collins
from collins.offload.streams import HostStreams
from collins.statistics import SAMPLE, Reading, sample

SHAPES, FEW_SHAPES = STEP_SHAPES, FEW_STEP_SHAPES
WAYS = {
    **STEP_WAYS,
    "in backward": {"compile": False, "in_backward": True},
    "host in backward": {"compile": False, "in_backward": True, "memory": "host"},
}


RATIOS = {"compiled": (8,), "kernel": (1, 8)}


def make_optimizer(way, params, **options):
    if way == "kernel":
        pytest.importorskip("triton")
    opt = Collins(params, **{**OPTIONS, **WAYS[way], **options})
    return with_kernel(opt) if way == "kernel" else opt


def shapes(way):
    return FEW_SHAPES if way in ("compiled", "kernel") else SHAPES


def step(opt, ps, number, value=None, indices=()):
    """A step, after backward or in it, whose gradients are `wrong` at the given positions of every parameter."""
    give_gradients(number, ps)
    grads = [p.grad for p in ps]
    for g in grads:
        for index in indices:
            if index < g.numel():
                g.view(-1)[index] = value
    if opt.in_backward:
        opt.zero_grad()
        sum((p * g).sum() for p, g in zip(ps, grads, strict=True)).backward()
    opt.step()


def statistics_of(opt):
    return {key: float(value) for key, value in opt.statistics().items()}


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(("way", "ratio"), [(way, ratio) for way in WAYS for ratio in RATIOS.get(way, (1, 8, 32))])
def test_skipped_buckets_are_counted(way, ratio):
    ps = parameters(torch.float32, shapes(way))
    opt = make_optimizer(way, ps, nonfinite="skip", compress_ratio=ratio)
    indices, expected, total = (3, 5, 1000, 1200), 0, 0
    for p in ps:
        (entry,) = (entry for entry in opt._members() if entry.p is p)
        load, hash = int(opt._stepper.spec(entry).update.loads[1]), opt.hash_of(p)
        bucket = torch.arange(p.numel(), device=p.device) // load
        if way == "universal" and hash is not None:
            bucket = hash.bucket(torch.arange(p.numel(), device=p.device))
            total += p.numel()
            expected += int(
                torch.isin(bucket, bucket[torch.tensor([index for index in indices if index < p.numel()])]).sum()
            )
        else:
            total += -(-p.numel() // load)
            expected += len({int(bucket[index]) for index in indices if index < p.numel()})
    assert 0 < expected < total
    assert statistics_of(opt)["skipped_buckets"] == 0
    step(opt, ps, 0)
    assert statistics_of(opt)["skipped_buckets"] == 0
    step(opt, ps, 1, math.nan, indices)
    assert statistics_of(opt)["skipped_buckets"] == expected
    step(opt, ps, 2, math.inf, range(4160))
    step(opt, ps, 3, math.inf, indices)
    statistics = opt.statistics()
    assert int(statistics["skipped_buckets"]) == 2 * expected + total
    assert int(statistics["skipped_steps"]) == 1
    assert all(
        statistics[key].dtype == torch.int64 and statistics[key].shape == ()
        for key in ("skipped_buckets", "skipped_steps")
    )


def test_only_buckets_that_can_be_skipped_are_counted():
    ps = parameters(torch.float32, FEW_SHAPES)
    opt = Collins([{"params": ps[:1], "nonfinite": "skip"}, {"params": ps[1:]}], **OPTIONS)
    step(opt, ps, 0, math.nan, range(4160))
    assert statistics_of(opt)["skipped_steps"] == 1
    propagating = Collins(parameters(torch.float32, FEW_SHAPES), **OPTIONS)
    step(propagating, [p for group in propagating.param_groups for p in group["params"]], 0, math.nan, range(4160))
    assert statistics_of(propagating)["skipped_buckets"] == statistics_of(propagating)["skipped_steps"] == 0


@pytest.mark.parametrize("way", ["eager", "in backward", "capturable"])
def test_a_hundred_completely_skipped_steps_give_one_warning(way):
    ps = parameters(torch.float32, [(40,)])
    opt = make_optimizer(way, ps, nonfinite="skip")

    def steps(first, last, value):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for number in range(first, last):
                step(opt, ps, number, value, range(40))
        return [str(warning.message) for warning in warned if issubclass(warning.category, UserWarning)]

    assert steps(0, 60, math.nan) == []
    assert steps(60, 61, 0.0) == []
    assert steps(61, 150, math.nan) == []
    assert int(opt.statistics()["skipped_steps"]) == 149
    (message,) = steps(150, 220, math.nan)
    assert "nonfinite='skip' has skipped every gradient in 139 consecutive steps" in message
    assert steps(220, 400, math.nan) == []


def test_a_nonfinite_norm_counts_as_a_skipped_step():
    ps = parameters(torch.float32, SHAPES)
    opt = Collins(ps, **OPTIONS, nonfinite="skip", max_grad_norm=1.0)
    step(opt, ps, 0, math.inf, [0])
    statistics = opt.statistics()
    assert int(statistics["skipped_steps"]) == 1
    assert statistics["grad_norm"].isinf()


def sizes(group, ps, before):
    new, old = (torch.cat([p.detach().double().flatten() for p in tensors]) for tensors in (ps, before))
    values = {f"update_rms/{group}": new - old, f"weight_rms/{group}": new}
    values = {key: value.square().mean().sqrt() for key, value in values.items()}
    return {**values, f"moved_share/{group}": (new != old).double().mean()} if ps[0].dtype == torch.bfloat16 else values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_measured_updates_equal_actual_ones_and_measuring_changes_no_bit(way, dtype):
    if (way, dtype) in (("compiled", torch.float32), ("kernel", torch.bfloat16)):
        pytest.skip("as in the other dtype, and slow")
    ps, copies = parameters(dtype, shapes(way)), parameters(dtype, shapes(way))
    opts = [
        make_optimizer(way, [{"params": params[:1]}, {"params": params[1:], "lr": 1e-3}, {"params": []}])
        for params in (ps, copies)
    ]
    assert opts[0].statistics().keys() == {"grad_norm", "skipped_buckets", "skipped_steps", "link_bytes"}
    for number in range(4):
        before = [p.detach().double() for p in ps]
        if number in (0, 3):
            opts[0].statistics(updates=True)
        for opt, params in zip(opts, (ps, copies), strict=True):
            step(opt, params, number)
        if number in (0, 3):
            expected = {**sizes(0, ps[:1], before[:1]), **sizes(1, ps[1:], before[1:])}
        statistics = {key: value for key, value in opts[0].statistics().items() if "/" in key}
        assert statistics.keys() == expected.keys()  # of the last step that was measured
        for key, value in expected.items():
            torch.testing.assert_close(statistics[key].double(), value, rtol=1e-4, atol=0)
    for opt in opts:
        opt.state_dict()
    for p, q in zip(ps, copies, strict=True):
        assert same([p.detach(), *moments(opts[0], p)], [q.detach(), *moments(opts[1], q)])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_large_parameters_are_sampled(layout):
    torch.manual_seed(0)
    weights = {
        "contiguous": lambda: torch.randn(512, 512),
        "transposed": lambda: torch.randn(512, 512).t(),
        "strided": lambda: torch.randn(512, 1024)[:, ::2],
    }[layout]()
    p = nn.Parameter(weights * torch.linspace(0.1, 2, 512))  # columns of different sizes
    small_param = nn.Parameter(torch.full((8,), 100.0))
    opt = Collins([p, small_param], lr=0.1)
    p.grad, small_param.grad = torch.randn(512, 512), torch.zeros(8)
    before = p.detach().clone()
    opt.statistics(updates=True)
    opt.step()
    statistics = opt.statistics()
    assert p.numel() > 8 * SAMPLE
    new = torch.cat([p.detach().flatten(), small_param.detach()])
    change = torch.cat([(p.detach() - before).flatten(), small_param.detach() - 100])
    for name, value in (("weight_rms/0", new), ("update_rms/0", change)):
        assert float(statistics[name]) == pytest.approx(float(value.square().mean().sqrt()), rel=0.03)


@pytest.mark.parametrize("count", [0, 1, SAMPLE, SAMPLE + 1, 20_000, 4 * SAMPLE - 1, 4 * SAMPLE])
def test_a_sample_has_at_most_so_many_elements(count):
    taken = len(sample(torch.zeros(count)))
    assert taken == count if count <= SAMPLE else SAMPLE // 3 <= taken <= SAMPLE


def test_a_measured_step_allocates_no_memory_of_the_parameters_size():
    from helpers import Allocations

    p = nn.Parameter(torch.ones(2048, 2048))
    opt = Collins([p], compile=False)
    peaks = []
    for updates in (False, False, True):
        opt.statistics(updates)
        p.grad = torch.ones_like(p)
        with Allocations() as allocations:
            opt.step()
        peaks.append(allocations.peak)
    assert peaks[2] <= peaks[1] + 64 * SAMPLE


def test_a_failed_step_does_not_affect_the_measurement_of_the_next_one():
    ps = parameters(torch.float32, [(40,), (8,)])
    opt = Collins(ps, **OPTIONS)
    step(opt, ps, 0)
    opt.statistics(updates=True)
    give_gradients(1, ps)
    ps[1].grad = torch.ones(8).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        opt.step()
    before = torch.cat([p.detach().clone() for p in ps])
    step(opt, ps, 1)
    change = torch.cat([p.detach() for p in ps]) - before
    torch.testing.assert_close(opt.statistics()["update_rms/0"], change.square().mean().sqrt())


def make_16_bit(way="eager", lr=1e-4, rounding=False, dtype=torch.bfloat16, **options):
    p = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
    return [p], make_optimizer(way, [p], **{"lr": lr, "weight_decay": 0.0, "stochastic_rounding": rounding, **options})


@pytest.mark.parametrize("way", ["eager", "in backward", "capturable"])
def test_a_rate_too_small_for_nearest_rounding_gives_one_warning(way):
    ps, opt = make_16_bit(way)
    opt.statistics(updates=True)
    with pytest.warns(UserWarning, match="lr is too small to move most 16-bit weights of group 0 with lr=0.0001"):
        step(opt, ps, 0)
    assert float(opt.statistics()["moved_share/0"]) < 0.5
    for number in range(1, 4):  # where any warning is an error
        opt.statistics(updates=True)
        step(opt, ps, number)
    assert float(opt.statistics()["moved_share/0"]) < 0.5


@pytest.mark.parametrize(
    "case",
    [
        {"lr": 1e-1},
        {"rounding": None},
        {"rounding": True},
        {"dtype": torch.float32},
        {"lr": torch.tensor(1e-1)},
        {"lr": 1e-2, "dtype": torch.float16},
    ],
    ids=str,
)
def test_no_warning_for_other_rates_and_roundings(case):
    ps, opt = make_16_bit(**case)
    for number in range(3):
        opt.statistics(updates=True)
        step(opt, ps, number)


def test_the_rate_is_checked_once_without_a_call():
    ps, opt = make_16_bit(lr=torch.tensor(1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(99):
            step(opt, ps, number)
    assert "moved_share/0" not in opt.statistics()
    with pytest.warns(UserWarning, match="lr is too small to move most 16-bit weights of group 0"):
        step(opt, ps, 99)
    for number in range(100, 210):
        step(opt, ps, number)


def test_link_bytes_equal_the_copied_bytes(monkeypatch):
    sizes = []
    original = HostStreams.copy

    def counting_copy(self, kind, target, source):
        sizes.append(target.nbytes)
        original(self, kind, target, source)

    monkeypatch.setattr(HostStreams, "copy", counting_copy)
    ps = parameters(torch.float32, SHAPES)
    opt = Collins(ps, **OPTIONS, memory={"tier": "host", "transfer_size": 2000})
    for number in range(3):
        step(opt, ps, number)
        link_bytes = opt.statistics()["link_bytes"]
        assert type(link_bytes) is int
        assert link_bytes == sum(sizes) > 2 * number * (opt.memory_report().state_bytes - 4 * len(ps))
    resident = Collins(ps, **OPTIONS)
    step(resident, ps, 0)
    assert resident.statistics()["link_bytes"] == 0


def test_steps_of_single_parameters_are_counted_once():
    ps = parameters(torch.float32, FEW_SHAPES)
    opt = Collins(ps, **OPTIONS, nonfinite="skip")
    for _ in range(3):
        for p in ps:
            p.grad = torch.full_like(p, math.nan)
            opt.step_parameter(p)
            p.grad = None
    opt.step()
    assert int(opt.statistics()["skipped_steps"]) == 3


def test_readings_keep_their_values_and_copies_restart_from_zero():
    ps = parameters(torch.float32, FEW_SHAPES)
    opt = Collins(ps, **OPTIONS, nonfinite="skip", max_grad_norm=1.0)
    step(opt, ps, 0, math.nan, [0])
    statistics = opt.statistics()
    before = copy.deepcopy(statistics)
    step(opt, ps, 1, math.nan, [0])
    assert int(statistics["skipped_steps"]) == int(before["skipped_steps"]) == 1
    assert int(statistics["skipped_buckets"]) == int(before["skipped_buckets"]) > 0
    assert int(opt.statistics()["skipped_steps"]) == 2
    _, other = copy.deepcopy((ps, opt))
    assert int(other.statistics()["skipped_buckets"]) == 0


class _Event:
    """An event that the device reaches on request."""

    def __init__(self):
        self.reached = False

    def query(self):
        return self.reached


def test_a_reading_is_available_once_it_has_arrived():
    reading, event = Reading(), _Event()
    assert reading.take() is None
    reading._under_way = torch.tensor(3), event
    assert reading.take() is None
    event.reached = True
    assert int(reading.take()) == 3
    assert reading.take() is None
    value = torch.tensor(5)
    reading.ask(value)
    value.fill_(6)
    assert int(reading.take()) == 5


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("in_backward", [False, True])
def test_statistics_do_not_synchronize(in_backward):
    ps = parameters(torch.bfloat16, SHAPES, "cuda")
    opt = Collins(ps, **OPTIONS, nonfinite="skip", max_grad_norm=1.0, in_backward=in_backward)
    grads = [torch.randn_like(p) for p in ps]

    def take_step():
        if in_backward:
            sum((p * g).sum() for p, g in zip(ps, grads, strict=True)).backward()
        else:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g
        opt.step()

    for _ in range(3):
        opt.statistics(updates=True)
        take_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(60):
            opt.statistics(updates=True)
            take_step()
        statistics = opt.statistics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(statistics["grad_norm"]) > 1
    assert 0 < float(statistics["moved_share/0"]) <= 1


@pytest.mark.cuda
def test_statistics_of_a_device_arrive_later_with_a_warning():
    ps = parameters(torch.float32, [(40,)], "cuda")
    opt = Collins(ps, **OPTIONS, nonfinite="skip")

    def steps():
        for number in range(160):
            step(opt, ps, number, math.nan, range(40))
            torch.cuda.synchronize()

    with pytest.warns(UserWarning, match="has skipped every gradient in 1.. consecutive steps"):
        steps()
