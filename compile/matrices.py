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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins.compile.cpu_codegen import hinted
from collins.compile.graphs import Graph, Graphs, ScalarTensors, compiled, of_step
from collins.hashing import WORD
from collins.orthogonal import Matrices, encoded, kept, matrices_of, moved, orthogonalised, update_scale
from collins.rule import StepScalars
from collins.task import HashKeys, UpdateSpec, UpdateTask, Write, pieces, unit_of
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
    """Steps tasks of decode="orthogonal".

    Args:
        graphs: the engine's.
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
        found = [self._encoded(member, scalars) for member in batch]
        Xs = [X for X, _ in found]
        X = (Xs[0] if len(Xs) == 1 else torch.cat(Xs)).view(-1, matrices.rows, matrices.cols)
        new_ms = [m for _, m in found]
        del Xs, found
        Q, finite = orthogonalised(X, matrices)
        del X
        scale = update_scale(matrices.row_parts[0], matrices.cols)
        writes: list[Write] = []
        flags: Tensor | None = None
        left_out: list[Tensor] = []
        skips, at = batch[0].task.spec.skip, 0
        for member, new_m in zip(batch, new_ms, strict=True):
            task, own = member.task, slice(at, at + member.stacked)
            if skips:
                flags = finite[own] if member.alone else finite[own].all()[None]
                buckets = -(-task.p.numel() // int(task.spec.load))
                left_out.append((~flags).sum() * (buckets // len(flags)))
            new = self._moved(member, Q[own].view(-1), scale, flags, scalars)
            writes.append((task.p, new.view(task.p.shape)))
            for target, value in zip(task.m, new_m, strict=True):
                writes.append((target, value if flags is None else kept(flags, value, target)))
            at += member.stacked
        return Values(writes, left_out=torch.stack(left_out).sum() if skips else None)

    def _encoded(self, member: Member, scalars: ScalarTensors) -> tuple[Tensor, list[Tensor]]:
        """X of a member, flat, and the stored tensors of its first moment after the step."""
        task, g, hp = member.task, member.g, member.hp
        dtype = _product_dtype(task.p)
        made: list[tuple[Tensor, ...]] = []

        def graph() -> None:
            tensors = (g, *task.m)
            signature = (encoded, task.spec, dtype, g.device, *((t.dtype, t.shape) for t in tensors))
            run = self._graphs.of(signature, lambda number: _encoding(hinted(task.spec, g.device), dtype, number))
            keys, start = self._graphs.constants(task)
            made.append(run(g.detach(), task.m, keys, *of_step(task, hp, scalars), start))

        if self._suits(member) and self._attempt("graphs", graph):
            X, *m = made[0]
            return X, m
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

    def _moved(self, member: Member, Q: Tensor, scale: float, flags: Tensor | None, scalars: ScalarTensors) -> Tensor:
        """The new values of a member's parameter, flat."""
        task, hp, p = member.task, member.hp, member.task.p
        made: list[Tensor] = []

        def graph() -> None:
            count = None if flags is None else len(flags)
            signature = (moved, task.spec, count, p.device, p.dtype, p.shape, Q.dtype)
            run = self._graphs.of(signature, lambda number: _moving(hinted(task.spec, p.device), number))
            keys, start = self._graphs.constants(task)
            factor = torch.tensor(scale, dtype=torch.float64, device="cpu")
            made.append(run(p.detach(), Q, factor, flags, keys, *of_step(task, hp, scalars), start))

        if self._suits(member) and self._attempt("graphs", graph):
            return made[0]
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


def _encoding(spec: UpdateSpec, dtype: torch.dtype, number: int) -> Graph:
    def encode(
        g: Tensor, m: tuple[Tensor, ...], keys: HashKeys, step: Tensor, scalars: Tensor, start: Tensor
    ) -> tuple[Tensor, ...]:
        task = UpdateTask(g, m, (), spec, keys, g.numel(), start)  # all buckets are whole, so `numel` has no effect
        X, writes = encoded(g, m, task, StepScalars(step, *scalars))
        return X.to(dtype), *(value for _, value in writes)

    return compiled(encode, number)


def _moving(spec: UpdateSpec, number: int) -> Graph:
    def move(
        p: Tensor,
        Q: Tensor,
        scale: Tensor,
        finite: Tensor | None,
        keys: HashKeys,
        step: Tensor,
        scalars: Tensor,
        start: Tensor,
    ) -> Tensor:
        task = UpdateTask(p, (), (), spec, keys, p.numel(), start)
        return moved(p, Q, scale, finite, task, StepScalars(step, *scalars))

    return compiled(move, number)
