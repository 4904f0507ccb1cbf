"""Runs the work of a step: compiled where asked for, eagerly elsewhere."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from collins.hashing import WORD, HashKey
from collins.rounding import ROUNDED
from collins.rule import Scalars
from collins.update import Keys, Spec, Work, update_

# Elements per piece of an eager step, at most: enough to outweigh the calls, few enough to stay in cache.
_PIECE_CPU = 1 << 18
_PIECE_ACCELERATOR = 1 << 22
_PIECE_SMALLEST = 1 << 15

# Dense tensors of at most this many elements are stacked by signature and stepped in one call: launches rule there.
_SMALL = 1 << 16

_Graph = Callable[..., None]


class Engine:
    """Applies `update_` to every parameter of a step.

    Args:
        compile: True or False for all devices; None compiles on accelerators and not on the CPU.
    """

    def __init__(self, compile: bool | None = None) -> None:
        self._compile = compile
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._constants: dict[Keys, Keys] = {}
        self._compiler_works = True

    @property
    def graphs(self) -> int:
        """How many graphs have been made: one for each signature seen."""
        return len(self._graphs)

    def run(self, works: Sequence[Work]) -> None:
        """Performs all of them; they must be of different parameters."""
        small: dict[tuple[Any, ...], list[Work]] = {}
        numbers: dict[Scalars, Scalars] = {}
        for work in works:
            p = work.p
            whole = _whole(work) if self._compiles(p.device) else 0
            if whole == 0:
                self._run_eagerly(work)
            elif work.spec.layout.hash is None and whole == p.numel() <= _SMALL:
                small.setdefault((work.spec, p.shape, p.dtype, work.m.dtype, p.device), []).append(work)
            elif whole == p.numel():
                self._run_one(work, numbers)
            else:
                for part in _split(work, whole):
                    self._run_one(part, numbers) if part.start == 0 else self._run_eagerly(part)
        for signature, batch in small.items():
            self._run_stacked(signature, batch)

    def _run_eagerly(self, work: Work) -> None:
        if work.p.numel():
            update_(work, _piece(work.p))

    def _compiles(self, device: torch.device) -> bool:
        wanted = device.type not in ("cpu", "meta") if self._compile is None else self._compile
        return wanted and self._compiler_works

    def _run_one(self, work: Work, numbers: dict[Scalars, Scalars]) -> None:
        p, g, m, v, spec, keys, h, _ = work
        tensors = [t.detach().view(shape) for t, shape in zip((p, g, m, v), _views(work), strict=True)]
        signature = (spec, p.device, *((t.dtype, t.shape, t.stride()) for t in tensors))
        if keys not in self._constants:
            self._constants[keys] = tree_map(torch.tensor, keys)
        if h not in numbers:
            numbers[h] = Scalars(
                torch.tensor(h.step), *(torch.as_tensor(number, dtype=torch.float64) for number in h[1:])
            )
        if signature not in self._graphs:
            self._graphs[signature] = _graph_of_one(spec, p.device, len(self._graphs))
        if not self._called(self._graphs[signature], *tensors, self._constants[keys], numbers[h]):
            self._run_eagerly(work)

    def _run_stacked(self, signature: tuple[Any, ...], batch: list[Work]) -> None:
        """Small dense tensors of one signature, stacked along a first dimension whose size may change between steps."""
        if signature not in self._graphs:
            self._graphs[signature] = _graph_of_many(batch[0].spec, batch[0].p.device, len(self._graphs))
        doubled = batch * 2 if len(batch) == 1 else batch  # a size of 1 would be compiled as a constant
        tensors = [torch.stack(column) for column in zip(*((w.p, w.g, w.m, w.v) for w in doubled), strict=True)]
        device = batch[0].p.device
        keys = torch.tensor([tree_flatten(work.keys)[0] for work in doubled], device=device)
        steps = torch.tensor([work.h.step for work in doubled], device=device)
        numbers = torch.stack([_row(work.h[1:], device) for work in doubled])
        for stacked in (*tensors, keys, steps, numbers):
            torch._dynamo.mark_dynamic(stacked, 0)
        if not self._called(self._graphs[signature], *tensors, keys, steps, numbers):
            for work in batch:
                self._run_eagerly(work)
            return
        p, _, m, v = (list(results.unbind(0))[: len(batch)] for results in tensors)
        torch._foreach_copy_([work.p for work in batch], p)
        torch._foreach_copy_([work.m for work in batch], m)
        torch._foreach_copy_([work.v for work in batch], v)

    def _called(self, graph: _Graph, *args: Any) -> bool:
        """Whether the graph could be run; if not, nothing has changed and a warning has said why."""
        try:
            graph(*args)
        except TorchDynamoException as error:  # raised while compiling, before anything ran
            cause = " ".join(str(error).split("\n\n")[0].split())
            if self._compiler_works:
                warnings.warn(f"Collins steps eagerly, because torch.compile failed: {cause}", stacklevel=2)
            self._compiler_works = False
        return self._compiler_works


def _piece(p: Tensor) -> int:
    """Elements per piece: few enough that all temporaries together stay under twice the size of a large tensor."""
    largest = _PIECE_CPU if p.device.type == "cpu" else _PIECE_ACCELERATOR
    return min(max(p.numel() // 16, _PIECE_SMALLEST), largest)


def _whole(work: Work) -> int:
    """How many leading elements a graph may take: all of the parameter but an odd end, or none of it.

    Inductor's CPU backend splits a loop over x where it sees x // 32, and loses the end when 32 does not divide the
    range (seen in torch 2.13). So graphs take whole buckets, and where values are rounded stochastically whole words.
    """
    p, g, m, _, spec, _, _, _ = work
    load = int(spec.layout.load) if spec.layout.hash == "block" else 1
    unit = load
    if spec.rounding:
        unit = load * WORD if m.dtype in ROUNDED else max(load, WORD)
    if p.numel() % unit == 0:
        return p.numel()
    divisible = spec.layout.hash != "universal" and p.is_contiguous() and g.is_contiguous()
    return p.numel() // unit * unit if divisible else 0


def _split(work: Work, whole: int) -> tuple[Work, Work]:
    """The first `whole` elements of a contiguous parameter, and the rest."""
    p, g, m, v = (t.detach().view(-1) for t in work[:4])
    entry = whole // int(work.spec.layout.load)
    return (
        work._replace(p=p[:whole], g=g[:whole], m=m[:entry], v=v[:entry]),
        work._replace(p=p[whole:], g=g[whole:], m=m[entry:], v=v[entry:], start=whole),
    )


def _views(work: Work) -> tuple[tuple[int, ...], ...]:
    """Shapes under which p, g, m and v enter a graph: one row a bucket where that is a view, so that the graph's loops
    agree and parameters of different shapes share it.
    """
    p, g, m = work.p, work.g, work.m
    table = (m.numel(),)
    if not (p.is_contiguous() and g.is_contiguous()):
        return p.shape, g.shape, table, table
    shape = (m.numel(), p.numel() // m.numel()) if work.spec.layout.hash == "block" else (p.numel(),)
    return shape, shape, table, table


def _row(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    if any(isinstance(number, Tensor) for number in numbers):
        return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _graph_of_one(spec: Spec, device: torch.device, number: int) -> _Graph:
    def one(p: Tensor, g: Tensor, m: Tensor, v: Tensor, keys: Keys, h: Scalars) -> None:
        update_(Work(p, g, m, v, spec, keys, h))

    return torch.compile(_with_own_code(one, number), fullgraph=True, dynamic=False, options=_options(device))


def _graph_of_many(spec: Spec, device: torch.device, number: int) -> _Graph:
    structure = tree_flatten(Keys(HashKey(0, 0), HashKey(0, 0), (0, 0, 0, 0), 0))[1]

    def one(
        p: Tensor, g: Tensor, m: Tensor, v: Tensor, keys: Tensor, step: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        update_(Work(p, g, m, v, spec, tree_unflatten(keys.unbind(), structure), Scalars(step, *numbers.unbind())))
        return p, m, v

    many = torch.vmap(one)

    def stacked(*args: Tensor) -> None:
        many(*args)

    return torch.compile(_with_own_code(stacked, number), fullgraph=True, options=_options(device))


def _with_own_code(function: Any, number: int) -> Any:
    """The function behind a code object of its own: PyTorch's recompilation limit counts per code object."""
    code = function.__code__.replace(co_name=f"collins_{function.__code__.co_name}_{number}")
    return types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)


def _options(device: torch.device) -> dict[str, Any]:
    """How much Inductor inlines. By default it stores any value of more than 30 operations, here one of the parameter's
    size. On accelerators everything becomes one kernel, which computes hashes once a row; on the CPU hashes are worth
    storing, one a bucket.
    """
    operations = 40 if device.type == "cpu" else 10_000
    return {
        "realize_opcount_threshold": operations,
        "realize_reads_threshold": 1000,
        "realize_acc_reads_threshold": 1000,
    }
