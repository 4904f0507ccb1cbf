"""Weights and state are bitwise the same in every tier, also if memory runs out."""

import copy
import gc
import weakref

import pytest
import torch
from fake_streams import MODES, FakeStreams, FreedMemoryError
from helpers import OPTIONS, on_machine
from torch import nn
from training import TIERS, backward, make_model, same_bits, take_steps, train_model

from collins import Collins
from collins.compile import Engine
from collins.formats import TensorSpec
from collins.offload import MemoryPolicy, Request, pinned_bytes, set_pin_limit, slabs, staging, tiers
from collins.offload.memory import DeviceFigures
from collins.offload.staging import Backend, StateRequest, zeros
from collins.offload.streams import HostStreams, StreamKind, WaitFor
from collins.offload.tiers import device_room
from collins.roles import Role
from collins.update import update_

CASES = [
    (torch.float32, {}),
    (torch.float32, {"decode": "sketch", "rehash_period": None}),
    (torch.float32, {"hash": "universal"}),
    (torch.float32, {"table_dtype": torch.bfloat16, "compress_ratio": 4}),
    (torch.float64, {"table_dtype": torch.float64, "maximize": True}),
    (torch.float64, {"hash": "universal", "decode": "sketch"}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"table_dtype": torch.bfloat16}),
    (torch.bfloat16, {"table_dtype": torch.bfloat16, "hash": "universal", "decode": "sketch"}),
    (torch.float16, {"stochastic_rounding": False, "compress_ratio": 1}),
]
GIB = 2**30


@pytest.fixture(autouse=True)
def _pin_limit_as_before():
    yield
    set_pin_limit(None)


def tiers_of(opt):
    return [row.tier for plan in opt.placement for row in plan.rows]


@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize("tier", ["device", "host", "mixed"])
@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_every_tier_gives_bitwise_the_same_result(dtype, options, tier, in_backward, device):
    policy = TIERS[tier]
    options = {**options, "model": {"dtype": dtype, "device": device, "odd": dtype == torch.float32}}
    if tier == "mixed":
        sizes = train_model(steps=0, **options)[1].memory_report().rows
        policy = {**policy, "device_budget": 4 * sum(row.state_bytes - 4 for row in sizes) // 5}
    expected = train_model(**options)
    actual = train_model(**options, memory=policy, in_backward=in_backward)
    assert same_bits(expected, actual)
    assert set(tiers_of(actual[1])) == ({"device", "host"} if tier == "mixed" else {tier})


@pytest.mark.parametrize("compile", [True, pytest.param(None, marks=pytest.mark.cuda)])
def test_compiled_steps_are_bitwise_the_same_on_the_host(compile, device):
    """With one transfer per parameter, since the compiler's rounding depends on which tensors are stacked."""
    if compile is None and device.type == "cpu":
        pytest.skip("the fastest way on the CPU is the eager one")
    torch.manual_seed(0)
    start = nn.Linear(64, 96, bias=False).to(device)
    results = []
    for options in ({}, {"memory": "host"}, {"memory": "host", "in_backward": True}):
        model = copy.deepcopy(start)
        opt = Collins(model.parameters(), **OPTIONS, compile=compile, **options)
        for step in range(4):
            model(torch.full((2, 64), 1.0 + step, device=device)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        results.append((model, opt))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


class FakeEngine(Engine):
    """Launches each task on the current stream of a fake device."""

    def __init__(self, fake):
        super().__init__(False)
        self.fake = fake

    def executor(self, tasks, grads):
        return FakeExecutor(self.fake, tasks)

    def executor_of_one(self, task):
        return FakeExecutor(self.fake, [task])


class FakeExecutor:
    def __init__(self, fake, tasks):
        self.fake, self.tasks = fake, tasks

    def bind(self, grads):
        return grads

    def run(self, grads, scalars, rows, done):
        for number, (task, g) in enumerate(zip(self.tasks, grads, strict=True)):
            without_tensors, count = task._replace(p=None, m=None, v=None), len(task.m)  # keeps no tensor alive

            def kernel(p, g, *moments, task=without_tensors, count=count, hp=scalars[rows[number]]):
                update_(task._replace(p=p, m=moments[:count], v=moments[count:]), g, hp)

            self.fake.launch(kernel, *(t.detach() for t in (task.p, g, *task.m, *task.v)))
            done.append(number)


def on_fake_device(opt, fake):
    """Makes Collins use these streams."""
    opt._stepper.engine = FakeEngine(fake)
    return on_machine(opt, streams=lambda device: fake)


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_copy_is_awaited(mode, slots, in_backward):
    """A whole optimizer on a simulated device that runs work as late or in as unusual an order as its waits allow."""
    fake, expected = FakeStreams(mode), train_model()
    model = make_model()
    memory = {**TIERS["host"], "staging_slots": slots}
    opt = on_fake_device(Collins(model.parameters(), **OPTIONS, memory=memory, in_backward=in_backward), fake)
    for step in range(7):
        backward(model, step)
        opt.step()
        opt.zero_grad()
        fake.current.run_to(fake.current.enqueued)  # the next forward is enqueued after it on the same stream
    assert same_bits(expected, (model, opt))


class WithTokens(nn.Module):
    """Two large tables, the first and the last parameter, and small ones of several sizes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(300, 24), (24, 24), (7,), (24, 48), (30, 24), (24, 24), (250, 24)]
        self.ps = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, step):
        generator = torch.Generator().manual_seed(step)
        return sum((p * torch.randn(p.shape, generator=generator)).square().sum() for p in self.ps)


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=["float32", "integers"])
def test_a_ring_of_two_sizes_holds_any_table_and_takes_the_bytes_of_the_plan(table_dtype, slots, in_backward):
    """Tables of integers have scales, so that their slabs have gaps."""
    fake, results = FakeStreams("late"), []
    empty, allocated = fake.empty, []
    fake.empty = lambda nbytes: (allocated.append(nbytes), empty(nbytes))[1]
    for on_host in (False, True):
        memory = {"tier": "host", "transfer_size": 600, "staging_slots": slots} if on_host else None
        model = WithTokens()
        options = {"table_dtype": table_dtype, "memory": memory, "in_backward": in_backward and on_host}
        opt = Collins(model.parameters(), **{**OPTIONS, **options})
        if on_host:
            on_fake_device(opt, fake)
        for step in range(4):
            model(step).backward()
            opt.step()
            opt.zero_grad()
            fake.current.run_to(fake.current.enqueued)
        results.append((model, opt))
    assert same_bits(*results)
    (plan,) = results[1][1].placement
    assert allocated == [plan.staging_bytes]
    assert plan.ring.slots == slots
    assert plan.ring.first > plan.ring.other


# Ways to handle a gradient that the device is still computing in backward, and whether each is correct.

STREAMS_OF_A_HOOK = {
    "current, as it does": ({}, True),
    "its own": ({"own_stream": True}, False),
    "its own, after a wait": ({"own_stream": True, "waits": True}, False),
    "its own, after a wait, and held": ({"own_stream": True, "waits": True, "holds": True}, True),
}


@pytest.mark.filterwarnings("ignore:Exception ignored in.*finalize")  # when optimizers with incorrect hooks are freed
@pytest.mark.parametrize(("hook", "correct"), STREAMS_OF_A_HOOK.values(), ids=STREAMS_OF_A_HOOK)
def test_pending_gradients_are_read_once_computed_and_freed_once_read(hook, correct, monkeypatch):
    """A hook on a stream of its own could read gradients before backward has computed them, or after backward has
    reused their memory. Here each gradient is computed late, on backward's stream, and only the optimizer refers to it.
    """

    def train_on(mode, own_stream=False, waits=False, holds=False):
        fake = FakeStreams(mode)
        hook_stream, backward_stream = fake.new_stream("own"), fake.new_stream("backward")

        def replace_gradient(p):
            value, pending = p.grad, fake.empty(p.grad.nbytes).view(p.dtype).view(p.shape)
            fake.launch(lambda g: g.copy_(value), pending)
            p.grad = pending

        def update_on_stream(opt, p, original=Collins._update_one):
            if not own_stream:
                return original(opt, p)
            computed_event = fake.event()
            fake.record(computed_event, StreamKind.CURRENT)
            with fake.on(hook_stream):
                if waits:
                    fake.wait(StreamKind.CURRENT, computed_event, WaitFor.COMPUTED)
                if holds:
                    fake.hold(p.grad, StreamKind.CURRENT)
                return original(opt, p)

        with monkeypatch.context() as patch:
            patch.setattr(Collins, "_update_one", update_on_stream)
            model = make_model()
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(replace_gradient)
            opt = on_fake_device(Collins(model.parameters(), **OPTIONS, memory=TIERS["host"], in_backward=True), fake)
            for step in range(3):
                with fake.on(backward_stream):
                    backward(model, step)
                    opt.step()
                fake.finish_everything()
            return model, opt

    def is_correct(mode):
        try:
            return same_bits(expected, train_on(mode, **hook))
        except FreedMemoryError:
            return False

    expected = train_model(steps=3)
    assert all(map(is_correct, MODES)) == correct


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_nothing_is_decided_before_the_first_step(in_backward):
    model = make_model()
    opt = Collins(model.parameters(), **OPTIONS, memory="host", in_backward=in_backward)
    loss = model(torch.zeros(1, 2, dtype=torch.long), optional=True).sum()
    assert opt.placement == ()
    loss.backward()
    opt.step()
    (plan,) = opt.placement
    assert [row.bytes for row in plan.rows] == [row.state_bytes - 4 for row in opt.memory_report().rows]
    take_steps(model, opt, range(3))
    assert opt.placement == (plan,)


@pytest.mark.parametrize("loaded", ["resident", "host", "mixed", "auto"])
@pytest.mark.parametrize("saved", ["resident", "host", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_are_loaded_into_other_tiers(saved, loaded, dtype):
    model, opt = train_model(model={"dtype": dtype}, memory=TIERS[saved])
    other = make_model(dtype)
    other.load_state_dict(model.state_dict())
    other_opt = Collins(other.parameters(), **OPTIONS, memory=TIERS.get(loaded, loaded), in_backward=True)
    other_opt.load_state_dict(opt.state_dict())
    assert same_bits((model, opt), (other, other_opt))
    if loaded in ("mixed", "auto"):
        assert other_opt.placement == ()  # no peak has been measured yet
    else:
        assert bool(other_opt.placement) == (loaded == "host")  # measurements would not change it
    for pair in ((model, opt), (other, other_opt)):
        take_steps(*pair, range(7, 10))
    assert same_bits((model, opt), (other, other_opt))
    assert bool(other_opt.placement) == (loaded != "resident")


def test_the_memory_of_a_table_stays_while_its_values_change():
    model, opt = train_model(steps=1, memory="host")
    addresses = [
        state[key].data_ptr() for state in opt.state.values() for key in state if key not in ("step", "layout")
    ]
    opt.load_state_dict(opt.state_dict())
    take_steps(model, opt, range(1, 4))
    assert addresses == [
        state[key].data_ptr() for state in opt.state.values() for key in state if key not in ("step", "layout")
    ]


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_host_memory_is_freed_with_the_optimizer(in_backward, monkeypatch):
    live_slabs = weakref.WeakSet()

    class Slab(slabs.Slab):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            live_slabs.add(self)

    monkeypatch.setattr(staging, "Slab", Slab)
    model, opt = train_model(memory=TIERS["host"], in_backward=in_backward)
    assert len(live_slabs) > 5
    del opt
    gc.collect()
    assert not live_slabs
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_left_to_step_do_not_disturb_the_prefetch_order(monkeypatch):
    """A gradient without a hook is stepped at the end, and tables of the others are prefetched in their order."""
    model = make_model()
    opt = Collins(model.parameters(), **OPTIONS, memory=TIERS["host"], in_backward=True)
    stage, staged = staging.Pipeline._stage, []
    monkeypatch.setattr(staging.Pipeline, "_stage", lambda self, b, slot: (staged.append(b), stage(self, b, slot)))
    unhooked = model.blocks[1].norm.weight
    for handle in list(unhooked._post_accumulate_grad_hooks):
        del unhooked._post_accumulate_grad_hooks[handle]
    monkeypatch.setattr(Collins, "_watch", lambda self: None)
    prefetched = []
    for step in range(0, 8, 2):
        staged.clear()
        backward(model, step)
        in_backward = [*prefetched, *staged]
        staged.clear()
        assert unhooked.grad is not None
        opt.step()
        prefetched = staged[-2:]  # the slots of the ring
        opt.zero_grad()
    assert len(in_backward) == len(set(in_backward)) > 5  # every transfer was copied once, and none needlessly
    other, other_opt = train_model(steps=0)
    take_steps(other, other_opt, range(0, 8, 2))
    assert same_bits((model, opt), (other, other_opt))


# When memory runs out.


def assert_first_step_refused(model, opt, match):
    """Checks that a step raises and leaves everything unchanged."""
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(MemoryError, match=match):
        take_steps(model, opt, [0])
    assert opt.placement == ()
    assert not opt.state
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    opt.zero_grad()


def failing_allocator(count):
    """The device's allocator provides memory for `after` moments, then fails."""
    allocated = []

    def allocate(spec, device):
        if len(allocated) >= count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocated.append(weakref.ref(zeros(spec, device)))
        return zeros(spec, device)

    return allocate


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize("after", [0, 1, 6, 41])
def test_tables_spill_to_the_host(after, in_backward):
    machine = {"allocate": failing_allocator(after)}
    with pytest.warns(
        UserWarning, match=r"(?s)Collins moves tables to the host: the device ran out of memory.*\nhost: "
    ):
        model, opt = train_model(
            memory={"transfer_size": 900, "staging_slots": 2}, in_backward=in_backward, machine=machine
        )
    assert same_bits((model, opt), train_model())
    tiers = tiers_of(opt)
    assert tiers == sorted(tiers)
    assert tiers.count("device") <= after // 2
    assert after < 41 or tiers.count("device") > 0


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_a_forced_device_that_runs_out_changes_nothing(in_backward):
    model = make_model()
    opt = Collins(model.parameters(), **OPTIONS, memory="device", in_backward=in_backward)
    on_machine(opt, allocate=failing_allocator(5))
    assert_first_step_refused(model, opt, r"ran out of memory while placing parameter 2 of .*KiB.*tier='auto'")
    on_machine(opt)
    take_steps(model, opt, range(7))
    assert same_bits((model, opt), train_model())


def failing_ring(monkeypatch):
    """No ring fits on the device until all moments have left it, and the first ring does not fit even then."""
    empty, requested_sizes, placed = HostStreams.empty, [], []

    def allocate_moment(spec, device):
        moment = zeros(spec, device)
        placed.append(weakref.ref(moment))
        return moment

    def allocate_ring(self, nbytes):
        requested_sizes.append(nbytes)
        if len(requested_sizes) == 1 or any(moment() is not None for moment in placed):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(self, nbytes)

    monkeypatch.setattr(HostStreams, "empty", allocate_ring)
    return allocate_moment


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_tables_on_the_device_make_room_for_the_ring(in_backward, monkeypatch):
    machine = {"allocate": failing_ring(monkeypatch)}
    with pytest.warns(UserWarning, match="Collins moves tables to the host"):
        pair = train_model(memory=TIERS["mixed"], in_backward=in_backward, machine=machine)
    assert set(tiers_of(pair[1])) == {"host"}
    assert same_bits(pair, train_model())


def test_nothing_is_placed_if_the_ring_does_not_fit(monkeypatch):
    allocate = failing_ring(monkeypatch)
    model = make_model()
    opt = on_machine(Collins(model.parameters(), **OPTIONS, memory=TIERS["host"]), allocate=allocate)
    assert_first_step_refused(model, opt, r"cpu has no room for the staging ring of .*slot.? of .*staging_slots")
    take_steps(model, opt, range(7))
    assert same_bits((model, opt), train_model())


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize("tier", ["auto", "host", "device"])
def test_neither_tier_can_hold_the_tables(tier, in_backward):
    model = make_model()
    opt = Collins(model.parameters(), **OPTIONS, memory=tier, in_backward=in_backward)
    on_machine(opt, host_free=lambda: 3000)
    assert_first_step_refused(model, opt, rf"tier='{tier}'\. The device may give 2\.9 KiB.*The host may give")
    on_machine(opt)
    take_steps(model, opt, range(7))
    assert same_bits((model, opt), train_model())


def test_nothing_is_placed_if_the_tables_of_one_device_do_not_fit():
    """Host memory of the tables of the first device is not available for those of the second."""
    ps = [nn.Parameter(torch.ones(64, 64, device=device)) for device in ("cpu", "meta")]
    opt = Collins(ps, memory="auto", table_dtype=torch.float32)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    assert [row.state_bytes - 4 for row in opt.memory_report().rows] == [8192, 8192]
    on_machine(opt, host_free=lambda: 10_000)
    with pytest.raises(MemoryError, match=r"The device may give 1\.8 KiB"):
        opt.step()
    assert opt.placement == ()
    assert not opt.state


def test_the_pin_limit_of_the_policy_is_applied():
    train_model(steps=1, memory={"tier": "host", "pin_limit": "3KiB"})
    assert slabs._pins.limit == 3072
    slabs._pins.warned = True
    train_model(steps=1, memory="host")  # the limit and the warning of another optimizer have no effect
    assert slabs._pins.limit is None
    assert not slabs._pins.warned


@pytest.mark.cuda
def test_pinned_memory_stays_within_the_policy():
    gc.collect()
    before = pinned_bytes()
    with pytest.warns(UserWarning, match="pageable host memory"):
        pair = train_model(memory={**TIERS["host"], "pin_limit": before + 3000}, model={"device": "cuda"})
    assert before < pinned_bytes() <= before + 3000
    assert same_bits(pair, train_model(model={"device": "cuda"}))
    del pair
    gc.collect()
    assert pinned_bytes() == before


@pytest.mark.cuda
def test_the_device_tier_stays_within_free_memory():
    model = make_model(device="cuda")
    opt = Collins(model.parameters(), **OPTIONS, memory={"device_reserve": "100%"}, in_backward=True)
    with pytest.raises(MemoryError, match="device_reserve 100%"):
        backward(model, 0)
    assert not opt.state


@pytest.fixture
def limit_device_memory(monkeypatch):
    """Returns a function that reduces the device memory of this process after a plan has been made."""

    def limit_after_planning(room, planned=tiers.planned):
        def planned_then_limited(*args):
            plan = planned(*args)
            limit = torch.cuda.memory_reserved() + room
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
            return plan

        monkeypatch.setattr(tiers, "planned", planned_then_limited)

    gc.collect()
    torch.cuda.empty_cache()
    yield limit_after_planning
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.cuda
@pytest.mark.parametrize(("in_backward", "room"), [(False, 500), (True, 640)], ids=["after", "in_backward"])
def test_tables_spill_when_a_real_device_is_full(in_backward, room, limit_device_memory):
    """Training continues with the memory that it needs: in backward, 64 MiB for each gradient to come."""

    tables = {"compress_ratio": 2, "table_dtype": torch.float32}  # 12 times 64 MiB

    def make_run(**options):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(12))).cuda()
        return model, Collins(model.parameters(), lr=1e-3, **tables, **options)

    def train(model, opt):
        for step in range(3):
            model(torch.full((2, 4096), 1.0 + step, device="cuda")).square().mean().backward()
            opt.step()
            opt.zero_grad()

    expected = make_run()
    train(*expected)
    actual = make_run(
        memory={"device_reserve": 0, "transfer_size": "64MiB", "staging_slots": 2}, in_backward=in_backward
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ooms_before = torch.cuda.memory_stats()["num_ooms"]
    limit_device_memory(room * 2**20)
    with pytest.warns(UserWarning, match="Collins moves tables to the host: the device ran out of memory"):
        train(*actual)
    assert torch.cuda.memory_stats()["num_ooms"] > ooms_before
    (plan,) = actual[1].placement
    assert [row.tier for row in plan.rows] == sorted(row.tier for row in plan.rows)
    assert {row.tier for row in plan.rows} == {"device", "host"}
    assert same_bits(actual, expected)


# The memory that is available to a plan within the first backward.


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_a_plan_made_within_backward_is_marked(in_backward, monkeypatch):
    planned, early = tiers.planned, []
    monkeypatch.setattr(tiers, "planned", lambda *args: (early.append(args[-2]), planned(*args))[1])
    train_model(memory="auto", in_backward=in_backward)
    assert early == [in_backward]


def test_a_plan_reserves_memory_for_gradients_to_come():
    requests = [Request("p", (1,), GIB)] * 3
    auto = MemoryPolicy(device_reserve="1%", staging_slots=2)
    ring = 2 * GIB + GIB  # and the reserve, of 100 GiB
    assert device_room(50 * GIB, 100 * GIB, auto, requests, 4 * GIB) == 30 * GIB
    assert device_room(22 * GIB, 100 * GIB, auto, requests, 4 * GIB) == ring
    assert device_room(2 * GIB, 100 * GIB, auto, requests, 4 * GIB) == 2 * GIB
    for tier in ("device", "host"):
        assert device_room(22 * GIB, 100 * GIB, MemoryPolicy(tier=tier), requests, 4 * GIB) == 22 * GIB


@pytest.mark.parametrize(("early", "tier"), [(True, "host"), (False, "device")])
def test_a_device_with_space_only_for_the_ring_uses_the_host_tier(early, tier):
    figures = DeviceFigures(100 * GIB, 4 * GIB, fraction=1.0, reserved=96 * GIB, allocated=96 * GIB, peak=97 * GIB)
    assert figures.spare == 3 * GIB
    machine = Backend(measure=lambda device: figures)
    p = torch.empty(GIB // 2, device="meta", dtype=torch.bfloat16)  # 1 GiB
    moments = (TensorSpec((2**24,), torch.float32),) * 2
    requests = [StateRequest(str(i), p, moments, Role("matrix", "shape")) for i in range(8)]  # of 1 GiB in all
    plan, leave = tiers.planned(MemoryPolicy(), torch.device("cuda"), requests, 64 * GIB, early, machine)
    assert [row.tier for row in plan.rows] == 8 * [tier]
    assert leave == 4 * GIB - plan.limits.device  # of what is free: for activations, the gradients to come, a reserve


def test_the_first_step_logs_the_placement_and_its_reason(caplog):
    with caplog.at_level("INFO", logger="collins"):
        _, opt = train_model(steps=2, memory=TIERS["mixed"])
    (record,) = caplog.records
    assert record.getMessage() == f"Where the tables are, and why:\n{opt.placement[0].summary()}"
    assert "first within the device's 6.0 KiB" in record.getMessage()
