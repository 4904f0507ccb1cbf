"""Steps whole matrices (`collins.orthogonal`), in batches of one shape.

A batch is stepped completely or not at all: all new values are computed before any is written. A batch holds at most
`BATCH` elements, or else one matrix, or a stack whose matrices share stored entries. A larger stack of experts is
stepped in several batches, one after another.

Memory: the temporaries of a batch are X and its successor in the dtype of the products, two square matrices of the
shorter side for each matrix, and the new values of parameters and moments. For parameters of at most 32 bits these are
less than 16 bytes per element of the batch, plus the temporaries of `encoded` and `moved`, which work in pieces where
no graph is compiled.

Exactness: the matrix multiplication library may sum in another order when the batch has another size. Steps after
backward and steps in backward use batches of different sizes, and then agree only to the rounding of bfloat16. Matrices
of more than `BATCH` / 2 elements are never stepped together, and agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins.compile.cpu_codegen import hinted
from collins.compile.graphs import Graph, Graphs, ScalarTensors, columns_of, compiled, of_step
from collins.hashing import WORD
from collins.orthogonal import Matrices, encoded, kept, matrices_of, moved, orthogonalised, update_scale
from collins.rule import StepScalars
from collins.task import UpdateSpec, UpdateTask, Write, pieces, unit_of
from collins.update import PiecewiseUpdate, Values

BATCH = 1 << 24  # elements of a batch on an accelerator: one matrix of 4096 x 4096
BATCH_CPU = 1 << 20


class Member(NamedTuple):
    """The matrices of one parameter in a batch: all of them, or some matrices of a stack."""

    task: UpdateTask  # over these matrices, with flat moments
    g: Tensor
    hp: StepScalars
    stacked: int  # the number of matrices
    alone: bool  # whether no two matrices share stored entries, so that nonfinite="skip" can skip each by itself


class MatrixSteps:
    """Performs tasks of decode="orthogonal".

    Args:
        graphs: the graphs of the engine.
        attempt: runs a graph and returns whether that worked; see `collins.compile.engine.Engine`.
        compiles: returns whether graphs are compiled for a device.
        piece: returns the number of elements in a piece of eager code, given a parameter and its load.
    """

    def __init__(
        self,
        graphs: Graphs,
        attempt: Callable[[str, Callable[[], bool | None]], bool],
        compiles: Callable[[torch.device], bool],
        piece: Callable[[Tensor, float], int],
    ) -> None:
        self._graphs, self._attempt, self._compiles, self._piece = graphs, attempt, compiles, piece

    def run(
        self,
        tasks: Mapping[int, UpdateTask],
        grads: Sequence[Tensor],
        hps: Sequence[StepScalars],
        scalars: ScalarTensors,
        done: list[int],
    ) -> None:
        """Performs tasks, by number.

        Args:
            tasks: the tasks to perform.
            grads, hps: gradients and scalars of all tasks of the executor, indexed by number.
            scalars: the scalars of this step as tensors, which are added here.
            done: the numbers of the tasks that have been performed are appended to it.
        """
        for numbers, matrices, batches in batched(tasks, grads, hps):
            values = [partial(self._values, batch, matrices, scalars) for batch in batches]
            update = PiecewiseUpdate(values, tasks[numbers[0]].skipped)
            try:
                update.run()
                done += numbers
            except BaseException:
                if update.begun and numbers[0] not in done:
                    update.finish()
                    done += numbers
                raise

    def _values(self, batch: Sequence[Member], matrices: Matrices, scalars: ScalarTensors) -> Values:
        """The results of a batch."""
        runs = list(self._runs(batch))
        found = [self._encoded(run, scalars) for run in runs]
        Xs = [X for X, _ in found]
        X = (Xs[0] if len(Xs) == 1 else torch.cat(Xs)).view(-1, matrices.rows, matrices.cols)
        new_ms = [new_m for _, new_m in found]
        del Xs, found
        Q, finite = orthogonalised(X, matrices)
        del X
        scale = update_scale(matrices.row_parts[0], matrices.cols)
        writes: list[Write] = []
        left_out: list[Tensor] = []
        skips, at = batch[0].task.spec.skip, 0
        for run, new_m in zip(runs, new_ms, strict=True):
            task, count = run[0].task, len(run) * run[0].stacked
            own, flags = slice(at, at + count), None
            if skips:
                flags = finite[own] if run[0].alone else finite[own].view(len(run), -1).all(1)
                buckets = -(-task.p.numel() // int(task.spec.load))
                left_out.append((~flags).sum() * (len(run) * buckets // len(flags)))
            new = self._moved(run, Q[own].view(-1), scale, flags, scalars)
            params = [member.task.p for member in run]
            writes += zip(params, _parted(new, params), strict=True)
            for place, value in enumerate(new_m):
                old = [member.task.m[place] for member in run]
                value = value if flags is None else kept(flags, value, _joined(old))
                writes += zip(old, _parted(value, old), strict=True)
            at += count
        return Values(writes, left_out=torch.stack(left_out).sum() if skips else None)

    def _runs(self, batch: Sequence[Member]) -> Iterator[list[Member]]:
        """Splits a batch, in order, into runs of members that one graph steps together, and single members."""

        def alike(member: Member) -> tuple[Any, ...]:
            return member.task.spec, id(member.hp), member.g.dtype, member.g.numel(), self._suits(member)

        for (*_, suits), members in groupby(batch, alike):
            run = list(members)
            yield from [run] if suits else ([member] for member in run)

    def _encoded(self, run: Sequence[Member], scalars: ScalarTensors) -> tuple[Tensor, list[Tensor]]:
        """X of members that are alike, flat, and the stored tensors of their first moments after the step, joined."""
        task, g, hp = run[0].task, run[0].g, run[0].hp
        dtype = _product_dtype(task.p)
        made: list[tuple[Tensor, ...]] = []

        def graph() -> None:
            joined = _joined([member.g.detach() for member in run])
            m = tuple(_joined(parts) for parts in zip(*(member.task.m for member in run), strict=True))
            tensors = (joined, *m)
            signature = (encoded, task.spec, dtype, g.device, len(run), *((t.dtype, t.shape) for t in tensors))
            call = self._graphs.of(
                task.spec,
                signature,
                lambda number: _encoding(hinted(task.spec, g.device), dtype, _stacked(run), number),
            )
            keys, starts = self._constants(signature, run)
            made.append(call(joined, m, keys, *of_step(task, hp, scalars), starts))

        if self._suits(run[0]) and self._attempt("graphs", graph):
            X, *new_m = made[0]
            return X, new_m
        found = [self._encoded_eagerly(member, dtype) for member in run]
        return _joined([X for X, _ in found]), [_joined(parts) for parts in zip(*(m for _, m in found), strict=True)]

    def _encoded_eagerly(self, member: Member, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        task, g, hp = member.task, member.g, member.hp
        X = torch.empty(g.numel(), dtype=dtype, device=g.device)
        new_m = tuple(map(torch.empty_like, task.m))
        m_format, _ = task.spec.formats
        for offset, p, grad in pieces(task, g, self._piece(task.p, task.spec.load), unit_of(task.spec)):
            count, load = p.numel(), int(task.spec.load)
            here = offset // load, -(-count // load)
            values, writes = encoded(grad, m_format.cut(task.m, *here), task._replace(start=task.start + offset), hp)
            X[offset : offset + count].copy_(values)
            for target, (_, value) in zip(m_format.cut(new_m, *here), writes, strict=True):
                target.copy_(value)
        return X, list(new_m)

    def _moved(
        self, run: Sequence[Member], Q: Tensor, scale: float, flags: Tensor | None, scalars: ScalarTensors
    ) -> Tensor:
        """The new values of the parameters of members that are alike, flat."""
        task, hp, p = run[0].task, run[0].hp, run[0].task.p
        made: list[Tensor] = []

        def graph() -> None:
            joined = _joined([member.task.p.detach() for member in run])
            count = None if flags is None else len(flags)
            signature = (moved, task.spec, count, p.device, p.dtype, len(run), joined.shape, Q.dtype)
            call = self._graphs.of(
                task.spec, signature, lambda number: _moving(hinted(task.spec, p.device), _stacked(run), number)
            )
            keys, starts = self._constants(signature, run)
            factor = torch.tensor(scale, dtype=torch.float64, device="cpu")
            made.append(call(joined, Q, factor, flags, keys, *of_step(task, hp, scalars), starts))

        if self._suits(run[0]) and self._attempt("graphs", graph):
            return made[0]
        each = [None] * len(run) if flags is None else flags.chunk(len(run))
        Qs = Q.chunk(len(run))
        return _joined([self._moved_eagerly(*own, scale) for own in zip(run, Qs, each, strict=True)])

    def _moved_eagerly(self, member: Member, Q: Tensor, flags: Tensor | None, scale: float) -> Tensor:
        task, hp, p = member.task, member.hp, member.task.p
        new = torch.empty(p.numel(), dtype=p.dtype, device=p.device)
        stretches = 1 if flags is None else len(flags)  # one flag says whether nonfinite="skip" skips a stretch
        stretch = p.numel() // stretches
        for number in range(stretches):
            part = _narrowed(task, Q.view(p.shape), number * stretch, stretch)
            flag = None if flags is None else flags[number : number + 1]
            for offset, old, direction in pieces(part.task, part.g, self._piece(p, task.spec.load)):
                own = part.task._replace(start=part.task.start + offset)
                first = number * stretch + offset
                new[first : first + old.numel()].copy_(moved(old, direction, scale, flag, own, hp))
        return new

    def _constants(self, signature: tuple[Any, ...], run: Sequence[Member]) -> tuple[Any, Tensor]:
        """The keys and the starts of members that are alike, as arguments of a graph."""
        tasks = [member.task for member in run]
        if len(run) == 1:
            return self._graphs.constants(tasks[0])
        return self._graphs.stacked_constants((*signature, tasks[0].keys, tasks[0].start), tasks)

    def _suits(self, member: Member) -> bool:
        """Whether graphs support a member: contiguous tensors of whole buckets and words; see `graphs.whole_of`."""
        task, g = member.task, member.g
        unit = math.lcm(unit_of(task.spec), int(task.spec.load) * WORD)
        flat = task.p.dim() == g.dim() == 1
        return flat and not task.p.numel() % unit and not task.start % unit and self._compiles(task.p.device)


def batched(
    tasks: Mapping[int, UpdateTask], grads: Sequence[Tensor], hps: Sequence[StepScalars]
) -> Iterator[tuple[list[int], Matrices, list[list[Member]]]]:
    """Groups tasks into units that are stepped completely or not at all.

    Yields:
        The numbers of the tasks of a unit, the form of their matrices, and the unit's batches: either several tasks in
        one batch, or one task in several batches.
    """
    alike: dict[Any, list[int]] = {}
    for number, task in tasks.items():
        alike.setdefault((*_matrices(task)[1:], task.p.dtype, task.p.device, task.spec.skip), []).append(number)
    for numbers in alike.values():
        matrices, limit = _matrices(tasks[numbers[0]]), BATCH_CPU if tasks[numbers[0]].p.is_cpu else BATCH
        together: list[tuple[int, Member]] = []
        for number in numbers:
            task, count = tasks[number], _matrices(tasks[number]).stacked
            alone = matrices.numel % unit_of(task.spec) == 0
            each = max(limit // matrices.numel, 1) if alone else count
            found = [
                _narrowed(task, grads[number], first * matrices.numel, min(each, count - first) * matrices.numel)
                for first in range(0, count, each)
            ]
            members = [Member(t, g, hps[number], g.numel() // matrices.numel, alone) for t, g in found]
            if len(members) > 1:
                yield [number], matrices, [[member] for member in members]
                continue
            if together and sum(member.stacked for _, member in together) + count > limit // matrices.numel:
                yield [n for n, _ in together], matrices, [[member for _, member in together]]
                together = []
            together.append((number, members[0]))
        if together:
            yield [n for n, _ in together], matrices, [[member for _, member in together]]


class _Narrowed(NamedTuple):
    task: UpdateTask
    g: Tensor


def _narrowed(task: UpdateTask, g: Tensor, first: int, count: int) -> _Narrowed:
    """A task over `count` elements from number `first` on, and the same elements of `g`; both are flat where the
    parameter and `g` are contiguous. The moments are flat, and narrowed likewise.
    """
    p, load, (m_format, _) = task.p, int(task.spec.load), task.spec.formats
    m = tuple(part.view(-1) for part in task.m)
    if p.is_contiguous() and g.is_contiguous():
        p, g = p.detach().view(-1)[first : first + count], g.detach().view(-1)[first : first + count]
    elif count < p.numel():
        width = p[0].numel()
        p, g = (t[first // width : (first + count) // width] for t in (p, g))
    return _Narrowed(
        task._replace(p=p, m=m_format.cut(m, first // load, -(-count // load)), start=task.start + first), g
    )


def _matrices(task: UpdateTask) -> Matrices:
    return matrices_of(task.p.shape, task.spec.row_parts)


def _product_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.bfloat16


def _stacked(run: Sequence[Member]) -> int | None:
    """The number of members in a graph, for `encoded`; None for one, whose keys and start are numbers."""
    return len(run) if len(run) > 1 else None


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([t.view(-1) for t in tensors])


def _parted(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_joined`, in the shapes of the tensors `like`."""
    return [part.view(t.shape) for part, t in zip(joined.chunk(len(like)), like, strict=True)]


def _encoding(spec: UpdateSpec, dtype: torch.dtype, stacked: int | None, number: int) -> Graph:
    def encode(g: Tensor, m: tuple[Tensor, ...], keys: Any, step: Tensor, scalars: Tensor, start: Tensor) -> Any:
        keys = keys if stacked is None else columns_of(keys)
        task = UpdateTask(g, m, (), spec, keys, g.numel(), start)  # all buckets are whole, so `numel` has no effect
        X, writes = encoded(g, m, task, StepScalars(step, *scalars), stacked)
        return X.to(dtype), *(value.view(-1) for _, value in writes)

    return compiled(encode, number)


def _moving(spec: UpdateSpec, stacked: int | None, number: int) -> Graph:
    def move(
        p: Tensor,
        Q: Tensor,
        scale: Tensor,
        finite: Tensor | None,
        keys: Any,
        step: Tensor,
        scalars: Tensor,
        start: Tensor,
    ) -> Tensor:
        keys = keys if stacked is None else columns_of(keys)
        task = UpdateTask(p, (), (), spec, keys, p.numel(), start)
        return moved(p, Q, scale, finite, task, StepScalars(step, *scalars), stacked)

    return compiled(move, number)
