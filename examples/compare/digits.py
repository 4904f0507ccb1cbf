"""Vision: a small ViT on the digits of scikit-learn, which are 1,797 images of 8 x 8 pixels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from compare.tasks import Paths, Settings, Task, TaskError, Workload

_SIDE, _PATCH, _CLASSES, _HELD_OUT = 8, 2, 10, 360


@dataclass(frozen=True, kw_only=True)
class DigitsSettings(Settings):
    """The settings of a task, and the shape of the model."""

    hidden: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}")


class VisionTransformer(nn.Module):
    """A pre-norm transformer over patches of 2 x 2 pixels, mean pooling and a linear head; images are (batch, 8, 8)."""

    def __init__(self, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Linear(_PATCH**2, hidden)
        self.positions = nn.Parameter(torch.empty((_SIDE // _PATCH) ** 2, hidden))
        nn.init.normal_(self.positions, std=0.5)  # as large as patch embeddings: smaller ones are learnt slowly
        block = nn.TransformerEncoderLayer(
            hidden, heads, 4 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        for name, p in self.blocks.named_parameters():  # nn.TransformerEncoder gives all layers the same weights
            if p.dim() == 2:
                depth = 2 * layers if name.endswith(("out_proj.weight", "linear2.weight")) else 1
                nn.init.normal_(p, std=1 / math.sqrt(p.shape[1] * depth))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, _PATCH, _PATCH).unfold(2, _PATCH, _PATCH).flatten(3).flatten(1, 2)
        x = self.blocks(self.patches(patches) + self.positions)
        logits: Tensor = self.head(self.norm(x.mean(1)))
        return logits


class DigitsWorkload(Workload):
    """The model and the images. A batch is int64 (batch, 65): 64 pixels in each row, then the class."""

    def __init__(self, settings: DigitsSettings, device: torch.device, weights: torch.dtype, seed: int) -> None:
        self.settings, self.weights = settings, weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VisionTransformer(settings.hidden, settings.layers, settings.heads)
        self.model = model.to(device, weights)
        data = _digits().to(device)
        self.held_out, self.train = data[:_HELD_OUT], data[_HELD_OUT:]

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Images in a new order in each epoch; each image is shifted by -1, 0 or 1 pixel in both directions."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.settings.steps):
            while len(order) < self.settings.batch:
                order = torch.cat((order, torch.randperm(len(self.train), generator=generator)))
            indices, order = order[: self.settings.batch], order[self.settings.batch :]
            offsets = torch.randint(3, (len(indices), 2, 1), generator=generator).to(self.train.device)
            yield _shifted(self.train[indices.to(self.train.device)], offsets)

    def loss(self, batch: Tensor) -> Tensor:
        return functional.cross_entropy(self._logits(batch), batch[:, -1])

    def measure(self) -> dict[str, float]:
        logits, classes = self._logits(self.held_out), self.held_out[:, -1]
        correct = (logits.argmax(1) == classes).float().mean()
        return {"loss": functional.cross_entropy(logits, classes).item(), "accuracy": correct.item()}

    def _logits(self, batch: Tensor) -> Tensor:
        images = batch[:, :-1].view(-1, _SIDE, _SIDE).to(self.weights) / 8 - 1  # from 0 to 16, to [-1, 1]
        logits: Tensor = self.model(images).float()
        return logits


def _shifted(batch: Tensor, offsets: Tensor) -> Tensor:
    """Images padded with one empty pixel on each side, then cropped at `offsets`, 0 to 2, (batch, 2, 1)."""
    padded = functional.pad(batch[:, :-1].view(-1, _SIDE, _SIDE), (1, 1, 1, 1))
    span = torch.arange(_SIDE, device=batch.device)
    rows, columns = (offsets[:, 0] + span)[:, :, None], (offsets[:, 1] + span)[:, None, :]
    images = padded[torch.arange(len(batch), device=batch.device)[:, None, None], rows, columns]
    return torch.cat((images.flatten(1), batch[:, -1:]), 1)


@lru_cache(maxsize=1)
def _digits() -> Tensor:
    """All images and classes, int64 (1797, 65), shuffled with a fixed seed."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    data = torch.cat((torch.from_numpy(dataset.data), torch.from_numpy(dataset.target)[:, None]), 1).long()
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]


@dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """Classification of digits."""

    settings: DigitsSettings

    def prepare(self, paths: Paths) -> str:
        if importlib.util.find_spec("sklearn") is None:
            raise TaskError(f"{self.name} needs scikit-learn, which contains the images: pip install scikit-learn")
        return ""

    def workload(self, paths: Paths, device: torch.device, weights: torch.dtype, seed: int) -> Workload:
        return DigitsWorkload(self.settings, device, weights, seed)


DIGITS = Digits(
    name="digits",
    about="a ViT of 0.4M parameters on the digits of scikit-learn; half a minute per run on one core",
    unit="nats",
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
    settings=DigitsSettings(steps=600, batch=64, hidden=128, layers=2, heads=4),
)
