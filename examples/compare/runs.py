"""A run of one task, optimizer, learning rate and seed: its identity and its execution."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from llama import Llama

import collins
from compare.optimizers import Choice, Setup
from compare.tasks import Paths, Task
from compare.training import StepCallback, state_bytes, train

Record = dict[str, Any]  # the result of a finished run, a line of JSON
IDENTITY = ("task", "optimizer", "lr", "beta2", "seed", "settings", "data", "precision", "options")


@dataclass(frozen=True)
class Run:
    """A run, before its execution.

    Args:
        task, choice, lr, beta2, seed: the point of the grid; `beta2` is None for optimizers without one.
        data: the digest of the task's data.
        device: the type of the device, "cpu" or "cuda".
    """

    task: Task
    choice: Choice
    lr: float
    beta2: float | None
    seed: int
    data: str
    device: str

    @property
    def identity(self) -> Record:
        """Everything that the result depends on: a finished run of the same identity is not repeated."""
        return {
            "task": self.task.name,
            "optimizer": self.choice.name,
            "lr": self.lr,
            "beta2": self.beta2,
            "seed": self.seed,
            "settings": asdict(self.task.settings),
            "data": self.data,
            "precision": self.task.precision(torch.device(self.device), self.choice.weights),
            "options": self.choice.described(),
        }

    @property
    def key(self) -> str:
        return key_of(self.identity)

    @property
    def title(self) -> str:
        beta2 = "" if self.beta2 is None else f" beta2 {self.beta2:g}"
        return f"{self.task.name}: {self.choice.name} lr {self.lr:g}{beta2} seed {self.seed}"

    @property
    def steps(self) -> int:
        return self.task.settings.steps

    def perform(self, paths: Paths, device: torch.device, callback: StepCallback) -> Record:
        """Trains, and returns the record of the run."""
        start = time.monotonic()
        task, settings, spec = self.task, self.task.settings, self.choice.spec
        workload = task.workload(paths, device, self.choice.weights, self.seed)
        decay = settings.weight_decay / spec.unit
        setup = Setup(
            workload.model,
            self.lr,
            self.beta2,
            decay,
            settings.clip,
            self.seed,
            self.choice.options,
            settings.accumulate,
        )
        optimizers = spec.make(setup)
        drive = spec.drive(workload.model, optimizers, settings.clip)
        autocast = torch.bfloat16 if task.uses_autocast(device, self.choice.weights) else None
        curve = train(workload, settings, drive, seed=self.seed, autocast=autocast, callback=callback)
        parameters = sum(p.numel() for p in workload.model.parameters())
        seconds = time.monotonic() - start
        return {
            "key": self.key,
            **self.identity,
            "validation_loss": None if curve.diverged else curve.last["loss"],
            "measured": {} if curve.diverged else curve.last,
            "diverged": curve.diverged,
            "steps": curve.steps,
            "training": _finite(curve.training),
            "validation": _finite(curve.validation),
            "parameters": parameters,
            "weight_bytes": sum(p.nbytes for p in workload.model.parameters()),
            "state_bytes": state_bytes(optimizers),
            "state_bytes_7b": state_bytes_7b(self.choice),
            "optimizer_ms": round(drive.times.median(), 3),
            "seconds": round(seconds, 2),
            "placement": placements(optimizers),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "versions": {"torch": torch.__version__, "collins": collins.__version__},
        }


def key_of(record: Record) -> str:
    """The digest of the identity in a record, which is the same for all records of one run."""
    identity = {name: record[name] for name in IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _finite(values: Sequence[float]) -> list[float | None]:
    """The values with None for infinities and NaN, which JSON does not have."""
    return [value if abs(value) < float("inf") else None for value in values]


def placements(optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """The placement of tables, for optimizers with a memory policy."""
    return [plan.summary() for optimizer in optimizers for plan in getattr(optimizer, "placement", ())]


def state_bytes_7b(choice: Choice) -> int | None:
    """Bytes of state for a LLaMA of 6.74 billion parameters, computed from its shapes; None if they are not known."""
    if choice.spec.computed is None:
        return None
    return choice.spec.computed(Setup(_llama_7b(choice.weights), 1e-3, None, 0.0, 1.0, 0, choice.options))


@lru_cache(maxsize=2)
def _llama_7b(weights: torch.dtype) -> Llama:
    with torch.device("meta"):
        return Llama(32, 4096, 11008, 32, 32, 32_000, checkpointed=False).to(weights)
