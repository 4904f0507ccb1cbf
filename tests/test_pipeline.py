"""Steps with moments in host slabs are bitwise equal to resident ones, in every order that the waits allow.

Each wait is needed: without it, some order gives a wrong result.
"""

import gc
import multiprocessing
import weakref
from itertools import accumulate, chain, product

import pytest
import torch
from fake_streams import MODES, FakeStreams, FreedMemoryError
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from collins.bucketing import bucketing_of
from collins.formats import format_name
from collins.hashing import hash_key
from collins.offload import Pipeline, Slab, TensorSpec, grouped, streams_for
from collins.offload.streams import CudaStreams, HostStreams, StreamKind, WaitFor
from collins.rule import step_scalars
from collins.update import HashKeys, UpdateSpec, UpdateTask, update_

SHAPES = [(40, 3), (7,), (64, 4), (96,), (5, 5), (33, 8), (16,), (50, 2)]
TOKENS = [(90, 16), *SHAPES[1:7], (80, 16)]  # two of them, the first and the last, exceed the smaller slots
DTYPES = [torch.float32, torch.bfloat16]


class ComputeError(Exception):
    pass


def shuffled(count):
    """The transfers of a step in a different order."""
    return [place * 5 % count for place in range(count)] if count % 5 else list(reversed(range(count)))


class Model:
    """Parameters, their gradients, and the real update of one of them."""

    def __init__(self, count=8, dtype=torch.float32, device="cpu", shapes=SHAPES):
        self.device, self.dtype = torch.device(device), dtype
        generator = torch.Generator().manual_seed(count)
        self.start = [torch.randn(shape, generator=generator) for shape in (shapes * 9)[:count]]
        self.p = [p.to(self.device, copy=True) for p in self.start]
        self.layouts = [bucketing_of(p.numel(), compress_ratio=4, min_K=20, hash="block") for p in self.p]
        self.parts = [[TensorSpec(self.moment_shape(i), dtype)] * 2 for i in range(count)]

    def moment_shape(self, i):
        layout = self.layouts[i]
        return tuple(self.p[i].shape) if layout.hash is None else (layout.buckets,)

    def gradient(self, i, step):
        generator = torch.Generator().manual_seed(1000 * step + i)
        return torch.randn(self.p[i].shape, generator=generator)

    def update(self, i, step, g, m, v):
        layout = self.layouts[i]
        formats = (format_name(self.dtype),) * 2
        spec = UpdateSpec(layout.hash, layout.load, "least_squares", True, True, False, False, *formats)
        keys = HashKeys(hash_key(0, i, "sign"), hash_key(0, i, "round"), (0, 0, 0, 0), 3)
        hp = step_scalars(
            step, lr=0.02, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, residual_weight=0.3, residual_square=1.0
        )
        update_(UpdateTask(self.p[i], (m,), (v,), spec, keys, layout.numel), g, hp)


class Resident(Model):
    """The oracle: moments stay on the device."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.moments = [
            [torch.zeros(part.shape, dtype=part.dtype, device=self.device) for part in parts] for parts in self.parts
        ]

    def step(self, step, indices):
        for i in indices:
            self.update(i, step, self.gradient(i, step).to(self.device), *self.moments[i])


class Staged(Model):
    """The same parameters with their moments in slabs, on the given streams."""

    def __init__(self, streams, *args, transfer_size=600, slots=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.streams = streams
        self.members = grouped(self.parts, transfer_size)
        self.place = {i: (b, j) for b, members in enumerate(self.members) for j, i in enumerate(members)}
        slabs = [Slab(part for i in members for part in self.parts[i]) for members in self.members]
        self.pipeline = Pipeline(slabs, streams, slots=slots)

    @property
    def moments(self):
        """The moments in the slabs."""
        positions = [(self.pipeline.slabs[b].tensors, j) for b, j in (self.place[i] for i in range(len(self.p)))]
        return [tensors[2 * j : 2 * j + 2] for tensors, j in positions]

    def compute(self, i, step, m, v):
        """Enqueues the gradient and the update on the current stream; neither has necessarily run on return."""
        g = self.streams.empty(self.p[i].nbytes).view(torch.float32).view(self.p[i].shape)
        self.streams.launch(lambda g: g.copy_(self.gradient(i, step)), g)
        self.streams.launch(lambda g, m, v: self.update(i, step, g, m, v), g, m, v)

    def whole_step(self, step, order, stop_at=None):
        def compute(transfer, tensors):
            for j, i in enumerate(self.members[transfer]):
                self.compute(i, step, *tensors[2 * j : 2 * j + 2])
            if transfer == stop_at:
                raise ComputeError

        self.pipeline.run(order, compute)

    def arrive(self, step, indices, streams=(), stop_at=None):
        """Steps the parameters with these indices, in this order, on the given streams in turn."""
        streams = streams or [self.streams.current]
        remaining = {b: sum(self.place[i][0] == b for i in indices) for b in range(len(self.members))}
        for number, i in enumerate(indices):
            transfer, j = self.place[i]
            remaining[transfer] -= 1
            has_more = remaining[transfer] > 0 or number % 5 == 4  # sometimes the last one is not marked as the last
            with self.streams.on(streams[number % len(streams)]):
                try:
                    with self.pipeline.using(transfer, (2 * j, 2 * j + 1), more=has_more) as tensors:
                        if i == stop_at:
                            self.streams.launch(lambda m, v: (m.fill_(3), v.fill_(4)), *tensors)
                            raise ComputeError
                        self.compute(i, step, *tensors)
                except ComputeError:
                    pass
        self.pipeline.finish()


def equal_bits(a_tensors, b_tensors):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(a_tensors, b_tensors, strict=True))


def same_moments(staged, resident):
    return equal_bits(chain(*staged.moments), chain(*resident.moments))


def same_bits(staged, resident):
    return equal_bits(staged.p, resident.p) and same_moments(staged, resident)


def drain_and_check(staged):
    """Drains the pipeline, and checks that values read then equal those after all work of the device."""
    staged.pipeline.drain()
    read = [t.clone() for t in chain(*staged.moments)]
    staged.streams.finish_everything()
    assert equal_bits(read, chain(*staged.moments)), "the slabs changed after the pipeline was drained"


def staged_and_resident(streams, *, dtype=torch.float32, shapes=SHAPES, **options):
    return Staged(streams, 8, dtype, shapes=shapes, **options), Resident(8, dtype, shapes=shapes)


# Scenarios: each trains a few steps and returns whether the result is bitwise that of resident moments.


def whole_steps(streams, **options):
    staged, resident = staged_and_resident(streams, **options)
    for step in (1, 2, 3):
        order = list(range(len(staged.members)))
        staged.whole_step(step, shuffled(len(order)) if step == 2 else order)
        resident.step(step, range(8))
        streams.next_step()
    drain_and_check(staged)
    return same_bits(staged, resident)


def arrivals(streams, **options):
    """Orders that differ from step to step, parameters without gradient, and three streams in turn."""
    staged, resident = staged_and_resident(streams, **options)
    streams_in_turn = [streams.current, streams.new_stream("side"), streams.new_stream("other")]
    orders = [[7, 6, 5, 4, 3, 2, 1, 0], [7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 7, 5, 1], [3, 0, 7], [1, 5, 0, 6, 2, 7]]
    for step, order in enumerate(orders, 1):
        staged.arrive(step, order, streams_in_turn)
        resident.step(step, order)
        staged.pipeline.prefetch_first()  # without effect if the next order differs
        streams.next_step()
    drain_and_check(staged)
    return same_bits(staged, resident)


def failures(streams, **options):
    """The update of one parameter fails after others of its transfer have been updated."""
    staged, resident = staged_and_resident(streams, **options)
    for step, (order, fails) in enumerate(
        [([0, 1, 2, 3, 4, 5, 6, 7], 2), ([7, 6, 5, 4, 3, 2, 1, 0], 1), ([2, 1], 2), ([7, 3, 0], 0)], 1
    ):
        staged.arrive(step, order, stop_at=fails)
        resident.step(step, [i for i in order if i != fails])
        streams.next_step()
    drain_and_check(staged)
    return same_bits(staged, resident)


SCENARIOS = {"whole": whole_steps, "arrivals": arrivals, "failures": failures}
SETTINGS = [
    *({"transfer_size": size, "slots": slots} for size, slots in [(1, 3), (600, 1), (600, 2), (1500, 3)]),
    *({"transfer_size": size, "slots": slots, "shapes": TOKENS} for size, slots in [(1, 2), (600, 3), (1, 4)]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    SETTINGS,
    ids=lambda o: "-".join([f"{o['transfer_size']}B", f"{o['slots']}slots", *["tokens"] * ("shapes" in o)]),
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_results_bitwise_equal_resident_ones_in_every_order(scenario, mode, options, dtype):
    assert SCENARIOS[scenario](FakeStreams(mode), dtype=dtype, **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_results_bitwise_equal_resident_ones_for_any_order_of_arrival(data):
    count = data.draw(st.integers(1, 9))
    streams = FakeStreams(data.draw(st.one_of(st.sampled_from(MODES), st.integers(0, 10_000))))
    options = {"transfer_size": data.draw(st.integers(1, 3000)), "slots": data.draw(st.integers(1, 5))}
    shapes = data.draw(st.sampled_from([SHAPES, TOKENS]))
    staged, resident = Staged(streams, count, shapes=shapes, **options), Resident(count, shapes=shapes)
    streams_in_turn = [streams.current, streams.new_stream("side")]
    for step in range(1, data.draw(st.integers(2, 5))):
        indices = data.draw(st.permutations(range(count)))[: data.draw(st.integers(0, count))]
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(staged.members))))
            staged.whole_step(step, order)
            resident.step(step, range(count))
        else:
            staged.arrive(step, indices, streams_in_turn[: data.draw(st.integers(1, 2))])
            resident.step(step, indices)
        prefetched = data.draw(st.sampled_from(["nothing", "first", "any", "drain"]))
        if prefetched == "first":
            staged.pipeline.prefetch_first()
        elif prefetched == "any":
            staged.pipeline.prefetch(data.draw(st.integers(0, len(staged.members) - 1)))
        elif prefetched == "drain":
            staged.pipeline.drain()
            assert same_moments(staged, resident)
    drain_and_check(staged)
    assert same_bits(staged, resident)


# Mutants: the streams of each entry omit one wait or one rule of order.

MUTANTS = {rule.name: {"drop": [rule]} for rule in WaitFor if rule is not WaitFor.LET_GO}
MUTANTS["SLOT_FREE, in memory that nobody used before"] = {"drop": [WaitFor.SLOT_FREE], "inherits": False}
MUTANTS["current stream cached at construction"] = {"caches_current": True}
MUTANTS["new streams every step"] = {"remakes_streams": True}


def gives_a_wrong_result(scenario, mode, options, mutation):
    try:
        return not scenario(FakeStreams(mode, **mutation), **options)
    except (AssertionError, FreedMemoryError):
        return True


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_rule_is_needed(mutant):
    """Without it, some scenario fails; the tests above show that with it none does."""
    attempts = product((*MODES, *range(4, 20)), SETTINGS, SCENARIOS.values())
    assert any(gives_a_wrong_result(scenario, mode, options, MUTANTS[mutant]) for mode, options, scenario in attempts)


def test_slabs_are_freed_only_when_copies_are_complete():
    def drop_pipeline(**mutation):
        streams = FakeStreams("late", **mutation)
        pipeline = Pipeline([Slab([TensorSpec((4,), torch.float32)]) for _ in range(4)], streams)
        pipeline.run(range(4), lambda transfer, tensors: streams.launch(lambda m: m.add_(1), *tensors))
        reference = weakref.ref(pipeline)
        del pipeline
        assert reference() is None
        streams.finish_everything()

    drop_pipeline()
    with pytest.raises(FreedMemoryError, match="a slab was freed"):
        drop_pipeline(drop=[WaitFor.LET_GO])


@pytest.mark.parametrize("mode", MODES)
def test_slots_are_freed_only_when_the_callers_stream_is_complete(mode):
    def drop_pipeline(**mutation):
        streams = FakeStreams(mode, **mutation)
        staged = Staged(streams)
        total = torch.zeros(1)
        with streams.on(streams.new_stream("side")):
            (m,) = staged.pipeline.acquire(0, [0])
            streams.launch(lambda m: total.copy_(1 + m.abs().sum()), m)
        del staged, m
        gc.collect()
        streams.finish_everything()
        return total.item()

    assert drop_pipeline() == 1
    if mode == "late":
        with pytest.raises(FreedMemoryError):
            drop_pipeline(holds=False)


# The schedule.


def test_streams_and_addresses_are_the_same_in_every_step():
    streams = FakeStreams("late")
    staged = Staged(streams, transfer_size=600)
    count, addresses = len(streams.streams), []
    original = staged.pipeline.acquire

    def acquire(transfer, parts=None):
        tensors = original(transfer, parts)
        addresses[-1][transfer] = [t.data_ptr() for t in tensors]
        return tensors

    staged.pipeline.acquire = acquire
    order = shuffled(len(staged.members))
    for step in (1, 2, 3, 4):
        addresses.append({})
        staged.whole_step(step, order)
        staged.pipeline.drain() if step == 2 else staged.pipeline.prefetch_first()
    assert len(streams.streams) == count
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3]
    assert len({address for values in addresses[0].values() for address in values}) > 3


SIZES = [3000, 100, 200, 100, 300, 100, 200, 2000]  # bytes: those of a model with two token tables


def pipeline_of(sizes, streams, slots):
    return Pipeline([Slab([TensorSpec((size,), torch.uint8)]) for size in sizes], streams, slots=slots)


def spied(pipeline):
    """The offsets in the ring at which transfers are acquired, and the transfers that had not been prefetched then."""
    start = pipeline._slots[0].memory.data_ptr()
    offsets, misses, acquire, stage = [], [], pipeline.acquire, pipeline._stage
    acquiring = []

    def logged_acquire(transfer, parts=None):
        acquiring.append(transfer)
        tensors = acquire(transfer, parts)
        acquiring.clear()
        offsets.append((transfer, tensors[0].data_ptr() - start))
        return tensors

    def logged_stage(transfer, slot):
        misses.extend([transfer] if transfer in acquiring else [])
        stage(transfer, slot)

    pipeline.acquire, pipeline._stage = logged_acquire, logged_stage
    return offsets, misses


@given(
    st.lists(st.sampled_from([100, 200, 300, 2000, 3000]), min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from(["whole", "arrive"]),
    st.data(),
)
def test_addresses_in_a_ring_of_two_sizes_are_the_same_in_every_step(sizes, slots, way, data):
    """From the first step on whose order is known, however much of it was prefetched before it began."""
    pipeline, steps = pipeline_of(sizes, FakeStreams("late"), slots), []
    offsets, _ = spied(pipeline)
    order = data.draw(st.permutations(range(len(sizes))))
    for _ in range(4):
        if way == "whole":
            pipeline.run(order, lambda transfer, tensors: None)
        else:
            for transfer in order:
                with pipeline.using(transfer):
                    pass
            pipeline.finish()
        steps.append(offsets.copy())
        offsets.clear()
        {"drain": pipeline.drain, "first": pipeline.prefetch_first, "nothing": lambda: None}[
            data.draw(st.sampled_from(["drain", "first", "nothing"]))
        ]()
    known = steps if way == "whole" else steps[1:]
    assert all(step == known[0] for step in known)
    starts = list(accumulate(pipeline.ring.sizes, initial=0))
    for transfer, offset in chain(*steps):
        assert sizes[transfer] <= pipeline.ring.sizes[starts.index(offset)]


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_a_large_transfer_finds_its_slot_free_when_it_is_expected(slots):
    """Small transfers leave the large slot to it, wherever in the order it comes, and use all slots otherwise."""
    for count in range(3, 13):
        pipeline = pipeline_of([3000, *[100] * count, 2000], FakeStreams("late"), slots)
        offsets, misses = spied(pipeline)
        for _ in range(3):
            misses.clear()
            offsets.clear()
            pipeline.run(range(count + 2), lambda transfer, tensors: None)
            pipeline.prefetch_first()
        assert not {0, count + 1} & set(misses)
        assert len(misses) <= (slots == 2)  # the transfer before a large one has the small slot only
        if count >= 2 * slots:
            assert len({offset for _, offset in offsets[1:-1]}) == slots


@pytest.mark.parametrize(("slots", "expected"), [(2, [0, 1, 0, 1]), (3, [1, 2, 1, 2]), (4, [1, 2, 3, 1])])
def test_neighbours_use_different_slots_before_any_order_is_known(slots, expected):
    """The smaller slots in turn; a single one takes turns with the larger slot."""
    pipeline = pipeline_of([3000, *[100] * 4, 2000], FakeStreams("late"), slots)
    offsets, _ = spied(pipeline)
    for transfer in (1, 2, 3, 4):
        with pipeline.using(transfer):
            pass
    starts = list(accumulate(pipeline.ring.sizes, initial=0))
    assert [starts.index(offset) for _, offset in offsets] == expected


def test_a_transfer_uses_only_slots_that_it_fits_into():
    pipeline = pipeline_of(SIZES, HostStreams(), 3)
    assert pipeline.ring.sizes == (3072, 512, 512)
    pipeline.acquire(0)
    assert not pipeline.prefetch(7)
    with pytest.raises(RuntimeError, match=r"no slot for transfer 7: all of 2,000 bytes or more .* transfers, \[0\];"):
        pipeline.acquire(7)
    pipeline.acquire(1)
    pipeline.acquire(2)
    with pytest.raises(RuntimeError, match=r"no slot for transfer 3: all hold acquired transfers, \[0, 2, 1\];"):
        pipeline.acquire(3)
    pipeline.release(0)
    pipeline.acquire(7)
    for transfer in (1, 2, 7):
        pipeline.release(transfer)
    pipeline.drain()


@pytest.mark.parametrize("mode", MODES)
def test_a_large_transfer_evicts_a_small_one_that_has_not_been_written_back(mode):
    streams = FakeStreams(mode)
    pipeline = pipeline_of(SIZES, streams, 3)

    def use(transfer, more):
        with pipeline.using(transfer, more=more) as (m,):
            streams.launch(lambda m: m.add_(transfer), m)

    with pipeline.using(1), pipeline.using(2):  # both small slots
        use(3, more=True)
    assert pipeline._slots[0].transfer == 3
    use(7, more=True)
    use(4, more=False)
    use(0, more=False)
    pipeline.finish()
    pipeline.drain()
    assert [slab.tensors[0].unique().tolist() for slab in pipeline.slabs] == [[0], [0], [0], [3], [4], [0], [0], [7]]


def test_both_directions_overlap_with_compute():
    """With three slots, copies in are enqueued two transfers ahead of compute, and none waits for a later transfer."""
    streams, log = FakeStreams("late"), []
    slabs = [Slab([TensorSpec((4,), torch.float32)]) for _ in range(6)]
    pipeline = Pipeline(slabs, streams, slots=3)
    transfer_at = {slab.bytes.data_ptr(): b for b, slab in enumerate(slabs)}
    copy = streams.copy

    def log_copy(kind, target, source):
        host = target if kind is StreamKind.D2H else source
        log.append((kind.name, transfer_at[host.data_ptr()]))
        copy(kind, target, source)

    streams.copy = log_copy
    pipeline.run(range(6), lambda transfer, tensors: log.append(("compute", transfer)))
    for transfer in range(6):
        prefetched = {b for kind, b in log[: log.index(("compute", transfer))] if kind == "H2D"}
        assert prefetched == set(range(min(transfer + 3, 6)))
        before_copy = log[: log.index(("D2H", transfer))]
        assert ("compute", transfer) in before_copy
        assert ("compute", transfer + 1) not in before_copy


def test_parts_that_are_stepped_one_by_one_on_one_stream_need_no_more_events():
    calls, counts = [], []
    for uses in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        streams = FakeStreams("late")
        pipeline = Pipeline([Slab([TensorSpec((4,), torch.float32)] * 4)], streams)
        for name in ("record", "wait", "hold", "copy"):
            original = getattr(streams, name)
            setattr(streams, name, lambda *args, original=original: (calls.append(original), original(*args)))
        for parts in uses:
            with pipeline.using(0, parts, more=parts is not uses[-1]) as tensors:
                streams.launch(lambda *ms: [m.add_(1) for m in ms], *tensors)
        counts.append(len(calls))
        pipeline.drain()
        calls.clear()
        assert [t.tolist() for t in pipeline.slabs[0].tensors] == [[1] * 4] * 4
    assert counts[0] == counts[1] == counts[2]


def test_the_last_order_is_the_prediction():
    streams = FakeStreams("late")
    pipeline = Pipeline([Slab([TensorSpec((4,), torch.float32)]) for _ in range(5)], streams, slots=2)
    misses = []
    original = pipeline._room
    pipeline._room = lambda transfer, *args, force=False, **kwargs: (
        misses.append(transfer) if force else None,
        original(transfer, *args, force=force, **kwargs),
    )[1]
    for _ in range(2):
        for transfer in (4, 1, 3, 0, 2):
            with pipeline.using(transfer):
                pass
        pipeline.finish()
    assert misses == [4, 1, 3, 0, 2, 4]  # in the second step only the first transfer is waited for
    pipeline.prefetch_first()
    with pipeline.using(4):
        pass
    assert misses[6:] == []


def test_staged_values_do_not_outlive_a_drain():
    pipeline = Pipeline([Slab([TensorSpec((4,), torch.float32)])], HostStreams())
    assert pipeline.prefetch(0)
    pipeline.drain()
    pipeline.slabs[0].tensors[0].fill_(5)
    with pipeline.using(0) as (m,):
        assert m.tolist() == [5] * 4


@pytest.mark.parametrize(("shapes", "fails"), [(SHAPES, 4), (TOKENS, 4), (TOKENS, 7)], ids=["alike", "small", "large"])
@pytest.mark.parametrize("mode", MODES)
def test_a_failed_transfer_keeps_its_values_and_the_pipeline_remains_usable(mode, shapes, fails):
    streams = FakeStreams(mode)
    staged, resident = Staged(streams, transfer_size=1, shapes=shapes), Resident(8, shapes=shapes)
    staged.whole_step(1, range(8))
    resident.step(1, range(8))
    streams.finish_everything()
    before = [p.clone() for p in staged.p]
    with pytest.raises(ComputeError):
        staged.whole_step(2, range(8), stop_at=fails)
    drain_and_check(staged)
    # The caller restores its parameters: here those of the failed transfer.
    staged.p[fails].copy_(before[fails])
    resident.step(2, range(fails))
    assert same_bits(staged, resident)
    staged.whole_step(3, range(8))
    resident.step(3, range(8))
    drain_and_check(staged)
    assert same_bits(staged, resident)


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_second_use_preserves_the_first(mode):
    """Both uses are of the same part, and the first one has not been written back yet."""
    streams = FakeStreams(mode)
    pipeline = Pipeline([Slab([TensorSpec((4,), torch.float32)] * 2)], streams)
    with pipeline.using(0, [1], more=True) as (m,):
        streams.launch(lambda m: m.add_(5), m)

    def fail():
        with pipeline.using(0, [1], more=True) as (m,):
            streams.launch(lambda m: m.add_(7), m)
            raise ComputeError

    with pytest.raises(ComputeError):
        fail()
    pipeline.drain()
    assert [t.tolist() for t in pipeline.slabs[0].tensors] == [[0] * 4, [5] * 4]


def test_the_host_backend_is_bitwise_equal():
    pipeline = Pipeline(
        [Slab([TensorSpec((40,), torch.float32)]), Slab([TensorSpec((4,), torch.bfloat16)])], HostStreams()
    )
    for step in (1, 2):
        pipeline.run([1, 0], lambda transfer, tensors, step=step: tensors[0].add_(step + transfer))
    pipeline.drain()
    assert [slab.tensors[0].unique().tolist() for slab in pipeline.slabs] == [[3], [5]]
    assert isinstance(streams_for(torch.device("cpu")), HostStreams)


# Bad input.


def two_transfers(slots=3):
    return Pipeline([Slab([TensorSpec((4,), torch.float32)]) for _ in range(2)], HostStreams(), slots=slots)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Pipeline([], HostStreams()), ValueError, "slabs must hold at least one slab"),
        (lambda: two_transfers(slots=0), ValueError, "slots must be at least 1, got 0"),
        (lambda: two_transfers().acquire(2), ValueError, r"transfer must be in \[0, 1\], got 2"),
        (lambda: two_transfers().prefetch(-1), ValueError, r"transfer must be in \[0, 1\], got -1"),
        (lambda: two_transfers().run([0, 7], print), ValueError, r"transfer must be in \[0, 1\], got 7"),
        (lambda: two_transfers().acquire(0, [1]), ValueError, r"parts of transfer 0 must be in \[0, 0\], got \[1\]"),
        (lambda: two_transfers().release(0), RuntimeError, "transfer 0 is not acquired"),
        (lambda: two_transfers().discard(1), RuntimeError, "transfer 1 is not acquired"),
        (lambda: streams_for(torch.device("meta")), ValueError, "device must be a CUDA device or the CPU"),
    ],
)
def test_invalid_input_is_rejected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_transfer_is_acquired_once_and_slots_are_finite():
    pipeline = two_transfers(slots=1)
    pipeline.acquire(0)
    with pytest.raises(RuntimeError, match="transfer 0 is acquired already"):
        pipeline.acquire(0)
    with pytest.raises(RuntimeError, match=r"no slot for transfer 1: all hold acquired transfers, \[0\]"):
        pipeline.acquire(1)
    assert not pipeline.prefetch(1)
    with pytest.raises(RuntimeError, match=r"transfers \[0\] are still acquired"):
        pipeline.drain()
    pipeline.release(0)
    pipeline.drain()


def call_in_child(pipeline, answers):
    for name, call in {
        "drain": pipeline.drain,
        "prefetch": lambda: pipeline.prefetch(0),
        "prefetch_first": pipeline.prefetch_first,
        "acquire": lambda: pipeline.acquire(0),
        "run": lambda: pipeline.run([0], lambda transfer, tensors: tensors[0].fill_(9)),
    }.items():
        try:
            call()
            answers.put((name, "worked"))
        except RuntimeError as error:
            answers.put((name, str(error)))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # threads and fork, from Python 3.12 on
def test_a_forked_child_is_rejected():
    pipeline = two_transfers()
    pipeline.run([0, 1], lambda transfer, tensors: tensors[0].fill_(1))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=call_in_child, args=(pipeline, answers))
    child.start()
    replies = dict(answers.get(timeout=60) for _ in range(5))
    child.join(timeout=60)
    assert child.exitcode == 0
    assert len(replies) == 5
    assert all("forked" in message and "spawn" in message for message in replies.values())
    pipeline.drain()
    assert [slab.tensors[0].tolist() for slab in pipeline.slabs] == [[1] * 4] * 2


def test_the_pipeline_is_freed_with_its_last_reference():
    pipeline = two_transfers()
    pipeline.run([0, 1], lambda transfer, tensors: None)
    slab, reference = weakref.ref(pipeline.slabs[0]), weakref.ref(pipeline)
    del pipeline
    assert reference() is None
    assert slab() is None


# On a real device.


class OnCuda(Staged):
    """Like `Staged`, with real kernels."""

    def compute(self, i, step, m, v):
        g = self.gradient(i, step).to(self.device, non_blocking=True)
        self.update(i, step, g, m, v)


@pytest.fixture
def cuda():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.cuda
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_results_bitwise_equal_resident_ones(cuda, dtype, slots):
    count = 24
    staged = OnCuda(CudaStreams(cuda), count, dtype, cuda, transfer_size=2000, slots=slots)
    resident = Resident(count, dtype, cuda)
    transfers = len(staged.members)
    for step in range(1, 7):
        staged.whole_step(step, shuffled(transfers) if step % 2 else range(transfers))
        resident.step(step, range(count))
        if step == 3:
            staged.pipeline.prefetch_first()
    staged.pipeline.drain()
    assert all(slab.pinned and slab.bytes.is_pinned() for slab in staged.pipeline.slabs)
    assert same_bits(staged, resident)


@pytest.mark.cuda
def test_cuda_results_bitwise_equal_resident_ones_on_side_streams(cuda):
    """A large transfer after a slow kernel, stepped on a side stream: copies that run too early change the result."""
    numel = 2**24
    slabs = [Slab([TensorSpec((numel,), torch.float32)]) for _ in range(4)]
    pipeline = Pipeline(slabs, CudaStreams(cuda), slots=2)
    streams = [torch.cuda.current_stream(cuda), torch.cuda.Stream(cuda), torch.cuda.Stream(cuda)]
    for step in range(6):
        with torch.cuda.stream(streams[step % 3]):

            def compute(transfer, tensors, step=step):
                torch.cuda._sleep(10_000_000)
                tensors[0].mul_(2).add_(transfer + step)

            pipeline.run([0, 1, 2, 3] if step % 2 else [2, 0, 3, 1], compute)
    pipeline.drain()
    for transfer, slab in enumerate(slabs):
        expected = 0
        for step in range(6):
            expected = 2 * expected + transfer + step
        assert slab.tensors[0].unique().tolist() == [expected]


@pytest.mark.cuda
def test_cuda_copy_streams_are_created_once_per_device(cuda):
    first, second = CudaStreams(cuda), CudaStreams(torch.device("cuda"))
    for kind in (StreamKind.H2D, StreamKind.D2H):
        assert first._stream(kind) == second._stream(kind)
        assert first._stream(kind) != torch.cuda.default_stream(cuda)
    side_stream = torch.cuda.Stream(cuda)
    with torch.cuda.stream(side_stream):
        assert first._stream(StreamKind.CURRENT) == side_stream
    assert first._stream(StreamKind.CURRENT) != side_stream


@pytest.mark.cuda
def test_cuda_graphs_are_rejected_during_capture(cuda):
    pipeline = Pipeline([Slab([TensorSpec((4,), torch.float32)])], CudaStreams(cuda))
    pipeline.run([0], lambda transfer, tensors: tensors[0].add_(1))
    pipeline.drain()
    x = torch.zeros(1, device=cuda)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)  # an empty graph would warn
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            pipeline.acquire(0)
    pipeline.run([0], lambda transfer, tensors: tensors[0].add_(1))
    pipeline.drain()
    assert pipeline.slabs[0].tensors[0].tolist() == [2] * 4
