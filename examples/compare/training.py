"""Training of one run: its steps, their duration, and the validation loss at some of them."""

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

_SMOOTHING = 0.05  # the weight of a step's loss in the moving average of the training loss


class OutOfTimeError(Exception):
    """A run was not finished by its deadline."""


class StepCallback(Protocol):
    """A callback that is called with the number of new steps; it raises OutOfTimeError to stop the run."""

    def __call__(self, steps: int) -> None: ...


class Drive(Protocol):
    """Performs a step, given its losses: backward, clipping, accumulation and the steps of the optimizers.

    Optimizers that step in backward need another drive than those that step after it.
    """

    times: StepTimes

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]: ...

    def __call__(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Takes a step on the mean of the losses, and returns that mean. Each loss is computed when it is called."""


class AfterBackward:
    """Steps after backward: all backward passes, clipping by the global norm, then the steps of the optimizers."""

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
    """Steps in backward: an optimizer steps each parameter when its gradient arrives.

    The gradients of all parameters never exist together, so the optimizer itself clips, and accumulates by partial
    steps.
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
    """A context manager that measures each step of the optimizers; on a GPU by events, without synchronization."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[Any, Any]] = []
        self._seconds: list[float] = []
        self._on_gpu = device.type == "cuda"
        self._start: Any = None

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events.append((self._start, self._now()))
        else:
            self._seconds.append(self._now() - self._start)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float:
        """Milliseconds of the median step, without the first quarter, which includes allocation and compilation."""
        if self._events:
            torch.cuda.synchronize()
            times = [start.elapsed_time(end) for start, end in self._events]
        else:
            times = [1e3 * seconds for seconds in self._seconds]
        return statistics.median(times[len(times) // 4 :]) if times else 0.0


@dataclass
class Curve:
    """The losses of a run at some of its steps, in nats."""

    steps: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)  # a moving average
    validation: list[float] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)  # all metrics of the last validation
    diverged: bool = False


def train(
    workload: Workload,
    settings: Settings,
    drive: Drive,
    *,
    seed: int,
    autocast: torch.dtype | None,
    callback: StepCallback,
) -> Curve:
    """Trains with a linear warm-up, a cosine schedule and regular validation, until the end or a non-finite loss."""
    curve, average = Curve(), None
    device = next(workload.model.parameters()).device
    groups = [group for optimizer in drive.optimizers for group in optimizer.param_groups]
    peaks = [float(group["lr"]) for group in groups]
    interval = max(settings.steps // settings.points, 1)
    for step, batch in enumerate(workload.batches(seed), 1):
        for group, peak in zip(groups, peaks, strict=True):
            set_rate(group, peak * rate_at(step - 1, settings))
        loss = drive([_loss(workload, part, autocast) for part in batch.chunk(settings.accumulate)]).float()
        average = loss if average is None else average.lerp(loss, _SMOOTHING)
        if step % interval == 0 or step == settings.steps:
            curve.last = _validate(workload, autocast)
            curve.steps.append(step)
            curve.training.append(average.item())
            curve.validation.append(curve.last["loss"])
            curve.diverged = not all(map(math.isfinite, (curve.training[-1], curve.validation[-1])))
        callback(1)
        if curve.diverged:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return curve


def _loss(workload: Workload, batch: Tensor, autocast: torch.dtype | None) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        with _autocast(batch.device, autocast):
            return workload.loss(batch)

    return loss


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _validate(workload: Workload, autocast: torch.dtype | None) -> dict[str, float]:
    workload.model.eval()
    with torch.no_grad(), _autocast(next(workload.model.parameters()).device, autocast):
        metrics = workload.measure()
    workload.model.train()
    return metrics


def rate_at(step: int, settings: Settings) -> float:
    """The learning rate of step number `step`, counted from 0, as a fraction of its peak."""
    warmup_steps = max(round(settings.warmup * settings.steps), 1)
    progress = max(step - warmup_steps, 0) / max(settings.steps - warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min((step + 1) / warmup_steps, 1.0) * (settings.final + (1 - settings.final) * cosine)


def set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # optimizers that compile their steps would compile a number as a constant
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def state_bytes(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors in the optimizers' state, however deeply nested; shared storages are counted once."""
    storages: dict[tuple[torch.device, int], int] = {}
    visited: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)  # of tensor subclasses with inner tensors, as torchao's
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
