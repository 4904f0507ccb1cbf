"""The interface of a task: settings that all optimizers share, data, and a model on a device."""

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
    """The settings of a task, which are the same for every optimizer.

    Args:
        steps: optimizer steps per run.
        batch: examples per step.
        accumulate: the number of backward passes into which the batch of a step is divided.
        warmup: the fraction of the steps in which the learning rate rises linearly.
        final: the learning rate at the end of the cosine schedule, as a fraction of its peak.
        clip: the maximum norm of the gradient.
        weight_decay: decoupled weight decay of all parameters except vectors.
        points: the number of measurements of the validation loss per run.
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
            is_fraction, is_integer = name in _FRACTIONS, isinstance(value, int)
            if is_fraction:
                accepted = "0 to 1"
            elif is_integer:
                accepted = "at least 1"
            else:
                accepted = "above 0" if name == "clip" else "at least 0"
            in_range = value > 0 if is_integer or name == "clip" else value >= 0
            if not (math.isfinite(value) and in_range and (value <= 1 or not is_fraction)):
                raise ValueError(f"{name} must be {accepted}, got {value}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate, got {self.batch} and {self.accumulate}")


_FRACTIONS = ("warmup", "final")


@dataclass(frozen=True)
class Paths:
    """The folders that a task reads and writes.

    Args:
        cache: the folder of tokens and pretrained weights, which is created if it does not exist.
        text: folders with text; empty for the text of installed packages.
    """

    cache: Path
    text: tuple[Path, ...] = ()


class Workload(ABC):
    """The model of a task with new weights, and the task's data, on one device."""

    model: nn.Module

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Tensor]:
        """The batch of each step; dimension 0 is the batch dimension."""

    @abstractmethod
    def loss(self, batch: Tensor) -> Tensor:
        """The mean loss of a batch, or of a part of one, in nats."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """The validation metrics: "loss" in nats, and others that depend on the task."""


@dataclass(frozen=True)
class PretrainingPlan:
    """The pretraining that all runs of a task need: its title, the file of its weights in the cache, and its steps."""

    title: str
    path: Path
    steps: int


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A kind of workload, with its settings.

    Args:
        name: its name on the command line.
        about: a description of one line.
        unit: the unit of its loss.
        settings: the settings that all optimizers share.
        rates: the learning rates of the sweep of each optimizer.
        beta2s: the second-moment decays of the sweep of each optimizer that has one.
        optimizers: the optimizers that are compared by default.
        autocast: whether float32 weights are trained under bfloat16 autocast on a GPU.
    """

    name: str
    about: str
    unit: str
    settings: Settings
    rates: tuple[float, ...]
    beta2s: tuple[float, ...] = (0.999,)
    optimizers: tuple[str, ...] = ("adamw", "collins")
    autocast: bool = False

    def prepare(self, paths: Paths) -> str:
        """Creates the data if it is not in the cache, and returns its digest; "" if the data never changes.

        Raises:
            TaskError: if this machine does not have what the task needs.
        """
        return ""

    def pretraining_plan(self, paths: Paths) -> PretrainingPlan | None:
        """The pretraining that is done once before all runs of this task, or None."""
        return None

    @abstractmethod
    def workload(self, paths: Paths, device: torch.device, weights: torch.dtype, seed: int) -> Workload:
        """A model whose initial weights depend only on the seed, and its data."""

    def with_settings(self, values: Mapping[str, str]) -> Task:
        """The task with some settings changed, by name, to values in the texts of a command line.

        Raises:
            ValueError: for an unknown name or an invalid value.
        """
        settings = dataclasses.asdict(self.settings)
        changes: dict[str, Any] = {}
        for name, text in values.items():
            if name not in settings:
                raise ValueError(f"{self.name} has no setting {name!r}, only {', '.join(settings)}")
            type_ = type(settings[name])
            try:
                changes[name] = type_(text)
            except ValueError:
                raise ValueError(f"{name} of {self.name} must be {_TYPE_NAMES[type_]}, got {text!r}") from None
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))

    def precision(self, device: torch.device, weights: torch.dtype) -> str:
        """The dtype of the weights, and of matrix products if it is another one."""
        dtype = str(weights).removeprefix("torch.")
        return f"{dtype}, products in bfloat16" if self.uses_autocast(device, weights) else dtype

    def uses_autocast(self, device: torch.device, weights: torch.dtype) -> bool:
        return self.autocast and device.type == "cuda" and weights == torch.float32


class TaskError(ValueError):
    """A task cannot be run on this machine; the message names what is missing and the remedy."""


_TYPE_NAMES = {int: "a whole number", float: "a number"}
