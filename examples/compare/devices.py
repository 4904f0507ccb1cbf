"""Which devices there are to run on, and which an argument names."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

_MOST_PROCESSES = 8  # on a CPU: each has a model, its data and a copy of torch


def gpus(named: Sequence[str]) -> list[torch.device]:
    """`all` of them, `none`, or those of the given numbers.

    Raises:
        ValueError: for a number that no GPU has, and for anything else.
    """
    count = torch.cuda.device_count()
    if list(named) == ["all"]:
        return [torch.device("cuda", number) for number in range(count)]
    if list(named) == ["none"]:
        return []
    for text in named:
        if not (text.isdecimal() and int(text) < count):
            there = f"numbers below {count}" if count else "none are here"
            raise ValueError(f"must be all, none or numbers of GPUs, of which {there}; got {text!r}")
    return [torch.device("cuda", int(text)) for text in dict.fromkeys(named)]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus(processes: int | None, jobs: int) -> list[torch.device]:
    """The CPU, once for each process: as many as asked for, or one for each core while there are jobs for them."""
    wanted = min(cores(), _MOST_PROCESSES) if processes is None else processes
    return [torch.device("cpu")] * max(min(wanted, jobs), 1)


def threads(devices: Sequence[torch.device]) -> int:
    """Cores are shared equally; no process takes more threads than it was given (`OMP_NUM_THREADS`)."""
    return max(min(cores() // len(devices), torch.get_num_threads()), 1)
