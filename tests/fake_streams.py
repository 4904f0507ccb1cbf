"""Simulated streams of a device, which run work as late, as early or in as unusual an order as its waits allow.

Copies and kernels are queued. They run when something that waits for them needs them, or when the `mode` selects them:

    "late"      nothing runs before it is needed
    "eager"     everything runs as soon as its waits allow
    "h2d", "d2h", "current"     work of that kind runs as soon as its waits allow, other work when it is needed
    an int      the seed of a random order that the waits allow

Device memory is filled with 0xFF (NaN in every floating dtype) when it is allocated, by a pending kernel of its
previous user, and after each copy out of it. Work that uses freed memory raises `FreedMemoryError`, unless it is on a
stream that the allocator accounts for: the stream of the allocation, or one passed to `hold`."""

import ctypes
import random
import weakref
from collections import deque
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from collins.offload.streams import StreamKind

MODES = ("late", "eager", "h2d", "d2h", "current", 1, 2, 3)


class FreedMemoryError(Exception):
    """A copy or a kernel ran after memory that it uses had been freed."""


class Stream:
    """A queue of operations, each a pair (position to wait for or None, function). `enqueued` counts all operations,
    `completed` those that have run."""

    def __init__(self, name):
        self.name, self.enqueued, self.completed = name, 0, 0
        self._pending = deque()

    @property
    def head(self):
        return self._pending[0] if self._pending else None

    def enqueue(self, operation):
        self._pending.append(operation)
        self.enqueued += 1

    def ready(self):
        if self.head is None:
            return False
        mark = self.head[0]
        return mark is None or mark[0].completed >= mark[1]

    def run_one(self):
        mark, work = self.head
        if mark is not None:
            mark[0].run_to(mark[1])
        self._pending.popleft()
        self.completed += 1
        work()

    def run_to(self, position):
        while self.completed < position:
            self.run_one()


class Event:
    mark = None  # (stream, number of its operations to wait for)


class Region:
    """One allocation. Its bytes are kept after it is freed, so that using them raises an error instead of crashing."""

    def __init__(self, nbytes, stream):
        self.data, self.stream = bytearray(nbytes), stream
        self.start = ctypes.addressof((ctypes.c_char * nbytes).from_buffer(self.data))
        self.users, self.freed = {stream}, False
        self.poison(0, nbytes)

    def poison(self, start, count):
        ctypes.memset(self.start + start, 0xFF, count)

    def check(self, stream):
        if self.freed and stream not in self.users:
            raise FreedMemoryError("device memory was freed before this work on it had run")


class FakeStreams:
    """Implements `collins.offload.streams.Streams`.

    Args:
        mode: the order of execution, see above.
        drop: rules whose waits are omitted.
        inherits: whether allocated memory has a previous user with a pending kernel.
        holds: whether `hold` has an effect.
        caches_current: whether the current stream is looked up only once, at construction.
        remakes_streams: whether `next_step` creates new copy streams."""

    def __init__(self, mode="late", drop=(), *, inherits=True, holds=True, caches_current=False, remakes_streams=False):
        self.device = torch.device("cpu")
        self.asynchronous = True
        self.mode, self.drop, self.inherits, self.holds = mode, set(drop), inherits, holds
        self.remakes_streams = remakes_streams
        self.rng = random.Random(mode if isinstance(mode, int) else 0)
        self.streams, self.regions = [], []
        self.current = self.new_stream("default")
        self.cached = self.current if caches_current else None
        self.make_copy_streams()

    # The interface of `Streams`.

    def empty(self, nbytes):
        region = Region(nbytes, self._stream(StreamKind.CURRENT))
        self.regions.append(region)
        owner = (ctypes.c_char * nbytes).from_buffer(region.data)
        weakref.finalize(owner, setattr, region, "freed", True).atexit = False
        if self.inherits:
            self._enqueue(region.stream, lambda: region.poison(0, nbytes))
        return torch.frombuffer(owner, dtype=torch.uint8)

    def event(self):
        return Event()

    def caller(self):
        return self._stream(StreamKind.CURRENT)

    def record(self, event, kind):
        stream = self._stream(kind)
        event.mark = (stream, stream.enqueued)

    def wait(self, kind, event, rule):
        if rule not in self.drop and event.mark is not None:
            self._enqueue(self._stream(kind), lambda: None, event.mark)

    def synchronize(self, event, rule):
        if rule not in self.drop and event.mark is not None:
            event.mark[0].run_to(event.mark[1])

    def copy(self, kind, target, source):
        assert target.nbytes == source.nbytes
        target_at, source_at, nbytes = target.data_ptr(), source.data_ptr(), target.nbytes
        regions = [self._region(target), self._region(source)]
        assert sum(region is not None for region in regions) == 1, "a copy between host and device"
        host = StorageWeakRef((target if regions[1] else source).untyped_storage())
        stream = self._stream(kind)

        def run():
            if host.expired():
                raise FreedMemoryError("a slab was freed before this copy had run")
            for region in filter(None, regions):
                region.check(stream)
            ctypes.memmove(target_at, source_at, nbytes)
            if regions[1]:
                regions[1].poison(source_at - regions[1].start, nbytes)

        self._enqueue(stream, run)

    def hold(self, tensor, kind):
        if self.holds:
            self._region(tensor).users.add(self._stream(kind))

    # What tests use.

    def new_stream(self, name):
        self.streams.append(Stream(name))
        return self.streams[-1]

    @contextmanager
    def on(self, stream):
        """Makes a stream the current one."""
        self.current, before = stream, self.current
        try:
            yield
        finally:
            self.current = before

    def launch(self, kernel, *tensors):
        """Enqueues `kernel(*tensors)` on the current stream. Like a kernel, it keeps no device memory allocated."""
        uses = [(tensor, None) if self._region(tensor) is None else self._region_view(tensor) for tensor in tensors]
        stream = self.current

        def run():
            for _, region in uses:
                if region is not None:
                    region.check(stream)
            kernel(*(tensor for tensor, _ in uses))

        self._enqueue(stream, run)

    def next_step(self):
        if self.remakes_streams:
            self.make_copy_streams()

    def make_copy_streams(self):
        self.kinds = {kind: self.new_stream(kind.value) for kind in (StreamKind.H2D, StreamKind.D2H)}

    def finish_everything(self):
        for stream in self.streams:
            stream.run_to(stream.enqueued)

    def _stream(self, kind):
        if kind is StreamKind.CURRENT:
            return self.cached or self.current
        return self.kinds[kind] if isinstance(kind, StreamKind) else kind

    def _region(self, tensor):
        address = tensor.data_ptr()
        return next((r for r in self.regions if not r.freed and r.start <= address < r.start + len(r.data)), None)

    def _region_view(self, tensor):
        region = self._region(tensor)
        start = tensor.data_ptr() - region.start
        flat = torch.frombuffer(region.data, dtype=torch.uint8)[start : start + tensor.nbytes]
        return flat.view(tensor.dtype).view(tensor.shape), region

    def _enqueue(self, stream, work, mark=None):
        stream.enqueue((mark, work))
        if self.mode == "late":
            return
        if isinstance(self.mode, int):
            for _ in range(self.rng.randrange(4)):
                ready = [one_stream for one_stream in self.streams if one_stream.ready()]
                if ready:
                    self.rng.choice(ready).run_one()
            return
        kind = {"h2d": StreamKind.H2D, "d2h": StreamKind.D2H}.get(self.mode)
        while True:
            eager = self.streams
            if self.mode == "current":
                eager = [one_stream for one_stream in eager if one_stream not in self.kinds.values()]
            elif kind is not None:
                eager = [self.kinds[kind]]
            ready = [one_stream for one_stream in eager if one_stream.ready()]
            if not ready:
                return
            for one_stream in ready:
                one_stream.run_one()
