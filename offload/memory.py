"""Free and total memory, measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def host_memory_free(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Bytes of host memory that this process can still allocate: the smallest of the system's available memory and the
    headroom of each control group.

    Inactive file pages of a group count as headroom, since the kernel drops them before an allocation fails.

    Args:
        cgroups: where the control-group file system is mounted (versions 1 and 2 are understood).
        membership: the file that lists this process's groups.
    """
    headrooms = [limit - usage for limit, usage in _limits(cgroups, membership)]
    return max(min([psutil.virtual_memory().available, *headrooms]), 0)


def host_memory_total(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """The most bytes of host memory that this process can have: the smallest of the system's memory and the limits of
    its control groups.
    """
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits(cgroups, membership))])


def _limits(cgroups: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Limit, and usage without idle file pages, of this process's memory groups and all groups above them."""
    if not membership.is_file():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, idle = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        # Inside a container the path may be that of the host; then the mount is the group itself.
        for folder in [group, *group.parents] if group.is_dir() else [root]:
            if (folder / limit).is_file() and (folder / usage).is_file():
                allowed = (folder / limit).read_text().strip()
                if allowed != "max":
                    yield int(allowed), max(int((folder / usage).read_text()) - _counted(folder, idle), 0)
            if folder == root:
                break


def _counted(folder: Path, name: str) -> int:
    """A line of a group's statistics, in bytes."""
    statistics = folder / "memory.stat"
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


class DeviceFigures(NamedTuple):
    """The figures of the driver and of PyTorch's allocator for one device at one moment, in bytes."""

    total: int  # the memory of the device
    driver_free: int  # allocated by no process
    fraction: float  # the fraction of `total` that this process may use (torch.cuda.set_per_process_memory_fraction)
    reserved: int  # reserved by PyTorch's allocator
    allocated: int  # the part of `reserved` that tensors use
    peak: int  # the peak of `allocated` (torch.cuda.max_memory_allocated)

    @property
    def obtainable(self) -> int:
        """The most that all tensors of this process can have, including the current ones."""
        return min(self.driver_free + self.reserved, int(self.fraction * self.total))

    @property
    def free(self) -> int:
        """The memory that new tensors can have now."""
        return max(self.obtainable - self.allocated, 0)

    @property
    def spare(self) -> int:
        """What nothing has ever used: what is free now, less what the next forward and backward will need again.

            spare = free - (peak - allocated)

        Between a backward and its step, activations have been freed, but each later step needs their memory, so tables
        must not take it. The peak counts from the start of the process, or from `torch.cuda.reset_peak_memory_stats`: a
        higher peak before training (for example if weights were loaded twice) makes this too small until it is reset,
        and a measurement before the end of the first backward makes it too large.
        """
        return max(self.obtainable - max(self.peak, self.allocated), 0)


def device_figures(device: torch.device) -> DeviceFigures:
    """The figures of a CUDA device, now.

    Raises:
        ValueError: for a device that is not CUDA; host memory is `host_memory_free`.
    """
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    if device.index is None:  # the memory fraction can only be read for a device with an index
        device = torch.device("cuda", torch.cuda.current_device())
    driver_free, total = torch.cuda.mem_get_info(device)
    return DeviceFigures(
        total=total,
        driver_free=driver_free,
        fraction=torch.cuda.get_per_process_memory_fraction(device),
        reserved=torch.cuda.memory_reserved(device),
        allocated=torch.cuda.memory_allocated(device),
        peak=torch.cuda.max_memory_allocated(device),
    )


def device_memory_free(device: torch.device) -> int:
    """Bytes that a CUDA device can still give to tensors of this process, now.

    Raises:
        ValueError: for a device that is not CUDA; host memory is `host_memory_free`.
    """
    return device_figures(device).free
