"""Host memory of exact size for the tensors of one transfer of parameters, page-locked where CUDA is there.

PyTorch's own pinned allocator rounds each block up to a power of two, which nearly doubles 16.4 GiB. A slab is an
anonymous mapping, registered with `cudaHostRegister` at just the bytes that its tensors take.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from collins.formats import TensorSpec

ALIGNMENT = 64  # bytes, of every tensor in a slab: a cache line, and a multiple of every dtype's size

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices, not only for the current one
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, which Python's mmap has no name for


def offsets(parts: Iterable[TensorSpec]) -> tuple[tuple[int, ...], int]:
    """Where each part begins, in bytes, when they follow each other at multiples of `ALIGNMENT`; and where all end."""
    starts, end = [], 0
    for part in parts:
        starts.append(_aligned(end))
        end = starts[-1] + part.nbytes
    return tuple(starts), end


def carve(memory: Tensor, parts: Iterable[TensorSpec]) -> list[Tensor]:
    """The parts as tensors that view `memory` (uint8, flat), laid out by `offsets`."""
    parts = tuple(parts)
    starts, _ = offsets(parts)
    return [
        memory[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for start, part in zip(starts, parts, strict=True)
    ]


def grouped(members: Sequence[Sequence[TensorSpec]], transfer_size: int) -> list[list[int]]:
    """Sorts parameters, each given by the parts that are kept for it, into transfers of at most `transfer_size` bytes.

    Neighbours stay neighbours: their gradients arrive one after the other. A parameter whose parts alone are larger
    than `transfer_size` is a transfer of its own. The same input always gives the same transfers.

    Returns:
        Per transfer the places of its parameters in `members`, ascending; together every place once.

    Raises:
        ValueError: for a `transfer_size` below 1.
    """
    if transfer_size < 1:
        raise ValueError(f"transfer_size must be at least 1 byte, got {transfer_size}")
    transfers: list[list[int]] = []
    end = 0
    for place, parts in enumerate(members):
        size = offsets(parts)[1]
        if transfers and _aligned(end) + size <= transfer_size:
            transfers[-1].append(place)
            end = _aligned(end) + size
        else:
            transfers.append([place])
            end = size
    return transfers


class Slab:
    """Host tensors in one exact-size, page-aligned block of memory, zero at first.

    The block lives as long as the slab or any tensor that views it. While it is pinned, it counts towards
    `pinned_bytes`; it is unpinned and handed back to the system when the last of them is gone. A forked child finds
    zeros there and cannot reach its parent's values: `check_process`, which every use of a slab goes through, refuses.

    Args:
        parts: shape and dtype of each tensor.
        pin: whether to page-lock the block, where CUDA is there. Beyond the limit of `set_pin_limit`, or when the
            driver refuses, a warning says so once and the block stays pageable: copies are then slower, not wrong.

    Attributes:
        parts: as given.
        nbytes: the bytes of all parts, with the gaps that align them, and not one more.
        pinned: whether the block is page-locked.
    """

    def __init__(self, parts: Iterable[TensorSpec], *, pin: bool = True) -> None:
        self.parts = tuple(TensorSpec(*part) for part in parts)
        self.nbytes = offsets(self.parts)[1]
        self._process = os.getpid()
        block = _mapped(max(self.nbytes, 1))  # no mapping is empty
        self.pinned = pin and self.nbytes > 0 and torch.cuda.is_available() and _pinned(block, self.nbytes)
        self._bytes = torch.frombuffer(block, dtype=torch.uint8)[: self.nbytes]
        starts, _ = offsets(self.parts)
        self._tensors = [_part(block, start, part) for start, part in zip(starts, self.parts, strict=True)]

    @property
    def bytes(self) -> Tensor:
        """The whole block: uint8, shape (nbytes,).

        Raises:
            RuntimeError: in a forked child.
        """
        self.check_process()
        return self._bytes

    @property
    def tensors(self) -> list[Tensor]:
        """The parts as tensors, in order.

        Raises:
            RuntimeError: in a forked child.
        """
        self.check_process()
        return self._tensors

    def check_process(self) -> None:
        """Raises a RuntimeError in any process but the one that made the slab."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this slab of optimizer state belongs to process {self._process}, and process {os.getpid()} was forked"
                " from it and cannot use it: build the optimizer in the child, or start the child with 'spawn'"
            )


class _Pins:
    """How much is pinned in this process, and how much may be."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a slab may be collected while this thread holds it
        self.used = 0
        self.limit: int | None = None
        self.warned = False


_pins = _Pins()


def pinned_bytes() -> int:
    """Bytes that the slabs of this process hold pinned."""
    return _pins.used


def set_pin_limit(limit: int | None) -> None:
    """Limits what the slabs of this process may pin from now on, in bytes; None for no limit. Pinned slabs stay so.

    An optimizer with tables on the host sets what its `MemoryPolicy` says before it makes slabs.

    Raises:
        ValueError: for a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be None or at least 0 bytes, got {limit}")
    with _pins.lock:
        _pins.limit, _pins.warned = limit, False


_Block = ctypes.Array[ctypes.c_char]


def _mapped(nbytes: int) -> _Block:
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        # A fork would share the pages until one side writes: a write of the parent would then move its page away from
        # where the device copies to. Kernels older than the flag (4.14) keep that hazard.
        with contextlib.suppress(OSError):
            mapping.madvise(_WIPE_ON_FORK)
    return (ctypes.c_char * nbytes).from_buffer(mapping)


def _part(block: _Block, start: int, part: TensorSpec) -> Tensor:
    """A part as a tensor whose storage is its own bytes only.

    Whoever saves a tensor saves its storage, and `torch.distributed.checkpoint` (2.13) cannot stage a DTensor whose
    local part begins further on in one.
    """
    count = part.nbytes // part.dtype.itemsize
    if not count:
        return torch.zeros(part.shape, dtype=part.dtype)
    return torch.frombuffer(block, dtype=part.dtype, count=count, offset=start).view(part.shape)


def _pinned(block: _Block, nbytes: int) -> bool:
    """Pins a block, to be unpinned when it goes, or warns and returns False."""
    with _pins.lock:
        if _pins.limit is not None and _pins.used + nbytes > _pins.limit:
            _warn_pageable(f"{nbytes:,} bytes more would exceed the limit of {_pins.limit:,}")
            return False
        cudart = torch.cuda.cudart()
        address = ctypes.addressof(block)
        error = int(cudart.cudaHostRegister(address, nbytes, _PORTABLE))
        if error:
            _forget_error()
            reason = cudart.cudaGetErrorString(cudart.cudaError(error))
            _warn_pageable(f"cudaHostRegister of {nbytes:,} bytes failed with error {error} ({reason})")
            return False
        _pins.used += nbytes
        # On the array, not on the mapping: a mapping is already unmapped when its finalizers run.
        weakref.finalize(block, _unpin, address, nbytes, os.getpid()).atexit = False
        return True


def _unpin(address: int, nbytes: int, process: int) -> None:
    if os.getpid() != process:  # a forked child has no pins, and CUDA must not be called there
        return
    with _pins.lock:
        torch.cuda.cudart().cudaHostUnregister(address)
        _pins.used -= nbytes


def _warn_pageable(reason: str) -> None:
    """The first refusal speaks for those to come: an optimizer makes hundreds of slabs."""
    if not _pins.warned:
        _pins.warned = True
        warnings.warn(
            f"Collins keeps optimizer state in pageable host memory, which copies more slowly: {reason};"
            f" {_pins.used:,} bytes are pinned",
            stacklevel=4,
        )


def _forget_error() -> None:
    """A failed runtime call leaves an error pending, which the next kernel launch of anyone would report as its own:
    this launch takes it.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
