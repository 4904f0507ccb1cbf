"""Launches `collins::step_` once for all tasks of a kind; builds and keeps the tables that the kernel reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collins.compile import kernels
from collins.compile.kernels import LARGEST_LOAD, PARAMETERS, SPAN, WIDE
from collins.compile.transfer import ArgUploader, LaunchArgs
from collins.hashing import WORD
from collins.rule import StepScalars
from collins.update import HashKeys, UpdateSpec, UpdateTask

# The number of tables that a launch keeps: tables of single tensors, which steps in backward use in turn; and tables of
# sets of tensors. Each set has a row per tensor and a word per program, and every choice of experts is another set.
_KEPT, _KEPT_SETS = 4096, 16

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

    def of(self, spec: UpdateSpec, p: Tensor, start: int) -> KernelLaunch | None:
        """The launch that steps such a parameter, or None if the kernel does not support it."""
        load, count = max(map(int, spec.loads)), p.numel()
        unit = max(WORD, load, int(spec.load) * spec.formats[0].unit)
        if (
            p.device.type != self._device_type
            or spec.hash == "universal"
            or load > LARGEST_LOAD
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
        return self._launches[key]

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
    skipped: Tensor | None = None
    sizes: tuple[int, ...] = ()
    addresses: tuple[list[int], ...] = ()  # addresses of p, m, v and the scales of m
    gradients: Sequence[int] | np.ndarray = ()  # addresses of the gradients of this step
    distinct: list[int] = field(default_factory=list)  # indices of this step's scalars that the tasks use
    rows: list[int] = field(default_factory=list)  # for each task, an index into `distinct`

    def __post_init__(self) -> None:
        self.p = tuple(task.p for task in self.tasks)
        self.m = tuple(task.m[0] for task in self.tasks)
        self.v = tuple(task.v[0] for task in self.tasks)
        self.scales = tuple(task.m[1] for task in self.tasks if len(task.m) == 2)
        self.keys = tuple(task.keys for task in self.tasks)
        self.skipped = self.tasks[0].skipped if self.tasks else None  # all tasks of a device share the counter
        self.sizes = tuple(map(Tensor.numel, self.p))
        self.addresses = self.addresses_now()
        self.rows = [0] * len(self.tasks)

    def addresses_now(self) -> tuple[list[int], ...]:
        """The current addresses of parameters and moments."""
        return tuple([list(map(Tensor.data_ptr, column)) for column in (self.p, self.m, self.v, self.scales)])

    def pick(self, grads: Sequence[Tensor]) -> Iterable[Tensor]:
        """The gradients of the batch, selected from those of the executor."""
        return map(grads.__getitem__, self.numbers)

    def reads(self, grads: Sequence[Tensor]) -> bool:
        """Whether the kernel can read all tensors of the batch, which must be contiguous and aligned."""
        columns = (self.p, self.m, self.v) if self.launch.dense else (self.p,)
        lying = all(map(_aligned, self.addresses[: len(columns)])) and _aligned(list(map(Tensor.data_ptr, grads)))
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
            self.rows = new


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
        self._batches = sorted(batches, key=lambda batch: -sum(p.nbytes for p in batch.p))
        self._rows: Sequence[int] = ()
        self._is_new = True

    def bind(self, grads: Sequence[Tensor]) -> list[np.ndarray] | None:
        """The addresses of each launch's gradients; None if the kernel cannot read a gradient, or if the address of a
        parameter or a moment has changed.
        """
        at = [np.array(list(map(Tensor.data_ptr, batch.pick(grads)))) for batch in self._batches]
        if self._is_new:
            self._is_new = False
            return at
        if not all(map(_aligned, at)):
            return None
        return at if all(batch.addresses_now() == batch.addresses for batch in self._batches) else None

    def run(
        self, bound: Sequence[np.ndarray], scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]
    ) -> list[int]:
        """Steps the tasks; returns the numbers of those whose launch failed, which are unchanged."""
        if rows != self._rows:
            self._rows = rows
            for batch in self._batches:
                batch.take(rows)
        for batch, gradients in zip(self._batches, bound, strict=True):
            batch.gradients = gradients
        left: list[int] = []
        for batch, args in zip(self._batches, self._launches.upload(self._batches, scalars), strict=True):
            if self._attempt(lambda batch=batch, args=args: batch.launch.run(batch, args)):  # type: ignore[misc]
                done += batch.numbers
            else:
                left += batch.numbers
        return left


def scale_address(task: UpdateTask) -> int:
    """The address of the scales of a first moment that is stored as integers, else 0."""
    return task.m[1].data_ptr() if len(task.m) == 2 else 0


def batched(tasks: Sequence[UpdateTask], grads: Sequence[Tensor]) -> tuple[list[Batch], list[int]]:
    """Batches of the tasks that have a launch, and the numbers of all other tasks: those that have none, and those with
    tensors that the kernel cannot read.
    """
    by_launch: dict[KernelLaunch | None, list[int]] = {}
    for number, task in enumerate(tasks):
        by_launch.setdefault(task.launch, []).append(number)
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


def _aligned(at: Sequence[int] | np.ndarray) -> bool:
    return bool(np.bitwise_or.reduce(at) % WIDE == 0)


class KernelLaunch:
    """Steps many tensors of one `UpdateSpec` and one dtype on one device.

    A table on the device holds sizes, hash constants and the addresses of parameters and moments; it is rebuilt only
    when one of them has changed. Addresses of gradients and scalars are uploaded in every step.
    """

    def __init__(self, spec: UpdateSpec, *, even: bool, uploader: ArgUploader) -> None:
        self.dense, self._skips = spec.hash is None, spec.skip
        load, v_load = map(int, spec.loads)
        self._constants = (
            *kernels.int_constants(spec.m_format), load, v_load, *kernels.decode_constants(spec.decode),
            spec.rehash, spec.rounding, spec.maximize, spec.skip, even,
        )  # fmt: skip
        self.uploader = uploader
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self._tables_of_sets: dict[Any, tuple[Tensor, Tensor]] = {}
        self._last: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        self._captured: list[Any] = []

    def run(self, batch: Batch, args: LaunchArgs) -> None:
        """Performs all of a batch's tasks; they must be of different parameters."""
        known = batch.keys, batch.sizes, *batch.addresses, batch.rows
        if self._last is None or self._last[0] != known:
            *addresses, scales = batch.addresses
            fixed = (*addresses, scales or [0] * len(batch.tasks), batch.rows)
            key = batch.keys, batch.sizes, *map(tuple, fixed)
            self._last = known, *self._description(batch.tasks, fixed, key)
        _, owners, table = self._last
        self._step(batch.p, batch.m, batch.v, owners, table, args.gradients, args.scalars, batch.skipped)

    def reads(self, task: UpdateTask, g: Tensor) -> bool:
        """Whether the kernel can read these tensors, which must be contiguous and aligned."""
        p, m, v = task.p, task.m[0], task.v[0]
        if (p.data_ptr() | g.data_ptr()) % WIDE or not (p.is_contiguous() and g.is_contiguous()):
            return False
        tables = (m.data_ptr() | v.data_ptr()) % WIDE == 0 and m.is_contiguous() and v.is_contiguous()
        return tables or not self.dense

    def run_one(self, task: UpdateTask, g: Tensor, hp: StepScalars) -> bool:
        """Performs a single task, of a step in backward. The kernel gets the gradient itself instead of a table of
        addresses, and the scalars are uploaded once for all tasks that share them.

        Returns:
            Whether the kernel can read all tensors of the task; if not, nothing is done.
        """
        if not self.reads(task, g):
            return False
        p, m, v = task.p, task.m[0], task.v[0]
        at = p.data_ptr(), m.data_ptr(), v.data_ptr(), scale_address(task)
        key = task.keys, p.numel(), at
        described = self._tables.get(key)
        if described is None:
            described = self._description([task], [[address] for address in (*at, 0)], key)
        self._step((p,), (m,), (v,), *described, g, self.uploader.scalars(hp), task.skipped)
        return True

    def _step(
        self,
        p: Sequence[Tensor],
        m: Sequence[Tensor],
        v: Sequence[Tensor],
        owners: Tensor,
        table: Tensor,
        gradients: Tensor,
        scalars: Tensor,
        skipped: Tensor | None,
    ) -> None:
        if skipped is None:  # no counter is wanted; without `skip` the kernel does not access the argument
            skipped = torch.zeros_like(table[:1]) if self._skips else table
        kernels.step_(p, m, v, owners, table, gradients, scalars, skipped, *self._constants)
        torch.autograd.graph.increment_version(p)
        if self.uploader.capturing():
            self._captured.append((owners, table))

    def _description(
        self, tasks: Sequence[UpdateTask], fixed: Sequence[Sequence[int]], key: Any
    ) -> tuple[Tensor, Tensor]:
        """The index of the tensor that each program steps, and the table of tensors; both are kept under `key`."""
        tables, most = (self._tables, _KEPT) if len(tasks) == 1 else (self._tables_of_sets, _KEPT_SETS)
        if key not in tables:
            if self.uploader.capturing():
                raise RuntimeError(
                    "Collins.step() is being captured in a CUDA graph before any step with the same parameters has run:"
                    " run a few steps before the capture"
                )
            if len(tables) == most:
                del tables[next(iter(tables))]  # the oldest
            owners: list[int] = []
            table: list[Any] = []
            span = SPAN // tasks[0].p.element_size()
            for i, (task, at_p, at_m, at_v, at_scale, row) in enumerate(zip(tasks, *fixed, strict=True)):
                local = task.p.numel()
                sign, rounding, _, period = task.keys
                table += (
                    at_p,
                    at_m,
                    at_v,
                    local,
                    len(owners),
                    task.start,
                    task.numel,
                    *sign,
                    *rounding,
                    period,
                    row,
                    at_scale,
                )
                owners += [i] * -(-local // span)
            upload = self.uploader.to_device
            owners_of_programs = torch.tensor(owners, dtype=torch.int32, device="cpu")
            tables[key] = upload(owners_of_programs), upload(torch.tensor(table, device="cpu"))
        return tables[key]
