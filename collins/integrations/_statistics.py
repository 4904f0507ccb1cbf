"""What `Collins.statistics` says, as numbers that a framework's loggers take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from collins.optimizer import Collins


def numbers_of(optimizers: Iterable[object], prefix: str = "collins/") -> dict[str, float]:
    """The statistics of every Collins among some optimizers; with a number in their names where there are several.

    Waits for each device once.

    Args:
        optimizers: of any kind, wrapped by Accelerate or Lightning or not.
        prefix: before every name.
    """
    found = [one for one in map(_inner, optimizers) if isinstance(one, Collins)]
    values: dict[str, Any] = {}
    for number, one in enumerate(found):
        place = f"{prefix}{number}/" if len(found) > 1 else prefix
        values |= {place + name: value for name, value in one.statistics().items()}
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, value in values.items():
        if isinstance(value, Tensor):
            by_device[value.device][name] = value
    for tensors in by_device.values():
        copied = torch.stack([t.detach().double().reshape(()) for t in tensors.values()]).tolist()
        values |= zip(tensors, copied, strict=True)
    return {name: float(value) for name, value in values.items()}


def _inner(optimizer: object) -> object:
    while not isinstance(optimizer, Collins) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
