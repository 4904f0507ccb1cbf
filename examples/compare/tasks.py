"""What a task is: settings that all optimizers share, data, and a model on a device."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for every optimizer of a task.

    Args:
        steps: optimizer steps of a run.
        batch: examples of a step.
        accumulate: backward passes that a step's batch is divided into.
        warmup: share of the steps in which the rate rises linearly.
        final: what the rate falls to, along a cosine, as a share of its peak.
        clip: the gradient's largest norm.
        weight_decay: decoupled, of everything but vectors.
        points: how often validation loss is measured in a run.
    """

    steps: int
    batch: int
    accumulate: int = 1
    warmup: float = 0.1
    final: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.1
    points: int = 10

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            shares, whole = name in _SHARES, isinstance(value, int)
            accepted = "0 to 1" if shares else "at least 1" if whole else "above 0" if name == "clip" else "at least 0"
            least = value > 0 if whole or name == "clip" else value >= 0
            if not (math.isfinite(value) and least and (value <= 1 or not shares)):
                raise ValueError(f"{name} must be {accepted}, got {value}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate, got {self.batch} and {self.accumulate}")


_SHARES = ("warmup", "final")


@dataclass(frozen=True)
class Place:
    """Where things are.

    Args:
        cache: folder of tokens and pretrained weights, made where it is not there.
        text: folders to take text from instead of what is installed; empty for that.
    """

    cache: Path
    text: tuple[Path, ...] = ()


class Workload(ABC):
    """A task's model with new weights and its data, on one device."""

    model: nn.Module

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Tensor]:
        """What each step trains on; dimension 0 is the batch."""

    @abstractmethod
    def loss(self, batch: Tensor) -> Tensor:
        """The mean loss of a batch, or of a part of one, in nats."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """What is validated: "loss" in nats, and whatever else the task knows."""


@dataclass(frozen=True)
class Preparation:
    """Something that runs of a task need and that takes training to make: a file in the cache."""

    title: str
    path: Path
    steps: int


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A kind of workload, with its settings.

    Args:
        name: what it is called on the command line.
        about: one line on it.
        unit: of its loss.
        settings: shared by all optimizers.
        rates: learning rates that each optimizer is tried at.
        beta2s: second-moment decays that those optimizers are tried at which have one.
        optimizers: those that are compared where none are named.
        autocast: whether products are computed in bfloat16 on a GPU.
    """

    name: str
    about: str
    unit: str
    settings: Settings
    rates: tuple[float, ...]
    beta2s: tuple[float, ...] = (0.999,)
    optimizers: tuple[str, ...] = ("adamw", "collins")
    autocast: bool = False

    def prepare(self, place: Place) -> str:
        """Makes the data where it has to be made once, and returns what identifies it.

        Raises:
            TaskError: where that cannot be done on this machine.
        """
        return ""

    def preparation(self, place: Place) -> Preparation | None:
        """What has to be trained once before any run of this task, if anything."""
        return None

    @abstractmethod
    def workload(self, place: Place, device: torch.device, weights: torch.dtype, seed: int) -> Workload:
        """A model with weights that depend on the seed alone, and its data."""

    def changed(self, values: Mapping[str, str]) -> Task:
        """The task with some settings changed; texts, as they come from a command line.

        Raises:
            ValueError: for a name or a value that cannot be, saying what can.
        """
        known = dataclasses.asdict(self.settings)
        found: dict[str, Any] = {}
        for name, text in values.items():
            if name not in known:
                raise ValueError(f"{name!r} is not a setting of {self.name}: it has {', '.join(known)}")
            kind = type(known[name])
            try:
                found[name] = kind(text)
            except ValueError:
                raise ValueError(f"{name} of {self.name} must be {_KINDS[kind]}, got {text!r}") from None
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **found))

    def precision(self, device: torch.device, weights: torch.dtype) -> str:
        """What weights are stored in and products are computed in."""
        stored = str(weights).removeprefix("torch.")
        return f"{stored}, products in bfloat16" if self.casts(device, weights) else stored

    def casts(self, device: torch.device, weights: torch.dtype) -> bool:
        return self.autocast and device.type == "cuda" and weights == torch.float32


class TaskError(ValueError):
    """A task cannot be run on this machine: what is missing, and what to do."""


_KINDS = {int: "a whole number", float: "a number"}
