"""Prefetch, compute, write-back: moments in host slabs are updated on the device through a ring of slots.

Two streams copy, one in each direction, while the caller's stream computes. The dependencies (each is a `WaitFor`):

    h2d(b into slot)     after the slot's last use, and after the last d2h of b
    compute(b)           after h2d(b), and after earlier compute on it
    d2h(b)               after compute(b); then the slot is free

A stream does not wait twice for the same event: a transfer whose parameters are stepped one after another on one stream
needs no more events than a transfer that is stepped at once.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from collins.offload.ring import ring_of
from collins.offload.slabs import Slab, carve
from collins.offload.streams import Event, Stream, StreamKind, Streams, WaitFor


@dataclass(eq=False)
class _Slot:
    """A staging slot: a range of device memory, and the transfer that it holds."""

    memory: Tensor
    staged: Event  # after the last h2d into it
    computed: Event  # once `marked`, after the last compute on it, or after a failed one was taken back
    free: Event  # after the last use of whatever it held before
    back: int = 0  # the number of the last d2h that `free` comes after
    transfer: int | None = None
    tensors: list[Tensor] = field(default_factory=list)  # the transfer's, here
    user: Stream | None = None  # that of the last compute, which has waited for all before it
    marked: bool = True
    held: tuple[int, ...] | None = None  # the parts in use, between acquire and release
    changed: set[int] = field(default_factory=set)  # parts that differ from the slab's
    touched: int = 0


class Traffic:
    """The number of bytes copied between host and device, in both directions."""

    def __init__(self) -> None:
        self.nbytes = 0


class Pipeline:
    """Stages transfers of moments on the device, and writes them back.

    Transfer b is `slabs[b]`. `run` processes all transfers of a step in a known order. In backward, gradients arrive in
    any order: call `using` (or `acquire` and `release`) for each of them, and `finish` once per step. The order of one
    step is used as the prediction for the next; a wrong prediction only costs time. A transfer of several parameters
    may be used in several parts (`more=True`); it is written back early if its slot is needed.

    Slots have two sizes, see `Ring`; a transfer is staged in one that it fits into. As long as the order of transfers
    stays the same and is predicted, each one is staged at the same device addresses in every step.

    If compute raises, the parts of the transfer that it was given keep their values from before, on the device and in
    the slab; other parts and other transfers keep the values computed for them. The pipeline remains usable.

    Calls may be made from any thread and under any current stream, but only one at a time. Compute must run on the
    stream that is current when `acquire` and `release` are called; both look it up again.

    Args:
        slabs: the transfers. Only the pipeline may access them, except after `drain`.
        streams: the streams of the computing device; see `streams_for`.
        slots: the most staging slots; there is no more than one for each slab. With three, both directions and compute
            overlap.

    Attributes:
        ring: the sizes of the slots.

    Raises:
        ValueError: without slabs or slots.
        RuntimeError: from every method in a process forked from the one that made the pipeline.
    """

    def __init__(self, slabs: Sequence[Slab], streams: Streams, *, slots: int = 3) -> None:
        if not slabs:
            raise ValueError("slabs must hold at least one slab, got none")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.slabs = tuple(slabs)
        self.streams = streams
        self._written = [streams.event() for _ in self.slabs]
        self._back = [0 for _ in self.slabs]  # the number of each transfer's last d2h, which come one after the other
        self._backs = 0
        self._callers: set[Stream] = set()  # for which the slots' memory is held
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # by transfer and address of the slot
        self._staged: dict[int, _Slot] = {}  # by transfer
        self._expected: dict[int, int] = {}  # places of the transfers in the order that this step should take
        self._seen: dict[int, None] = {}  # the order that this step has taken so far
        self._clock = 0
        self.traffic = Traffic()

        self.ring = ring_of((slab.nbytes for slab in self.slabs), slots)
        self._slots: list[_Slot] = []  # the largest first
        for memory in streams.empty(self.ring.nbytes).split(self.ring.sizes):
            slot = _Slot(memory, streams.event(), streams.event(), streams.event())
            # Fresh memory may still be in use on this stream by whoever freed it.
            streams.record(slot.free, StreamKind.CURRENT)
            self._slots.append(slot)
        # How many of the slots each transfer fits into: these are the first ones.
        self._fitting = [sum(slab.nbytes <= size for size in self.ring.sizes) for slab in self.slabs]
        # The arguments keep the slabs until the copies are done that still read and write them.
        weakref.finalize(self, _settle, streams, self._slots, self.slabs, os.getpid()).atexit = False

    def expect(self, order: Sequence[int]) -> None:
        """Begins a step with this expected order of transfers. Without this call, the last step's order is expected."""
        for transfer in order:
            self._check(transfer)
        self._expected = {transfer: place for place, transfer in enumerate(order)}
        self._seen = {}

    def prefetch(self, transfer: int) -> bool:
        """Starts to stage a transfer if a slot is empty; returns whether the transfer is staged or being staged."""
        self._check(transfer)
        if transfer not in self._staged:
            slot = self._room(transfer)
            if slot is None:
                return False
            self._stage(transfer, slot)
        return True

    def prefetch_first(self) -> None:
        """Starts to stage the first transfers of the next step; call it while the device does other work."""
        self._check_process()
        for transfer in list(self._expected)[: len(self._slots)]:
            self.prefetch(transfer)

    def acquire(self, transfer: int, parts: Sequence[int] | None = None) -> list[Tensor]:
        """The transfer's tensors on the device, for compute on the current stream until `release` or `discard`.

        Args:
            transfer: the number of the transfer.
            parts: the tensors to return, by their places in the slab; None for all. Others must not be changed.

        Raises:
            ValueError: for a transfer or a part that does not exist.
            RuntimeError: if the transfer is acquired already, or all slots that it fits into hold acquired transfers.
        """
        self._check(transfer)
        count = len(self.slabs[transfer].parts)
        chosen = tuple(range(count)) if parts is None else tuple(parts)
        if chosen and not (min(chosen) >= 0 and max(chosen) < count):
            raise ValueError(f"parts of transfer {transfer} must be in [0, {count - 1}], got {list(chosen)}")
        slot, caller = self._staged.get(transfer), self.streams.caller()
        if slot is not None and slot.held is not None:
            raise RuntimeError(f"transfer {transfer} is acquired already: release it first")
        if slot is not None and not slot.changed.isdisjoint(chosen):
            # A failure now could not be taken back from the slab, which is older than the last use.
            self._write_back(slot)
            slot = None
        if slot is None or slot.user is not caller:
            slot = self._entered(transfer, slot, caller)
        slot.held = chosen
        self._touch(slot)
        return [slot.tensors[part] for part in chosen]

    def release(self, transfer: int, *, more: bool = False) -> None:
        """Schedules the write-back of an acquired transfer, after compute has been enqueued on the current stream.

        Args:
            transfer: the number of the transfer.
            more: whether other parts of it will be used in this step. Then it stays staged until that use, until its
                slot is needed, or until `finish`.

        Raises:
            RuntimeError: if the transfer is not acquired.
        """
        slot, parts = self._acquired(transfer)
        slot.marked = False
        slot.changed.update(parts)
        slot.held = None
        if not more:
            self._write_back(slot)

    def discard(self, transfer: int, keep: Sequence[int] = ()) -> None:
        """Releases an acquired transfer after compute has failed: its parts get back the values from before `acquire`.

        Args:
            transfer: the number of the transfer.
            keep: parts that were computed successfully, and keep their new values.

        Raises:
            RuntimeError: if the transfer is not acquired.
        """
        slot, parts = self._acquired(transfer)
        slot.changed.update(keep)
        slot.held = None
        if not slot.changed:
            self.streams.record(slot.free, slot.user)
            self._empty(slot)
            return
        slot.marked = False
        self._mark(slot)
        self.streams.wait(StreamKind.H2D, slot.computed, WaitFor.UNDONE)
        for part in parts:
            if part not in keep:
                self.streams.copy(StreamKind.H2D, slot.tensors[part], self.slabs[transfer].tensors[part])
                self.traffic.nbytes += slot.tensors[part].nbytes
        self.streams.record(slot.computed, StreamKind.H2D)
        slot.user = None

    def abandon(self, transfer: int, keep: Sequence[int] = ()) -> None:
        """`discard`, if the transfer is acquired; for callers that were interrupted during `acquire` or `release`."""
        slot = next((slot for slot in self._slots if slot.transfer == transfer and slot.held is not None), None)
        if slot is not None:
            self._staged[transfer] = slot
            self.discard(transfer, keep)

    def drop(self, transfer: int) -> None:
        """Call this after the host has written to a transfer's slab: its staged copy is dropped, unless it is newer."""
        self._check(transfer)
        slot = self._staged.get(transfer)
        if slot is not None and slot.held is None and not slot.changed:
            self.streams.wait(StreamKind.CURRENT, slot.staged, WaitFor.STAGED)
            self.streams.record(slot.free, StreamKind.CURRENT)
            self._empty(slot)

    def using(self, transfer: int, parts: Sequence[int] | None = None, *, more: bool = False) -> _Use:
        """A context manager: `acquire`, then `release`; if the body raises, `discard` except for parts to keep."""
        return _Use(self, transfer, parts, more)

    def run(self, order: Sequence[int], compute: Callable[[int, list[Tensor]], None]) -> None:
        """A whole step: calls `compute(transfer, tensors)` for each transfer in this order, and prefetches later ones.

        If compute raises, earlier transfers have their new values; the failing one and later ones have their old ones.
        """
        self.expect(order)
        for transfer in order:
            with self.using(transfer) as tensors:
                compute(transfer, tensors)
        self.finish()

    def finish(self) -> None:
        """Ends a step: schedules all remaining write-backs, and predicts this step's order for the next one.

        Raises:
            RuntimeError: if a transfer is still acquired.
        """
        self._check_process()
        held = [slot.transfer for slot in self._slots if slot.held is not None]
        if held:
            raise RuntimeError(f"transfers {held} are still acquired: release or discard them first")
        for slot in self._slots:
            if slot.changed:
                self._write_back(slot)
        if self._seen:
            self._expected = {transfer: place for place, transfer in enumerate(self._seen)}
            self._seen = {}

    def drain(self) -> None:
        """Ends the step, then waits until the slabs hold all values and no copy is pending.

        Until the next call of any other method the host may read and write the slabs; nothing stays staged.
        """
        self.finish()
        _wait_for(self.streams, self._slots, WaitFor.DRAINED)
        for slot in self._slots:
            self._empty(slot)

    def _entered(self, transfer: int, slot: _Slot | None, caller: Stream) -> _Slot:
        """The slot of a transfer, staged if necessary, for compute on a stream; prefetches the expected next ones."""
        ahead = self._upcoming(transfer)
        if slot is None:
            slot = self._room(transfer, keep=ahead, force=True)
            if slot is None:
                fitting = self._slots[: self._fitting[transfer]]
                which = "" if len(fitting) == len(self._slots) else f" of {self.slabs[transfer].nbytes:,} bytes or more"
                raise RuntimeError(
                    f"no slot for transfer {transfer}: all{which} hold acquired transfers,"
                    f" {[other.transfer for other in fitting]}; release one first"
                )
            self._stage(transfer, slot)
        self.streams.wait(StreamKind.CURRENT, slot.staged, WaitFor.STAGED)
        if slot.changed:
            self._mark(slot)
            self.streams.wait(StreamKind.CURRENT, slot.computed, WaitFor.EARLIER_USE)
        if caller not in self._callers:
            self._callers.add(caller)
            self.streams.hold(slot.memory, StreamKind.CURRENT)  # all slots are one stretch of it
        slot.user = caller
        slot.held = ()  # so that no other transfer takes it
        self._seen.setdefault(transfer)
        for following in ahead:
            room = None if following in self._staged else self._room(following, keep=ahead)
            if room is not None:
                self._stage(following, room)
        return slot

    def _mark(self, slot: _Slot) -> None:
        """Records `computed`; called only when another stream has to wait for it."""
        if not slot.marked:
            self.streams.record(slot.computed, slot.user)
            slot.marked = True

    def _stage(self, transfer: int, slot: _Slot) -> None:
        self.streams.wait(StreamKind.H2D, slot.free, WaitFor.SLOT_FREE)
        if self._back[transfer] > slot.back:
            self.streams.wait(StreamKind.H2D, self._written[transfer], WaitFor.WRITTEN_BACK)
        self.streams.copy(StreamKind.H2D, slot.memory[: self.slabs[transfer].nbytes], self.slabs[transfer].bytes)
        self.traffic.nbytes += self.slabs[transfer].nbytes
        self.streams.record(slot.staged, StreamKind.H2D)
        key = transfer, slot.memory.data_ptr()
        if key not in self._views:
            self._views[key] = carve(slot.memory, self.slabs[transfer].parts)
        slot.transfer, slot.tensors = transfer, self._views[key]
        self._staged[transfer] = slot
        self._touch(slot)

    def _empty(self, slot: _Slot) -> None:
        if slot.transfer is not None and self._staged.get(slot.transfer) is slot:
            del self._staged[slot.transfer]
        slot.transfer = slot.user = None
        slot.tensors = []

    def _write_back(self, slot: _Slot) -> None:
        transfer = slot.transfer
        assert transfer is not None
        self._mark(slot)
        self.streams.wait(StreamKind.D2H, slot.computed, WaitFor.COMPUTED)
        self.streams.copy(StreamKind.D2H, self.slabs[transfer].bytes, slot.memory[: self.slabs[transfer].nbytes])
        self.traffic.nbytes += self.slabs[transfer].nbytes
        self._backs += 1
        self._back[transfer] = slot.back = self._backs
        slot.free = self._written[transfer]
        self.streams.record(slot.free, StreamKind.D2H)
        slot.changed.clear()
        self._empty(slot)

    def _room(self, transfer: int, keep: Collection[int] | None = None, *, force: bool = False) -> _Slot | None:
        """A slot for a transfer, which is emptied if necessary.

        An empty slot is preferred; then one whose transfer was staged unnecessarily and is not in `keep` (None: no such
        slot). With `force`, any slot that is not held is used, unchanged ones first.
        """
        choices = self._choices(transfer, force=force)
        for slot in choices:
            if slot.transfer is None:
                return slot
        oldest = sorted((slot for slot in choices if slot.held is None), key=lambda slot: slot.touched)
        unchanged = [slot for slot in oldest if not slot.changed]
        useless = [slot for slot in unchanged if keep is not None and slot.transfer not in keep]
        chosen = next(iter(useless + unchanged + oldest if force else useless), None)
        if chosen is not None:
            if chosen.changed:
                self._write_back(chosen)
            self._empty(chosen)
        return chosen

    def _choices(self, transfer: int, *, force: bool) -> list[_Slot]:
        """The slots that a transfer fits into, in the order in which empty ones are used.

        The smaller ones come first. The place in the expected order decides among them, so that neighbours use
        different slots and every step uses the same ones; a single smaller slot takes turns with the larger one. The
        larger one is left to the larger transfers that are expected soon: with `force` it comes last then, else not
        at all.
        """
        fitting = self._slots[: self._fitting[transfer]]
        alike = [slot for slot in fitting if slot.memory.nbytes == fitting[-1].memory.nbytes]
        turning = alike if len(alike) > 1 else fitting
        home = self._expected.get(transfer, len(self._seen)) % len(turning)
        choices = turning[home:] + turning[:home] + [slot for slot in fitting if slot not in turning]
        if len(alike) < len(fitting):
            soon = min((self._fitting[following] for following in self._upcoming(transfer)), default=len(fitting))
            if soon < len(fitting):
                kept = fitting[:soon]
                choices = [slot for slot in choices if slot not in kept] + (kept if force else [])
        return choices

    def _upcoming(self, transfer: int) -> list[int]:
        """The transfers expected after this one, as many as there are other slots."""
        if transfer not in self._expected:
            return []
        order = islice(self._expected, self._expected[transfer] + 1, None)
        return list(islice((following for following in order if following not in self._seen), len(self._slots) - 1))

    def _acquired(self, transfer: int) -> tuple[_Slot, tuple[int, ...]]:
        slot = self._staged.get(transfer)
        if slot is None or slot.held is None:
            self._check(transfer)
            raise RuntimeError(f"transfer {transfer} is not acquired")
        return slot, slot.held

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.touched = self._clock

    def _check(self, transfer: int) -> None:
        self._check_process()
        if not 0 <= transfer < len(self.slabs):
            raise ValueError(f"transfer must be in [0, {len(self.slabs) - 1}], got {transfer}")

    def _check_process(self) -> None:
        self.slabs[0].check_process()


class _Use:
    """See `Pipeline.using`."""

    __slots__ = ("_kept", "_more", "_parts", "_pipeline", "_transfer")

    def __init__(self, pipeline: Pipeline, transfer: int, parts: Sequence[int] | None, more: bool) -> None:
        self._pipeline, self._transfer, self._parts, self._more = pipeline, transfer, parts, more
        self._kept: Sequence[int] = ()

    def keep(self, parts: Sequence[int]) -> None:
        """Marks parts that keep their new values if the body raises."""
        self._kept = parts

    def __enter__(self) -> list[Tensor]:
        return self._pipeline.acquire(self._transfer, self._parts)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._pipeline.release(self._transfer, more=self._more)
        else:
            self._pipeline.discard(self._transfer, self._kept)


def _wait_for(streams: Streams, slots: Sequence[_Slot], rule: WaitFor) -> None:
    """Blocks the host until all copies from and to the slots are complete."""
    for slot in slots:
        streams.synchronize(slot.staged, rule)
        streams.synchronize(slot.free, rule)


def _settle(streams: Streams, slots: Sequence[_Slot], slabs: Sequence[Slab], process: int) -> None:
    if os.getpid() == process:
        _wait_for(streams, slots, WaitFor.LET_GO)
