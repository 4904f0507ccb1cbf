"""What is known of an optimizer's parameters from step to step.

A `ParamEntry` stays with a parameter for as long as it is in the optimizer, and its hash key for as long as its state
is kept: freezing, appending and reordering parameters leave the keys of all others as they were. So it is with the role
that was found for a parameter, from the first step on, whatever is added to the optimizer later. A `ParamSpec` is what
follows from the parameter's shape and its group's options; it is made anew when one of these changes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins.formats import TensorSpec
from collins.hashing import BlockHash, UniversalHash, name_key
from collins.roles import Role, found_roles
from collins.sharding import Slice
from collins.update import HashKeys, UpdateSpec, UpdateTask

Hash = BlockHash | UniversalHash


@dataclass(frozen=True, slots=True, eq=False)
class ParamSpec:
    """What follows from a parameter's shape and its group's options, kept from step to step."""

    settings: tuple[Any, ...]  # the options in `PLANNED`
    kind: type  # of the parameter, as the next three
    size: torch.Size
    dtype: torch.dtype
    device: torch.device
    role: Role
    update: UpdateSpec
    keys: HashKeys
    hash: Hash | None  # None for dense moments
    numel: int
    tensors: dict[str, TensorSpec]  # what its state holds, by name: the first moment's parts, then the second's
    first_count: int  # how many of them are the first moment's
    slice: Slice | None  # of a sharded parameter, whose size and tensors above are those of the whole
    launch: Any  # the engine's

    @property
    def local_tensors(self) -> tuple[TensorSpec, ...]:
        """This rank's part of each tensor of the state."""
        if self.slice is None or self.slice.shape == self.size:
            return tuple(self.tensors.values())
        own = self.slice.shape
        shapes = (own if spec.shape == self.size else (own[0], *spec.shape[1:]) for spec in self.tensors.values())
        return tuple(map(TensorSpec, shapes, (spec.dtype for spec in self.tensors.values())))

    @property
    def skippable(self) -> int:
        """How much a step may leave out of this rank's part, as `UpdateTask.skipped` counts it."""
        if not self.update.skip:
            return 0
        count = self.numel if self.slice is None else math.prod(self.slice.shape)
        return count if self.update.hash == "universal" else -(-count // int(self.update.loads[1]))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the state, by name."""
        return {name: spec.shape for name, spec in self.tensors.items()}

    def fits(self, p: Tensor, settings: tuple[Any, ...]) -> bool:
        """Whether this still is the spec of `p` under these settings."""
        return (
            self.settings is settings
            and self.kind is type(p)
            and self.size == p.shape
            and self.dtype is p.dtype
            and self.device == p.device
        )


class ParamEntry:
    """A parameter of the optimizer, and what is known of it from step to step.

    Attributes:
        p: the parameter.
        group: its group.
        key: what its hashes derive from.
        name: for errors.
        found: its role, as far as its group says nothing else; None until `ParamEntries.find_roles` is asked.
        settled: whether that role stays.
        spec: as of the last step.
        step: the counter in its state, and `moments`: the tensors of its state, as they were adopted; None before.
        task: of the update, over these moments.
        counter: the number of `step` among the optimizer's counters, where it is on the host.
        program: the program that steps it in backward.
    """

    __slots__ = (
        "_held",
        "counter",
        "found",
        "group",
        "key",
        "moments",
        "name",
        "p",
        "program",
        "settled",
        "spec",
        "step",
        "task",
        "universal",
    )

    def __init__(self, p: Tensor, key: int, universal: UniversalHash | None = None, found: Role | None = None) -> None:
        self.p = p
        self.key = key
        self.universal = universal
        self.found = found
        self.settled = found is not None
        self.group: dict[str, Any] = {}
        self.name = ""
        self.spec: ParamSpec | None = None
        self.step: Tensor | None = None
        self.moments: tuple[Tensor, ...] | None = None
        self.counter: int | None = None
        self.task: UpdateTask | None = None
        self.program: Any = None
        self._held: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = []

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Takes the tensors of a state as the entry's own."""
        tensors = self.known_spec.tensors
        self.step, self.moments = state["step"], tuple(state[name] for name in tensors)
        self._held = [(name, state[name], due.shape, due.dtype) for name, due in tensors.items()]
        self.task = self.program = None

    def holds(self, state: Mapping[str, Any]) -> bool:
        """Whether a state still has the counter and the moments that were adopted, and these are what they were."""
        if self.moments is None or state.get("step") is not self.step:
            return False
        for name, moment, shape, dtype in self._held:
            if state.get(name) is not moment or moment.shape != shape or moment.dtype is not dtype:
                return False
        return True

    def forget(self) -> None:
        """The state is to be adopted anew."""
        self.step = self.moments = self.task = self.program = None

    def respec(self, spec: ParamSpec) -> None:
        """Takes a new spec; the state is to be adopted under it."""
        self.spec = spec
        self.forget()

    @property
    def known_spec(self) -> ParamSpec:
        """The spec, of an entry that has one."""
        assert self.spec is not None
        return self.spec


class Carried(NamedTuple):
    """What the copy of an optimizer, by deepcopy or pickle, knows of its parameters from the original."""

    entries: Sequence[tuple[int, UniversalHash | None, Role | None]] = ()  # key, hash, and the role that stays
    by_module: Mapping[str, Role] = {}  # what modules say of parameters, by name


class ParamEntries:
    """The parameters of an optimizer's groups, whose lists others may change between steps.

    A parameter that is taken out keeps its key for as long as the optimizer keeps its state.

    Args:
        carried: of the original, where the optimizer is a copy.
    """

    def __init__(self, carried: Carried) -> None:
        self._copied = list(carried.entries)
        self._by_module = dict(carried.by_module)
        self._found = False  # whether the roles of all entries are known
        self._absent: list[ParamEntry] = []  # of parameters that have been taken out
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._entries: list[list[ParamEntry]] = []

    def by_group(self, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any]) -> list[list[ParamEntry]]:
        """The entries of each group: the same object as at the last call for as long as no parameter changes."""
        known = self._groups
        if len(known) != len(groups) or not all(map(_is_same_group, known, groups)):
            before = [*flattened(self._entries), *self._absent]
            self._entries = self._made(groups, {id(entry.p): entry for entry in before})
            present = set(map(id, flattened(self._entries)))
            self._absent = [entry for entry in before if id(entry) not in present and entry.p in states]
            self._groups = [(group, list(group["params"])) for group in groups]
            self._found = False
        return self._entries

    def carried(self) -> Carried:
        """What a copy is to know."""
        return Carried(
            [
                (entry.key, entry.universal, entry.found if entry.settled else None)
                for entry in flattened(self._entries)
            ],
            self._by_module,
        )

    def told(self, by_module: Mapping[str, Role]) -> None:
        """Takes what the modules of parameters say of them, by name. Where they disagree on a name, neither counts."""
        for name, role in by_module.items():
            if self._by_module.setdefault(name, role) != role:
                del self._by_module[name]
        self._found = False

    def find_roles(self) -> None:
        """Finds the role of each entry that has none which stays."""
        if self._found:
            return
        names = [group.get("param_names") or [None] * len(params) for group, params in self._groups]
        entries = list(flattened(self._entries))
        shapes = [tuple(entry.p.shape) for entry in entries]
        roles = found_roles(list(zip(chain(*names), shapes, strict=True)), self._by_module)
        for entry, role in zip(entries, roles, strict=True):
            if not entry.settled and entry.found != role:
                entry.found, entry.spec = role, None
        self._found = True

    def settle(self) -> None:
        """From now on the roles stay: moments are about to be made or loaded."""
        self.find_roles()
        for entry in flattened(self._entries):
            entry.settled = True

    def kept(self) -> Iterator[ParamEntry]:
        """The entries of all parameters whose state the optimizer keeps, also of those that have been taken out."""
        return flattened([*self._entries, self._absent])

    def _made(self, groups: Sequence[dict[str, Any]], known: Mapping[int, ParamEntry]) -> list[list[ParamEntry]]:
        params = [p for group in groups for p in group["params"]]
        found = [known.get(id(p)) for p in params]
        for number, carried in enumerate(self._copied[: len(params)]):
            found[number] = ParamEntry(params[number], *carried)
        self._copied = []
        taken = {entry.key for entry in found if entry is not None}
        made, number = [], 0
        for group in groups:
            names, entries = group.get("param_names"), []
            for place, p in enumerate(group["params"]):
                entry = found[number]
                if entry is None:
                    entry = ParamEntry(p, name_key(names[place]) if names else _free(number, taken))
                    taken.add(entry.key)
                entry.group, entry.name = group, label(names[place] if names else number)
                entries.append(entry)
                number += 1
            made.append(entries)
        return made


def _is_same_group(known: tuple[dict[str, Any], list[Tensor]], group: dict[str, Any]) -> bool:
    params = group["params"]
    return known[0] is group and len(known[1]) == len(params) and all(map(operator.is_, known[1], params))


def _free(number: int, taken: set[int]) -> int:
    """A key for a parameter without a name: its number, unless another one has it."""
    return number if number not in taken else 1 + max(key for key in taken if key < 2**63)


def label(name: str | int) -> str:
    """A parameter's name in errors."""
    return f"parameter {name!r}"


def flattened(groups: Iterable[Sequence[ParamEntry]]) -> Iterator[ParamEntry]:
    """The entries of all groups."""
    for entries in groups:
        yield from entries
