"""Text for the examples that every Python installation has: the sources of the standard library, as bytes."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def standard_library() -> Tensor:
    """The bytes of the standard library's own sources, uint8, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    files = (path for path in sorted(root.rglob("*.py")) if skipped.isdisjoint(path.relative_to(root).parts))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batches(text: Tensor, count: int, batch: int, context: int, seed: int, device: torch.device) -> Iterable[Tensor]:
    """`count` batches of random windows of the text: int64 of shape (batch, context + 1)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        start = torch.randint(len(text) - context, (batch, 1), generator=generator)
        yield text[start + torch.arange(context + 1)].long().to(device)


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished what the current stream was given; copies on other streams may go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
