"""Host memory of exact size for the tensors of one transfer, page-locked if CUDA is available.

PyTorch's pinned allocator rounds each block up to a power of two, which nearly doubles 16.4 GiB. A slab is an anonymous
mapping of exactly the bytes that its tensors take, registered with `cudaHostRegister`.
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
    """The offset of each part in bytes, in sequence at multiples of `ALIGNMENT`, and the total size."""
    starts, end = [], 0
    for part in parts:
        starts.append(aligned(end))
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
    """Divides parameters, each given by its stored parts, into transfers of at most `transfer_size` bytes.

    A transfer consists of consecutive parameters, because their gradients arrive one after another. A parameter whose
    parts exceed `transfer_size` is a transfer of its own. The same input always gives the same transfers.

    Returns:
        For each transfer the indices of its parameters in `members`, ascending; each index is in one transfer.

    Raises:
        ValueError: for a `transfer_size` below 1.
    """
    if transfer_size < 1:
        raise ValueError(f"transfer_size must be at least 1 byte, got {transfer_size}")
    transfers: list[list[int]] = []
    end = 0
    for place, parts in enumerate(members):
        size = offsets(parts)[1]
        if transfers and aligned(end) + size <= transfer_size:
            transfers[-1].append(place)
            end = aligned(end) + size
        else:
            transfers.append([place])
            end = size
    return transfers


class Slab:
    """Host tensors in one page-aligned block of memory of exact size, initialized to zeros.

    The block lives as long as the slab or any tensor that views it; then it is unpinned and freed. While it is pinned,
    it counts towards `pinned_bytes`. A forked child sees zeros instead of its parent's values, so every use of a slab
    calls `check_process`, which raises an error in the child.

    Args:
        parts: shape and dtype of each tensor.
        pin: whether to page-lock the block, if CUDA is available. Beyond the limit of `set_pin_limit`, or if the driver
            refuses, there is one warning and the block stays pageable; then copies are slower.

    Attributes:
        parts: the argument.
        nbytes: the bytes of all parts, including the gaps for alignment.
        pinned: whether the block is page-locked.
    """

    def __init__(self, parts: Iterable[TensorSpec], *, pin: bool = True) -> None:
        self.parts = tuple(TensorSpec(*part) for part in parts)
        self.nbytes = offsets(self.parts)[1]
        self._process = os.getpid()
        block = _mapped(max(self.nbytes, 1))  # no mapping is empty
        self.pinned = pin and self.nbytes > 0 and torch.cuda.is_available() and _pinned(block, self.nbytes)
        self._bytes = torch.frombuffer(block, dtype=torch.uint8)[: self.nbytes]
        self._block = block
        self._starts, _ = offsets(self.parts)
        self._tensors = list(map(self._tensor, range(len(self.parts))))

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

    def reattach(self, part: int) -> Tensor | None:
        """Gives a part's tensor the memory of the block again, if it has other memory after an assignment to `.data`.

        Returns:
            The tensor that it was until then; None if it had the memory of the block.
        """
        t, spec = self.tensors[part], self.parts[part]
        at = ctypes.addressof(self._block) + self._starts[part]
        if (tuple(t.shape), t.dtype) == spec and (not spec.nbytes or t.data_ptr() == at):
            return None
        other = t.detach()
        t.data = self._tensor(part)
        return other

    def _tensor(self, part: int) -> Tensor:
        """A new tensor of a part, whose storage has only the bytes of the part.

        Saving a tensor saves its whole storage, and `torch.distributed.checkpoint` (2.13) cannot stage a DTensor whose
        local part has an offset in its storage.
        """
        shape, dtype = self.parts[part]
        count = self.parts[part].nbytes // dtype.itemsize
        if not count:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self._block, dtype=dtype, count=count, offset=self._starts[part]).view(shape)

    def check_process(self) -> None:
        """Raises a RuntimeError in any process other than the one that made the slab."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this slab of optimizer state belongs to process {self._process}, and process {os.getpid()} was forked"
                " from it and cannot use it: build the optimizer in the child, or start the child with 'spawn'"
            )


class _Pins:
    """The pinned bytes of this process, and their limit."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a slab may be collected while this thread holds it
        self.used = 0
        self.limit: int | None = None
        self.warned = False


_pins = _Pins()


def pinned_bytes() -> int:
    """The pinned bytes of all slabs of this process."""
    return _pins.used


def set_pin_limit(limit: int | None) -> None:
    """Limits the bytes that new slabs of this process may pin; None for no limit. Pinned slabs stay pinned.

    An optimizer with tables on the host sets the limit of its `MemoryPolicy` before it makes slabs.

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


def _pinned(block: _Block, nbytes: int) -> bool:
    """Pins a block, and registers that it is unpinned when it is freed; warns and returns False if that fails."""
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
    """Warns at the first failure only, since an optimizer makes hundreds of slabs."""
    if not _pins.warned:
        _pins.warned = True
        warnings.warn(
            f"Collins keeps optimizer state in pageable host memory, which copies more slowly: {reason};"
            f" {_pins.used:,} bytes are pinned",
            stacklevel=4,
        )


def _forget_error() -> None:
    """Clears the pending error of a failed runtime call by a launch; else the next kernel launch would report it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def aligned(offset: int) -> int:
    """The first multiple of `ALIGNMENT` that is at least `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
