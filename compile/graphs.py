"""Steps by torch.compile: one graph per signature, which all parameters of that signature share.

All optimizers of a process also share these graphs. PyTorch keeps the compiled code of a code object, some megabytes,
until the process ends (`orig_code_map` in torch/_dynamo/convert_frame.py), so separate graphs of each optimizer would
never be freed.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import (
    known_options,
    mark_dynamic,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from collins.compile.cpu_codegen import hinted
from collins.hashing import WORD, HashKey
from collins.rule import DECODES, StepScalars
from collins.update import HashKeys, UpdateSpec, UpdateTask, update_, update_rows_

# Dense tensors of at most this many elements are stacked by signature and stepped in one call: single steps would be
# bound by launch overhead.
SMALL = 1 << 16

# By default Inductor stores any value of more than 30 operations in memory, here a tensor of the parameter's size. With
# these thresholds it stores only the values that `CpuHints.realized` marks.
_OPTIONS: dict[str, Any] = {
    "realize_opcount_threshold": 10_000,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "cpp.enable_floating_point_contract_flag": "fast",  # x * y + z in one instruction
    "deterministic": True,  # otherwise every process measures which order of summation is fastest, and uses that
}

Graph = Callable[..., Any]

# The step number, and the other scalars of a step in one tensor; the key is the identity of the scalars, the dtype of
# the update, and the device.
ScalarTensors = dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]]


class _Stacked(NamedTuple):
    """The constants of the tasks that were last stacked for one signature."""

    whose: list[tuple[HashKeys, int | Tensor]]  # the keys and the start of each task
    keys: Tensor  # (n, keys), int64
    starts: Tensor  # (n, 1), int64


_SHARED: dict[Any, Graph] = {}  # by signature, and the registered decode and formats that the signature names


class Graphs:
    """The graphs of one optimizer."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._constants: dict[Any, Any] = {}
        self._stacked: dict[tuple[Any, ...], _Stacked] = {}
        self._captured: list[_Stacked] = []  # read by the replays of captured CUDA graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, task: UpdateTask, g: Tensor, hp: StepScalars, scalars: ScalarTensors) -> None:
        """Performs a task that a graph supports according to `whole_of`.

        Args:
            task: the task of a parameter.
            g: the parameter's gradient.
            hp: the task's scalars.
            scalars: the scalars of this step as tensors, which are added here.
        """
        shape, table = _views(task, g)
        p, grad = task.p.detach().view(shape[0]), g.detach().view(shape[1])
        m, v = (tuple(part.detach().view(-1) for part in parts) for parts in (task.m, task.v))
        tensors = (p, grad, *m, *v)
        signature = (task.spec, p.device, table, *((t.dtype, t.shape, t.stride()) for t in tensors))
        graph = self.of(task.spec, signature, lambda number: _graph_of_one(hinted(task.spec, p.device), number))
        keys, start = self.constants(task)
        graph(p, grad, m, v, keys, *of_step(task, hp, scalars), start, task.skipped)

    def of(self, spec: UpdateSpec, signature: tuple[Any, ...], make: Callable[[int], Graph]) -> Graph:
        """The graph of a signature, which contains `spec`; if there is none, `make` makes it from an unused number."""
        if signature not in self._graphs:
            shared = signature, DECODES.get(spec.decode), spec.formats
            if shared not in _SHARED:
                _SHARED[shared] = make(len(_SHARED))
            self._graphs[signature] = _SHARED[shared]
        return self._graphs[signature]

    def constants(self, task: UpdateTask) -> tuple[HashKeys, Tensor]:
        """The keys and the start of a task as tensors, so that tasks that differ in them share a graph."""
        for constant in (task.keys, task.start):
            if constant not in self._constants:
                self._constants[constant] = tree_map(_constant, constant)
        return self._constants[task.keys], self._constants[task.start]

    def retain(self, tasks: Iterable[UpdateTask]) -> None:
        """Frees the constants of all other tasks."""
        kept = {constant for task in tasks for constant in (task.keys, task.start)}
        self._constants = {constant: made for constant, made in self._constants.items() if constant in kept}

    def stacked_constants(self, signature: tuple[Any, ...], tasks: Sequence[UpdateTask]) -> tuple[Tensor, Tensor]:
        """The keys (n, keys) and starts (n, 1) of tasks, int64 on their device, cached for a signature's last tasks."""
        device, whose = tasks[0].p.device, [(task.keys, task.start) for task in tasks]
        if signature not in self._stacked or self._stacked[signature].whose != whose:
            keys, starts = zip(*((tree_flatten(key)[0], [start]) for key, start in whose), strict=True)
            self._stacked[signature] = _Stacked(
                whose, torch.tensor(keys, device=device), torch.tensor(starts, device=device)
            )
        found = self._stacked[signature]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(found)
        return found.keys, found.starts

    def run_stacked(
        self,
        batch: Sequence[UpdateTask],
        grads: Sequence[Tensor],
        hps: Sequence[StepScalars],
        scalars: ScalarTensors,
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        """As `run`, for small dense tensors of one signature, stacked along a first dimension whose size may change
        between steps. It writes nothing to the tensors of the tasks.

        Returns:
            Pairs of targets and new values, which the caller copies to perform the step.
        """
        spec, device = batch[0].spec, batch[0].p.device
        signature = (spec, *_signature(batch[0]))
        graph = self.of(spec, signature, lambda number: _graph_of_many(hinted(spec, device), number))
        times = 2 if len(batch) == 1 else 1  # a size of 1 would be compiled as a constant
        doubled, grads, hps = [*batch] * times, [*grads] * times, [*hps] * times
        columns = zip(*((task.p, g, *task.m, *task.v) for task, g in zip(doubled, grads, strict=True)), strict=True)
        stacks = [torch.stack(column) for column in columns]
        tensors = [stack.view(len(doubled), -1) for stack in stacks]
        cut = 2 + len(batch[0].m)
        keys, starts = self.stacked_constants(signature, doubled)
        steps = _together([hp.step for hp in hps], torch.int64, device)[:, None]
        others = torch.stack([of_step(task, hp, scalars)[1] for task, hp in zip(doubled, hps, strict=True)])
        skipped = torch.zeros(len(doubled), dtype=torch.int64, device=device)
        for stacked in (*tensors, keys, steps, others, starts, skipped):
            mark_dynamic(stacked, 0)
        p, g, m, v = tensors[0], tensors[1], tuple(tensors[2:cut]), tuple(tensors[cut:])
        graph(p, g, m, v, keys, steps, others, starts, skipped if spec.skip else None)
        changed = [stacks[0], *stacks[2:]]
        copies = [
            ([task.tensors[place] for task in batch], list(stack.unbind(0))[: len(batch)])
            for place, stack in enumerate(changed)
        ]
        counter = batch[0].skipped
        if spec.skip and counter is not None:
            copies.append(([counter], [counter + skipped[: len(batch)].sum()]))
        return copies


def is_small(task: UpdateTask) -> bool:
    """Whether a task is stepped in one call with others of its signature."""
    alone = len(task.m) == 1 and task.spec.v_load is None
    return task.spec.hash is None and alone and whole_of(task, task.p) == task.p.numel() <= SMALL


def _signature(task: UpdateTask) -> tuple[Any, ...]:
    return task.p.device, task.p.shape, task.p.dtype, *((t.dtype, t.shape) for t in task.tensors[1:])


def stack_key(task: UpdateTask) -> tuple[Any, ...]:
    """The key that small tasks must share to be stacked."""
    return task.spec, *_signature(task)


def whole_of(task: UpdateTask, g: Tensor) -> int:
    """The number of leading elements that a graph may step, which form whole buckets and words; 0 for none.

    Inductor's CPU backend splits a loop over x where the loop uses x // 32, and drops the remainder when 32 does not
    divide the range (observed in torch 2.13). So graphs step whole buckets, and whole words of 32 elements where values
    are rounded stochastically.
    """
    p, spec = task.p, task.spec
    loads = [1 if spec.hash == "universal" else int(load) for load in spec.loads]
    unit = math.lcm(*(load * format.unit for load, format in zip(loads, spec.formats, strict=True)))
    if spec.rounding:
        unit = max(loads) * WORD if any(format.rounds for format in spec.formats) else max(unit, WORD)
    if task.start % unit:
        return 0
    if p.numel() % unit == 0:
        return p.numel()
    divisible = spec.hash != "universal" and p.is_contiguous() and g.is_contiguous()
    return p.numel() // unit * unit if divisible else 0


def split(task: UpdateTask, whole: int) -> tuple[UpdateTask, UpdateTask]:
    """The first `whole` elements of a contiguous parameter, and the rest."""
    p = task.p.detach().view(-1)
    first: dict[str, Any] = {"p": p[:whole]}
    second: dict[str, Any] = {"p": p[whole:]}
    for name, parts, load, format in zip("mv", (task.m, task.v), task.spec.loads, task.spec.formats, strict=True):
        flat = tuple(part.detach().view(-1) for part in parts)
        entry, total = whole // int(load), -(-task.p.numel() // int(load))
        first[name], second[name] = format.cut(flat, 0, entry), format.cut(flat, entry, total - entry)
    return task._replace(**first), task._replace(**second, start=task.start + whole)


def _views(task: UpdateTask, g: Tensor) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The shapes in which p and g are passed to a graph, and the number of entries of the first moment. Where a view
    allows it, the shape has one row per bucket: then all loops of the graph have the same range, and parameters of
    different shapes share the graph.
    """
    p = task.p
    entries = -(-p.numel() // int(task.spec.load)) if task.spec.hash == "block" else task.m[0].numel()
    if not (p.is_contiguous() and g.is_contiguous()):
        return (p.shape, g.shape), entries
    shape = (entries, p.numel() // entries) if task.spec.hash == "block" else (p.numel(),)
    return (shape, shape), entries


def _constant(value: int) -> Tensor:
    return torch.tensor(value, device="cpu")


def of_step(task: UpdateTask, hp: StepScalars, scalars: ScalarTensors) -> tuple[Tensor, Tensor]:
    """The entry of `scalars` for a task, in the dtype of the update, so that no loop has to convert scalars."""
    here = id(hp), torch.promote_types(task.p.dtype, torch.float32), task.p.device
    if here not in scalars:
        step = hp.step if isinstance(hp.step, Tensor) else _constant(hp.step)
        scalars[here] = step, _together(hp[1:], *here[1:])
    return scalars[here]


def _together(numbers: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers in one tensor. If some are tensors, nothing is copied from the host: a CUDA graph could not capture
    that copy.
    """
    if not any(isinstance(number, Tensor) for number in numbers):
        return torch.tensor(numbers, dtype=dtype, device=device)
    made = (x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device) for x in numbers)
    return torch.stack([x.to(device, dtype) for x in made])


def _graph_of_one(spec: UpdateSpec, number: int) -> Graph:
    def one(
        p: Tensor,
        g: Tensor,
        m: tuple[Tensor, ...],
        v: tuple[Tensor, ...],
        keys: HashKeys,
        step: Tensor,
        scalars: Tensor,
        start: Tensor,
        skipped: Tensor | None,
    ) -> None:
        task = UpdateTask(p, m, v, spec, keys, p.numel(), start, skipped=skipped)
        update_(task, g, StepScalars(step, *scalars))

    return compiled(one, number)


def compiled(function: Callable[..., Any], number: int) -> Graph:
    """Compiles a function of tensors of fixed shapes; `number` must differ from the numbers of all other graphs."""
    own = _with_own_code(function, number)
    return torch.compile(own, fullgraph=True, dynamic=False, options=known_options(_OPTIONS))


def columns_of(keys: Tensor) -> HashKeys:
    """Converts the keys of `Graphs.stacked_constants`, (n, keys), to columns, (n, 1), for `UpdateTask.keys`."""
    structure = tree_flatten(HashKeys(HashKey(0, 0), HashKey(0, 0), (0, 0, 0, 0), 0))[1]
    found: HashKeys = tree_unflatten(keys.split(1, 1), structure)
    return found


def _graph_of_many(spec: UpdateSpec, number: int) -> Graph:
    def stacked(
        p: Tensor,
        g: Tensor,
        m: tuple[Tensor, ...],
        v: tuple[Tensor, ...],
        keys: Tensor,
        step: Tensor,
        scalars: Tensor,
        start: Tensor,
        skipped: Tensor | None,
    ) -> None:
        task = UpdateTask(p, m, v, spec, columns_of(keys), p.shape[1], start, skipped=skipped)
        update_rows_(task, g, StepScalars(step, *scalars.split(1, 1)))

    return torch.compile(_with_own_code(stacked, number), fullgraph=True, options=known_options(_OPTIONS))


def _with_own_code(function: Any, number: int) -> Any:
    """A copy of the function with a code object of its own, since PyTorch limits recompilations per code object."""
    code = function.__code__.replace(co_name=f"collins_{function.__code__.co_name}_{number}")
    return types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
