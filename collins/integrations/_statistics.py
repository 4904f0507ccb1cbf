"""What `Collins.statistics` says, as numbers that a framework's loggers take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from collins.optimizer import Collins


def measure_next(optimizers: Iterable[object]) -> None:
    """Has the next step measure the sizes of its updates, which takes some launches and is not done unasked."""
    for one in _every(optimizers):
        one.statistics(updates=True)


def numbers_of(optimizers: Iterable[object], prefix: str = "collins/") -> dict[str, float]:
    """The statistics of every Collins among some optimizers; with a number in their names where there are several.

    Waits for each device once. A norm that nothing has computed is left out.

    Args:
        optimizers: of any kind, wrapped by Accelerate or Lightning or not.
        prefix: before every name.
    """
    found = _every(optimizers)
    values: dict[str, Any] = {}
    for number, one in enumerate(found):
        place = f"{prefix}{number}/" if len(found) > 1 else prefix
        known = {name: value for name, value in one.statistics().items() if name != "grad_norm" or one.max_grad_norm}
        values |= {place + name: value for name, value in known.items()}
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, value in values.items():
        if isinstance(value, Tensor):
            by_device[value.device][name] = value
    for tensors in by_device.values():
        copied = torch.stack([t.detach().double().reshape(()) for t in tensors.values()]).tolist()
        values |= zip(tensors, copied, strict=True)
    return {name: float(value) for name, value in values.items()}


def _every(optimizers: Iterable[object]) -> list[Collins]:
    return [one for one in map(_inner, optimizers) if isinstance(one, Collins)]


def _inner(optimizer: object) -> object:
    while not isinstance(optimizer, Collins) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
