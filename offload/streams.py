"""The device interface of the pipeline: three streams, events between them, and copies."""

from __future__ import annotations

import functools
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from collins._torch_internals import current_raw_stream

Event = Any  # of the backend's own kind; waiting for one that was never recorded returns at once
Stream = Any  # likewise


class StreamKind(Enum):
    """A stream, by its role."""

    H2D = "host to device"
    D2H = "device to host"
    CURRENT = "the caller's current stream, looked up at every call"


class WaitFor(Enum):
    """The purpose of a wait. Real backends ignore it; tests use it to remove a single wait."""

    SLOT_FREE = "h2d into a slot waits for whoever used the slot's memory before"
    WRITTEN_BACK = "h2d of a transfer waits for that transfer's last d2h"
    STAGED = "compute waits for the transfer's h2d"
    EARLIER_USE = "compute waits for earlier compute on the same staged transfer, which another stream may run"
    COMPUTED = "d2h waits for compute"
    UNDONE = "h2d that takes back a failed use waits for what that use has enqueued"
    DRAINED = "the host waits for all copies before it reads"
    LET_GO = "the host waits for all copies before slabs are freed"


class Streams(Protocol):
    """The streams of a device. Work on one stream runs in order; work on different streams is ordered by waits only."""

    device: torch.device
    asynchronous: bool  # whether copies run beside the work of the host

    def empty(self, nbytes: int) -> Tensor:
        """Device memory for the current stream: uint8, shape (nbytes,)."""

    def event(self) -> Event:
        """A new event, not yet recorded."""

    def caller(self) -> Stream:
        """The caller's current stream: the same object for the same stream."""

    def record(self, event: Event, kind: StreamKind | Stream) -> None:
        """Records an event after all work enqueued on `kind`; it replaces an earlier record of the event."""

    def wait(self, kind: StreamKind, event: Event, rule: WaitFor) -> None:
        """Makes all later work on `kind` wait for the current record of `event`."""

    def synchronize(self, event: Event, rule: WaitFor) -> None:
        """Blocks the host until the work before `event` is complete."""

    def copy(self, kind: StreamKind, target: Tensor, source: Tensor) -> None:
        """Enqueues a copy between host and device; the host does not wait for it."""

    def hold(self, tensor: Tensor, kind: StreamKind) -> None:
        """Prevents the reuse of a freed tensor's device memory before the work on `kind` that uses it is complete."""


class CudaStreams:
    """The streams of a CUDA device: one for each copy direction, made once for the device, and the current stream."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._index = index
        self._copies = _copy_streams(index)
        self._current: dict[int, torch.cuda.Stream] = {}  # by address: making the object takes ten times as long

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def caller(self) -> torch.cuda.Stream:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "optimizer state in host memory cannot be used while a CUDA graph is captured, since replaying the"
                " graph would not copy it; step outside the graph, or keep the state on the device"
            )
        address = current_raw_stream(self._index)
        if address not in self._current:
            self._current[address] = torch.cuda.current_stream(self.device)
        return self._current[address]

    def record(self, event: torch.cuda.Event, kind: StreamKind | torch.cuda.Stream) -> None:
        event.record(self._stream(kind))

    def wait(self, kind: StreamKind, event: torch.cuda.Event, rule: WaitFor) -> None:
        self._stream(kind).wait_event(event)

    def synchronize(self, event: torch.cuda.Event, rule: WaitFor) -> None:
        event.synchronize()

    def copy(self, kind: StreamKind, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream(kind)):
            target.copy_(source, non_blocking=True)

    def hold(self, tensor: Tensor, kind: StreamKind) -> None:
        tensor.record_stream(self._stream(kind))

    def _stream(self, kind: StreamKind | torch.cuda.Stream) -> torch.cuda.Stream:
        if kind is StreamKind.CURRENT:
            return self.caller()
        return self._copies[kind] if isinstance(kind, StreamKind) else kind


@functools.cache
def _copy_streams(index: int) -> dict[StreamKind, torch.cuda.Stream]:
    return {kind: torch.cuda.Stream(index) for kind in (StreamKind.H2D, StreamKind.D2H)}


class HostStreams:
    """Synchronous streams, for parameters on the CPU."""

    asynchronous = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def event(self) -> None:
        return None

    def caller(self) -> HostStreams:
        return self

    def record(self, event: None, kind: StreamKind | HostStreams) -> None:
        return None

    def wait(self, kind: StreamKind, event: None, rule: WaitFor) -> None:
        return None

    def synchronize(self, event: None, rule: WaitFor) -> None:
        return None

    def copy(self, kind: StreamKind, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def hold(self, tensor: Tensor, kind: StreamKind) -> None:
        return None


def streams_for(device: torch.device) -> Streams:
    """The streams of a device.

    Raises:
        ValueError: for a device that is neither CUDA nor the CPU.
    """
    if device.type == "cuda":
        return CudaStreams(device)
    if device.type == "cpu":
        return HostStreams()
    raise ValueError(f"device must be a CUDA device or the CPU for tables in host memory, got {device}")
