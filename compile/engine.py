"""Makes executors of tasks: through kernels, through compiled graphs, or eagerly."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collins._torch_internals import foreach_copy_, is_compile_error, version_of
from collins.compile.graphs import Graphs, ScalarTensors, is_small, split, stack_key, whole_of
from collins.compile.matrices import MatrixSteps
from collins.compile.program import Executor, moment_guards
from collins.rule import ORTHOGONAL, StepScalars
from collins.update import EagerUpdate, UpdateSpec, UpdateTask

if TYPE_CHECKING:
    from collins.compile.multi_tensor import KernelLaunches, ParamLaunch

# The largest number of elements in a piece of an eager step: enough to outweigh the cost of the calls, few enough to
# stay in the cache.
_PIECE_CPU = 1 << 18
_PIECE_ACCELERATOR = 1 << 22
_PIECE_SMALL = 1 << 12  # the smallest number: smaller pieces take as long
# The size of all temporaries together: numbers in the dtype of the computation for each element of a piece, and bytes
# for each of its buckets.
_TEMPORARIES = 11
_BUCKET_BYTES = 64


class Engine:
    """Applies `update_` to every parameter of a step, in the fastest way there is.

    Args:
        compile: None for kernels on CUDA devices, graphs on other accelerators, eager steps on the CPU. True for graphs
            on every device, False for eager steps.
        busy_link: whether tables are copied from and to the host during steps.
        launches: replaces the kernel launches for CUDA devices.
    """

    def __init__(
        self, compile: bool | None = None, *, busy_link: bool = False, launches: KernelLaunches | None = None
    ) -> None:
        self._compile = compile
        self._graphs = Graphs()
        self.launches = launches or (_launches(busy_link) if compile is None else None)
        self._matrices = MatrixSteps(self._graphs, self._attempt, self._compiles, self._piece)
        self._failed: set[str] = set()
        self._largest = 0  # bytes of the largest parameter so far

    @property
    def graphs(self) -> int:
        """How many graphs have been made: one for each signature seen."""
        return len(self._graphs)

    def launch_of(self, spec: UpdateSpec, p: Tensor, start: int = 0) -> ParamLaunch | None:
        """The `UpdateTask.launch` of a new parameter."""
        return None if self.launches is None else self.launches.of(spec, p, start)

    def retain(self, tasks: Iterable[UpdateTask]) -> None:
        """Frees the constants of graphs that belong to none of these tasks; a later step makes them anew."""
        self._graphs.retain(tasks)

    def executor(self, tasks: Sequence[UpdateTask], grads: Sequence[Tensor]) -> Executor:
        """An executor for these tasks, of different parameters, with gradients of the memory layout of `grads`."""
        self._largest = max(self._largest, *(task.p.nbytes for task in tasks), 0)
        return EngineExecutor(self, tasks, grads)

    def executor_of_one(self, task: UpdateTask) -> Executor:
        """An executor for one task of a step in backward, where tasks run one by one as their gradients arrive."""
        self._largest = max(self._largest, task.p.nbytes)
        return OneExecutor(self, task)

    @property
    def has_kernel(self) -> bool:
        """Whether no kernel has failed to compile so far."""
        return "kernel" not in self._failed

    def run_kernel(self, way: Callable[[], bool | None]) -> bool:
        """Calls `way`, which launches the kernel, and returns whether that worked; if not, nothing has changed."""
        return self._attempt("kernel", way)

    def run_rest(
        self, tasks: dict[int, UpdateTask], grads: Sequence[Tensor], hps: Sequence[StepScalars], done: list[int]
    ) -> None:
        """Performs tasks, by number, through graphs or eagerly.

        Args:
            tasks: the tasks to perform.
            grads, hps: gradients and scalars of all tasks of the executor, indexed by number.
            done: the numbers of the tasks that have been performed are appended to it.
        """
        small: dict[tuple[Any, ...], list[int]] = {}
        whole: dict[int, UpdateTask] = {}
        scalars: ScalarTensors = {}
        for number, task in tasks.items():
            if task.spec.decode == ORTHOGONAL:
                whole[number] = task
            elif self._compiles(task.p.device) and is_small(task):
                small.setdefault(stack_key(task), []).append(number)
            else:
                self._run_one(number, task, grads[number], hps[number], scalars, done)
        for numbers in small.values():
            self._run_stacked(numbers, tasks, grads, hps, scalars, done)
        self._matrices.run(whole, grads, hps, scalars, done)

    def _run_one(
        self, number: int, task: UpdateTask, g: Tensor, hp: StepScalars, scalars: ScalarTensors, done: list[int]
    ) -> None:
        """Performs a task completely or not at all: a graph steps the elements that it supports, the rest is eager."""
        whole = whole_of(task, g) if self._compiles(task.p.device) else 0
        if not 0 < whole < task.p.numel():
            first, rest = task, None
        else:
            first, rest = split(task, whole)
            flat = g.detach().view(-1)
            g, g_rest = flat[:whole], flat[whole:]
        updates: list[EagerUpdate] = []  # what remains to be performed after an exception
        before = version_of(task.p)
        try:
            if rest is not None:  # smaller than a piece
                updates.append(EagerUpdate(rest, g_rest, hp))
                updates[0].prepare()
            if task.p.numel() and not (
                whole and self._attempt("graphs", lambda: self._graphs.run(first, g, hp, scalars))
            ):
                updates.append(EagerUpdate(first, g, hp, self._piece(first.p, first.spec.load)))
            for update in reversed(updates):
                update.run()
            done.append(number)
        except BaseException:
            begun = version_of(task.p) != before or any(update.begun for update in updates)
            if begun and number not in done:
                for update in updates:
                    update.finish()
                done.append(number)
            raise

    def _run_stacked(
        self,
        numbers: list[int],
        tasks: dict[int, UpdateTask],
        grads: Sequence[Tensor],
        hps: Sequence[StepScalars],
        scalars: ScalarTensors,
        done: list[int],
    ) -> None:
        """Performs small tasks of one signature, all of them or none."""
        batch = [tasks[number] for number in numbers]
        own = [grads[number] for number in numbers], [hps[number] for number in numbers]
        copies: list[tuple[list[Tensor], list[Tensor]]] = []
        if not self._attempt("graphs", lambda: copies.extend(self._graphs.run_stacked(batch, *own, scalars))):
            for number in numbers:
                self._run_one(number, tasks[number], grads[number], hps[number], scalars, done)
            return
        try:
            _copy(copies)
            done += numbers
        except BaseException:
            if numbers[0] not in done:
                _copy(copies)
                done += numbers
            raise

    def _compiles(self, device: torch.device) -> bool:
        return device.type not in ("cpu", "meta") if self._compile is None else self._compile

    def _piece(self, p: Tensor, load: float) -> int:
        """Elements per piece: its temporaries take at most twice the bytes of the largest parameter, or those of
        `_PIECE_SMALL` elements.
        """
        each = _TEMPORARIES * torch.promote_types(p.dtype, torch.float32).itemsize + _BUCKET_BYTES / load
        cap = _PIECE_CPU if p.device.type == "cpu" else _PIECE_ACCELERATOR
        return min(max(int(2 * self._largest / each), _PIECE_SMALL), cap)

    def _attempt(self, name: str, way: Callable[[], bool | None]) -> bool:
        """Calls `way` and returns whether it worked; if not, nothing has changed. A failed compilation is warned about
        once, and `way` is not tried again; where `way` returns False there is no warning.
        """
        if name in self._failed:
            return False
        try:
            return way() is not False
        except Exception as error:
            if not is_compile_error(error) and not type(error).__module__.startswith("triton"):
                raise
            cause = " ".join(str(error).split("\n\n")[0].split())
            instead, what = _INSTEAD[name]
            warnings.warn(f"Collins steps {instead}, because {what} failed: {cause}", stacklevel=2)
            self._failed.add(name)
            return False


class EngineExecutor:
    """Steps fixed tasks: by kernels where they can read the tensors, else by graphs or eagerly."""

    def __init__(self, engine: Engine, tasks: Sequence[UpdateTask], grads: Sequence[Tensor]) -> None:
        self._engine, self._tasks = engine, tasks
        self._kernel, rest = None, list(range(len(tasks)))
        if engine.launches is not None and engine.has_kernel:
            from collins.compile.multi_tensor import KernelExecutor, batched

            batches, rest = batched(tasks, grads)
            if batches:
                self._kernel = KernelExecutor(engine.launches, batches, engine.run_kernel)
        self._rest = {number: tasks[number] for number in rest}
        self._moments = [t for number in rest for t in (*tasks[number].m, *tasks[number].v)]
        self._guards = moment_guards(self._moments)

    def bind(self, grads: Sequence[Tensor]) -> Any:
        if self._guards is not None and not self._guards.check(*self._moments):  # the kernel compares addresses
            return None
        addresses = None if self._kernel is None else self._kernel.bind(grads)
        return None if self._kernel is not None and addresses is None else (grads, addresses)

    def run(self, bound: Any, scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]) -> None:
        grads, addresses = bound
        rest = self._rest
        if self._kernel is not None:
            left = self._kernel.run(addresses, scalars, rows, done)
            if left:
                rest = {**rest, **{number: self._tasks[number] for number in left}}
        if rest:
            self._engine.run_rest(rest, grads, [scalars[row] for row in rows], done)


class OneExecutor:
    """Steps one task."""

    def __init__(self, engine: Engine, task: UpdateTask) -> None:
        self._engine, self._task = engine, task

    def bind(self, grads: Sequence[Tensor]) -> Any:
        return grads

    def run(self, bound: Any, scalars: Sequence[StepScalars], rows: Sequence[int], done: list[int]) -> None:
        engine, task = self._engine, self._task
        (g,), (hp,) = bound, scalars
        if (
            task.launch is not None
            and engine.has_kernel
            and engine.run_kernel(lambda: task.launch.run_one(task, g, hp))
        ):
            done.append(0)
            return
        engine.run_rest({0: task}, bound, [hp], done)


def _copy(copies: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    for targets, values in copies:
        foreach_copy_(targets, values)


_INSTEAD = {"graphs": ("eagerly", "torch.compile"), "kernel": ("through torch.compile", "its Triton kernel")}


def _launches(busy_link: bool) -> KernelLaunches | None:
    if not (torch.cuda.is_available() and importlib.util.find_spec("triton")):
        return None
    from collins.compile.multi_tensor import KernelLaunches

    return KernelLaunches("cuda", busy_link=busy_link)
