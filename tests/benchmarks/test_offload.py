"""The host link: its copy rate, the share of it that steps on the host tier reach, and their cost in training.

    pytest tests/benchmarks/test_offload.py --benchmark-json=offload.json

runs on a GPU, and is skipped where there is none. It ends with two tables. The first is of LLaMA-7B's tables in pinned
slabs: each direction of the link alone, both at once ("copy"), the pipeline with nothing to compute, the pipeline with
Collins' update of bf16 parameters, that update with resident tables, and `Collins(memory="host").step()` as a user
calls it. "of copy speed" is relative to the rate of both directions at once: a pipeline whose directions do not overlap
reaches about half of it. The second is of training steps of LLaMA-7B, in backward, a few in a row as in training:
copies that are pending when a step ends overlap with the next forward.

Two bounds are asserted. The step after backward reaches 80 % of the link's rate. Training on the host tier takes at
most 5 % longer than on the device tier; their steps are timed in turns, so that a slower machine affects both.
"""

import gc
import sys

import pytest
import torch
from helpers import EXAMPLES
from turns import Turns

from collins import Collins
from collins.bucketing import bucketing_of
from collins.compile import Engine
from collins.hashing import hash_key
from collins.offload import Pipeline, Slab, TensorSpec, grouped, streams_for
from collins.offload.shapes import llama
from collins.offload.streams import StreamKind, WaitFor
from collins.rule import step_scalars
from collins.update import HashKeys, UpdateSpec, UpdateTask

pytestmark = pytest.mark.cuda

SHAPES = llama(32, 4096, 11008, 4096, 32000).shapes
TRANSFER_SIZE = 64 * 2**20
SLOTS = 3
ROUNDS = 15
DEVICE = torch.device("cuda")
LENGTH, CHUNKS = 2048, 8
IN_A_ROW = 4  # training steps
MEDIANS = {}  # seconds, by name


class Tables:
    """The tables of a model in slabs, as in the host tier."""

    def __init__(self, shapes=SHAPES, device=DEVICE, transfer_size=TRANSFER_SIZE):
        self.shapes, self.device = shapes, device
        self.layouts = [
            bucketing_of(torch.Size(shape).numel(), compress_ratio=32, min_K=1024, hash="block") for shape in shapes
        ]
        parts = [
            [TensorSpec(shape if layout.hash is None else (layout.buckets,), torch.float32)] * 2
            for shape, layout in zip(shapes, self.layouts, strict=True)
        ]
        self.members = grouped(parts, transfer_size)
        self.slabs = [Slab(part for i in members for part in parts[i]) for members in self.members]
        self.nbytes = sum(slab.nbytes for slab in self.slabs)
        self.streams = streams_for(device)

    def update(self):
        """A function that steps a transfer's parameters, bf16 and resident with their gradients."""
        ps = [torch.randn(shape, device=self.device, dtype=torch.bfloat16) for shape in self.shapes]
        gs = [torch.randn_like(p) for p in ps]
        engine = Engine(busy_link=True)
        hp = step_scalars(
            9, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, residual_weight=0.3, residual_square=1.0
        )
        specs = [
            UpdateSpec(layout.hash, layout.load, "least_squares", layout.hash is not None, True, False)
            for layout in self.layouts
        ]
        launches = [engine.launch_of(spec, p) for spec, p in zip(specs, ps, strict=True)]
        executors = {}

        def executor_over(transfer, tensors):
            members = self.members[transfer]
            tasks = [
                UpdateTask(
                    ps[i],
                    (tensors[2 * j],),
                    (tensors[2 * j + 1],),
                    specs[i],
                    HashKeys(hash_key(0, i, "sign"), hash_key(0, i, "round"), (0, 0, 0, 0), 100),
                    self.layouts[i].numel,
                    launch=launches[i],
                )
                for j, i in enumerate(members)
            ]
            return engine.executor(tasks, [gs[i] for i in members])

        def compute(transfer, tensors):
            key = transfer, tensors[0].data_ptr()
            if key not in executors:
                executors[key] = executor_over(transfer, tensors)
            grads = [gs[i] for i in self.members[transfer]]
            executors[key].run(executors[key].bind(grads), [hp], [0] * len(grads), [])

        return compute


@pytest.fixture(scope="module")
def tables():
    tables_of_model = Tables()
    assert all(slab.pinned for slab in tables_of_model.slabs)
    yield tables_of_model
    del tables_of_model
    gc.collect()


@pytest.fixture
def measure(benchmark):
    def timed(
        function, name, nbytes, peak=None, group="llama-7b tables over the host link", before=None, rounds=ROUNDS
    ):
        def once():
            function()
            torch.cuda.synchronize()

        benchmark.group = group
        benchmark.extra_info.update(name=name, bytes=nbytes, peak=peak)
        benchmark.pedantic(once, setup=before, rounds=rounds, warmup_rounds=3)
        MEDIANS[name] = benchmark.stats.stats.median

    yield timed
    gc.collect()
    torch.cuda.empty_cache()


def copier(tables, *kinds):
    """Copies all slabs in the given directions at once, each from or to device memory of its own."""
    streams = tables.streams
    size = max(slab.nbytes for slab in tables.slabs)
    memory = {kind: streams.empty(size) for kind in kinds}
    ready = streams.event()

    def copy():
        streams.record(ready, StreamKind.CURRENT)
        for kind in kinds:
            streams.wait(kind, ready, WaitFor.SLOT_FREE)
        for slab in tables.slabs:
            for kind in kinds:
                ends = slab.bytes, memory[kind][: slab.nbytes]
                streams.copy(kind, *(ends if kind is StreamKind.D2H else ends[::-1]))

    return copy


@pytest.mark.parametrize(
    "kinds", [(StreamKind.H2D,), (StreamKind.D2H,), (StreamKind.H2D, StreamKind.D2H)], ids=["h2d", "d2h", "both"]
)
def test_link(measure, tables, kinds):
    names = {(StreamKind.H2D,): "h2d alone", (StreamKind.D2H,): "d2h alone"}
    measure(copier(tables, *kinds), names.get(kinds, "copy"), len(kinds) * tables.nbytes)


@pytest.mark.parametrize("computes", [False, True], ids=["copies", "collins"])
def test_pipeline(measure, tables, computes):
    pipeline = Pipeline(tables.slabs, tables.streams, slots=SLOTS)
    compute = tables.update() if computes else lambda transfer, tensors: None
    order = range(len(tables.slabs))

    def step():
        pipeline.run(order, compute)
        pipeline.prefetch_first()

    name = "pipeline with Collins" if computes else "pipeline alone"
    measure(step, name, 2 * tables.nbytes, pipeline.ring.nbytes)


def test_resident(measure, tables):
    """The time of the update without copies."""
    compute = tables.update()
    resident = [[tensor.to(DEVICE) for tensor in slab.tensors] for slab in tables.slabs]

    def step():
        for transfer, tensors in enumerate(resident):
            compute(transfer, tensors)

    measure(step, "resident Collins", 2 * tables.nbytes)


def test_step_after_backward(measure, tables):
    """A step after backward with all tables on the host reaches at least 80 % of the rate of the link."""
    ps = [torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)) for shape in SHAPES]
    for p in ps:
        p.grad = torch.randn_like(p)
    opt = Collins(ps, memory="host")
    measure(opt.step, "Collins.step, host tier", 2 * tables.nbytes)
    (plan,) = opt.placement
    assert plan.host_bytes == plan.bytes
    if "copy" in MEDIANS:
        assert MEDIANS["copy"] / MEDIANS["Collins.step, host tier"] >= 0.8


@pytest.fixture(scope="module")
def training():
    """Over each tier, training steps of LLaMA-7B in bf16, compiled block by block, on a batch of one sequence."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from llama import Llama
    finally:
        sys.path.remove(str(EXAMPLES))
    tokens = torch.randint(32000, (1, LENGTH + 1), device=DEVICE)

    def build(tier):
        with torch.device("meta"):
            llama_7b = Llama(32, 4096, 11008, 32, 32, 32000).to(torch.bfloat16)
        llama_7b.to_empty(device=DEVICE)
        llama_7b.fill()
        llama_7b.compile_blocks()
        opt = Collins(llama_7b.parameters(), lr=1e-4, memory=tier, in_backward=True)

        def steps():
            for _ in range(IN_A_ROW):
                llama_7b.loss(tokens, CHUNKS).backward()
                opt.step()

        return steps, opt

    return {tier: build(tier) for tier in ("device", "host")}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile's own look at its inputs
@pytest.mark.parametrize("tier", ["device", "host"])
def test_training_steps(measure, training, tier):
    (steps, opt), (other, _) = training[tier], training["host" if tier == "device" else "device"]
    turns, rounds = Turns(other, torch.cuda.synchronize), ROUNDS // 2
    name = f"{IN_A_ROW} training steps, {tier} tier"
    moved = sum(p.nbytes for group in opt.param_groups for p in group["params"]) * 3
    moved += 2 * opt.memory_report().state_bytes
    measure(steps, name, IN_A_ROW * moved, group="llama-7b training, in backward", before=turns, rounds=rounds)
    assert all(row.tier == tier for plan in opt.placement for row in plan.rows)
    if tier == "host":
        assert MEDIANS[name] <= 1.05 * turns.median(rounds)
