"""One run: the steps it takes, what they cost, and what the validation loss was on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compare.tasks import Settings, Workload

_SMOOTHED = 0.05  # the share of a step's own loss in the training loss that is noted


class OutOfTimeError(Exception):
    """A run was not finished by its deadline."""


class Follower(Protocol):
    """Who is told of every step; raises OutOfTimeError to stop the run."""

    def __call__(self, steps: int) -> None: ...


class Drive(Protocol):
    """What takes a step from its losses: backward, clipping, accumulation and the optimizers' own steps.

    An optimizer that steps while backward goes on brings a drive of its own.
    """

    times: StepTimes

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]: ...

    def __call__(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Steps on the mean of the losses, each of which is computed when it is called, and returns it."""


class AfterBackward:
    """The usual way: all backward passes, clipping by the norm of the whole gradient, then the optimizers' steps."""

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], clip: float) -> None:
        self.model, self.optimizers, self.clip = model, optimizers, clip
        self.times = StepTimes(next(model.parameters()).device)

    def __call__(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        total = backward(losses)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        with self.times:
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return total


class InBackward:
    """Parameters are stepped as their gradients arrive, by an optimizer that hooks into backward.

    Gradients are never there together: clipping is the optimizer's to do, and so is accumulation, by partial steps.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], clip: float) -> None:
        self.optimizers = optimizers
        self.times = StepTimes(next(model.parameters()).device)

    def __call__(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        total = backward(losses)
        with self.times:
            for optimizer in self.optimizers:
                optimizer.step()
        return total


def backward(losses: Sequence[Callable[[], Tensor]]) -> Tensor:
    total = None
    for loss in losses:
        part = loss() / len(losses)
        part.backward()
        total = part.detach() if total is None else total + part.detach()
    assert total is not None
    return total


class StepTimes:
    """Times of the optimizers' steps, entered once for each; on a GPU by events, for which nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[Any, Any]] = []
        self._seconds: list[float] = []
        self._on_gpu = device.type == "cuda"
        self._started: Any = None

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events.append((self._started, self._now()))
        else:
            self._seconds.append(self._now() - self._started)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float:
        """Milliseconds of the median step, the first quarter aside, in which things are made and compiled."""
        if self._events:
            torch.cuda.synchronize()
            times = [begun.elapsed_time(ended) for begun, ended in self._events]
        else:
            times = [1e3 * seconds for seconds in self._seconds]
        return statistics.median(times[len(times) // 4 :]) if times else 0.0


@dataclass
class Curve:
    """What a run showed, at some of its steps; losses in nats."""

    steps: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)  # a moving average
    validation: list[float] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)  # all that was measured at the end
    diverged: bool = False


def train(
    workload: Workload,
    settings: Settings,
    drive: Drive,
    *,
    seed: int,
    autocast: torch.dtype | None,
    follower: Follower,
) -> Curve:
    """Steps through a workload: linear warm-up, cosine, validation now and then. Stops where the loss is not finite."""
    curve, smoothed = Curve(), None
    device = next(workload.model.parameters()).device
    groups = [group for optimizer in drive.optimizers for group in optimizer.param_groups]
    peaks = [float(group["lr"]) for group in groups]
    every = max(settings.steps // settings.points, 1)
    for step, batch in enumerate(workload.batches(seed), 1):
        for group, peak in zip(groups, peaks, strict=True):
            set_rate(group, peak * rate_at(step - 1, settings))
        loss = drive([_loss(workload, part, autocast) for part in batch.chunk(settings.accumulate)]).float()
        smoothed = loss if smoothed is None else smoothed.lerp(loss, _SMOOTHED)
        if step % every == 0 or step == settings.steps:
            curve.last = _measured(workload, autocast)
            curve.steps.append(step)
            curve.training.append(smoothed.item())
            curve.validation.append(curve.last["loss"])
            curve.diverged = not all(map(math.isfinite, (curve.training[-1], curve.validation[-1])))
        follower(1)
        if curve.diverged:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return curve


def _loss(workload: Workload, batch: Tensor, autocast: torch.dtype | None) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        with _products(batch.device, autocast):
            return workload.loss(batch)

    return loss


def _products(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _measured(workload: Workload, autocast: torch.dtype | None) -> dict[str, float]:
    workload.model.eval()
    with torch.no_grad(), _products(next(workload.model.parameters()).device, autocast):
        measured = workload.measure()
    workload.model.train()
    return measured


def rate_at(step: int, settings: Settings) -> float:
    """The share of the peak rate in step number `step`, from 0."""
    warm = max(round(settings.warmup * settings.steps), 1)
    progress = max(step - warm, 0) / max(settings.steps - warm, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min((step + 1) / warm, 1.0) * (settings.final + (1 - settings.final) * cosine)


def set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # some optimizers compile their steps, for which a number would be a constant
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def held_bytes(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors in the optimizers' state, wherever in it they are; what two share counts once."""
    storages: dict[tuple[torch.device, int], int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)  # a tensor that is made of others, quantized ones say
            if inner is not None:
                for name in inner()[0]:
                    visit(getattr(value, name))
            else:
                storage = value.untyped_storage()
                storages[value.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in list(value.values()):
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            visit(vars(value))

    for optimizer in optimizers:
        for state in optimizer.state.values():
            visit(state)
    return sum(storages.values())
