"""What a device is doing for the thread that asks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from collins._torch_internals import current_raw_stream


class Place(NamedTuple):
    """Where work is enqueued: what is computed at one place is computed in order."""

    device: torch.device
    stream: int


def place_on(device: torch.device) -> Place:
    """The device, and its current stream: gradients arrive on the streams that computed them."""
    return Place(device, current_raw_stream(device.index) if device.type == "cuda" else 0)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
