"""Documents in rows of one length, and rows in batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finetuning.data import UNTRAINED, Documents


@dataclass(frozen=True)
class Batch:
    """The input of one forward and backward.

    Attributes:
        tokens: (rows, length), int64.
        positions: of each token in its document, (rows, length), int64: they begin at 0 with each document.
        trained: which places have a target, numbers into the flattened batch, (count,), int64.
        targets: the tokens to be predicted there, (count,), int64.
    """

    tokens: Tensor
    positions: Tensor
    trained: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(t.to(device) for t in (self.tokens, self.positions, self.trained, self.targets)))


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of documents, row by row, so that no row holds more than `room` places.

    Best-fit decreasing: each document, the longest first, goes to the row that it fits most closely. Equal input gives
    equal rows.
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of `by_space`, in order
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        if length > room:
            raise ValueError(f"documents must have at most {room} places, got {length}")
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), room
            rows.append([])
        else:
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        rows[row].append(document)
        if space - length:
            if space - length not in by_space:
                insort(spaces, space - length)
            by_space.setdefault(space - length, []).append(row)
    return rows


class Rows:
    """All documents in rows, with a new random order for each pass over them.

    Args:
        packed: whether several documents share a row. Otherwise each has its own row, and all rows are as long as the
            longest document.
        seed: the seed of the orders.
    """

    def __init__(self, documents: Documents, *, seq_len: int, batch_size: int, packed: bool, seed: int) -> None:
        self._documents, self.packed = documents, packed
        lengths = documents.lengths
        self.length = seq_len if packed else max(lengths)
        self.rows = pack(lengths, seq_len) if packed else [[document] for document in range(len(lengths))]
        self._batch_size, self._seed = batch_size, seed

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epochs: float) -> int:
        """The number of batches for a number of passes over the rows."""
        return max(1, -(-round(epochs * len(self.rows)) // self._batch_size))

    @property
    def filled(self) -> float:
        """The share of places that are not padding."""
        return len(self._documents.tokens) / (len(self.rows) * self.length)

    def batch(self, number: int) -> Batch:
        """Batch number `number` of a run, from 1. One that begins in a pass over the rows may end in the next."""
        first = (number - 1) * self._batch_size
        chosen = []
        for place in range(first, first + self._batch_size):
            epoch, index = divmod(place, len(self.rows))
            chosen.append(int(_order(self._seed, epoch, len(self.rows))[index]))
        return self._of(chosen)

    def in_order(self) -> Iterator[Batch]:
        """Every row once. The last batch is filled up with empty rows."""
        numbers = range(len(self.rows))
        for first in range(0, len(numbers), self._batch_size):
            yield self._of(numbers[first : first + self._batch_size])

    def _of(self, chosen: Sequence[int]) -> Batch:
        shape = (self._batch_size, self.length)
        tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, UNTRAINED, dtype=torch.int64)
        documents = self._documents
        for i in range(self._batch_size):
            at = 0
            for document in self.rows[chosen[i]] if i < len(chosen) else ():
                start, stop = documents.bounds[document], documents.bounds[document + 1]
                place = slice(at, at + stop - start)
                tokens[i, place] = torch.frombuffer(documents.tokens, dtype=torch.int32)[start:stop]
                targets[i, place] = torch.frombuffer(documents.targets, dtype=torch.int32)[start:stop]
                positions[i, place] = torch.arange(stop - start)
                at = place.stop
            positions[i, at:] = torch.arange(self.length - at)  # padding is a document of its own
        flat = targets.flatten()
        trained = (flat != UNTRAINED).nonzero().flatten()
        return Batch(tokens, positions, trained, flat[trained])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    """In which order a pass over the rows takes them."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
