"""`Collins.statistics` as Python numbers for the loggers of frameworks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from collins.optimizer import Collins


def measure_next(optimizers: Iterable[object]) -> None:
    """Requests that the next step measures the sizes of its updates, which takes some launches."""
    for one in _every(optimizers):
        one.statistics(updates=True)


def numbers_of(optimizers: Iterable[object], prefix: str = "collins/") -> dict[str, float]:
    """The statistics of every Collins in `optimizers`; if there are several, their names contain its number.

    Waits for each device once. The gradient norm is left out if it is not computed.

    Args:
        optimizers: optimizers of any kind, which Accelerate or Lightning may have wrapped.
        prefix: the prefix of every name.
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
