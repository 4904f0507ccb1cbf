"""What grows while an optimizer is used for long: nothing.

Run by name, as it takes minutes; what it found is printed at the end:

    pytest -n 0 tests/soak

After a warm-up the same must be there as at the end: tensors and their bytes, other Python objects, threads, file
handles, streams, graphs, and the memory that the process, or the device, has taken.
"""

import copy
import functools
import gc
import os
import random
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

STEPS = int(os.environ.get("SOAK_STEPS", 10_000))
CYCLES = int(os.environ.get("SOAK_CYCLES", 1_000))
SHAPES = [(64, 64), (40,), (33, 37), (48, 64), (64, 40)]
HOST = {"tier": "host", "transfer_size": 3000, "staging_slots": 2}
MIXED = {"device_budget": "12KiB", "transfer_size": 3000, "staging_slots": 2}
WAYS = {
    "resident": {},
    "resident, in backward": {"in_backward": True},
    "clipped": {"max_grad_norm": 1.0, "nonfinite": "skip"},
    "graphs": {"compile": True},
    "universal": {"hash": "universal"},
    "orthogonal": {"decode": "orthogonal"},
    "device": {"memory": "device"},
    "host": {"memory": HOST},
    "mixed": {"memory": MIXED},
    "host, in backward": {"memory": HOST, "in_backward": True},
    "mixed, in backward": {"memory": MIXED, "in_backward": True},
}
FAKE = ("host", "mixed", "host, in backward", "mixed, in backward")  # over streams that do all as oddly as they may


@dataclass
class Held:
    """What the process holds.

    Attributes:
        resident: bytes of memory, of the host.
        device: bytes that PyTorch has reserved on the device.
        tensors, tensor_bytes: alive, as the garbage collector sees them.
        objects: of Python that it sees.
        threads, files: of the process.
        optimizers: that compiled code may find.
        streams, graphs: of the optimizer that is looked at.
    """

    resident: int
    device: int
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
    """What has grown between the first tenth of the steps and their end."""
    before = None
    for number in range(steps):
        if number == steps // 10:
            before = run.held()
        run.step(number)
    return run.held().growth(before)


@pytest.mark.parametrize("way", WAYS)
def test_steps(way, figures):
    growth = soaked(Run(WAYS[way]), STEPS)
    figures(f"{STEPS:,} steps, {way}", growth)
    has_not_grown(growth)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a real one")
@pytest.mark.parametrize("way", FAKE)
def test_steps_over_streams_of_a_fake_device(way, figures):
    growth = soaked(Run(WAYS[way], FakeStreams(1)), STEPS)
    figures(f"{STEPS:,} steps, {way}, fake streams", growth)
    has_not_grown(growth)


@pytest.mark.skipif(DEVICE == "cuda", reason="there it is what steps by default")
def test_steps_of_the_kernel_under_the_interpreter(figures):
    pytest.importorskip("triton")
    steps = STEPS // 25
    growth = soaked(Run({}, kernel=True), steps)
    figures(f"{steps:,} steps, kernel", growth)
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
    before = None
    for number in range(cycles):
        if number == cycles // 5:
            before = Held.now()
        there = cycle(WAYS[way], fake)
        if number % 10 == 0:
            gc.collect()
            assert there() is None
    growth = Held.now().growth(before)
    figures(f"{cycles:,} lives, {way}{', fake streams' if fake else ''}", growth)
    has_not_grown(growth)


@pytest.fixture
def figures(request):
    return functools.partial(request.config.stash.setdefault(FIGURES, {}).__setitem__)


FIGURES = pytest.StashKey()
