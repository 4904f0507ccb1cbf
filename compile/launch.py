"""One launch of `collins::step_` for all works of a variant: builds and keeps the tables that the kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collins.compile.kernels import CHUNK, DTYPES, LARGEST_LOAD, NUMBERS, tile_of
from collins.hashing import WORD
from collins.rule import Scalars
from collins.update import Spec, Work

_WIDE = 16  # bytes: what one instruction of the kernel reads at once

Key = tuple[Spec, torch.dtype, torch.dtype, torch.device, bool]


class Launches:
    """The launches of one optimizer, for parameters on devices of one type."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._launches: dict[Key, Launch] = {}

    def sorted(self, works: Sequence[Work]) -> tuple[dict[Key, list[Work]], list[Work]]:
        """Works by the launch that takes them, and those that none can take."""
        batches: dict[Key, list[Work]] = {}
        rest: list[Work] = []
        for work in works:
            p, g, m, v, spec, _, _, _, start = work
            dtype, load, count = p.dtype, int(spec.load), p.numel()
            aligned = p.data_ptr() | g.data_ptr() | (0 if spec.hash else m.data_ptr() | v.data_ptr())
            if (
                p.device.type == self._device_type
                and spec.hash != "universal"
                and not spec.skip
                and load <= LARGEST_LOAD
                and start % max(WORD, load) == 0
                and dtype in DTYPES
                and m.dtype in DTYPES
                and count
                and aligned % _WIDE == 0
                and p.is_contiguous()
                and g.is_contiguous()
            ):
                batches.setdefault((spec, dtype, m.dtype, p.device, count % WORD == 0), []).append(work)
            else:
                rest.append(work)
        return batches, rest

    def run(self, key: Key, works: Sequence[Work]) -> None:
        """Performs all works of one launch."""
        if key not in self._launches:
            spec, _, _, device, even = key
            self._launches[key] = Launch(spec, even, device)
        self._launches[key].run(works)


class Launch:
    """Steps many tensors of one `Spec`, one dtype and one dtype of moments on one device.

    Sizes, addresses of parameters and moments and hash constants lie in a table on the device, which is rewritten only
    when one of them has changed. Addresses of gradients and the step's numbers follow in one copy a step. All lie at
    fixed addresses: a captured CUDA graph replays that copy from host memory kept for it.
    """

    def __init__(self, spec: Spec, even: bool, device: torch.device) -> None:
        self._spec = spec
        self._even = even
        self._device = device
        self._seen: list[Any] = []
        self._owners = self._table = self._moving = torch.empty(0)
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def run(self, works: Sequence[Work]) -> None:
        """Performs all of them; they must be of different parameters."""
        seen: list[Any] = []
        numbers: list[Scalars] = []
        rows: dict[int, int] = {}
        for work in works:
            h = work.h
            row = rows.get(id(h))
            if row is None:
                row = rows[id(h)] = len(numbers)
                numbers.append(h)
            seen += (work.p.data_ptr(), work.m.data_ptr(), work.v.data_ptr(), work.keys, row)
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if seen != self._seen:
            self._describe(works, rows, capturing)
            self._seen = seen
        count = len(works)
        size = count + len(numbers) * len(NUMBERS)
        if self._moving.numel() != size:
            self._moving = torch.empty(size, dtype=torch.int64, device=self._device)
        host = self._host(size, capturing)
        host[:count] = torch.tensor([work.g.data_ptr() for work in works])
        columns = [_column(h) for h in numbers]
        on_host = [[0.0 if isinstance(x, Tensor) else x for x in column] for column in columns]
        host[count:].view(torch.float64).copy_(torch.tensor(on_host, dtype=torch.float64).view(-1))
        self._moving.copy_(host, non_blocking=True)
        table = self._moving[count:].view(torch.float64).view(len(numbers), len(NUMBERS))
        for i, column in enumerate(zip(*columns, strict=True)):
            if isinstance(column[0], Tensor):
                table[:, i] = torch.stack([x.to(torch.float64) for x in column])
        p, g, m, v = zip(*(work[:4] for work in works), strict=True)
        spec = self._spec
        torch.ops.collins.step_(
            p, g, m, v, self._owners, self._table, self._moving, table,
            int(spec.load), spec.decode == "residual", spec.rehash, spec.rounding, spec.maximize, self._even,
        )  # fmt: skip
        torch.autograd.graph.increment_version((*p, *m, *v))

    def _describe(self, works: Sequence[Work], rows: dict[int, int], capturing: bool) -> None:
        owners: list[int] = []
        table: list[int] = []
        span = CHUNK * tile_of(works[0].p.dtype)
        for i, work in enumerate(works):
            chunk, local = len(owners), work.p.numel()
            owners += [i] * -(-local // span)
            sign, rounding, _, period = work.keys
            addresses = (work.p.data_ptr(), work.m.data_ptr(), work.v.data_ptr())
            row = rows[id(work.h)]
            table += (*addresses, local, chunk, work.start, work.numel, *sign, *rounding, period, row)  # type: ignore[arg-type]
        self._owners = self._uploaded(torch.tensor(owners, dtype=torch.int32), capturing)
        self._table = self._uploaded(torch.tensor(table), capturing)

    def _host(self, size: int, capturing: bool) -> Tensor:
        """Host memory to copy from; while a graph is captured, memory that was made before and that nobody reuses."""
        pinned = self._device.type == "cuda"
        if not capturing:
            if pinned and (self._spare is None or self._spare.numel() != size):
                self._spare = torch.empty(size, dtype=torch.int64, pin_memory=True)
            return torch.empty(size, dtype=torch.int64, pin_memory=pinned)
        host, self._spare = self._spare, None
        if host is None or host.numel() != size:
            raise RuntimeError(
                "Collins.step() is captured in a CUDA graph before it has run with the same parameters and gradients; "
                "run a few steps outside of the graph first"
            )
        self._captured.append(host)
        return host

    def _uploaded(self, host: Tensor, capturing: bool) -> Tensor:
        if self._device.type == "cpu":
            return host
        if capturing:
            raise RuntimeError("parameters or moments of Collins moved between warm-up and capture of a CUDA graph")
        return host.pin_memory().to(self._device, non_blocking=True)


def _column(h: Scalars) -> tuple[Any, ...]:
    step, lr, shrink, beta1, beta2, correction1, correction2, eps, rho = h
    return step, lr, shrink, beta1, 1 - beta1, beta2, 1 - beta2, 1 / correction1, 1 / correction2, eps, rho
