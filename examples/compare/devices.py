"""The devices of this machine, and the selection of devices by an argument."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

_MOST_PROCESSES = 8  # on a CPU; each process uses memory for a model, its data and a copy of torch


def gpus(names: Sequence[str]) -> list[torch.device]:
    """The selected GPUs.

    Args:
        names: "all", "none", or the numbers of GPUs.

    Raises:
        ValueError: for a number without a GPU, and for any other text.
    """
    count = torch.cuda.device_count()
    if list(names) == ["all"]:
        return [torch.device("cuda", number) for number in range(count)]
    if list(names) == ["none"]:
        return []
    for text in names:
        if not (text.isdecimal() and int(text) < count):
            accepted = f"0 to {count - 1}" if count else "this machine has none"
            raise ValueError(f"must be all, none or numbers of GPUs ({accepted}), got {text!r}")
    return [torch.device("cuda", int(text)) for text in dict.fromkeys(names)]


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus(processes: int | None, jobs: int) -> list[torch.device]:
    """The CPU device, once per process: `processes` of them, by default one per core, and at most one per job."""
    wanted = min(cores(), _MOST_PROCESSES) if processes is None else processes
    return [torch.device("cpu")] * max(min(wanted, jobs), 1)


def threads(devices: Sequence[torch.device]) -> int:
    """The threads of each process: an equal share of the cores, but no more than torch uses (`OMP_NUM_THREADS`)."""
    return max(min(cores() // len(devices), torch.get_num_threads()), 1)
