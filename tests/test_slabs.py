"""Slabs have exactly the bytes they need, are pinned within a limit, and are freed with their last tensor."""

import ctypes
import gc
import mmap
import os
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collins.offload import Slab, TensorSpec, grouped, pinned_bytes, set_pin_limit
from collins.offload.slabs import ALIGNMENT, carve, offsets

PARTS = [
    TensorSpec((3,), torch.float32),
    TensorSpec((2, 5), torch.bfloat16),
    TensorSpec((), torch.float64),
    TensorSpec((0, 4), torch.float32),
    TensorSpec((7,), torch.uint8),
    TensorSpec((129,), torch.float32),
]


class Cudart:
    """Imitates the runtime calls of pinning, and checks that their memory exists."""

    def __init__(self, error=0):
        self.error, self.registered, self.calls = error, {}, 0

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls += 1
        assert address % mmap.PAGESIZE == 0
        assert flags == 1
        if not self.error:
            self.registered[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address):
        ctypes.string_at(address, self.registered.pop(address))  # crashes if it has been unmapped
        return 0

    def cudaError(self, code):
        return code

    def cudaGetErrorString(self, error):
        return f"reason {error}"


@pytest.fixture(autouse=True)
def without_limit():
    set_pin_limit(None)
    yield
    set_pin_limit(None)


@pytest.fixture
def cudart(monkeypatch):
    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch, "ones", lambda *args, device: None)  # the kernel that clears a pending error
    return fake


# Memory.


def test_parts_are_zero_aligned_and_apart():
    slab = Slab(PARTS, pin=False)
    assert slab.nbytes == slab.bytes.numel() == slab.tensors[-1].data_ptr() + 4 * 129 - slab.bytes.data_ptr()
    assert slab.bytes.data_ptr() % mmap.PAGESIZE == 0
    assert not slab.bytes.any()
    for part, tensor in zip(PARTS, slab.tensors, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == part
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT == 0
    for value, tensor in enumerate(slab.tensors, 1):
        tensor.fill_(value)
    for value, tensor in enumerate(slab.tensors, 1):
        assert (tensor == value).all()
    assert slab.bytes.eq(0).sum() >= slab.nbytes - sum(part.nbytes for part in PARTS)


def test_an_empty_slab_has_no_bytes(cudart):
    slab = Slab([TensorSpec((0,), torch.float32)])
    assert (slab.nbytes, slab.bytes.numel(), slab.tensors[0].numel(), slab.pinned) == (0, 0, 0, False)
    assert cudart.calls == 0


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from([1, 2, 4, 8])), max_size=9))
def test_offsets_leave_only_the_gaps_that_align(shapes):
    dtypes = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    parts = [TensorSpec(tuple(shape), dtypes[size]) for shape, size in shapes]
    starts, end = offsets(parts)
    last = 0
    for start, part in zip(starts, parts, strict=True):
        assert start % ALIGNMENT == 0
        assert 0 <= start - last < ALIGNMENT
        last = start + part.nbytes
    assert end == last
    assert [t.shape for t in carve(torch.zeros(end, dtype=torch.uint8), parts)] == [part.shape for part in parts]


def mapped_bytes():
    with open("/proc/self/smaps_rollup") as rollup:
        return next(1024 * int(line.split()[1]) for line in rollup if line.startswith("Rss:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="not Linux")
def test_memory_is_kept_as_long_as_any_of_its_tensors():
    size = 2**26
    before = mapped_bytes()
    slab = Slab([TensorSpec((size,), torch.uint8), TensorSpec((4,), torch.float32)], pin=False)
    slab.tensors[0].fill_(1)
    assert mapped_bytes() - before > 0.9 * size
    tensor, reference = slab.tensors[1], weakref.ref(slab)
    del slab
    gc.collect()
    assert reference() is None
    tensor.fill_(5)
    assert mapped_bytes() - before > 0.9 * size
    assert tensor.tolist() == [5] * 4
    del tensor
    assert mapped_bytes() - before < 0.1 * size


# Pinning.


def test_a_slab_is_registered_at_its_exact_size_until_its_last_tensor_is_freed(cudart):
    before = pinned_bytes()
    slab = Slab(PARTS)
    assert slab.pinned
    assert cudart.registered == {slab.bytes.data_ptr(): slab.nbytes}
    assert pinned_bytes() - before == slab.nbytes
    tensor = slab.tensors[0]
    del slab
    gc.collect()
    assert len(cudart.registered) == 1
    del tensor
    assert not cudart.registered
    assert pinned_bytes() == before


def test_beyond_the_limit_slabs_are_pageable_with_one_warning(cudart):
    set_pin_limit(pinned_bytes() + 1500)
    slabs = [Slab([TensorSpec((1000,), torch.uint8)])]
    with pytest.warns(UserWarning, match="pageable") as caught:
        slabs += [Slab([TensorSpec((1001,), torch.uint8)]) for _ in range(3)]
    (warning,) = caught
    assert f"1,001 bytes more would exceed the limit of {pinned_bytes() + 500:,}" in str(warning.message)
    assert f"{pinned_bytes():,} bytes are pinned" in str(warning.message)
    assert warning.filename == __file__
    slabs.append(Slab([TensorSpec((500,), torch.uint8)]))
    assert [slab.pinned for slab in slabs] == [True, False, False, False, True]
    slabs[1].tensors[0].fill_(1)
    del slabs[0]
    assert Slab([TensorSpec((999,), torch.uint8)]).pinned


def test_if_pinning_fails_slabs_are_pageable_and_one_warning_gives_the_reason(cudart, monkeypatch):
    cudart.error = 2
    launches = []
    monkeypatch.setattr(torch, "ones", lambda *args, device: launches.append(device))
    before = pinned_bytes()
    with pytest.warns(UserWarning, match="pageable") as caught:
        slabs = [Slab(PARTS), Slab(PARTS)]
    (warning,) = caught
    expected = f"cudaHostRegister of {slabs[0].nbytes:,} bytes failed with error 2 (reason 2)"
    assert expected in str(warning.message)
    assert [slab.pinned for slab in slabs] == [False, False]
    assert launches == ["cuda"] * 2  # cleared the error that the next kernel would have raised
    assert pinned_bytes() == before
    slabs[0].tensors[0].fill_(1)
    del slabs
    assert pinned_bytes() == before


def test_nothing_is_pinned_without_request_or_without_cuda(cudart, monkeypatch):
    assert not Slab(PARTS, pin=False).pinned
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Slab(PARTS).pinned
    assert cudart.calls == 0


def test_a_negative_limit_is_rejected():
    with pytest.raises(ValueError, match="limit must be None or at least 0 bytes, got -1"):
        set_pin_limit(-1)


# Fork.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # threads and fork, from Python 3.12 on
def test_a_forked_child_is_rejected_and_cannot_access_the_values_of_its_parent(cudart):
    slab = Slab([TensorSpec((8,), torch.float32)])
    tensor = slab.tensors[0].fill_(3)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            messages = ""
            for use in (lambda: slab.tensors, lambda: slab.bytes, slab.check_process):
                try:
                    use()
                    messages += "worked;"
                except RuntimeError as error:
                    messages += f"{error};"
            tensor.fill_(9)
            del slab, tensor, use
            gc.collect()
            os.write(write_end, f"{messages}|{len(cudart.registered)}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    messages, registered = os.read(read_end, 10_000).decode().split("|")
    os.close(read_end)
    os.close(write_end)
    assert messages.count(f"belongs to process {os.getpid()}, and process {child} was forked") == 3
    assert registered == "1"  # the child made no call to CUDA when its copy was freed
    assert tensor.tolist() == [3] * 8
    assert slab.pinned


# Transfers.


def members(*sizes):
    return [[TensorSpec((size,), torch.uint8)] for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "transfer_size", "transfers"),
    [
        ([], 10, []),
        ([64, 64, 64], 128, [[0, 1], [2]]),
        ([64, 65, 1], 128, [[0], [1], [2]]),
        ([10, 10, 10], 138, [[0, 1, 2]]),
        ([10, 10, 10], 137, [[0, 1], [2]]),
        ([500, 10, 500, 10], 100, [[0], [1], [2], [3]]),
        ([0, 0, 5], 5, [[0, 1, 2]]),
    ],
)
def test_adjacent_parameters_share_a_transfer_up_to_its_size(sizes, transfer_size, transfers):
    assert grouped(members(*sizes), transfer_size) == transfers


@given(st.lists(st.integers(0, 400), max_size=30), st.integers(1, 1000))
def test_every_parameter_is_in_one_transfer_within_the_size(sizes, transfer_size):
    transfers = grouped(members(*sizes), transfer_size)
    assert [place for transfer in transfers for place in transfer] == list(range(len(sizes)))
    for transfer in transfers:
        nbytes = Slab((part for place in transfer for part in members(*sizes)[place]), pin=False).nbytes
        assert nbytes <= transfer_size or len(transfer) == 1


def test_a_transfer_size_below_one_byte_is_rejected():
    with pytest.raises(ValueError, match="transfer_size must be at least 1 byte, got 0"):
        grouped(members(1), 0)


# On a real device.


@pytest.mark.cuda
def test_cuda_pins_and_unpins():
    before, pooled = pinned_bytes(), torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    slab = Slab([TensorSpec((1000, 1000), torch.float32)])
    assert slab.pinned
    assert slab.bytes.is_pinned()
    assert slab.tensors[0].is_pinned()
    on_device = slab.tensors[0].fill_(3).to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == pooled
    assert pinned_bytes() - before == 4_000_000
    del slab
    assert pinned_bytes() == before
    assert (on_device == 3).all()


@pytest.mark.cuda
def test_cuda_is_usable_after_a_failed_registration(monkeypatch):
    """Registering the same pages twice fails; the error must not surface in the next kernel."""
    slab = Slab([TensorSpec((4096,), torch.uint8)])
    block = (ctypes.c_char * 4096).from_address(slab.bytes.data_ptr())
    monkeypatch.setattr("collins.offload.slabs._mapped", lambda nbytes: block)
    with pytest.warns(UserWarning, match="cudaHostRegister of 4,096 bytes failed"):
        again = Slab([TensorSpec((4096,), torch.uint8)])
    assert not again.pinned
    assert torch.arange(4, device="cuda").add(1).tolist() == [1, 2, 3, 4]
