"""Uploads the kernel's per-step arguments (addresses of gradients, scalars) to a device in one copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from collins._torch_internals import current_raw_stream
from collins.rule import StepScalars

_SCALARS = len(StepScalars._fields)
_GRAD_SCALE = StepScalars._fields.index("grad_scale")
_SETS = 16  # sets of scalars that are kept on the device for launches of single tasks
_SIZES = 256  # sizes of buffers that are kept: every choice of experts, and of numbers of steps, may have another one


@triton.jit(do_not_specialize=["count"])
def _fetch(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < count, cache_modifier=".cv"), mask=place < count)


def fetch(source: Tensor, target: Tensor) -> None:
    """Copies from page-locked host memory by a kernel, since a memcpy would queue behind the copies of whole slabs."""
    with torch.cuda.device_of(target):
        _fetch[(triton.cdiv(source.numel(), 1024),)](source, target, source.numel(), BLOCK=1024)


class LaunchArgs(NamedTuple):
    """The per-step arguments of a launch, on the device."""

    gradients: Tensor  # addresses, int64
    scalars: Tensor  # float64, rows of `StepScalars`


_Kept = TypeVar("_Kept")
_HostArgs = tuple[Sequence[int] | np.ndarray, Sequence[StepScalars]]  # addresses of gradients, and scalars
_ArgBuffer = tuple[Tensor, list[LaunchArgs]]  # device memory, int64, and the views of it that each launch reads


class ArgUploader:
    """Uploads the addresses of gradients and the scalars of a step to one device, all in one copy.

    Gradients of one device may arrive on several streams, so each stream has device buffers of its own: no stream
    overwrites arguments that another still reads. A captured CUDA graph replays its copy from host memory that is
    reserved for the graph.
    """

    def __init__(self, device: torch.device, *, busy_link: bool = False) -> None:
        self._device = device
        self._buffers: dict[Any, _ArgBuffer] = {}  # on the device, by sizes and stream
        self._alone: dict[int, dict[StepScalars, Tensor]] = {}  # scalars on the device for single tasks, by stream
        self._spares: dict[int, Tensor] = {}  # on the host, by size
        self._pool = PinnedBufferPool() if busy_link else None
        self._captured: list[Any] = []

    def capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def upload(self, launches: Sequence[_HostArgs]) -> list[LaunchArgs]:
        """Uploads the addresses and scalars of each launch; the next upload of the same sizes overwrites them."""
        capturing, sizes = self.capturing(), tuple((len(addresses), len(scalars)) for addresses, scalars in launches)
        buffer = None if capturing else self._buffers.get((sizes, self._stream()))
        if buffer is None:
            buffer = self._buffer(sizes)
            if not capturing:
                _bounded(self._buffers)[sizes, self._stream()] = buffer
        self._upload(buffer[0], launches, capturing)
        return buffer[1]

    def scalars(self, hp: StepScalars) -> Tensor:
        """The scalars of launches of single tasks, on the device; they are uploaded for the first such launch."""
        if isinstance(hp.grad_scale, Tensor):  # differs between tasks, and is already on the device
            values = self.scalars(hp._replace(grad_scale=1.0)).clone()
            values[0, _GRAD_SCALE].copy_(hp.grad_scale)
            return values
        kept = self._alone.setdefault(self._stream(), {})
        fixed = not (self.capturing() or any(isinstance(x, Tensor) for x in hp))
        if fixed and hp in kept:
            return kept[hp]
        buffer = self._buffer(((0, 1),))
        self._upload(buffer[0], [((), [hp])], self.capturing())
        values = buffer[1][0].scalars
        if fixed:
            if len(kept) == _SETS:
                del kept[next(iter(kept))]
            kept[hp] = values
        return values

    def to_device(self, host: Tensor) -> Tensor:
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)

    def _upload(self, memory: Tensor, launches: Sequence[_HostArgs], capturing: bool) -> None:
        count, fetched = memory.numel(), None
        if capturing:
            host = self._spare(count)
        else:
            if count not in self._spares:
                _bounded(self._spares)[count] = self._host(count)
            host, fetched = (self._host(count), None) if self._pool is None else self._pool.take(count)
        rows = [hp for _, scalars in launches for hp in scalars]
        values = list(chain.from_iterable(rows))
        plain = set(map(type, values)) <= {int, float}
        written, at = host.numpy(), 0
        for addresses, _ in launches:
            end = at + len(addresses)
            written[at:end] = addresses
            at = end
        written[at:].view(np.float64)[:] = values if plain else [0.0 if isinstance(x, Tensor) else x for x in values]
        if fetched is None:
            memory.copy_(host, non_blocking=True)
        else:
            fetch(host, memory)
            fetched.record(torch.cuda.current_stream(self._device))
        if not plain:
            _fill(memory[at:].view(torch.float64).view(-1, _SCALARS), rows)
        if capturing:
            self._captured.append((host, memory))

    def _stream(self) -> int:
        return 0 if self._device.type == "cpu" else current_raw_stream(self._device.index)

    def _buffer(self, sizes: Sequence[tuple[int, int]]) -> _ArgBuffer:
        total = sum(count + rows * _SCALARS for count, rows in sizes)
        memory = torch.empty(total, dtype=torch.int64, device=self._device)
        addresses = memory.split([count for count, _ in sizes] + [rows * _SCALARS for _, rows in sizes])
        scalars = [piece.view(torch.float64).view(-1, _SCALARS) for piece in addresses[len(sizes) :]]
        return memory, list(map(LaunchArgs, addresses, scalars))

    def _host(self, count: int) -> Tensor:
        """A host buffer to copy from, page-locked for CUDA devices."""
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")

    def _spare(self, count: int) -> Tensor:
        """A host buffer for a CUDA graph that is being captured. It was allocated earlier, since capture forbids
        allocating it, and is never reused.
        """
        host = self._spares.pop(count, None)
        if host is None:
            raise RuntimeError(
                "Collins.step() is being captured in a CUDA graph without a step before the capture: run one step"
                " before each capture, also between two captures"
            )
        return host


def _bounded(kept: dict[Any, _Kept]) -> dict[Any, _Kept]:
    """Makes room for one more size: without the oldest one, if there are as many as are kept."""
    if len(kept) >= _SIZES:
        del kept[next(iter(kept))]
    return kept


def _fill(values: Tensor, rows: Sequence[tuple[Any, ...]]) -> None:
    """Overwrites the entries of `values`, of shape (rows, columns), whose scalars are tensors on the device already."""
    on_device = [(row, i) for row, column in enumerate(rows) for i, x in enumerate(column) if isinstance(x, Tensor)]
    for i in dict.fromkeys(i for _, i in on_device):
        places = [row for row, j in on_device if j == i]
        first = rows[places[0]][i]
        if len(places) == len(rows) and all(row[i] is first for row in rows):
            values[:, i].copy_(first)
            continue
        found = torch.stack([rows[row][i].to(torch.float64) for row in places])
        if len(places) == len(rows):
            values[:, i] = found
        else:
            for row, scalar in zip(places, found, strict=True):
                values[row, i].copy_(scalar)


class PinnedBufferPool:
    """Page-locked buffers that kernels read; a buffer is reused once its kernel has read it."""

    def __init__(self) -> None:
        self._pieces: dict[int, deque[tuple[Tensor, torch.cuda.Event]]] = {}

    def take(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """An int64 buffer of shape (size,), and the event that the caller records after the kernel."""
        if size not in self._pieces and len(self._pieces) >= _SIZES:
            self._forget_one()
        pieces = self._pieces.setdefault(size, deque())
        if pieces and pieces[0][1].query():
            pieces.rotate(-1)
        else:
            pieces.append((torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True), torch.cuda.Event()))
        return pieces[-1]

    def _forget_one(self) -> None:
        """Frees the buffers of the oldest size that no kernel reads any more; there may be none."""
        for size, pieces in self._pieces.items():
            if all(event.query() for _, event in pieces):
                del self._pieces[size]
                return
