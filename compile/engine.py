"""Runs the work of a step: compiled where asked for, eagerly elsewhere."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map

from collins.rule import Scalars
from collins.update import Keys, Spec, Work, update_

# Elements per piece of an eager step, at most: enough to outweigh the calls, few enough to stay in cache.
_PIECE_CPU = 1 << 18
_PIECE_ACCELERATOR = 1 << 22
_PIECE_SMALLEST = 1 << 14

_Compiled = Callable[..., None]


def _piece(p: Tensor) -> int:
    """Elements per piece: few enough that all temporaries together stay under twice the size of a large tensor."""
    largest = _PIECE_CPU if p.device.type == "cpu" else _PIECE_ACCELERATOR
    return min(max(p.numel() // 16, _PIECE_SMALLEST), largest)


def _compiled(spec: Spec, number: int) -> _Compiled:
    """`update_` for one signature, behind a code object of its own: the recompilation limit counts per code object."""

    def whole(p: Tensor, g: Tensor, m: Tensor, v: Tensor, keys: Keys, h: Scalars) -> None:
        update_(Work(p, g, m, v, spec, keys, h))

    code = whole.__code__.replace(co_name=f"collins_step_{number}")
    own = types.FunctionType(code, whole.__globals__, code.co_name, None, whole.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _key_tensors(keys: Keys) -> Keys:
    return tree_map(torch.tensor, keys)


def _scalar_tensors(h: Scalars) -> Scalars:
    step, *rest = h
    return Scalars(torch.tensor(step), *(torch.as_tensor(x, dtype=torch.float64) for x in rest))


class Engine:
    """Applies `update_` to each parameter.

    Args:
        compile: True or False for all devices; None compiles on accelerators and not on the CPU.
    """

    def __init__(self, compile: bool | None = None) -> None:
        self._compile = compile
        self._graphs: dict[tuple[Any, ...], _Compiled] = {}
        self._constants: dict[Keys, Keys] = {}
        self._compiler_works = True

    def run(self, works: Sequence[Work]) -> None:
        """Performs every work, in order."""
        numbers: dict[Scalars, Scalars] = {}
        for work in works:
            if work.p.numel() == 0:
                continue
            if not (self._compiles(work.p.device) and self._run_compiled(work, numbers)):
                update_(work, _piece(work.p))

    def _compiles(self, device: torch.device) -> bool:
        wanted = device.type != "cpu" if self._compile is None else self._compile
        return wanted and self._compiler_works

    def _run_compiled(self, work: Work, numbers: dict[Scalars, Scalars]) -> bool:
        """Whether it could be done; if not, nothing has changed and a warning has said why."""
        p, g, m, v, spec, keys, h = work
        signature = (spec, p.device, *((t.dtype, t.shape, t.stride()) for t in (p, g, m, v)))
        graph = self._graphs.get(signature)
        if graph is None:
            graph = self._graphs[signature] = _compiled(spec, len(self._graphs))
        if keys not in self._constants:
            self._constants[keys] = _key_tensors(keys)
        if h not in numbers:
            numbers[h] = _scalar_tensors(h)
        try:
            graph(p, g, m, v, self._constants[keys], numbers[h])
        except TorchDynamoException as error:  # raised while compiling, before anything ran
            self._compiler_works = False
            cause = str(error).strip().splitlines()
            warnings.warn(f"Collins steps eagerly, because torch.compile failed: {' '.join(cause[:3])}", stacklevel=2)
        return self._compiler_works
