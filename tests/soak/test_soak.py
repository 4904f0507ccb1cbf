"""What grows while an optimizer is used for long: nothing.

Run by name, as it takes minutes; what it found is printed at the end:

    pytest -n 0 tests/soak

After a warm-up the same must be there as at the end: tensors and their bytes, other Python objects, threads, file
handles, streams, graphs, page-locked memory, and what the process, or the device, has taken. What leaks on purpose is
found.
"""

import copy
import gc
import os
import random
import threading
import time
import weakref
from dataclasses import asdict, dataclass

import psutil
import pytest
import torch
from fake_streams import FakeStreams
from helpers import DEVICE, with_kernel
from test_tiers import on_fake_device

from collins import Collins
from collins.compile import tracing
from collins.offload import pinned_bytes

STEPS = int(os.environ.get("SOAK_STEPS", 10_000))
CYCLES = int(os.environ.get("SOAK_CYCLES", 1_000))
SHAPES = [(64, 64), (40,), (33, 37), (48, 64), (64, 40)]
HOST = {"tier": "host", "transfer_size": 600, "staging_slots": 2}
MIXED = {"device_budget": 2700, "transfer_size": 600, "staging_slots": 2}  # bytes: of one parameter, and the ring
WAYS = {
    "resident": {},
    "resident, in backward": {"in_backward": True},
    "clipped": {"max_grad_norm": 1.0, "nonfinite": "skip"},
    "graphs": {"compile": True},
    "universal": {"hash": "universal"},
    "fp32 tables": {"table_dtype": torch.float32},
    "orthogonal": {"decode": "orthogonal"},
    "device": {"memory": "device"},
    "host": {"memory": HOST},
    "mixed": {"memory": MIXED},
    "host, fp32 tables": {"memory": HOST, "table_dtype": torch.float32},
    "device, in backward": {"memory": "device", "in_backward": True},
    "host, in backward": {"memory": HOST, "in_backward": True},
    "mixed, in backward": {"memory": MIXED, "in_backward": True},
}
FAKE = ("host", "mixed", "host, in backward", "mixed, in backward")  # over streams that do all as oddly as they may


@dataclass
class Held:
    """What the process holds.

    Attributes:
        resident: bytes of memory, of the host.
        device, allocated: bytes that PyTorch has reserved on the device, and that tensors have of them.
        pinned: bytes of page-locked memory.
        tensors, tensor_bytes: alive, as the garbage collector sees them.
        objects: of Python that it sees.
        threads, files: of the process.
        optimizers: that compiled code may find.
        streams, graphs: of the optimizer that is looked at.
    """

    resident: int
    device: int
    allocated: int
    pinned: int
    tensors: int
    tensor_bytes: int
    objects: int
    threads: int
    files: int
    optimizers: int
    streams: int = 0
    graphs: int = 0

    @classmethod
    def now(cls, **known):
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        everything = gc.get_objects()
        # Not those that torch.compile keeps to trace with, which have no memory.
        tensors = [one for one in everything if type(one) in (torch.Tensor, torch.nn.Parameter)]
        process = psutil.Process()
        return cls(
            process.memory_info().rss,
            torch.cuda.memory_reserved() if DEVICE == "cuda" else 0,
            torch.cuda.memory_allocated() if DEVICE == "cuda" else 0,
            pinned_bytes(),
            len(tensors),
            sum(t.untyped_storage().nbytes() for t in tensors),
            len(everything),
            process.num_threads(),
            process.num_fds(),
            len(tracing._optimizers),
            **known,
        )

    def growth(self, since):
        return {name: value - getattr(since, name) for name, value in asdict(self).items()}


def has_not_grown(growth):
    """Memory by no more than what allocators round up and the interpreter keeps for later; nothing else at all."""
    counted = {name: by for name, by in growth.items() if name not in ("resident", "objects")}
    assert not any(by > 0 for by in counted.values()), growth
    assert growth["objects"] <= 100, growth  # a program of a step, or none
    assert growth["resident"] <= 8 << 20, growth


class Run:
    """An optimizer over small parameters, on the fake device where `fake` is given."""

    def __init__(self, options, fake=None, kernel=False):
        generator = torch.Generator().manual_seed(0)
        self.ps = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]
        self.opt = Collins(self.ps, lr=1e-2, min_K=16, rehash_period=30, **options)
        self.fake = fake
        self.chance = random.Random(0)
        if fake is not None:
            on_fake_device(self.opt, fake)
        if kernel:
            with_kernel(self.opt)

    def step(self, number):
        """With another rate each time; sometimes without a gradient of one, or frozen, or loaded from itself."""
        opt, ps = self.opt, self.ps
        group = opt.param_groups[0]
        group["lr"], group["betas"] = 1e-2 / (1 + number % 97), (0.9 + 0.01 * (number % 7), 0.999)
        left_out = self.chance.randrange(len(ps)) if number % 11 == 0 else None
        loss = sum((p * (0.1 + number % 5)).square().mean() for i, p in enumerate(ps) if i != left_out)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if self.fake is not None:
            self.fake.current.run_to(self.fake.current.given)
        if number % 250 == 1:
            ps[3].requires_grad_(not ps[3].requires_grad)
        if number % 500 == 2:
            saved = copy.deepcopy(opt.state_dict())
            opt.load_state_dict(saved)
        if number % 500 == 3:  # as an embedding is resized
            old = ps[0]
            ps[0] = torch.nn.Parameter(old.detach().clone())
            opt.state.pop(old, None)
            group["params"][:] = [ps[0] if p is old else p for p in group["params"]]

    def held(self):
        self.opt.zero_grad()
        self.opt._stepper.store.drain()
        streams = len(self.fake.streams) if self.fake is not None else 0
        return Held.now(streams=streams, graphs=self.opt._stepper.engine.graphs)


def soaked(run, steps):
    """What has grown between the warm-up, in which all that a step does has been done once or twice, and the end."""
    before, warm_up = None, max(steps // 10, min(1000, steps // 2))
    for number in range(steps):
        if number == warm_up:
            before = run.held()
        run.step(number)
    return run.held().growth(before)


LEAKS = {
    "tensors": lambda kept: kept.append(torch.zeros(1)),
    "tensor_bytes": lambda kept: kept.append(torch.zeros(1000)),
    "objects": lambda kept: kept.extend([kept] for _ in range(3)),
    "resident": lambda kept: kept.append(os.urandom(1 << 17)),  # no object that the garbage collector sees
    "files": lambda kept: kept.append(open(os.devnull)),  # noqa: SIM115
    "threads": lambda kept: kept.append(wait_in_a_thread()),
    "optimizers": lambda kept: kept.append(Collins([torch.nn.Parameter(torch.zeros(2))])),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_what_leaks_is_found(leak):
    run, kept = Run({}), []
    step = run.step

    def leaks(number):
        step(number)
        if number >= 100 and len(kept) < 300:
            LEAKS[leak](kept)

    run.step = leaks
    growth = soaked(run, 200)
    for one in kept:
        if leak == "files":
            one.close()
        if leak == "threads":
            one.set()
    assert growth[leak] > 0
    with pytest.raises(AssertionError):
        has_not_grown(growth)


def wait_in_a_thread():
    """Starts a thread that waits for an event; returns the event."""
    event = threading.Event()
    threading.Thread(target=event.wait).start()
    return event


@pytest.mark.parametrize("what", ["streams", "graphs", "pinned"])
def test_one_more_of_what_is_counted_is_too_many(what):
    counts = dict.fromkeys(asdict(Held.now()), 0)
    has_not_grown(counts)
    with pytest.raises(AssertionError):
        has_not_grown({**counts, what: 1})


@pytest.mark.parametrize("way", WAYS)
def test_steps(way, figures):
    run = Run(WAYS[way])
    began = time.monotonic()
    growth = soaked(run, STEPS)
    figures(f"{STEPS:,} steps, {way}", growth, time.monotonic() - began)
    has_not_grown(growth)
    if "mixed" in way:
        assert {row.tier for plan in run.opt.placement for row in plan.rows} == {"device", "host"}


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a real one")
@pytest.mark.parametrize("way", FAKE)
def test_steps_over_streams_of_a_fake_device(way, figures):
    began = time.monotonic()
    growth = soaked(Run(WAYS[way], FakeStreams(1)), STEPS)
    figures(f"{STEPS:,} steps, {way}, fake streams", growth, time.monotonic() - began)
    has_not_grown(growth)


@pytest.mark.skipif(DEVICE == "cuda", reason="there it is what steps by default")
def test_steps_of_the_kernel_under_the_interpreter(figures, monkeypatch):
    """In few steps, as the interpreter is slow, with so few sets of tensors kept that all are made in the warm-up."""
    pytest.importorskip("triton")
    multi_tensor = pytest.importorskip("collins.compile.multi_tensor")
    monkeypatch.setattr(multi_tensor, "_KEPT_SETS", 2)
    steps, began = STEPS // 10, time.monotonic()
    growth = soaked(Run({}, kernel=True), steps)
    figures(f"{steps:,} steps, kernel", growth, time.monotonic() - began)
    has_not_grown(growth)


def cycle(options, fake):
    """A life: built, stepped, copied, saved and let go of, with its hooks, slabs and streams."""
    run = Run(options, FakeStreams(1) if fake else None)
    for number in (4, 5):  # neither frozen, nor loaded, nor replaced
        run.step(number)
    other = copy.deepcopy((run.ps, run.opt)) if not fake else None
    run.opt.state_dict()
    there = weakref.ref(run.opt)
    del run, other
    return there


@pytest.mark.parametrize("fake", [False, pytest.param(True, marks=pytest.mark.skipif(DEVICE == "cuda", reason="real"))])
@pytest.mark.parametrize("way", WAYS)
def test_lives(way, fake, figures):
    if fake and way not in FAKE:
        pytest.skip("it copies nothing")
    cycles = CYCLES // 20 if way == "graphs" else CYCLES  # each is traced anew
    before, began = None, time.monotonic()
    for number in range(cycles):
        if number == cycles // 5:
            before = Held.now()
        there = cycle(WAYS[way], fake)
        if number % 10 == 0:
            gc.collect()
            assert there() is None
    growth = Held.now().growth(before)
    figures(f"{cycles:,} lives, {way}{', fake streams' if fake else ''}", growth, time.monotonic() - began)
    has_not_grown(growth)


@pytest.fixture
def figures(request):
    """Notes what has grown in so many seconds."""
    found = request.config.stash.setdefault(FIGURES, {})
    return lambda name, growth, seconds: found.__setitem__(name, (growth, seconds))


FIGURES = pytest.StashKey()
