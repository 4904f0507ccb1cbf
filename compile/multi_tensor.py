"""Launches `collins::step_` once for all tasks of a kind; builds and keeps the tables that the kernel reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from collins.compile import kernels
from collins.compile.kernels import COLUMNS, PARAMETERS, SPAN, TILE, WIDE
from collins.compile.transfer import ArgUploader, LaunchArgs
from collins.hashing import WORD
from collins.identical import picker
from collins.rule import StepScalars
from collins.update import HashKeys, UpdateSpec, UpdateTask

# The number of tables that are kept: for a parameter that is stepped alone, one for each place of its staged moments in
# turn; and for a launch, tables of sets of parameters. Each set has a row per tensor and a word per program, and every
# choice of experts is another set.
_KEPT, _KEPT_SETS = 32, 16

Fallback = Callable[[Callable[[], bool | None]], bool]


class KernelLaunches:
    """The launches of one optimizer, for parameters on devices of one type.

    Args:
        device_type: a `torch.device.type`.
        busy_link: whether large copies from the host are in flight while the launches run.
    """

    def __init__(self, device_type: str, *, busy_link: bool = False) -> None:
        self._device_type = device_type
        self._busy_link = busy_link
        self._launches: dict[tuple[Any, ...], KernelLaunch] = {}
        self._uploaders: dict[torch.device, ArgUploader] = {}

    def of(self, spec: UpdateSpec, p: Tensor, start: int) -> ParamLaunch | None:
        """The launch of a new parameter, or None if the kernel does not support it."""
        load, count = max(map(int, spec.loads)), p.numel()
        unit = max(WORD, load, int(spec.load) * spec.formats[0].unit)
        if (
            p.device.type != self._device_type
            or spec.hash == "universal"
            or load > TILE
            or start % unit
            or p.dtype not in PARAMETERS
            or not kernels.takes(spec)
            or not count
        ):
            return None
        even = count % max(WORD, load) == 0
        key = (spec, p.dtype, p.device, even)
        if key not in self._launches:
            if p.device not in self._uploaders:
                self._uploaders[p.device] = ArgUploader(p.device, busy_link=self._busy_link)
            self._launches[key] = KernelLaunch(spec, even=even, uploader=self._uploaders[p.device])
        return ParamLaunch(self._launches[key])

    def upload(self, batches: Sequence[Batch], scalars: Sequence[StepScalars]) -> list[LaunchArgs]:
        """Uploads the arguments of each batch's launch, in one copy to each device."""
        by_uploader: dict[ArgUploader, list[int]] = {}
        for i, batch in enumerate(batches):
            by_uploader.setdefault(batch.launch.uploader, []).append(i)
        found: dict[int, LaunchArgs] = {}
        for uploader, places in by_uploader.items():
            args = [(batches[i].gradients, [scalars[row] for row in batches[i].distinct]) for i in places]
            found.update(zip(places, uploader.upload(args), strict=True))
        return [found[i] for i in range(len(batches))]


@dataclass(slots=True, eq=False)
class Batch:
    """The tasks of one launch, stored by column, so that loops over hundreds of tensors run in C."""

    launch: KernelLaunch
    numbers: list[int]  # the numbers of the tasks in their executor
    tasks: list[UpdateTask]
    p: tuple[Tensor, ...] = ()
    m: tuple[Tensor, ...] = ()
    v: tuple[Tensor, ...] = ()
    scales: tuple[Tensor, ...] = ()  # scales of first moments that are stored as integers
    keys: tuple[HashKeys, ...] = ()
    numels: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    launches: tuple[ParamLaunch, ...] = ()
    skipped: Tensor | None = None
    sizes: tuple[int, ...] = ()
    addresses: tuple[list[int], ...] = ()  # addresses of p, m, v and the scales of m, when the batch was made
    gradients: Sequence[int] | np.ndarray = ()  # addresses of the gradients of this step
    distinct: list[int] = field(default_factory=list)  # indices of this step's scalars that the tasks use
    rows: list[int] = field(default_factory=list)  # for each task, an index into `distinct`
    table: _Table | None = None  # of the tasks with these rows, once it has been made

    def __post_init__(self) -> None:
        if self.tasks:
            columns = _transposed(self.tasks)
            self.p, m, v, _, self.keys, self.numels, self.starts, self.launches, skipped = columns
            self.m, *scales = _transposed(m)  # tasks of one launch have one format
            (self.v,) = _transposed(v)
            self.scales = scales[0] if scales else ()
            self.skipped = skipped[0]  # all tasks of a device share the counter
        self.sizes = tuple(map(Tensor.numel, self.p))
        self.addresses = tuple([_addresses(column) for column in self.columns])
        self.rows = [0] * len(self.tasks)

    @property
    def columns(self) -> tuple[tuple[Tensor, ...], ...]:
        """The tensors whose addresses the kernel reads from a table."""
        return self.p, self.m, self.v, self.scales

    def reads(self, grads: Sequence[Tensor]) -> bool:
        """Whether the kernel can read all tensors of the batch, which must be contiguous and aligned."""
        columns = (self.p, self.m, self.v) if self.launch.dense else (self.p,)
        lying = all(map(_aligned, self.addresses[: len(columns)])) and _aligned(_addresses(grads))
        return lying and all(all(map(Tensor.is_contiguous, column)) for column in (grads, *columns))

    def take(self, rows: Sequence[int]) -> None:
        """Sets which scalars each task uses, given the row of every task of the executor."""
        own = [rows[number] for number in self.numbers]
        if own.count(own[0]) == len(own):
            distinct, new = [own[0]], [0] * len(own)
        else:
            distinct = list(dict.fromkeys(own))
            new = list(map({row: place for place, row in enumerate(distinct)}.__getitem__, own))
        self.distinct = distinct
        if new != self.rows:
            self.rows, self.table = new, None


class KernelExecutor:
    """Steps tasks by kernel launches alone, one for each kind of task.

    Args:
        launches: the launches of the optimizer.
        batches: the tasks of each launch.
        attempt: runs a launch and returns whether that worked; see `collins.compile.engine.Engine`.
    """

    def __init__(self, launches: KernelLaunches, batches: Sequence[Batch], attempt: Fallback) -> None:
        self._launches, self._attempt = launches, attempt
        # The longest launch comes first, so that the device is busy while the host prepares the others.
        self._batches = sorted(batches, key=lambda batch: -sum(batch.sizes) * batch.p[0].itemsize)
        # The tensors of all batches, one batch after another, which are compared in few loops in C.
        self._pick = picker([number for batch in self._batches for number in batch.numbers])
        ends = list(accumulate((len(batch.numbers) for batch in self._batches), initial=0))
        self._places = list(map(slice, ends, ends[1:]))
        self._held = [t for batch in self._batches for column in batch.columns for t in column]
        self._addresses = [at for batch in self._batches for column in batch.addresses for at in column]
        self._rows: Sequence[int] = ()
        self._is_new = True

    def bind(self, grads: Sequence[Tensor]) -> np.ndarray | None:
        """The addresses of the gradients of all batches; None if the kernel cannot read a gradient, or if the address
        of a parameter or a moment has changed.
        """
        at = np.fromiter(map(Tensor.data_ptr, self._pick(grads)), np.int64)
        if self._is_new:
            self._is_new = False
            return at
        return at if _aligned(at) and _addresses(self._held) == self._addresses else None

    def run(self, bound: np.ndarray, scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]) -> list[int]:
        """Steps the tasks; returns the numbers of those whose launch failed, which are unchanged."""
        if rows != self._rows:
            self._rows = rows
            for batch in self._batches:
                batch.take(rows)
        for batch, place in zip(self._batches, self._places, strict=True):
            batch.gradients = bound[place]
        scaled = any(map(_is_scaled, scalars))
        left: list[int] = []
        for batch, args in zip(self._batches, self._launches.upload(self._batches, scalars), strict=True):
            if self._attempt(lambda batch=batch, args=args: batch.launch.run(batch, args, scaled)):  # type: ignore[misc]
                done += batch.numbers
            else:
                left += batch.numbers
        return left


def batched(tasks: Sequence[UpdateTask], grads: Sequence[Tensor]) -> tuple[list[Batch], list[int]]:
    """Batches of the tasks that have a launch, and the numbers of all other tasks: those that have none, and those with
    tensors that the kernel cannot read.
    """
    by_launch: dict[KernelLaunch | None, list[int]] = {}
    for number, task in enumerate(tasks):
        by_launch.setdefault(task.launch and task.launch.shared, []).append(number)
    rest = by_launch.pop(None, [])
    batches = []
    for launch, numbers in by_launch.items():
        assert launch is not None
        batch = Batch(launch, numbers, [tasks[number] for number in numbers])
        if not batch.reads([grads[number] for number in numbers]):
            readable = [number for number in numbers if launch.reads(tasks[number], grads[number])]
            rest += [number for number in numbers if number not in set(readable)]
            batch = Batch(launch, readable, [tasks[number] for number in readable])
        if batch.numbers:
            batches.append(batch)
    return batches, rest


def _transposed(rows: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*rows, strict=True)


def _pairs(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """The first and the second members of pairs: (2, len(pairs))."""
    return np.fromiter(chain.from_iterable(pairs), np.int64).reshape(-1, 2).T


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _is_scaled(hp: StepScalars) -> bool:
    """Whether gradients are multiplied by a factor, which may be on the device."""
    return isinstance(hp.grad_scale, Tensor) or hp.grad_scale != 1.0


def _aligned(at: Sequence[int] | np.ndarray) -> bool:
    return bool(np.bitwise_or.reduce(at) % WIDE == 0)


class _Table(NamedTuple):
    """What the kernel reads besides the arguments of a step, on the device."""

    owners: Tensor  # the index of the tensor that each program steps
    rows: Tensor  # for each tensor its size, its hash constants, and the addresses of the parameter and the moments
    filled: bool  # whether every tensor consists of whole tiles


class KernelLaunch:
    """Steps many tensors of one `UpdateSpec` and one dtype on one device.

    Tables are rebuilt only when a size, a hash constant or the address of a parameter or a moment has changed. The
    addresses of gradients, and the scalars, are uploaded in every step.
    """

    def __init__(self, spec: UpdateSpec, *, even: bool, uploader: ArgUploader) -> None:
        self.dense, self._skips, self._even = spec.hash is None, spec.skip, even
        load, v_load = map(int, spec.loads)
        self._constants = (
            *kernels.int_constants(spec.m_format), load, v_load, *kernels.decode_constants(spec.decode),
            spec.rehash, spec.rounding, spec.maximize, spec.skip, even,
        )  # fmt: skip
        self.uploader = uploader
        # Tables of sets of parameters, each with references that remove it as soon as one of its parameters is gone.
        self._tables_of_sets: dict[bytes, tuple[_Table, list[weakref.ref[ParamLaunch]]]] = {}
        self._captured: list[_Table] = []

    def run(self, batch: Batch, args: LaunchArgs, scaled: bool) -> None:
        """Performs all of a batch's tasks; they must be of different parameters.

        Args:
            batch: the tasks.
            args: the arguments of this step.
            scaled: whether a gradient is multiplied by `grad_scale`.
        """
        if batch.table is None:
            batch.table = self._table_of_set(batch)
        self.step(batch.p, batch.m, batch.v, batch.table, args, scaled, batch.skipped)

    def reads(self, task: UpdateTask, g: Tensor) -> bool:
        """Whether the kernel can read these tensors, which must be contiguous and aligned."""
        p, m, v = task.p, task.m[0], task.v[0]
        if (p.data_ptr() | g.data_ptr()) % WIDE or not (p.is_contiguous() and g.is_contiguous()):
            return False
        tables = (m.data_ptr() | v.data_ptr()) % WIDE == 0 and m.is_contiguous() and v.is_contiguous()
        return tables or not self.dense

    def step(
        self,
        p: Sequence[Tensor],
        m: Sequence[Tensor],
        v: Sequence[Tensor],
        table: _Table,
        args: LaunchArgs,
        scaled: bool,
        skipped: Tensor | None,
    ) -> None:
        """Launches the kernel."""
        owners, rows, filled = table
        if skipped is None:  # no counter is wanted; without `skip` the kernel does not access the argument
            skipped = torch.zeros_like(rows[:1]) if self._skips else rows
        constants: tuple[Any, ...] = *self._constants, filled, scaled
        kernels.step_(p, m, v, owners, rows, *args, skipped, *constants)
        torch.autograd.graph.increment_version(p)
        if self.uploader.capturing():
            self._captured.append(table)

    def table(self, batch: Batch) -> _Table:
        """A new table of the tasks of a batch."""
        if self.uploader.capturing():
            raise RuntimeError(
                "Collins.step() is being captured in a CUDA graph before any step with the same parameters has run:"
                " run a few steps before the capture"
            )
        count, (at_p, at_m, at_v, at_scale) = len(batch.p), batch.addresses
        sizes = np.array(batch.sizes, np.int64)
        programs = -(-sizes // (SPAN // batch.p[0].element_size()))
        signs, roundings, _, periods = _transposed(batch.keys)
        columns = (
            at_p, at_m, at_v, sizes, np.cumsum(programs) - programs, batch.starts, batch.numels,
            *_pairs(signs), *_pairs(roundings), periods, batch.rows, at_scale or 0,
        )  # fmt: skip
        rows = np.empty((count, len(COLUMNS)), np.int64)
        for i, column in enumerate(columns):
            rows[:, i] = column
        owners = np.repeat(np.arange(count, dtype=np.int32), programs)
        upload = self.uploader.to_device
        filled = self._even and not (sizes % TILE).any()
        return _Table(upload(torch.from_numpy(owners)), upload(torch.from_numpy(rows.reshape(-1))), bool(filled))

    def _table_of_set(self, batch: Batch) -> _Table:
        if len(batch.launches) == 1:
            return batch.launches[0].table(batch.tasks[0], [at for column in batch.addresses for at in column])
        # Everything that the table is made from, since keys, numels and starts are constants of the launches. A key of
        # bytes is hashed many times as fast as one of tuples.
        own = map(id, batch.launches), batch.sizes, *batch.addresses, batch.rows
        key = np.fromiter(chain.from_iterable(own), np.int64).tobytes()
        kept = self._tables_of_sets
        found = kept.get(key)
        if found is None:
            table = self.table(batch)
            if len(kept) == _KEPT_SETS:
                kept.pop(next(iter(kept)), None)  # the oldest
            forget = partial(_forget_set, weakref.ref(self), key)
            found = kept[key] = table, [weakref.ref(launch, forget) for launch in batch.launches]
        return found[0]


def _forget_set(launch: weakref.ref[KernelLaunch], key: bytes, _: object) -> None:
    """Removes the table of a set, since one of its parameters is gone."""
    alive = launch()
    if alive is not None:
        alive._tables_of_sets.pop(key, None)


@dataclass(slots=True, eq=False, weakref_slot=True)
class ParamLaunch:
    """The launch of one parameter, with the tables of its steps alone: they are freed with the parameter.

    Attributes:
        shared: the launch that steps this parameter and all others of its kind.
    """

    shared: KernelLaunch
    _tables: dict[tuple[int, ...], _Table] = field(default_factory=dict)

    def run_one(self, task: UpdateTask, g: Tensor, hp: StepScalars) -> bool:
        """Performs a single task, of a step in backward. The kernel gets the gradient itself instead of a table of
        addresses, and the scalars are uploaded once for all tasks that share them.

        Returns:
            Whether the kernel can read all tensors of the task; if not, nothing is done.
        """
        shared = self.shared
        if not shared.reads(task, g):
            return False
        p, (m, *scales), (v,) = task.p, task.m, task.v
        table = self.table(task, _addresses((p, m, v, *scales)))
        args = LaunchArgs(g, shared.uploader.scalars(hp))
        shared.step((p,), (m,), (v,), table, args, _is_scaled(hp), task.skipped)
        return True

    def table(self, task: UpdateTask, addresses: Iterable[int]) -> _Table:
        """The table of a task of this parameter, given the addresses of p, m, v and the scales of m."""
        key = task.p.numel(), *addresses
        table = self._tables.get(key)
        if table is None:
            table = self.shared.table(Batch(self.shared, [0], [task]))
            if len(self._tables) == _KEPT:
                del self._tables[next(iter(self._tables))]  # the oldest
            self._tables[key] = table
        return table
