"""Placement: every row once, in order, within every limit; and an error exactly if no split meets the limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collins import Collins
from collins.offload import MemoryPolicy, Request, place
from collins.offload.budget import Training, budget_of, requests_of
from collins.offload.shapes import gpt2, llama, of_count

GIB = 2**30
DEFAULTS = {"compress_ratio": 32, "min_K": 1024, "hash": "block", "table_dtype": torch.float32}
LLAMA_70B = llama(80, 8192, 28672, 1024, 128256)
ANY_DEVICE = st.none() | st.integers(0, 800)


def requests(sizes):
    return [Request(f"p{i}", (4 * size,), size) for i, size in enumerate(sizes)]


def policies(tiers=("auto", "device", "host")):
    size = st.integers(0, 200)
    return st.builds(
        MemoryPolicy,
        tier=st.sampled_from(tiers),
        device_reserve=size | st.sampled_from(["1%", "50%"]),
        host_reserve=size | st.sampled_from(["10%", "100%"]),
        device_budget=st.none() | st.integers(0, 500),
        staging_slots=st.integers(2, 4),
        transfer_size=st.integers(1, 60),
    )


def bytes_of(value, total):
    return total * int(value[:-1]) // 100 if isinstance(value, str) else value


def fits(sizes, split, policy, figures):
    """Whether a split meets the limits, computed row by row from the docstring of `place`."""
    front, back = sizes[:split], sizes[split:]
    if (policy.tier == "device" and back) or (policy.tier == "host" and front):
        return False
    slot = max([min(policy.transfer_size, sum(back)), *back])
    device_bytes = sum(front) + policy.staging_slots * slot
    if policy.device_budget is not None and device_bytes > policy.device_budget:
        return False
    reserve = bytes_of(policy.host_reserve, figures["host_total"])
    if sum(back) and sum(back) + reserve > figures["host_free"]:
        return False
    if figures["device_free"] is None:
        return device_bytes + sum(back) + (reserve if sum(back) else 0) <= figures["host_free"]
    reserve = bytes_of(policy.device_reserve, figures["device_total"])
    return device_bytes == 0 or device_bytes + reserve <= figures["device_free"]


@st.composite
def cases(draw, tiers=("auto", "device", "host"), device=ANY_DEVICE):
    sizes = draw(st.lists(st.integers(0, 100), max_size=12))
    device_free = draw(device)
    host_free = draw(st.integers(0, 1500))
    figures = {
        "device_free": device_free,
        "device_total": None if device_free is None else device_free + draw(st.integers(0, 200)),
        "host_free": host_free,
        "host_total": host_free + draw(st.integers(0, 200)),
    }
    return sizes, draw(policies(tiers)), figures


@given(cases())
def test_placed_in_order_within_every_limit_or_rejected_if_impossible(case):
    sizes, policy, figures = case
    splits = [split for split in range(len(sizes) + 1) if fits(sizes, split, policy, figures)]
    if not splits:
        with pytest.raises(MemoryError):
            place(requests(sizes), policy, **figures)
        return
    plan = place(requests(sizes), policy, **figures)
    assert plan == place(requests(sizes), policy, **figures)
    assert [row[:4] for row in plan.rows] == requests(sizes)
    tiers = [row.tier for row in plan.rows]
    split = tiers.count("device")
    assert tiers == ["device"] * split + ["host"] * (len(sizes) - split)
    assert split == max(splits)
    assert all(row.why for row in plan.rows)
    assert plan.device_bytes == sum(sizes[:split])
    assert plan.bytes == sum(sizes)
    assert plan.device_bytes + plan.staging_bytes <= plan.limits.device
    assert plan.host_bytes <= plan.limits.host
    if plan.host_bytes:
        assert plan.staging_bytes == policy.staging_slots * plan.slot_bytes
        assert plan.slot_bytes >= max(sizes[split:])
    else:
        assert plan.staging_bytes == 0


@given(cases(tiers=["auto"], device=st.integers(400, 1500)), st.data())
def test_a_spill_uses_the_space_that_the_device_has_shown(case, data):
    sizes, policy, figures = case
    try:
        plan = place(requests(sizes), policy, **figures)
    except MemoryError:  # nothing is placed that could spill
        return
    if not sizes:
        return
    failed_row = data.draw(st.integers(0, len(sizes) - 1))
    placed_bytes = sum(row.bytes for row in plan.rows[:failed_row] if row.tier == "device") + plan.staging_bytes
    try:
        spilled = plan.spilled(failed_row)
    except MemoryError:
        assert sum(sizes) > plan.limits.host
        return
    split = [row.tier for row in spilled.rows].count("device")
    assert split <= failed_row
    assert [row.tier for row in spilled.rows] == ["device"] * split + ["host"] * (len(sizes) - split)
    assert [row[:4] for row in spilled.rows] == requests(sizes)
    assert split == 0 or spilled.device_bytes + spilled.staging_bytes <= placed_bytes
    assert spilled.host_bytes <= plan.limits.host
    for before, after in zip(plan.rows, spilled.rows, strict=True):
        assert (before == after) == (before.tier == after.tier)


def test_a_spill_names_its_reason_and_makes_room_for_the_ring():
    policy = MemoryPolicy(device_reserve=0, host_reserve=0, staging_slots=2, transfer_size=10)
    figures = {"device_free": 100, "device_total": 100, "host_free": 1000, "host_total": 1000}
    plan = place(requests([10] * 10), policy, **figures)
    assert plan.host_bytes == plan.staging_bytes == 0
    spilled = plan.spilled(6)  # 60 bytes were available: 40 for tables, and two slots of 10
    assert [row.tier for row in spilled.rows] == ["device"] * 4 + ["host"] * 6
    assert [row.why for row in spilled.rows[4:]] == ["makes room on the device"] * 2 + [
        "the device ran out of memory while placing"
    ] * 4
    assert spilled.staging_bytes == 20
    assert "ran out of memory" in str(spilled)
    assert plan.spilled(6, leave=15).device_bytes == 20
    assert plan.spilled(6, leave=1000).device_bytes == 0
    for from_row in (-1, 10):
        with pytest.raises(IndexError, match=rf"from_row must be in \[0, 9\], got {from_row}"):
            plan.spilled(from_row)


def test_placements_that_cannot_spill():
    figures = {"device_free": 100, "device_total": 100, "host_free": 20, "host_total": 20}
    plan = place(requests([10] * 5), MemoryPolicy(tier="device"), **figures)
    with pytest.raises(MemoryError, match="ran out of memory while placing p3 of 50 B of tables under tier='device'"):
        plan.spilled(3)
    plan = place(requests([10] * 5), MemoryPolicy(), **figures)
    with pytest.raises(MemoryError, match=r"ran out of memory while placing.*host may give 18 B"):
        plan.spilled(3)


def test_an_error_contains_every_figure_and_a_remedy():
    policy = MemoryPolicy(device_reserve="25%", host_reserve="1GiB", device_budget="2GiB", transfer_size="1GiB")
    figures = {"device_free": 3 * GIB, "device_total": 4 * GIB, "host_free": 5 * GIB, "host_total": 8 * GIB}
    with pytest.raises(MemoryError) as caught:
        place(requests([GIB] * 6), policy, **figures)
    for part in (
        "6.00 GiB of tables",
        "tier='auto'",
        "2.00 GiB (3.00 GiB free less device_reserve 25% and device_budget 2GiB)",
        "3.00 GiB of it for staging (3 slots of 1.00 GiB)",
        "4.00 GiB (5.00 GiB free less host_reserve 1GiB)",
        "lower a reserve",
        "compress_ratio",
    ):
        assert part in str(caught.value)
    with pytest.raises(MemoryError, match="or use tier='auto'"):
        place(requests([GIB] * 6), MemoryPolicy(tier="host"), **figures)


@pytest.mark.parametrize("name", ["device_free", "device_total", "host_free", "host_total"])
def test_invalid_figures_are_rejected(name):
    figures = dict.fromkeys(("device_free", "device_total", "host_free", "host_total"), 10)
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        place([], MemoryPolicy(), **{**figures, name: -1})
    if name.startswith("device"):
        with pytest.raises(ValueError, match=f"must both be given or both None, got .*{name}=None"):
            place([], MemoryPolicy(), **{**figures, name: None})


def test_tables_of_parameters_on_the_cpu_stay_on_the_cpu():
    host = {"device_free": None, "device_total": None, "host_free": 100, "host_total": 1000}
    plan = place(requests([40, 40]), MemoryPolicy(), **host)  # 10% of the total is all that is free
    assert [(row.tier, row.why) for row in plan.rows] == [("device", "its parameter is on the CPU")] * 2
    assert plan.staging_bytes == 0
    policy = MemoryPolicy(device_budget=60, host_reserve=0, staging_slots=2, transfer_size=10)
    plan = place(requests([40, 10, 10]), policy, **host)
    assert [row.tier for row in plan.rows] == ["device", "device", "device"]
    plan = place(requests([30, 10, 10, 10, 10]), policy, **host)
    assert [row.tier for row in plan.rows] == ["device", "device", "host", "host", "host"]
    assert "device (the CPU)" in str(plan)


def test_a_plan_prints_each_row_with_its_reason_and_a_summary_each_group():
    policy = MemoryPolicy(device_reserve="1%", host_reserve=0, device_budget="25%", transfer_size=100)
    plan = place(
        [Request(f"layer.{i}.weight", (16, 16), 64) for i in range(10)],
        policy,
        device_free=2000,
        device_total=2000,
        host_free=GIB,
        host_total=GIB,
    )
    lines = str(plan).splitlines()
    assert [line.split()[:3] for line in lines[2:12]] == [
        [f"layer.{i}.weight", "16x16", "device" if i < 3 else "host"] for i in range(10)
    ]
    assert "first within the device's 500 B" in lines[2]
    assert "the device's 500 B are spent" in lines[11]
    assert lines[12].split() == ["total", "640"]
    assert lines[13] == (
        "device: 192 B of tables, 300 B (3 slots of 100 B) staging; may take 500 B"
        " (2.0 KiB free less device_reserve 1%, device_budget 25%)"
    )
    summary = plan.summary().splitlines()
    assert len(summary) == 2 + 2 + 1 + 2
    assert summary[2].split()[-2:] == ["3", "192"]
    assert summary[3].split()[-2:] == ["7", "448"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        DEFAULTS,
        {**DEFAULTS, "hash": "universal", "table_dtype": torch.bfloat16},
        {**DEFAULTS, "compress_ratio": 100},
        {**DEFAULTS, "compress_ratio": 1},
        {**DEFAULTS, "min_K": 50000, "table_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_requests_equal_the_report_of_the_optimizer(options, dtype):
    if dtype == torch.float64:
        options = {**options, "table_dtype": dtype}
    model = llama(2, 256, 688, 16, 1000)  # small tables for keys and values, and large ones
    parameters = [
        (name, torch.nn.Parameter(torch.empty(shape, device="meta", dtype=dtype))) for name, shape in model.parameters()
    ]
    report = Collins(parameters, **options).memory_report()
    step = torch.float32.itemsize
    request_list = list(requests_of(model, dtype, **options))
    assert [(f"parameter {r.name!r}", r.shape, r.bytes) for r in request_list] == [
        (row.name, row.shape, row.state_bytes - step) for row in report.rows
    ]


def test_parameter_counts_of_real_models():
    assert gpt2().count == 124_439_808
    assert llama(32, 4096, 11008, 4096, 32000).count == 6_738_415_616
    assert llama(80, 8192, 28672, 1024, 32000).count == 68_976_648_192
    assert LLAMA_70B.count == 70_553_706_496
    assert llama(16, 2048, 8192, 512, 128256, tied=True).count == 1_235_814_400
    assert len(LLAMA_70B.shapes) == 723


@given(st.integers(1, 10**13))
def test_a_count_of_parameters_is_matched_exactly(count):
    model = of_count(count)
    assert model.count == count
    if count < 10**9:
        assert sum(torch.Size(shape).numel() for shape in model.shapes) == count


def test_the_budget_of_70b_on_one_141_gb_device():
    budget = budget_of(LLAMA_70B, Training())
    assert budget.weights / GIB == pytest.approx(131.4, rel=1e-3)
    assert budget.gradients == budget.weights
    assert budget.gradients_in_backward / GIB == pytest.approx(1.96, rel=1e-2)  # the head's
    assert budget.checkpoints / GIB == 2.5
    remaining = 139.8 * GIB - budget.held(in_backward=True)
    request_list = list(requests_of(LLAMA_70B, torch.bfloat16, **DEFAULTS))
    assert sum(request.bytes for request in request_list) / GIB == pytest.approx(16.4, rel=1e-2)
    layer = sum(request.bytes for request in request_list if request.name.startswith("model.layers.7."))
    assert layer / 2**20 == pytest.approx(204, rel=1e-2)
    assert (remaining / GIB) - 0.4 == pytest.approx(2.3, abs=0.1)  # of slack beside a ring of 0.4
    plan = place(
        request_list,
        MemoryPolicy(tier="host"),
        device_free=int(remaining),
        device_total=int(139.8 * GIB),
        host_free=64 * GIB,
        host_total=64 * GIB,
    )
    assert plan.host_bytes / GIB == pytest.approx(16.4, rel=1e-2)
    assert plan.slot_bytes == max(request.bytes for request in request_list)


def test_the_parts_of_a_budget_by_hand():
    model = llama(2, 8, 32, 4, 100, query=16)
    block = 2 * 8 * 16 + 2 * 4 * 8 + 3 * 8 * 32 + 2 * 8
    budget = budget_of(model, Training(torch.float32, batch_size=3, seq_len=5, loss_chunks=4))
    assert budget.weights == budget.gradients == 4 * (2 * 800 + 8 + 2 * block)
    assert budget.gradients_in_backward == 4 * block
    assert budget.checkpoints == 2 * 15 * 8 * 4
    assert budget.recomputed == 15 * (3 * 8 + 2 * 16 + 2 * 4 + 7 * 32) * 4
    assert budget.logits == 4 * 100 * 8
    assert budget.held(True) == budget.weights + 4 * block + budget.activations
    assert budget.held(False) == 2 * budget.weights + budget.activations
