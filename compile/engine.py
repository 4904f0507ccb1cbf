"""Runs the work of a step: in one launch, through compiled graphs, or eagerly."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from collins.compile.graphs import SMALL, Graphs, Numbers, split, whole_of
from collins.update import UpdateSpec, UpdateTask, update_

if TYPE_CHECKING:
    from collins.compile.multi_tensor import Course, KernelLaunch, KernelLaunches

# Elements per piece of an eager step, at most: enough to outweigh the calls, few enough to stay in cache.
_PIECE_CPU = 1 << 18
_PIECE_ACCELERATOR = 1 << 22
# What all temporaries take together: for each element of a piece, numbers of the dtype that is computed in; for each of
# its buckets, bytes.
_TEMPORARIES = 11
_BUCKET_BYTES = 64


class Engine:
    """Applies `update_` to every parameter of a step.

    Args:
        compile: None for the fastest way there is: the kernel on CUDA devices, graphs on other accelerators, eager
            steps on the CPU. True for graphs on every device, False for eager steps.
        busy_link: whether tables are copied from and to the host meanwhile.
    """

    def __init__(self, compile: bool | None = None, *, busy_link: bool = False) -> None:
        self._compile = compile
        self._graphs = Graphs()
        self._launches = _launches(busy_link) if compile is None else None
        self._failed: set[str] = set()
        self._largest = 0  # bytes of the largest parameter so far

    @property
    def graphs(self) -> int:
        """How many graphs have been made: one for each signature seen."""
        return len(self._graphs)

    def run(self, works: Sequence[UpdateTask]) -> None:
        """Performs all of them; they must be of different parameters."""
        if self._launches is not None:
            works = self._launched(works, self._launches)
            if not works:
                return
        self._largest = max(self._largest, *(work.p.nbytes for work in works), 0)
        small: dict[tuple[Any, ...], list[UpdateTask]] = {}
        numbers: Numbers = {}
        for work in works:
            p = work.p
            whole = whole_of(work) if self._compiles(p.device) else 0
            if whole == 0:
                self._run_eagerly(work)
            elif work.spec.hash is None and whole == p.numel() <= SMALL:
                small.setdefault((work.spec, p.shape, p.dtype, work.m.dtype, p.device), []).append(work)
            else:
                parts = (work,) if whole == p.numel() else split(work, whole)
                if not self._attempt("graphs", self._graphs.run, parts[0], numbers):
                    self._run_eagerly(parts[0])
                for part in parts[1:]:
                    self._run_eagerly(part)
        for batch in small.values():
            if not self._attempt("graphs", self._graphs.run_stacked, batch, numbers):
                for work in batch:
                    self._run_eagerly(work)

    def run_one(self, work: UpdateTask) -> None:
        """Performs one, which others follow as their gradients arrive in backward."""
        if work.launch is None or not self._attempt("kernel", work.launch.run_one, work):
            self.run([work])

    def _launched(self, works: Sequence[UpdateTask], launches: KernelLaunches) -> list[UpdateTask]:
        """Performs what the kernel can take, and returns the rest."""
        if "kernel" in self._failed:
            return list(works)
        batches, rest = launches.sorted(works)
        for batch, sent in zip(batches, launches.send(batches), strict=True):
            if not self._attempt("kernel", batch.columns.launch.run, batch, sent):
                rest += batch.columns.works
        return rest

    def course(self, works: Sequence[UpdateTask]) -> Course | None:
        """What takes the same step again with other gradients and numbers, if kernels take all of it."""
        if self._launches is None or "kernel" in self._failed or any(work.launch is None for work in works):
            return None
        return self._launches.course(works)

    def launch_of(self, spec: UpdateSpec, p: Tensor, moment_dtype: torch.dtype, start: int = 0) -> KernelLaunch | None:
        """What to give as `UpdateTask.launch` for such a parameter."""
        return None if self._launches is None else self._launches.of(spec, p, moment_dtype, start)

    def _compiles(self, device: torch.device) -> bool:
        return device.type not in ("cpu", "meta") if self._compile is None else self._compile

    def _run_eagerly(self, work: UpdateTask) -> None:
        if work.p.numel():
            update_(work, self._piece(work.p, work.spec.load))

    def _piece(self, p: Tensor, load: float) -> int:
        """Elements per piece: all its temporaries together take at most twice what the largest parameter does."""
        each = _TEMPORARIES * torch.promote_types(p.dtype, torch.float32).itemsize + _BUCKET_BYTES / load
        cap = _PIECE_CPU if p.device.type == "cpu" else _PIECE_ACCELERATOR
        return min(max(int(2 * self._largest / each), 1), cap)

    def _attempt(self, name: str, way: Callable[..., bool | None], *args: Any) -> bool:
        """Whether that way works here; if not, nothing has changed. One warning says why, unless the way declines."""
        if name in self._failed:
            return False
        try:
            return way(*args) is not False
        except Exception as error:
            if not isinstance(error, TorchDynamoException) and not type(error).__module__.startswith("triton"):
                raise
            cause = " ".join(str(error).split("\n\n")[0].split())
            instead, what = _INSTEAD[name]
            warnings.warn(f"Collins steps {instead}, because {what} failed: {cause}", stacklevel=2)
            self._failed.add(name)
            return False


_INSTEAD = {"graphs": ("eagerly", "torch.compile"), "kernel": ("through torch.compile", "its Triton kernel")}


def _launches(busy_link: bool) -> KernelLaunches | None:
    if not (torch.cuda.is_available() and importlib.util.find_spec("triton")):
        return None
    from collins.compile.multi_tensor import KernelLaunches

    return KernelLaunches("cuda", busy_link=busy_link)
