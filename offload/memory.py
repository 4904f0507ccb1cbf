"""Free memory, measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def host_memory_free(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Bytes of host memory this process can still take: min(available to the system, headroom of each control group).

    Args:
        cgroups: where the control-group file system is mounted (versions 1 and 2 are understood).
        membership: the file that lists this process's groups.
    """
    return max(min([psutil.virtual_memory().available, *_headrooms(cgroups, membership)]), 0)


def _headrooms(cgroups: Path, membership: Path) -> Iterator[int]:
    """Limit minus usage of this process's memory groups and all groups above them."""
    if not membership.is_file():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # Inside a container the path may be the host's: the mount then is the group itself.
        for folder in [group, *group.parents] if group.is_dir() else [root]:
            if (folder / limit).is_file() and (folder / usage).is_file():
                allowed = (folder / limit).read_text().strip()
                if allowed != "max":
                    yield int(allowed) - int((folder / usage).read_text())
            if folder == root:
                break


def device_memory_free(device: torch.device) -> int:
    """Bytes that a CUDA device can still give to tensors of this process.

    Raises:
        ValueError: for a device that is not CUDA; host memory is `host_memory_free`.
    """
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
