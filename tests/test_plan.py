"""Placement: every row once, in order, within every limit; and an error exactly if no split meets the limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collins import Collins
from collins.offload import MemoryPolicy, Pipeline, Request, Slab, TensorSpec, grouped, place
from collins.offload.budget import Training, budget_of, requests_of
from collins.offload.ring import Ring
from collins.offload.shapes import gpt2, llama, of_count
from collins.offload.slabs import offsets
from collins.offload.streams import HostStreams

KIB, GIB = 2**10, 2**30
DEFAULTS = {"compress_ratio": 32, "min_K": 1024, "hash": "block", "table_dtype": torch.float32}
LLAMA_70B = llama(80, 8192, 28672, 1024, 128256)
ANY_DEVICE = st.none() | st.integers(0, 24_000)


def requests(sizes):
    return [Request(f"p{i}", (4 * size,), size) for i, size in enumerate(sizes)]


def policies(tiers=("auto", "device", "host")):
    size = st.integers(0, 6000)
    return st.builds(
        MemoryPolicy,
        tier=st.sampled_from(tiers),
        device_reserve=size | st.sampled_from(["1%", "50%"]),
        host_reserve=size | st.sampled_from(["10%", "100%"]),
        device_budget=st.none() | st.integers(0, 15_000),
        staging_slots=st.integers(2, 4),
        transfer_size=st.integers(1, 2000),
    )


def bytes_of(value, total):
    return total * int(value[:-1]) // 100 if isinstance(value, str) else value


def ring_of(sizes, policy):
    """The bytes of the staging ring, computed from the transfers of these tables."""
    parts = [[TensorSpec((size,), torch.uint8)] for size in sizes]
    transfers = [
        offsets(part for i in members for part in parts[i])[1] for members in grouped(parts, policy.transfer_size)
    ]
    slots = [-(-size // 512) * 512 for size in sorted(transfers, reverse=True)]
    count = min(policy.staging_slots, len(slots))
    if len(slots) < 3:
        return count * max(slots, default=0)
    return slots[0] + (count - 1) * slots[2]


def fits(sizes, split, policy, figures):
    """Whether a split meets the limits, computed row by row from the docstring of `place`."""
    front, back = sizes[:split], sizes[split:]
    if (policy.tier == "device" and back) or (policy.tier == "host" and front):
        return False
    device_bytes = sum(front) + ring_of(back, policy)
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
    sizes = draw(st.lists(st.integers(0, 3000), max_size=12))
    device_free = draw(device)
    host_free = draw(st.integers(0, 45_000))
    figures = {
        "device_free": device_free,
        "device_total": None if device_free is None else device_free + draw(st.integers(0, 6000)),
        "host_free": host_free,
        "host_total": host_free + draw(st.integers(0, 6000)),
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
    assert [Request(*row[:4]) for row in plan.rows] == requests(sizes)
    tiers = [row.tier for row in plan.rows]
    split = tiers.count("device")
    assert tiers == ["device"] * split + ["host"] * (len(sizes) - split)
    assert split == max(splits)
    assert all(row.why for row in plan.rows)
    assert plan.device_bytes == sum(sizes[:split])
    assert plan.bytes == sum(sizes)
    assert plan.device_bytes + plan.staging_bytes <= plan.limits.device
    assert plan.host_bytes <= plan.limits.host
    assert plan.staging_bytes == sum(plan.ring.sizes) == ring_of(sizes[split:], policy)
    assert plan.slot_bytes >= max(sizes[split:], default=0)


@given(cases(tiers=["auto"], device=st.integers(12_000, 45_000)), st.data())
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
    assert [Request(*row[:4]) for row in spilled.rows] == requests(sizes)
    assert split == 0 or spilled.device_bytes + spilled.staging_bytes <= placed_bytes
    assert spilled.host_bytes <= plan.limits.host
    for before, after in zip(plan.rows, spilled.rows, strict=True):
        assert (before == after) == (before.tier == after.tier)


def test_a_spill_names_its_reason_and_makes_room_for_the_ring():
    policy = MemoryPolicy(device_reserve=0, host_reserve=0, staging_slots=2, transfer_size="1KiB")
    figures = {"device_free": 10 * KIB, "device_total": 10 * KIB, "host_free": 100 * KIB, "host_total": 100 * KIB}
    plan = place(requests([KIB] * 10), policy, **figures)
    assert plan.host_bytes == plan.staging_bytes == 0
    spilled = plan.spilled(6)  # 6 KiB were available: 4 for tables, and two slots of 1
    assert [row.tier for row in spilled.rows] == ["device"] * 4 + ["host"] * 6
    assert [row.why for row in spilled.rows[4:]] == ["makes room on the device"] * 2 + [
        "the device ran out of memory while placing"
    ] * 4
    assert spilled.staging_bytes == 2 * KIB
    assert "ran out of memory" in str(spilled)
    assert plan.spilled(6, leave=3 * KIB // 2).device_bytes == 2 * KIB
    assert plan.spilled(6, leave=100 * KIB).device_bytes == 0
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


class Counting(HostStreams):
    """Counts the bytes that are allocated."""

    allocated = 0

    def empty(self, nbytes):
        self.allocated += nbytes
        return super().empty(nbytes)


@given(
    st.lists(st.lists(st.integers(0, 2000), min_size=1, max_size=4), min_size=1, max_size=10),
    st.integers(1, 3000),
    st.integers(2, 5),
)
def test_the_ring_of_a_plan_is_what_the_pipeline_allocates(tables, transfer_size, slots):
    """Tables of several tensors, with gaps between them in a slab; for a plan, and for what a spill leaves of it."""
    parts = [[TensorSpec((size,), torch.uint8) for size in sizes] for sizes in tables]
    request_list = [Request(f"p{i}", (1,), sum(sizes), None, offsets(parts[i])[1]) for i, sizes in enumerate(tables)]
    policy = MemoryPolicy(device_reserve=0, host_reserve=0, staging_slots=slots, transfer_size=transfer_size)
    figures = {"device_free": GIB, "device_total": GIB, "host_free": GIB, "host_total": GIB}
    plan = place(request_list, policy, **figures)
    for from_row in range(len(tables)):
        spilled = plan.spilled(from_row)
        cut = sum(row.tier == "device" for row in spilled.rows)
        slabs = [Slab(p for i in group for p in parts[cut:][i]) for group in grouped(parts[cut:], transfer_size)]
        streams = Counting()
        pipeline = Pipeline(slabs, streams, slots=slots)
        assert streams.allocated == spilled.staging_bytes
        assert pipeline.ring == spilled.ring


@pytest.mark.parametrize(
    ("sizes", "slots", "expected"),
    [
        ([], 3, "0 slots of 0 B"),
        ([KIB], 3, "1 slot of 1.0 KiB"),
        ([4 * KIB, KIB], 3, "2 slots of 4.0 KiB"),
        ([4 * KIB, KIB, KIB], 2, "1 slot of 4.0 KiB, 1 of 1.0 KiB"),
        ([4 * KIB, KIB, KIB, 3 * KIB], 4, "1 slot of 4.0 KiB, 3 of 1.0 KiB"),
        ([4 * KIB, KIB, 2 * KIB, 3 * KIB], 3, "1 slot of 4.0 KiB, 2 of 2.0 KiB"),
        ([KIB, KIB - 511, KIB - 511], 3, "3 slots of 1.0 KiB"),  # in multiples of 512 bytes
    ],
)
def test_one_slot_is_as_large_as_the_largest_transfer_the_others_as_the_third(sizes, slots, expected):
    policy = MemoryPolicy("host", staging_slots=slots, transfer_size=1)
    figures = {"device_free": GIB, "device_total": GIB, "host_free": GIB, "host_total": GIB}
    plan = place(requests(sizes), policy, **figures)
    assert str(plan.ring) == expected
    assert len(plan.ring.sizes) == plan.ring.slots
    assert plan.staging_bytes == sum(plan.ring.sizes)
    if sizes:
        assert f"({expected}) staging" in plan.totals()


def test_a_plan_of_many_rows_is_quick():
    """The ring is found for all cuts in one pass: a quadratic search would take minutes."""
    figures = {"device_free": 2000 * KIB, "device_total": GIB, "host_free": GIB, "host_total": GIB}
    policy = MemoryPolicy(device_reserve=0, transfer_size="64KiB")
    plan = place(requests([KIB] * 50_000), policy, **figures)
    assert plan.ring == Ring(3, 64 * KIB, 64 * KIB)
    assert plan.device_bytes == (2000 - 3 * 64) * KIB


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
    host = {"device_free": None, "device_total": None, "host_free": 100 * KIB, "host_total": 1000 * KIB}
    policy = MemoryPolicy(device_budget="6KiB", host_reserve=0, staging_slots=2, transfer_size="1KiB")
    plan = place(requests([4 * KIB, KIB, KIB]), policy, **host)
    assert [row.tier for row in plan.rows] == ["device", "device", "device"]
    plan = place(requests([3 * KIB, KIB, KIB, KIB, KIB]), policy, **host)
    assert [row.tier for row in plan.rows] == ["device", "device", "host", "host", "host"]
    assert "device (the CPU)" in str(plan)


def test_a_plan_prints_each_row_with_its_reason_and_a_summary_each_group():
    policy = MemoryPolicy(device_reserve="1%", host_reserve=0, device_budget="25%", transfer_size="1KiB")
    plan = place(
        [Request(f"layer.{i}.weight", (16, 16), KIB) for i in range(10)],
        policy,
        device_free=26 * KIB,
        device_total=26 * KIB,
        host_free=GIB,
        host_total=GIB,
    )
    lines = str(plan).splitlines()
    assert [line.split()[:3] for line in lines[2:12]] == [
        [f"layer.{i}.weight", "16x16", "device" if i < 3 else "host"] for i in range(10)
    ]
    assert "first within the device's 6.5 KiB" in lines[2]
    assert "the device's 6.5 KiB are spent" in lines[11]
    assert lines[12].split() == ["total", "10,240"]
    assert lines[13] == (
        "device: 3.0 KiB of tables, 3.0 KiB (3 slots of 1.0 KiB) staging; may take 6.5 KiB"
        " (26.0 KiB free less device_reserve 1%, device_budget 25%)"
    )
    summary = plan.summary().splitlines()
    assert len(summary) == 2 + 2 + 1 + 2
    assert summary[2].split()[-2:] == ["3", "3,072"]
    assert summary[3].split()[-2:] == ["7", "7,168"]


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
