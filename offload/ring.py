"""The sizes of the staging slots: `Pipeline` allocates them, and the plan counts them.

Of a model's transfers at most two are much larger than the others: those of its two token tables, whose gradients are
the first and the last of a backward. So one slot is as large as the largest transfer, and all others are as large as
the third largest.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from collins.offload.sizes import size_text
from collins.offload.slabs import aligned

_ALIGNMENT = 512  # bytes, of every slot: what PyTorch's device allocator aligns its own blocks to


class Ring(NamedTuple):
    """The sizes of the staging slots, in bytes: that of the first one, and that of each other."""

    slots: int
    first: int
    other: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each slot, the largest first."""
        return (self.first, *(self.other,) * (self.slots - 1))[: self.slots]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.first + (self.slots - 1) * self.other if self.slots else 0

    def __str__(self) -> str:
        """As "3 slots of 64.0 MiB", or "1 slot of 1.10 GiB, 2 of 224.0 MiB"."""
        alike = self.slots if self.first == self.other else 1
        text = f"{alike} slot{'' if alike == 1 else 's'} of {size_text(self.first)}"
        return text if self.slots <= alike else f"{text}, {self.slots - alike} of {size_text(self.other)}"


def ring_of(transfers: Iterable[int], slots: int) -> Ring:
    """The ring for transfers of these sizes, with at most `slots` slots, and at most one for each transfer.

    With fewer than three transfers all slots are as large as the largest.
    """
    sizes = list(transfers)
    return _ring(heapq.nlargest(3, sizes), min(slots, len(sizes)))


def rings(members: Sequence[int], transfer_size: int, slots: int) -> list[Ring]:
    """For each place in a list of parameters, and for its end, the ring for the parameters from there on.

    Their transfers are those of `slabs.grouped`. The transfers from a place on are one transfer, then those from the
    place where it ends, so that one pass from the end of the list finds the largest of every place.

    Args:
        members: the bytes of each parameter alone in a slab.
        transfer_size: as for `grouped`.
        slots: as for `ring_of`.
    """
    starts = [0, *accumulate(map(aligned, members))]
    ends = [start + size for start, size in zip(starts, members, strict=False)]  # never descending
    largest: list[list[int]] = [[] for _ in starts]
    counts = [0 for _ in starts]
    for place in reversed(range(len(members))):
        following = max(bisect_right(ends, starts[place] + transfer_size), place + 1)
        size = ends[following - 1] - starts[place]
        largest[place] = heapq.nlargest(3, (size, *largest[following]))
        counts[place] = counts[following] + 1
    return [_ring(sizes, min(slots, count)) for sizes, count in zip(largest, counts, strict=True)]


def _ring(largest: Sequence[int], slots: int) -> Ring:
    """The ring for transfers of which these are the largest three, or all, in descending order."""
    if not largest:
        return Ring(0, 0, 0)
    first, other = largest[0], largest[2] if len(largest) > 2 else largest[0]
    return Ring(slots, _rounded(first), _rounded(other))


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
