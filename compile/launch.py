"""One launch of `collins::step_` for all works of a variant: builds and keeps the tables that the kernel reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import chain
from operator import itemgetter, or_
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from collins.compile import kernels
from collins.compile.kernels import CHUNK, LARGEST_LOAD, MOMENTS, NUMBERS, PARAMETERS, TILE, fetch
from collins.hashing import WORD
from collins.rule import Scalars
from collins.update import Keys, Spec, Work

_WIDE = 16  # bytes: what one instruction of the kernel reads at once
_KEPT = 4096  # descriptions of sets of tensors: one a parameter for steps in backward


class Launches:
    """The launches of one optimizer, for parameters on devices of one type.

    Args:
        device_type: as `torch.device.type`.
        busy_link: whether large copies from the host are on their way while the launches run.
    """

    def __init__(self, device_type: str, *, busy_link: bool = False) -> None:
        self._device_type = device_type
        self._busy_link = busy_link
        self._launches: dict[tuple[Any, ...], Launch] = {}

    def of(self, spec: Spec, p: Tensor, moment_dtype: torch.dtype, start: int) -> Launch | None:
        """The launch that takes such a parameter, or None where the kernel cannot."""
        load, count = int(spec.load), p.numel()
        if (
            p.device.type != self._device_type
            or spec.hash == "universal"
            or load > LARGEST_LOAD
            or start % max(WORD, load)
            or p.dtype not in PARAMETERS
            or moment_dtype not in MOMENTS
            or not count
        ):
            return None
        even = count % max(WORD, load) == 0
        key = (spec, p.dtype, moment_dtype, p.device, even)
        if key not in self._launches:
            self._launches[key] = Launch(spec, even=even, device=p.device, busy_link=self._busy_link)
        return self._launches[key]

    def course(self, works: Sequence[Work]) -> Course:
        return Course(works)

    def sorted(self, works: Sequence[Work]) -> tuple[list[Batch], list[Work]]:
        """Works in batches, by the launch that takes them, and those that none can take."""
        groups: dict[Launch | None, list[Work]] = {}
        for work in works:
            launch = work[-1]
            group = groups.get(launch)
            if group is None:
                groups[launch] = [work]
            else:
                group.append(work)
        rest = groups.pop(None, [])
        batches = []
        for launch, group in groups.items():
            assert launch is not None
            batch = _batch(launch, group)
            if batch is None:  # some lie in memory as the kernel cannot read it
                readable: list[Work] = []
                for work in group:
                    (rest if _batch(launch, [work]) is None else readable).append(work)
                batch = _batch(launch, readable) if readable else None
            if batch is not None:
                batches.append(batch)
        return batches, rest


class Columns(NamedTuple):
    """The works of one launch, column by column: C loops over hundreds of tensors."""

    launch: Launch
    works: Sequence[Work]
    p: tuple[Tensor, ...]
    m: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    keys: tuple[Keys, ...]
    sizes: tuple[int, ...]  # of the parameters

    @classmethod
    def of(cls, launch: Launch, works: Sequence[Work]) -> Columns:
        p, _, m, v, _, keys, *_ = zip(*works, strict=True)
        return cls(launch, works, p, m, v, keys, tuple(map(Tensor.numel, p)))

    def addresses(self, grads: Sequence[Tensor]) -> tuple[list[int], ...] | None:
        """Of gradients, parameters and moments. None if the kernel cannot read one: not contiguous, not aligned."""
        columns = (grads, self.p, self.m, self.v)
        at = tuple(map(_addresses, columns))
        wide = len(columns) if self.launch.dense else 2
        return at if all(map(_readable, columns[:wide], at)) else None

    def batch(self, at: tuple[list[int], ...], h: Sequence[Scalars]) -> Batch:
        """With the addresses, gradients' first, and the numbers of each work."""
        identities = list(map(id, h))  # numbers may lie on a device: to compare them would wait
        distinct = dict(zip(identities, h, strict=True))
        places = dict(zip(distinct, range(len(distinct)), strict=True))
        rows = list(map(places.__getitem__, identities))
        return Batch(self, at[0], (*at[1:], rows), list(distinct.values()))


class Batch(NamedTuple):
    """What one launch takes in one step."""

    columns: Columns
    addresses: list[int]  # of the gradients
    fixed: tuple[list[int], ...]  # addresses of p, m and v, and rows of `numbers`
    numbers: list[Scalars]  # of the rows


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _readable(tensors: Sequence[Tensor], at: Sequence[int]) -> bool:
    return reduce(or_, at) % _WIDE == 0 and all(map(Tensor.is_contiguous, tensors))


def _batch(launch: Launch, works: Sequence[Work]) -> Batch | None:
    columns = Columns.of(launch, works)
    at = columns.addresses([work.g for work in works])
    return None if at is None else columns.batch(at, [work.h for work in works])


class Course:
    """The launches of a whole step, which kernels take, to be taken again with other gradients and numbers."""

    def __init__(self, works: Sequence[Work]) -> None:
        groups: dict[Launch, list[int]] = {}
        for i, work in enumerate(works):
            groups.setdefault(cast(Launch, work.launch), []).append(i)
        # The device begins with what takes it longest, while the host prepares the rest.
        order = sorted(groups.items(), key=lambda item: -sum(works[i].p.nbytes for i in item[1]))
        # No gradient is kept beyond its step: the parameter takes its place.
        columns = [
            (Columns.of(launch, [works[i]._replace(g=works[i].p) for i in places]), places) for launch, places in order
        ]
        self._parts = [(part, part.addresses(part.p), itemgetter(*places), len(places)) for part, places in columns]

    def ready(self, grads: Sequence[Tensor]) -> Callable[[Sequence[Scalars]], None] | None:
        """What performs the step once its numbers are known; None if a kernel cannot read one of the tensors, or if
        parameters or moments have moved.

        Args:
            grads: one for each work, in the order of the works, which is that of the numbers too.
        """
        found = []
        for columns, known, get, count in self._parts:
            own = get(grads) if count > 1 else (get(grads),)
            at = _addresses(own)
            if known is None or not _readable(own, at) or not all(map(Tensor.is_contiguous, columns.p)):
                return None
            for tensors, before in zip(columns[2:5], known[1:], strict=True):
                if _addresses(tensors) != before:
                    return None
            found.append((columns, (at, *known[1:]), get, count))

        def run(h: Sequence[Scalars]) -> None:
            for columns, at, get, count in found:
                columns.launch.run(columns.batch(at, get(h) if count > 1 else (get(h),)))

        return run


class Launch:
    """Steps many tensors of one `Spec`, one dtype and one dtype of moments on one device.

    Sizes, addresses of parameters and moments and hash constants lie in a table on the device, which is made anew only
    when one of them has changed. Addresses of gradients and the step's numbers follow in one copy a step. A captured
    CUDA graph replays that copy from host memory kept for it.
    """

    def __init__(self, spec: Spec, *, even: bool, device: torch.device, busy_link: bool = False) -> None:
        self.dense = spec.hash is None
        self._spec = spec
        self._even = even
        self._device = device
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self._last: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        self._moving: dict[tuple[int, int], Tensor] = {}
        self._alone: dict[int, tuple[Scalars | None, Tensor]] = {}  # the numbers of single works, by stream
        self._spare: Tensor | None = None
        self._pages = _Pages() if busy_link else None
        self._captured: list[Any] = []

    def run(self, batch: Batch) -> None:
        """Performs all of its works; they must be of different parameters."""
        columns, addresses, fixed, numbers = batch
        _, works, p, m, v, keys, sizes = columns
        stream, capturing = self._current()
        known = keys, sizes, *fixed
        if self._last is None or self._last[0] != known:
            self._last = known, *self._description(works, fixed, (keys, sizes, *map(tuple, fixed)), capturing)
        _, owners, table = self._last
        moving = self._moved(addresses, numbers, stream, capturing)
        gradients, values = moving[: len(works)], moving[len(works) :].view(torch.float64)
        self._step(p, m, v, owners, table, gradients, values, capturing)

    def run_one(self, work: Work) -> bool:
        """Performs a work that comes alone, as gradients do in backward, with the numbers of many others: its gradient
        goes to the kernel as it is, and numbers are sent once.

        Returns:
            False, and nothing is done, if the kernel cannot read one of the tensors.
        """
        p, g, m, v, _, keys, h, *_ = work
        at = p.data_ptr(), m.data_ptr(), v.data_ptr()
        for tensor, address in ((g, g.data_ptr()), *zip((p, m, v) if self.dense else (p,), at, strict=False)):
            if address % _WIDE or not tensor.is_contiguous():
                return False
        stream, capturing = self._current()
        key = keys, p.numel(), at
        described = self._tables.get(key)
        if described is None:
            described = self._description([work], [[address] for address in (*at, 0)], key, capturing)
        values = self._values(h, stream, capturing)
        self._step((p,), (m,), (v,), *described, g, values, capturing)
        return True

    def _current(self) -> tuple[int, bool]:
        """The current stream, and whether it is being captured. Gradients of one device may arrive on several streams:
        what one of them still reads no other overwrites.
        """
        if self._device.type != "cuda":
            return 0, False
        return torch._C._cuda_getCurrentRawStream(self._device.index), torch.cuda.is_current_stream_capturing()

    def _step(
        self,
        p: Sequence[Tensor],
        m: Sequence[Tensor],
        v: Sequence[Tensor],
        owners: Tensor,
        table: Tensor,
        gradients: Tensor,
        values: Tensor,
        capturing: bool,
    ) -> None:
        spec = self._spec
        kernels.step_(
            p, m, v, owners, table, gradients, values,
            int(spec.load), spec.decode == "residual", spec.rehash, spec.rounding, spec.maximize, spec.skip, self._even,
        )  # fmt: skip
        torch.autograd.graph.increment_version(p)
        if capturing:
            self._captured.append((owners, table))

    def _values(self, h: Scalars, stream: int, capturing: bool) -> Tensor:
        """The numbers of a work that comes alone, on the device."""
        sent = None if capturing else self._alone.get(stream)
        if sent is None or sent[0] is not h:
            plain = _plain(h)
            if sent is None or plain is None or sent[0] != plain:
                sent = plain, self._moved((), [h], stream, capturing).view(torch.float64)
                if not capturing:
                    self._alone[stream] = sent
        return sent[1]

    def _moved(self, addresses: Sequence[int], numbers: Sequence[Scalars], stream: int, capturing: bool) -> Tensor:
        """Addresses, then the numbers in their rows, on the device, where the next ones take their place."""
        count = len(addresses)
        size = count + len(numbers) * len(NUMBERS)
        moving = None if capturing else self._moving.get((size, stream))
        if moving is None:
            moving = torch.empty(size, dtype=torch.int64, device=self._device)
            if not capturing:
                self._moving[size, stream] = moving
        host, fetched = (
            (self._host(size, capturing), None) if self._pages is None or capturing else self._pages.take(size)
        )
        sent = host.numpy()
        sent[:count] = addresses
        columns = [_column(h) for h in numbers]
        on_device = [
            (row, i) for row, column in enumerate(columns) for i, x in enumerate(column) if isinstance(x, Tensor)
        ]
        sent[count:].view(np.float64)[:] = [0.0 if isinstance(x, Tensor) else x for x in chain.from_iterable(columns)]
        if fetched is None:
            moving.copy_(host, non_blocking=True)
        else:
            fetch(host, moving)
            fetched.record(torch.cuda.current_stream(self._device))
        values = moving[count:].view(torch.float64).view(len(numbers), len(NUMBERS))
        for i in dict.fromkeys(i for _, i in on_device):
            rows = [row for row, j in on_device if j == i]
            numbers_there = torch.stack([columns[row][i].to(torch.float64) for row in rows])
            if len(rows) == len(columns):
                values[:, i] = numbers_there
            else:
                for row, number in zip(rows, numbers_there, strict=True):
                    values[row, i].copy_(number)
        if capturing:
            self._captured.append((host, moving))
        return moving

    def _description(
        self, works: Sequence[Work], fixed: Sequence[Sequence[int]], key: Any, capturing: bool
    ) -> tuple[Tensor, Tensor]:
        """Which tensor each chunk belongs to, and the table of the tensors; kept under `key`."""
        if key not in self._tables:
            if capturing:
                raise RuntimeError(
                    "Collins.step() is captured in a CUDA graph before it has run with the same parameters: run a few"
                    " steps outside of the graph first"
                )
            if len(self._tables) == _KEPT:
                self._tables.clear()
            owners: list[int] = []
            table: list[Any] = []
            span = CHUNK * TILE
            for i, (work, at_p, at_m, at_v, row) in enumerate(zip(works, *fixed, strict=True)):
                local = work.p.numel()
                sign, rounding, _, period = work.keys
                table += (at_p, at_m, at_v, local, len(owners), work.start, work.numel, *sign, *rounding, period, row)
                owners += [i] * -(-local // span)
            owners_of_chunks = torch.tensor(owners, dtype=torch.int32)
            self._tables[key] = self._uploaded(owners_of_chunks), self._uploaded(torch.tensor(table))
        return self._tables[key]

    def _host(self, size: int, capturing: bool) -> Tensor:
        """Host memory to copy from; while a graph is captured, memory that was made before and that nobody reuses."""
        pinned = self._device.type == "cuda"
        if not capturing:
            if pinned and (self._spare is None or self._spare.numel() != size):
                self._spare = torch.empty(size, dtype=torch.int64, pin_memory=True)
            return torch.empty(size, dtype=torch.int64, pin_memory=pinned)
        host, self._spare = self._spare, None
        if host is None or host.numel() != size:
            raise RuntimeError(
                "Collins.step() is captured in a CUDA graph without a step outside of it before: run one first, also"
                " between two captures"
            )
        return host

    def _uploaded(self, host: Tensor) -> Tensor:
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)


class _Pages:
    """Page-locked memory for kernels to read: a piece is used again once its kernel has read it."""

    def __init__(self) -> None:
        self._pieces: dict[int, deque[tuple[Tensor, torch.cuda.Event]]] = {}

    def take(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """int64 memory of shape (size,), and the event to record behind the kernel."""
        pieces = self._pieces.setdefault(size, deque())
        if pieces and pieces[0][1].query():
            pieces.rotate(-1)
        else:
            pieces.append((torch.empty(size, dtype=torch.int64, pin_memory=True), torch.cuda.Event()))
        return pieces[-1]


def _plain(h: Scalars) -> Scalars | None:
    """Numbers that can be told from others; None for those on a device, which would have to be waited for."""
    return None if any(isinstance(x, Tensor) for x in h) else h


def _column(h: Scalars) -> tuple[Any, ...]:
    step, lr, shrink, beta1, beta2, inverse1, inverse2, eps, rho = h
    return step, lr, shrink, beta1, 1 - beta1, beta2, 1 - beta2, inverse1, inverse2, eps, rho
