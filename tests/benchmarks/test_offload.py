"""The host link: how fast it copies, and how near to that a step over tables in host memory comes.

    pytest tests/benchmarks/test_offload.py --benchmark-json=offload.json

runs on a GPU, and is skipped where there is none. It ends with a table for the tables of LLaMA-7B in pinned slabs: each
direction of the link alone, both at once ("copy"), the pipeline with nothing to compute, the pipeline with Collins'
compiled update of bf16 parameters, and that update with resident tables. "of copy speed" is the share of the rate that
both directions reach at once: a pipeline whose directions do not overlap gets to about half of it.
"""

import gc

import pytest
import torch

from collins.compile import Engine
from collins.hashing import hash_key
from collins.layout import layout_of
from collins.offload import Part, Pipeline, Slab, grouped, streams_for
from collins.offload.shapes import llama
from collins.offload.streams import Lane, Rule
from collins.rule import scalars
from collins.update import Keys, Spec, Work

pytestmark = pytest.mark.cuda

SHAPES = llama(32, 4096, 11008, 4096, 32000).shapes
BUCKET_SIZE = 64 * 2**20
SLOTS = 3
ROUNDS = 15
DEVICE = torch.device("cuda")


class Tables:
    """The tables of a model in slabs, as the host tier keeps them."""

    def __init__(self, shapes=SHAPES, device=DEVICE, bucket_size=BUCKET_SIZE):
        self.shapes, self.device = shapes, device
        self.layouts = [
            layout_of(torch.Size(shape).numel(), compress_ratio=32, min_K=1024, hash="block") for shape in shapes
        ]
        parts = [
            [Part(shape if layout.hash is None else (layout.buckets,), torch.float32)] * 2
            for shape, layout in zip(shapes, self.layouts, strict=True)
        ]
        self.members = grouped(parts, bucket_size)
        self.slabs = [Slab(part for i in members for part in parts[i]) for members in self.members]
        self.nbytes = sum(slab.nbytes for slab in self.slabs)
        self.streams = streams_for(device)

    def update(self):
        """A function that steps a bucket's parameters, bf16 and resident with their gradients."""
        ps = [torch.randn(shape, device=self.device, dtype=torch.bfloat16) for shape in self.shapes]
        gs = [torch.randn_like(p) for p in ps]
        engine = Engine()
        h = scalars(9, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, residual_weight=None)

        def compute(bucket, tensors):
            engine.run(
                Work(
                    ps[i],
                    gs[i],
                    *tensors[2 * j : 2 * j + 2],
                    Spec(layout.hash, layout.load, "residual", layout.hash is not None, True, False),
                    Keys(hash_key(0, i, "sign"), hash_key(0, i, "round"), (0, 0, 0, 0), 100),
                    h,
                    layout.numel,
                )
                for j, (i, layout) in enumerate((i, self.layouts[i]) for i in self.members[bucket])
            )

        return compute


@pytest.fixture(scope="module")
def tables():
    made = Tables()
    assert all(slab.pinned for slab in made.slabs)
    yield made
    del made
    gc.collect()


@pytest.fixture
def measure(benchmark):
    def timed(function, name, nbytes, peak=None):
        def once():
            function()
            torch.cuda.synchronize()

        benchmark.group = "llama-7b tables over the host link"
        benchmark.extra_info.update(name=name, bytes=nbytes, peak=peak)
        benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=3)

    yield timed
    gc.collect()
    torch.cuda.empty_cache()


def copier(tables, *lanes):
    """Copies all slabs in the given directions at once, each from or to device memory of its own."""
    streams = tables.streams
    size = max(slab.nbytes for slab in tables.slabs)
    memory = {lane: streams.empty(size) for lane in lanes}
    ready = streams.event()

    def copy():
        streams.record(ready, Lane.CURRENT)
        for lane in lanes:
            streams.wait(lane, ready, Rule.SLOT_FREE)
        for slab in tables.slabs:
            for lane in lanes:
                ends = slab.bytes, memory[lane][: slab.nbytes]
                streams.copy(lane, *(ends if lane is Lane.D2H else ends[::-1]))

    return copy


@pytest.mark.parametrize("lanes", [(Lane.H2D,), (Lane.D2H,), (Lane.H2D, Lane.D2H)], ids=["h2d", "d2h", "both"])
def test_link(measure, tables, lanes):
    names = {(Lane.H2D,): "h2d alone", (Lane.D2H,): "d2h alone"}
    measure(copier(tables, *lanes), names.get(lanes, "copy"), len(lanes) * tables.nbytes)


@pytest.mark.parametrize("computes", [False, True], ids=["copies", "collins"])
def test_pipeline(measure, tables, computes):
    pipeline = Pipeline(tables.slabs, tables.streams, slots=SLOTS)
    compute = tables.update() if computes else lambda bucket, tensors: None
    order = range(len(tables.slabs))

    def step():
        pipeline.run(order, compute)
        pipeline.prefetch_first()

    name = "pipeline with Collins" if computes else "pipeline alone"
    measure(step, name, 2 * tables.nbytes, SLOTS * pipeline.slot_bytes)


def test_resident(measure, tables):
    """What the update takes when nothing has to be copied."""
    compute = tables.update()
    resident = [[tensor.to(DEVICE) for tensor in slab.tensors] for slab in tables.slabs]

    def step():
        for bucket, tensors in enumerate(resident):
            compute(bucket, tensors)

    measure(step, "resident Collins", 2 * tables.nbytes)
