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
    """Bytes of host memory this process can still take: min(available to the system, headroom of each control group).

    File pages that a group has not used of late are headroom: the kernel drops them before it refuses memory.

    Args:
        cgroups: where the control-group file system is mounted (versions 1 and 2 are understood).
        membership: the file that lists this process's groups.
    """
    headrooms = [limit - usage for limit, usage in _limits(cgroups, membership)]
    return max(min([psutil.virtual_memory().available, *headrooms]), 0)


def host_memory_total(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Bytes of host memory that this process could ever have: min(the system's, the limit of each control group)."""
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
        # Inside a container the path may be the host's: the mount then is the group itself.
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
    """What the driver and PyTorch's allocator say of one device at one moment, in bytes."""

    total: int  # that the device has
    driver_free: int  # held by no process
    fraction: float  # of the total that this process may hold (torch.cuda.set_per_process_memory_fraction)
    reserved: int  # held by the allocator
    allocated: int  # of these, in tensors
    peak: int  # the most there ever was in tensors (torch.cuda.max_memory_allocated)

    @property
    def obtainable(self) -> int:
        """The most that this process's tensors can have in all, those of now included."""
        return min(self.driver_free + self.reserved, int(self.fraction * self.total))

    @property
    def free(self) -> int:
        """What tensors can still have now."""
        return max(self.obtainable - self.allocated, 0)

    @property
    def spare(self) -> int:
        """What nothing has ever used: what is free now, less what the next forward and backward will need again.

            spare = free - (peak - allocated)

        Between a backward and its step, activations are gone and would seem to have left their room to the tables; yet
        each later step needs it. The peak counts from the start of the process, or from
        `torch.cuda.reset_peak_memory_stats`: a higher peak before training (weights loaded twice, say) makes this too
        small until it is reset, and a measurement before the first backward is over makes it too large.
        """
        return max(self.obtainable - max(self.peak, self.allocated), 0)


def device_figures(device: torch.device) -> DeviceFigures:
    """The figures of a CUDA device, now.

    Raises:
        ValueError: for a device that is not CUDA; host memory is `host_memory_free`.
    """
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    if device.index is None:  # the memory fraction is not told for "the current device"
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
