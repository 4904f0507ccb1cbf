"""A recommender, whose parameters are mostly embeddings, on interactions sampled from a known distribution.

Users and items have latent vectors of `rank` numbers. User u takes item i with probability

    p(i | u) = softmax over i of (log popularity_i + affinity u . v_i),     popularity_i = 1 / (i + 10)

so that items follow Zipf's law and a few rows get most gradients. The model predicts the next item from the user and
the user's previous item. The cross-entropy of the distribution itself is the lowest that a model can reach (`floor`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from compare.tasks import Paths, Settings, Task, Workload

_SEED = 20_261_126  # a fixed seed: the same interactions in every run
_CHUNK = 1024  # the number of users whose interactions are sampled at once


@dataclass(frozen=True, kw_only=True)
class RecommenderSettings(Settings):
    """The settings of a task, and the sizes of data and model; `held_out` interactions per user are for validation."""

    users: int
    items: int
    interactions: int
    hidden: int
    rank: int = 8
    affinity: float = 2.0
    held_out: int = 2


class Recommender(nn.Module):
    """A network maps the embeddings of the user and the previous item to a query for the embeddings of all items."""

    def __init__(self, users: int, items: int, hidden: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, hidden), nn.Embedding(items, hidden)
        self.network = nn.Sequential(nn.Linear(2 * hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.popularity = nn.Parameter(torch.zeros(items))
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, previous: Tensor) -> Tensor:
        query = self.network(torch.cat((self.user(user), self.item(previous)), 1))
        return functional.linear(query, self.item.weight, self.popularity)


class RecommenderWorkload(Workload):
    """The model and the interactions. A batch is int64 (batch, 3): user, previous item, next item."""

    def __init__(self, settings: RecommenderSettings, device: torch.device, weights: torch.dtype, seed: int) -> None:
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Recommender(settings.users, settings.items, settings.hidden)
        self.model = model.to(device, weights)
        train, held_out, self.floor = interactions(settings)
        self.train, self.held_out = train.to(device), held_out.to(device)

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.settings.steps):
            indices = torch.randint(len(self.train), (self.settings.batch,), generator=generator)
            yield self.train[indices.to(self.train.device)]

    def loss(self, batch: Tensor) -> Tensor:
        user, previous, targets = batch.unbind(1)
        return functional.cross_entropy(self.model(user, previous).float(), targets)

    def measure(self) -> dict[str, float]:
        batches = self.held_out.split(self.settings.batch)
        total = sum(self.loss(batch).item() * len(batch) for batch in batches)
        return {"loss": total / len(self.held_out), "floor": self.floor}


@lru_cache(maxsize=1)
def interactions(settings: RecommenderSettings) -> tuple[Tensor, Tensor, float]:
    """Rows (user, previous item, next item) for training and for validation, and the `floor` of the latter."""
    generator = torch.Generator().manual_seed(_SEED)
    item_vectors = torch.randn(settings.items, settings.rank, generator=generator)
    popularity = -(torch.arange(settings.items, dtype=torch.float32) + 10).log()
    train, held_out, floors = [], [], []
    for start in range(0, settings.users, _CHUNK):
        users = torch.arange(start, min(start + _CHUNK, settings.users))
        user_vectors = torch.randn(len(users), settings.rank, generator=generator) / settings.rank**0.5
        logits = torch.log_softmax(settings.affinity * user_vectors @ item_vectors.T + popularity, 1)
        samples = torch.multinomial(logits.exp(), settings.interactions + 1, replacement=True, generator=generator)
        rows = torch.stack((users[:, None].expand_as(samples[:, 1:]), samples[:, :-1], samples[:, 1:]), 2)
        train.append(rows[:, settings.held_out :].flatten(0, 1))
        held_out.append(rows[:, : settings.held_out].flatten(0, 1))
        floors.append(-logits.gather(1, samples[:, 1 : 1 + settings.held_out]).flatten())
    return torch.cat(train), torch.cat(held_out), torch.cat(floors).mean().item()


@dataclass(frozen=True, kw_only=True)
class Recommendation(Task):
    """Prediction of the next item of a user."""

    settings: RecommenderSettings

    def workload(self, paths: Paths, device: torch.device, weights: torch.dtype, seed: int) -> Workload:
        return RecommenderWorkload(self.settings, device, weights, seed)


RECOMMENDER = Recommendation(
    name="recommender",
    about="embeddings of 2,048 users and 4,096 items on sampled interactions; half a minute per run on one core",
    unit="nats per interaction",
    rates=(2.5e-3, 5e-3, 1e-2, 2e-2),
    settings=RecommenderSettings(
        steps=1000, batch=512, weight_decay=0.01, users=2048, items=4096, interactions=200, hidden=64
    ),
)
