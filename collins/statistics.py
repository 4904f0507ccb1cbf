"""Statistics of the last steps, computed on the device, where they stay until they are read.

Under nonfinite="skip" every step counts the buckets that it skipped, and the steps in which everything was skipped.
Sizes of weights and updates are measured only in steps for which they were requested, on a sample of each parameter: at
most `SAMPLE` elements spread evenly over its memory, so that no step needs memory of a parameter's size. For a sharded
parameter they are those of this rank's part.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import foreach_norm
from collins.devices import Place, is_capturing, place_on
from collins.entries import ParamEntry
from collins.rounding import ROUNDED
from collins.sharding import local

SAMPLE = 1 << 14  # the most elements of a parameter in its sample

ALL_SKIPPED = 100  # consecutive steps in which everything was skipped, after which there is a warning
_LOOKS = 50  # steps between two reads of that number
_ROUNDING_CHECK = 100  # the step whose updates are checked if 16-bit weights are rounded to nearest

Groups = Sequence[dict[str, Any]]


class Reading:
    """An asynchronous copy of a value from a device to the host, which never waits for it."""

    def __init__(self) -> None:
        self._under_way: tuple[Tensor, torch.Event | None] | None = None

    def ask(self, value: Tensor) -> None:
        """Starts a copy of the current value; a pending copy is dropped."""
        if value.is_cpu:
            self._under_way = value.clone(), None
            return
        host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
        host.copy_(value, non_blocking=True)
        arrived = torch.Event(value.device)
        arrived.record()
        self._under_way = host, arrived

    def take(self) -> Tensor | None:
        """The value if its copy is complete, else None; each value is returned once."""
        if self._under_way is None:
            return None
        host, arrived = self._under_way
        if arrived is not None and not arrived.query():
            return None
        self._under_way = None
        return host


class SkipCounts:
    """Counts of what nonfinite="skip" has skipped; see `collins.update.UpdateTask.skipped`."""

    def __init__(self) -> None:
        self._counters: dict[torch.device, Tensor] = {}
        self._before, self._steps, self._in_a_row = torch.zeros(3, dtype=torch.int64, device="cpu").unbind()
        self._due = 0  # the number that this step could skip
        self._count = 0
        self._reading = Reading()
        self._warned = False

    def counter(self, device: torch.device) -> Tensor:
        """The counter of a device: int64, shape (1,), the same tensor for as long as the optimizer lives."""
        if device not in self._counters:
            self._counters[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._counters[device]

    @property
    def buckets(self) -> Tensor:
        """The number of buckets skipped so far, 0-d."""
        counters = [counter[0] for counter in self._counters.values() if not counter.is_meta]
        home = next((counter.device for counter in counters if not counter.is_cpu), torch.device("cpu"))
        total: Tensor = torch.zeros((), dtype=torch.int64, device="cpu")
        if counters:
            total = torch.stack([counter.to(home) for counter in counters]).sum()
        return total

    @property
    def steps(self) -> Tensor:
        """The number of steps in which everything was skipped, 0-d; a copy."""
        return self._steps.clone()

    def stepped(self, due: int) -> None:
        """Records that parameters were stepped, with the number that could have been skipped."""
        self._due += due

    def end(self, *, capturing: bool) -> None:
        """Ends a step."""
        due, self._due = self._due, 0
        if not due:
            return
        now = self.buckets
        if self._before.device != now.device:
            own = self._before, self._steps, self._in_a_row
            self._before, self._steps, self._in_a_row = (t.to(now.device) for t in own)
        everything = now - self._before == due
        self._steps += everything
        self._in_a_row += 1
        self._in_a_row *= everything
        self._before.copy_(now)
        if not (capturing or self._warned):
            self._look()

    def _look(self) -> None:
        """Warns once, some steps late, because the host reads the count asynchronously."""
        self._count += 1
        if self._count % _LOOKS == 0:
            self._reading.ask(self._in_a_row)
        found = self._reading.take()
        if found is not None and int(found) >= ALL_SKIPPED:
            self._warned = True
            warnings.warn(
                f"nonfinite='skip' has skipped every gradient in {int(found)} consecutive steps: none of them was"
                " finite, or their norm was not, and nothing is being trained. Check the loss and its scale;"
                " nonfinite='error' names the parameters",
                stacklevel=2,
            )


class _Kind(NamedTuple):
    """Parameters that are measured together."""

    group: int  # the id() of their group
    place: Place
    dtype: torch.dtype


class _Measured(NamedTuple):
    """Sums over the parameters of one kind in a step."""

    sums: Tensor  # squares of updates, squares of weights, and the number of weights that changed: (3,)
    weights: int  # the number of weights


class UpdateSamples:
    """Sizes of updates, from samples of the weights before and after a step."""

    def __init__(self) -> None:
        self._asked = self._measuring = False
        self._found: dict[_Kind, _Measured] = {}
        self._values: dict[str, Tensor] = {}
        self._count = 0  # steps
        self._reading, self._rates = Reading(), ""
        self._warned = False

    def ask(self) -> None:
        """Requests that the next step is measured."""
        self._asked = True

    @property
    def values(self) -> dict[str, Tensor]:
        """The values of the last step that was measured."""
        return dict(self._values)

    def begin(self, groups: Groups, *, anew: bool, capturing: bool) -> None:
        """Begins a step (in backward, when the first gradient arrives), or, if not `anew`, continues one to end it."""
        if anew:  # drop the values of an interrupted step
            self._found = {}
        if self._count + 1 == _ROUNDING_CHECK and any(map(_rounds_to_nearest, groups)):
            self._asked = True
        if self._asked and not capturing:
            self._asked, self._measuring = False, True

    def before(self, entries: Sequence[ParamEntry]) -> list[Tensor]:
        """Copies of the samples of these parameters before they are stepped, for `after`."""
        return [_samples(members) for members in _alike(entries).values()] if self._measuring else []

    def after(self, entries: Sequence[ParamEntry], before: Sequence[Tensor]) -> None:
        """Measures parameters that have been stepped, given their samples from `before`."""
        for (key, members), old in zip(_alike(entries).items() if before else (), before, strict=True):
            new = _samples(members)
            wide = torch.promote_types(new.dtype, torch.float32)
            columns = new.to(wide) - old.to(wide), new.to(wide), (new != old).to(wide)
            sizes = [len(sample(p)) for p in members]
            norms = foreach_norm([part for column in columns for part in column.split(sizes)], 2)
            counts = [p.numel() / size for p, size in zip(members, sizes, strict=True)]
            weights = torch.tensor(counts, dtype=wide, device="cpu")
            if not new.is_cpu:
                weights = weights.pin_memory().to(new.device, non_blocking=True)
            sums = (torch.stack(norms).view(3, -1).square() * weights).sum(1)
            count = sum(p.numel() for p in members)
            if key in self._found:
                sums, count = sums + self._found[key].sums, count + self._found[key].weights
            self._found[key] = _Measured(sums, count)

    def end(self, groups: Groups, *, capturing: bool) -> None:
        """Ends a step."""
        self._count += 1
        if self._measuring:
            self._measuring, self._values = False, {}
            found, self._found = self._found, {}
            for number, group in enumerate(groups):
                own = {kind: each for kind, each in found.items() if kind.group == id(group)}
                if own:
                    self._values |= _summary(number, own)
            self._ask_of_rounding(groups)
        small = None if self._warned or capturing else self._reading.take()
        if small is not None and bool(small.any()):
            self._warned = True
            warnings.warn(
                f"lr is too small to move most 16-bit weights of {self._rates}: they are rounded to nearest, which"
                " drops updates below half a unit in the last place. Use stochastic_rounding=None, or a larger lr",
                stacklevel=2,
            )

    def _ask_of_rounding(self, groups: Groups) -> None:
        """Starts to read whether rounding to nearest drops updates.

        It does if most weights did not change, and lr, the approximate size of an update, is below half a unit in the
        last place of a weight of typical size.
        """
        small, rates = [], []
        for number, group in enumerate(groups):
            moved, size = (self._values.get(f"{name}/{number}") for name in ("moved_share", "weight_rms"))
            if moved is not None and size is not None and _rounds_to_nearest(group):
                spacing = max(torch.finfo(p.dtype).eps for p in group["params"] if p.dtype in ROUNDED)
                lr = group["lr"]
                lr = lr.to(size.device) if isinstance(lr, Tensor) else lr
                small.append((moved < 0.5) & (size * (spacing / 4) > lr).reshape(()))
                rates.append(f"group {number}" if isinstance(lr, Tensor) else f"group {number} with lr={lr:g}")
        if small:
            self._rates = ", ".join(rates)
            self._reading.ask(torch.stack([each.to(small[0].device) for each in small]))


class Statistics:
    """The statistics of one optimizer; `Collins.statistics` documents them."""

    def __init__(self) -> None:
        self.skips = SkipCounts()
        self.updates = UpdateSamples()

    def begin(self, groups: Groups, *, anew: bool = True) -> None:
        """See `UpdateSamples.begin`."""
        self.updates.begin(groups, anew=anew, capturing=is_capturing())

    @contextlib.contextmanager
    def stepping(self, entries: Sequence[ParamEntry], skippable: int) -> Iterator[None]:
        """A context in whose body these parameters are stepped; `skippable` is the number that may be skipped."""
        before = self.updates.before(entries)
        yield
        self.updates.after(entries, before)
        self.skips.stepped(skippable)

    def end(self, groups: Groups) -> None:
        """Ends a step."""
        capturing = is_capturing()
        self.skips.end(capturing=capturing)
        self.updates.end(groups, capturing=capturing)

    def values(self, norm: Tensor | None, link_bytes: int) -> dict[str, Tensor | int]:
        """All statistics, including the given gradient norm of the last step, if known, and the bytes copied so far."""
        counts = self.skips.buckets, self.skips.steps
        norm = torch.full((), math.nan, dtype=torch.float32, device=counts[0].device) if norm is None else norm
        known = {"grad_norm": norm, "skipped_buckets": counts[0], "skipped_steps": counts[1]}
        return {**known, "link_bytes": link_bytes, **self.updates.values}


def _rounds_to_nearest(group: Mapping[str, Any]) -> bool:
    return group["stochastic_rounding"] is False and any(p.dtype in ROUNDED for p in group["params"])


def _alike(entries: Iterable[ParamEntry]) -> dict[_Kind, list[Tensor]]:
    """This rank's parts of parameters, by their kind."""
    found: dict[_Kind, list[Tensor]] = {}
    for entry in entries:
        p = local(entry.p).detach()
        if p.numel() and not p.is_meta:
            found.setdefault(_Kind(id(entry.group), place_on(p.device), p.dtype), []).append(p)
    return found


def _samples(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([sample(p) for p in params])


def sample(p: Tensor) -> Tensor:
    """At most `SAMPLE` elements of a parameter, at equal distances in its memory, flat; all of a smaller one."""
    # With an odd distance the sample covers all columns, since their number is mostly a power of two.
    distance = -(-p.numel() // SAMPLE) | 1
    if not p.is_contiguous():  # sorts the dimensions by stride, which makes a transposed tensor contiguous
        strides = p.stride()
        p = p.permute(sorted(range(p.ndim), key=lambda dim: -strides[dim]))
    return p.reshape(-1)[::distance]


def _summary(number: int, found: Mapping[_Kind, _Measured]) -> dict[str, Tensor]:
    """The statistics of the parameters of one group."""
    home = next((kind.place.device for kind in found if kind.place.device.type != "cpu"), torch.device("cpu"))
    rounded = [each for kind, each in found.items() if kind.dtype in ROUNDED]
    sums = torch.stack([each.sums.to(home) for each in found.values()]).sum(0)
    update, weight = (sums[:2] / sum(each.weights for each in found.values())).sqrt()
    values = {f"update_rms/{number}": update, f"weight_rms/{number}": weight}
    if rounded:
        moved = torch.stack([each.sums[2].to(home) for each in rounded]).sum()
        values[f"moved_share/{number}"] = moved / sum(each.weights for each in rounded)
    return values
