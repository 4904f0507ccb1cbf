"""Plans the memory of training as `python -m collins plan` does, and proposes changes if it does not suffice."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import torch

from collins.offload import MemoryPolicy, device_figures, host_memory_free, host_memory_total
from collins.offload.budget import Training, requests_of
from collins.offload.forecast import as_text
from collins.offload.shapes import Transformer
from collins.offload.sizes import size_text
from collins.offload.trial import Machine, Trial, largest

_ROUND = 64  # a sequence that is proposed is a multiple of this


def with_index(device: torch.device) -> torch.device:
    """The same device by its number, which memory limits are set by."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def machine_of(device: torch.device) -> Machine:
    """Free and total memory before the model is loaded; for a CPU, device and host are the same."""
    host = host_memory_free(), host_memory_total()
    if device.type != "cuda":
        return Machine(*host, *host)
    figures = device_figures(device)
    return Machine(figures.free, figures.total, *host)


def trial_of(
    model: Transformer, training: Training, machine: Machine, policy: MemoryPolicy | None, compress_ratio: float = 32
) -> Trial:
    """The plan for a model that is stepped in backward by Collins with its defaults otherwise."""
    tables = partial(
        requests_of,
        dtype=training.dtype,
        compress_ratio=compress_ratio,
        min_K=1024,
        hash="block",
        table_dtype=None,
    )
    return Trial(model, training, machine, policy or MemoryPolicy("device"), tables, modes=(True,))


def figures(name: str, trial: Trial) -> str:
    """The plan's figures, and where the tables go.

    Args:
        name: of the model.
    """
    return as_text(name, trial, trial.outcomes())


def refuse_weights(trial: Trial) -> None:
    """Raises a MemoryError if the weights alone exceed the free memory; the plan's other figures are upper bounds."""
    weights, free = trial.budget.weights, trial.machine.device_free
    if weights > free:
        raise MemoryError(f"the weights take {size_text(weights)}, and {size_text(free)} are free")


def advice(name: str, trial: Trial) -> str:
    """The plan's figures, and proposed changes for a run that ran out of memory.

    Args:
        name: of the model, as `python -m collins plan` takes it.
    """
    found = largest(trial, name)
    training = trial.training
    changes = []
    if 0 < found.batch_size < training.batch_size:
        changes.append(f"--batch-size {found.batch_size}")
    if _ROUND <= found.seq_len < training.seq_len:
        changes.append(f"--seq-len {found.seq_len // _ROUND * _ROUND}")
    chunks = 4 * training.loss_chunks
    if not trial.fits() and replace(trial, training=replace(training, loss_chunks=chunks)).fits():
        changes.append(f"--loss-chunks {chunks}")
    if not trial.fits() and replace(trial, policy=MemoryPolicy("host")).fits():
        changes.append("--policy host, which keeps the optimizer's tables in host memory")
    if trial.fits():
        changes += [
            "by the plan it fits: free what other programs hold of the device",
            "leave it more to spare: a shorter --seq-len, a smaller --batch-size, more --loss-chunks",
            "a --policy FILE with a larger device_reserve, or --policy host",
        ]
    if "expandable_segments" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        changes.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, against fragmentation")
    if not found.seq_len:
        changes.append("a device with more memory, or a smaller model: no sequence fits")
    outcomes = trial.outcomes()
    return "\n".join([as_text(name, trial, outcomes, found), "", "What to change:", *(f"- {line}" for line in changes)])
