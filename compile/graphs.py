"""The step through torch.compile: one graph per signature, which every parameter of that signature shares."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import (
    foreach_copy_,
    known_options,
    mark_dynamic,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from collins.compile.cpu_codegen import hinted
from collins.hashing import WORD, HashKey
from collins.rounding import ROUNDED
from collins.rule import StepScalars
from collins.update import HashKeys, UpdateSpec, UpdateTask, update_, update_rows_

# Dense tensors of at most this many elements are stacked by signature and stepped in one call: launches rule there.
SMALL = 1 << 16

# By default Inductor stores any value of more than 30 operations, here one of the parameter's size. It is to store what
# `CpuHints.realized` keeps and no more.
_OPTIONS: dict[str, Any] = {
    "realize_opcount_threshold": 10_000,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "cpp.enable_floating_point_contract_flag": "fast",  # x * y + z by one instruction
    "deterministic": True,  # otherwise the fastest order of a sum is measured anew in every process
}

_Graph = Callable[..., None]

# A step's count, and its other `StepScalars` in one tensor: by identity, the dtype of the update, and the device.
Numbers = dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]]


class _Stacked(NamedTuple):
    """The constants of the tensors that were last stacked by one signature."""

    whose: list[tuple[HashKeys, int | Tensor]]  # each tensor's keys and start
    keys: Tensor  # (n, keys), int64
    starts: Tensor  # (n, 1), int64


class Graphs:
    """Compiles and keeps the graphs of one optimizer."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._constants: dict[Any, Any] = {}
        self._stacked: dict[tuple[Any, ...], _Stacked] = {}
        self._captured: list[_Stacked] = []  # which CUDA graphs read again

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, work: UpdateTask, numbers: Numbers) -> None:
        """Performs `work`, of which `whole_of` says that a graph can take it.

        Args:
            work: a parameter's step.
            numbers: those of this step; filled here.
        """
        p, g, m, v, spec, keys, _, _, start, _ = work
        tensors = [t.detach().view(shape) for t, shape in zip((p, g, m, v), _views(work), strict=True)]
        signature = (spec, p.device, *((t.dtype, t.shape, t.stride()) for t in tensors))
        for constant in (keys, start):
            if constant not in self._constants:
                self._constants[constant] = tree_map(torch.tensor, constant)
        if signature not in self._graphs:
            self._graphs[signature] = _graph_of_one(hinted(spec, p.device), len(self))
        self._graphs[signature](*tensors, self._constants[keys], *_of_step(work, numbers), self._constants[start])

    def run_stacked(self, batch: Sequence[UpdateTask], numbers: Numbers) -> None:
        """As `run`, for small dense tensors of one signature, stacked along a first dimension whose size may change
        between steps.
        """
        spec, device = batch[0].spec, batch[0].p.device
        signature = (spec, device, batch[0].p.shape, batch[0].p.dtype, batch[0].m.dtype)
        if signature not in self._graphs:
            self._graphs[signature] = _graph_of_many(hinted(spec, device), len(self))
        doubled = [*batch, *batch] if len(batch) == 1 else batch  # a size of 1 would be compiled as a constant
        stacks = [torch.stack(column) for column in zip(*((w.p, w.g, w.m, w.v) for w in doubled), strict=True)]
        tensors = [stack.view(len(doubled), -1) for stack in stacks]
        whose = [(work.keys, work.start) for work in doubled]
        if signature not in self._stacked or self._stacked[signature].whose != whose:
            keys, starts = zip(*((tree_flatten(key)[0], [start]) for key, start in whose), strict=True)
            self._stacked[signature] = _Stacked(
                whose, torch.tensor(keys, device=device), torch.tensor(starts, device=device)
            )
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(self._stacked[signature])
        _, keys, starts = self._stacked[signature]
        steps = _together([work.hp.step for work in doubled], torch.int64, device)[:, None]
        others = torch.stack([_of_step(work, numbers)[1] for work in doubled])
        for stacked in (*tensors, keys, steps, others, starts):
            mark_dynamic(stacked, 0)
        self._graphs[signature](*tensors, keys, steps, others, starts)
        p, _, m, v = (list(results.unbind(0))[: len(batch)] for results in stacks)
        foreach_copy_([work.p for work in batch], p)
        foreach_copy_([work.m for work in batch], m)
        foreach_copy_([work.v for work in batch], v)


def whole_of(work: UpdateTask) -> int:
    """How many leading elements a graph may take: all of the parameter but an odd end, or none of it.

    Inductor's CPU backend splits a loop over x where it sees x // 32, and loses the end when 32 does not divide the
    range (seen in torch 2.13). So graphs take whole buckets, and where values are rounded stochastically whole words.
    """
    p, g, m, _, spec, _, _, _, start, _ = work
    load = int(spec.load) if spec.hash == "block" else 1
    unit = load
    if spec.rounding:
        unit = load * WORD if m.dtype in ROUNDED else max(load, WORD)
    if start % unit:
        return 0
    if p.numel() % unit == 0:
        return p.numel()
    divisible = spec.hash != "universal" and p.is_contiguous() and g.is_contiguous()
    return p.numel() // unit * unit if divisible else 0


def split(work: UpdateTask, whole: int) -> tuple[UpdateTask, UpdateTask]:
    """The first `whole` elements of a contiguous parameter, and the rest."""
    p, g, m, v = (t.detach().view(-1) for t in work[:4])
    entry = whole // int(work.spec.load)
    return (
        work._replace(p=p[:whole], g=g[:whole], m=m[:entry], v=v[:entry]),
        work._replace(p=p[whole:], g=g[whole:], m=m[entry:], v=v[entry:], start=work.start + whole),
    )


def _views(work: UpdateTask) -> tuple[tuple[int, ...], ...]:
    """Shapes under which p, g, m and v enter a graph: one row a bucket where that is a view, so that the graph's loops
    agree and parameters of different shapes share it.
    """
    p, g, m = work.p, work.g, work.m
    table = (m.numel(),)
    if not (p.is_contiguous() and g.is_contiguous()):
        return p.shape, g.shape, table, table
    shape = (m.numel(), p.numel() // m.numel()) if work.spec.hash == "block" else (p.numel(),)
    return shape, shape, table, table


def _of_step(work: UpdateTask, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Its entry in `numbers`, in the dtype of its update, so that no loop has to convert them."""
    here = id(work.hp), torch.promote_types(work.p.dtype, torch.float32), work.p.device
    if here not in numbers:
        numbers[here] = torch.as_tensor(work.hp.step), _together(work.hp[1:], *here[1:])
    return numbers[here]


def _together(numbers: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In one tensor. If some are tensors, nothing is copied from the host, which no CUDA graph could capture."""
    if not any(isinstance(number, Tensor) for number in numbers):
        return torch.tensor(numbers, dtype=dtype, device=device)
    made = (x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device) for x in numbers)
    return torch.stack([x.to(device, dtype) for x in made])


def _graph_of_one(spec: UpdateSpec, number: int) -> _Graph:
    def one(
        p: Tensor, g: Tensor, m: Tensor, v: Tensor, keys: HashKeys, step: Tensor, numbers: Tensor, start: Tensor
    ) -> None:
        update_(UpdateTask(p, g, m, v, spec, keys, StepScalars(step, *numbers), p.numel(), start))

    return torch.compile(_with_own_code(one, number), fullgraph=True, dynamic=False, options=known_options(_OPTIONS))


def _graph_of_many(spec: UpdateSpec, number: int) -> _Graph:
    structure = tree_flatten(HashKeys(HashKey(0, 0), HashKey(0, 0), (0, 0, 0, 0), 0))[1]

    def stacked(
        p: Tensor, g: Tensor, m: Tensor, v: Tensor, keys: Tensor, step: Tensor, numbers: Tensor, start: Tensor
    ) -> None:
        hp = StepScalars(step, *numbers.split(1, 1))
        update_rows_(UpdateTask(p, g, m, v, spec, tree_unflatten(keys.split(1, 1), structure), hp, p.shape[1], start))

    return torch.compile(_with_own_code(stacked, number), fullgraph=True, options=known_options(_OPTIONS))


def _with_own_code(function: Any, number: int) -> Any:
    """The function behind a code object of its own: PyTorch's recompilation limit counts per code object."""
    code = function.__code__.replace(co_name=f"collins_{function.__code__.co_name}_{number}")
    return types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
