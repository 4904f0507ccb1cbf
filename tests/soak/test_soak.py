"""Long use of an optimizer leaks no memory and no other resources.

These tests take minutes, and are run by name only. The growth that they measured is printed at the end:

    pytest -n 0 tests/soak
    pytest -n 0 -m cuda tests/soak  # on a GPU, with fewer steps

`SOAK_STEPS`, a multiple of 1,000 and at least 2,000, and `SOAK_CYCLES` set the numbers of steps and of optimizers.

Between the end of a warm-up and the end of the test nothing may grow: the number of tensors and their bytes, other
Python objects, threads, file handles, streams, events, graphs, page-locked memory, and the memory of the process and of
the device. Deliberate leaks are detected.
"""

import copy
import gc
import os
import random
import sys
import threading
import time
import weakref
from collections import Counter
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
CUDA_STEPS = int(os.environ.get("SOAK_STEPS", 2_000))
CUDA_CYCLES = int(os.environ.get("SOAK_CYCLES", 100))
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
GRAPH_WAYS = ("graphs", "universal", "orthogonal")  # on a GPU; the kernel performs all other ways
FAKE_STREAM_WAYS = ("host", "mixed", "host, in backward", "mixed, in backward")  # also run over simulated streams


@dataclass
class Resources:
    """The resources of the process.

    Attributes:
        resident: resident host memory, in bytes.
        used: device memory in use, including that of graphs and kernels, in bytes.
        device: the part of `used` that PyTorch's allocator has reserved.
        allocated: the part of `device` that tensors use.
        blocks: the number of blocks that PyTorch's allocator has allocated on the device.
        pinned, host_cache: page-locked memory in slabs, and in PyTorch's own cache, in bytes.
        tensors, tensor_bytes: the tensors that the garbage collector sees.
        objects: the number of Python objects that it sees.
        threads, files: the threads and open files of the process.
        optimizers: the optimizers that are registered for compiled code.
        events, cuda_graphs: CUDA events and graphs.
        streams: CUDA streams, or those of the fake device.
        graphs: the compiled graphs of the optimizer under test.
    """

    resident: int
    used: int
    device: int
    allocated: int
    blocks: int
    pinned: int
    host_cache: int
    tensors: int
    tensor_bytes: int
    objects: int
    threads: int
    files: int
    optimizers: int
    events: int
    cuda_graphs: int
    streams: int = 0
    graphs: int = 0

    @classmethod
    def now(cls, streams=0, graphs=0):
        gc.collect()
        used, on_device, on_host = 0, {}, {}
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # frees the pools of deleted graphs
            free, total = torch.cuda.mem_get_info()
            used, on_device, on_host = total - free, torch.cuda.memory_stats(), torch.cuda.host_memory_stats()
        everything = gc.get_objects()
        kinds = Counter(map(type, everything))
        # This excludes the fake tensors that torch.compile keeps for tracing, which have no memory.
        tensors = [one for one in everything if type(one) in (torch.Tensor, torch.nn.Parameter)]
        process = psutil.Process()
        return cls(
            process.memory_info().rss,
            used,
            on_device.get("reserved_bytes.all.current", 0),
            on_device.get("allocated_bytes.all.current", 0),
            on_device.get("allocation.all.current", 0),
            pinned_bytes(),
            on_host.get("allocated_bytes.current", 0),
            len(tensors),
            sum(t.untyped_storage().nbytes() for t in tensors),
            len(everything),
            process.num_threads(),
            process.num_fds(),
            len(tracing._optimizers),
            count_of_type(kinds, torch.cuda.Event),
            count_of_type(kinds, torch.cuda.CUDAGraph),
            streams + count_of_type(kinds, torch.cuda.Stream),
            graphs,
        )

    def growth(self, since):
        return {name: value - getattr(since, name) for name, value in asdict(self).items()}


def count_of_type(kinds, kind):
    return sum(count for each, count in kinds.items() if issubclass(each, kind))


# Allocators round up, the interpreter keeps caches, and a step program may exist or not. Nothing else may grow.
TOLERANCES = {
    "resident": 8 << 20,
    "used": 8 << 20,
    "device": 4 << 20,
    "host_cache": 1 << 16,
    "objects": 100,
    "events": 8,
}


def assert_not_grown(growth):
    assert all(by <= TOLERANCES.get(name, 0) for name, by in growth.items()), growth


class Run:
    """An optimizer over small parameters, on the fake device where `fake` is given."""

    def __init__(self, options, fake=None, kernel=False):
        generator = torch.Generator().manual_seed(0)
        self.ps = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]
        self.opt = Collins(self.ps, lr=1e-2, min_K=16, rehash_period=30, **options)
        self.fake = fake
        self.rng = random.Random(0)
        if fake is not None:
            on_fake_device(self.opt, fake)
        if kernel:
            with_kernel(self.opt)

    def step(self, number):
        """A step with a new learning rate; at times without the gradient of a parameter, with a parameter frozen or
        replaced, or with the state reloaded."""
        opt, ps = self.opt, self.ps
        group = opt.param_groups[0]
        group["lr"], group["betas"] = 1e-2 / (1 + number % 97), (0.9 + 0.01 * (number % 7), 0.999)
        left_out = self.rng.randrange(len(ps)) if number % 11 == 0 else None
        loss = sum((p * (0.1 + number % 5)).square().mean() for i, p in enumerate(ps) if i != left_out)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if self.fake is not None:
            self.fake.current.run_to(self.fake.current.enqueued)
        if DEVICE == "cuda":  # so that as many buffers are in flight in each step
            torch.cuda.synchronize()
        if number % 250 == 1:
            ps[3].requires_grad_(not ps[3].requires_grad)
        if number % 500 == 2:
            saved = copy.deepcopy(opt.state_dict())
            opt.load_state_dict(saved)
        if number % 500 == 3:  # as an embedding is resized
            old = ps[0]
            shape = (72, 64) if number % 1000 == 3 else SHAPES[0]
            ps[0] = torch.nn.Parameter(old.detach().mean() + torch.zeros(shape, device=DEVICE))
            opt.state.pop(old, None)
            group["params"][:] = [ps[0] if p is old else p for p in group["params"]]

    def resources(self):
        self.opt.zero_grad()
        self.opt._stepper.store.drain()
        streams = len(self.fake.streams) if self.fake is not None else 0
        return Resources.now(streams=streams, graphs=self.opt._stepper.engine.graphs)


class CapturedRun(Run):
    """Steps that a CUDA graph replays from the fourth one on; without a GPU, the step is called instead of replayed."""

    def __init__(self, options):
        super().__init__({**options, "capturable": True})
        self.grads, self.replay, self.count = [torch.empty_like(p) for p in self.ps], self.opt.step, 0
        self.stream = torch.cuda.Stream() if DEVICE == "cuda" else None

    def step(self, number):
        with torch.cuda.stream(self.stream):
            for p, g in zip(self.ps, self.grads, strict=True):
                g.copy_(p.detach() * (0.1 + number % 5))
                p.grad = g
            self.count += 1
            if self.count == 4:
                self.replay = self.capture()
            self.replay()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def capture(self):
        if DEVICE != "cuda":
            return self.opt.step
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.opt.step()
        return graph.replay


def growth_over(run, steps):
    """The growth of resources from the end of the warm-up, in which every kind of step occurs, to the end."""
    baseline, warm_up = None, max(steps // 10, min(1000, steps // 2))
    for number in range(steps):
        if number == warm_up:
            baseline = run.resources()
        run.step(number)
    return run.resources().growth(baseline)


LEAKS = {
    "tensors": lambda kept: kept.append(torch.zeros(1)),
    "tensor_bytes": lambda kept: kept.append(torch.zeros(1000)),
    "objects": lambda kept: kept.extend([kept] for _ in range(3)),
    "resident": lambda kept: kept.append(os.urandom(1 << 17)),  # no object that the garbage collector sees
    "files": lambda kept: kept.append(open(os.devnull)),  # noqa: SIM115
    "threads": lambda kept: kept.append(start_waiting_thread()),
    "optimizers": lambda kept: kept.append(Collins([torch.nn.Parameter(torch.zeros(2))])),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_deliberate_leaks_are_found(leak):
    run, kept = Run({}), []
    step = run.step

    def leaking_step(number):
        step(number)
        if number >= 100 and len(kept) < 300:
            LEAKS[leak](kept)

    run.step = leaking_step
    growth = growth_over(run, 200)
    for leaked in kept:
        if leak == "files":
            leaked.close()
        if leak == "threads":
            leaked.set()
    assert growth[leak] > 0
    with pytest.raises(AssertionError):
        assert_not_grown(growth)


def start_waiting_thread():
    """Starts a thread that waits for an event; returns the event."""
    event = threading.Event()
    threading.Thread(target=event.wait).start()
    return event


@pytest.mark.parametrize("what", Resources.__dataclass_fields__)
def test_growth_above_any_tolerance_is_an_error(what):
    counts = {**dict.fromkeys(asdict(Resources.now()), 0), **TOLERANCES}
    assert_not_grown(counts)
    with pytest.raises(AssertionError):
        assert_not_grown({**counts, what: counts[what] + 1})


CUDA_COUNTERS = {
    "used": ("mem_get_info", lambda grown: (100 - grown, 100)),
    "device": ("memory_stats", lambda grown: {"reserved_bytes.all.current": grown}),
    "allocated": ("memory_stats", lambda grown: {"allocated_bytes.all.current": grown}),
    "blocks": ("memory_stats", lambda grown: {"allocation.all.current": grown}),
    "host_cache": ("host_memory_stats", lambda grown: {"allocated_bytes.current": grown}),
}


@pytest.mark.parametrize("what", [*CUDA_COUNTERS, "events", "cuda_graphs", "streams"])
def test_the_resources_of_a_gpu_are_counted(what, monkeypatch):
    """Without one: its runtime is replaced."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cuda")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name, answer in CUDA_COUNTERS.values():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer(0))
    for name in ("Event", "CUDAGraph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, type(name, (), {}))
    before, kept = Resources.now(), []
    if what in CUDA_COUNTERS:
        name, answer = CUDA_COUNTERS[what]
        monkeypatch.setattr(torch.cuda, name, lambda: answer(3))
    else:
        kind = {"events": "Event", "cuda_graphs": "CUDAGraph", "streams": "Stream"}[what]
        kept += [getattr(torch.cuda, kind)() for _ in range(3)]
    assert Resources.now().growth(before)[what] == 3


def soak(way, steps, figures):
    run = Run(WAYS[way]) if way in WAYS else CapturedRun({})
    started = time.monotonic()
    growth = growth_over(run, steps)
    figures(f"{steps:,} steps, {way}, on {DEVICE}", growth, time.monotonic() - started)
    assert_not_grown(growth)
    if "mixed" in way:
        assert {row.tier for plan in run.opt.placement for row in plan.rows} == {"device", "host"}


@pytest.mark.parametrize("way", [*WAYS, "captured"])
def test_steps(way, figures):
    soak(way, STEPS, figures)


@pytest.mark.cuda
@pytest.mark.parametrize("way", [*(way for way in WAYS if way not in GRAPH_WAYS), "captured"])
def test_steps_on_a_gpu(way, figures):
    soak(way, CUDA_STEPS, figures)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a real one")
@pytest.mark.parametrize("way", FAKE_STREAM_WAYS)
def test_steps_over_streams_of_a_fake_device(way, figures):
    started = time.monotonic()
    growth = growth_over(Run(WAYS[way], FakeStreams(1)), STEPS)
    figures(f"{STEPS:,} steps, {way}, fake streams", growth, time.monotonic() - started)
    assert_not_grown(growth)


@pytest.mark.skipif(DEVICE == "cuda", reason="there it is what steps by default")
def test_steps_of_the_kernel_under_the_interpreter(figures, monkeypatch):
    """Few steps, since the interpreter is slow, and few cached sets of tensors, so that the warm-up fills the cache."""
    pytest.importorskip("triton")
    multi_tensor = pytest.importorskip("collins.compile.multi_tensor")
    monkeypatch.setattr(multi_tensor, "_KEPT_SETS", 2)
    steps, started = STEPS // 10, time.monotonic()
    growth = growth_over(Run({}, kernel=True), steps)
    figures(f"{steps:,} steps, kernel", growth, time.monotonic() - started)
    assert_not_grown(growth)


def use_an_optimizer(options, fake):
    """Builds, steps, copies, saves and deletes an optimizer, with its hooks, slabs and streams; returns a weakref."""
    run = CapturedRun({}) if options is None else Run(options, FakeStreams(1) if fake else None)
    for number in range(4, 9 if options is None else 6):  # neither frozen, nor loaded, nor replaced
        run.step(number)
    other = copy.deepcopy((run.ps, run.opt)) if not fake else None
    run.opt.state_dict()
    reference = weakref.ref(run.opt)
    del run, other
    return reference


@pytest.mark.parametrize("way", [*WAYS, "captured"])
def test_optimizers(way, figures):
    soak_optimizers(way, CYCLES // 20 if way == "graphs" else CYCLES, figures)  # each compiles its graphs again


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a real one")
@pytest.mark.parametrize("way", FAKE_STREAM_WAYS)
def test_optimizers_over_streams_of_a_fake_device(way, figures):
    soak_optimizers(way, CYCLES, figures, fake=True)


@pytest.mark.cuda
@pytest.mark.parametrize("way", [*(way for way in WAYS if way not in GRAPH_WAYS), "captured"])
def test_optimizers_on_a_gpu(way, figures):
    soak_optimizers(way, CUDA_CYCLES, figures)


def soak_optimizers(way, cycles, figures, *, fake=False):
    baseline, started = None, time.monotonic()
    for number in range(cycles):
        if number == cycles // 5:
            baseline = Resources.now()
        reference = use_an_optimizer(WAYS.get(way), fake)
        if number % 10 == 0:
            gc.collect()
            assert reference() is None
    growth = Resources.now().growth(baseline)
    figures(
        f"{cycles:,} optimizers, {way}, on {'fake streams' if fake else DEVICE}", growth, time.monotonic() - started
    )
    assert_not_grown(growth)


@pytest.fixture
def figures(request):
    """A function that records the growth of a test and its duration, for the summary."""
    figures_by_name = request.config.stash.setdefault(FIGURES, {})
    return lambda name, growth, seconds: figures_by_name.__setitem__(name, (growth, seconds))


FIGURES = pytest.StashKey()
