"""The current stream of a device, and modes of PyTorch that concern steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from collins._torch_internals import current_raw_stream


class Place(NamedTuple):
    """A device and a stream: work that is enqueued on one stream runs in order."""

    device: torch.device
    stream: int


def place_on(device: torch.device) -> Place:
    """The device and its current stream; in a gradient hook that is the stream that computed the gradient."""
    return Place(device, current_raw_stream(device.index) if device.type == "cuda" else 0)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """A context in which new tensors may be changed later, also if it is entered under `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
