"""Records of an optimizer's parameters that are kept from step to step.

A `ParamEntry` belongs to a parameter for as long as the parameter is in the optimizer. Its hash key is kept for as long
as the optimizer keeps the parameter's state: freezing, appending and reordering parameters do not change the keys of
the others. The role found for a parameter is kept too, from the first step on, whatever is added to the optimizer
later. A `ParamSpec` holds everything that follows from the parameter's shape and its group's options; a new one is made
when one of these changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins._torch_internals import GUARDS_AVAILABLE, tensor_guards
from collins.formats import TensorSpec
from collins.hashing import BlockHash, UniversalHash, name_key
from collins.identical import identical
from collins.roles import Role, found_roles
from collins.sharding import Slice, is_sharded
from collins.update import HashKeys, UpdateSpec, UpdateTask

Hash = BlockHash | UniversalHash


@dataclass(frozen=True, slots=True, eq=False)
class ParamSpec:
    """Values that follow from a parameter's shape and its group's options, kept from step to step."""

    settings: tuple[Any, ...]  # the options in `PLANNED`
    kind: type  # the type of the parameter
    size: torch.Size
    dtype: torch.dtype
    device: torch.device
    role: Role
    update: UpdateSpec
    keys: HashKeys
    hash: Hash | None  # None for dense moments
    numel: int
    tensors: dict[str, TensorSpec]  # the tensors of its state by name: the first moment's parts, then the second's
    first_count: int  # the number of tensors of the first moment
    slice: Slice | None  # this rank's part of a sharded parameter; `size` and `tensors` are those of the whole
    launch: Any  # the kernel launch of the engine, or None

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
        """The largest number by which a step can increase `UpdateTask.skipped` for this rank's part."""
        if not self.update.skip:
            return 0
        count = self.numel if self.slice is None else math.prod(self.slice.shape)
        return count if self.update.hash == "universal" else -(-count // int(self.update.loads[1]))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the state, by name."""
        return {name: spec.shape for name, spec in self.tensors.items()}

    def fits(self, p: Tensor, settings: tuple[Any, ...]) -> bool:
        """Whether this is still the spec of `p` under these settings."""
        return (
            self.settings is settings
            and self.kind is type(p)
            and self.size == p.shape
            and self.dtype is p.dtype
            and self.device == p.device
        )


class ParamEntry:
    """The record of a parameter of the optimizer.

    Attributes:
        p: the parameter.
        group: its group.
        key: the key from which its hashes derive.
        name: its name for errors.
        found: the role found for it, which applies if its group sets none; None until `ParamEntries.find_roles` is
            called.
        settled: whether that role can no longer change.
        spec: its spec in the last step.
        step: the counter in its state when the state was adopted; None before.
        moments: the tensors of its state when the state was adopted; None before.
        state: all values of that state when it was last checked.
        task: the update task over these moments.
        counter: the index of `step` among the optimizer's counters, where it is on the host.
        program: the program that steps it in backward.
    """

    __slots__ = (
        "_addresses",
        "_guards",
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
        "state",
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
        self.state: dict[str, Any] | None = None
        self._guards: Any = None  # of the parameter, a gradient and the moments that have been checked together
        self._held: list[tuple[str, Tensor, TensorSpec, torch.device, int]] = []
        self._addresses: list[int] = []  # of the counter and the moments that have been checked

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Sets the entry's tensors to those of a state."""
        tensors = self.known_spec.tensors
        self.step, self.moments = state["step"], tuple(state[name] for name in tensors)
        self._held = [(name, t := state[name], due, t.device, address(t)) for name, due in tensors.items()]
        self.task = self.program = self.state = self._guards = None

    def accept(self, g: Tensor, state: Mapping[str, Any]) -> None:
        """Notes, for `accepts`, that the parameter, its gradient and its state have been checked."""
        spec, moments, self._guards = self.known_spec, self.moments, None
        plain = spec.slice is None and type(g) is Tensor and not g.is_neg()
        mutable = isinstance(spec.hash, UniversalHash)  # its coefficients may be set
        if GUARDS_AVAILABLE and moments is not None and plain and not mutable:
            self.state, self._guards = dict(state), tensor_guards([self.p, g, *moments])
            self._addresses = self._current_addresses()

    def accepts(self, g: Tensor, settings: tuple[Any, ...]) -> bool:
        """Whether a step may use this gradient without further checks, given that the values of the state are `state`.

        It compares the parameter, the gradient and the moments with those given to `accept`, in C: all that
        `ParamSpec.fits`, `holds` and `gradient_of` compare.
        """
        if self._guards is None or self.spec is None or self.spec.settings is not settings:
            return False
        if not self._guards.check(self.p, g, *(self.moments or ())):
            return False
        return self._current_addresses() == self._addresses

    def _current_addresses(self) -> list[int]:
        """The addresses of the counter and of the moments, which are plain tensors."""
        return [t.data_ptr() for t in (self.step, *(self.moments or ())) if t is not None]

    def holds(self, state: Mapping[str, Any]) -> bool:
        """Whether a state still has the counter and the moments that were adopted, of the same form and memory."""
        if self.moments is None or state.get("step") is not self.step:
            return False
        for name, moment, due, device, at in self._held:
            same = state.get(name) is moment and (moment.shape, moment.dtype, moment.device) == (*due, device)
            if not same or address(moment) != at:
                return False
        return True

    def forget(self) -> None:
        """Drops the adopted state, so that it must be adopted again."""
        self.step = self.moments = self.state = self.task = self.program = self._guards = None

    def respec(self, spec: ParamSpec) -> None:
        """Sets a new spec, under which the state must be adopted again."""
        self.spec = spec
        self.forget()

    @property
    def known_spec(self) -> ParamSpec:
        """The spec, of an entry that has one."""
        assert self.spec is not None
        return self.spec


class Carried(NamedTuple):
    """The part of the entries that a copy of an optimizer, by deepcopy or pickle, takes over from the original."""

    entries: Sequence[tuple[int, UniversalHash | None, Role | None]] = ()  # key, hash, and the role if it is settled
    by_module: Mapping[str, Role] = {}  # roles that follow from modules, by parameter name


class ParamEntries:
    """The entries of the parameters in an optimizer's groups, whose lists users may change between steps.

    A parameter that is removed keeps its key for as long as the optimizer keeps its state.

    Args:
        carried: taken from the original, if the optimizer is a copy.
    """

    def __init__(self, carried: Carried) -> None:
        self._copied = list(carried.entries)
        self._by_module = dict(carried.by_module)
        self._found = False  # whether the roles of all entries are known
        self._absent: list[ParamEntry] = []  # entries of parameters that were removed and still have a state
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._entries: list[list[ParamEntry]] = []

    def by_group(self, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any]) -> list[list[ParamEntry]]:
        """The entries of each group. As long as no group changes, every call returns the same object."""
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
        """The part of the entries that a copy takes over."""
        return Carried(
            [
                (entry.key, entry.universal, entry.found if entry.settled else None)
                for entry in flattened(self._entries)
            ],
            self._by_module,
        )

    def add_module_roles(self, by_module: Mapping[str, Role]) -> None:
        """Adds roles that follow from modules, by parameter name. If two roles of a name disagree, neither is used."""
        for name, role in by_module.items():
            if self._by_module.setdefault(name, role) != role:
                del self._by_module[name]
        self._found = False

    def find_roles(self) -> None:
        """Finds the role of each entry whose role is not settled."""
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
        """Fixes the roles of all entries, before moments are allocated or loaded."""
        self.find_roles()
        for entry in flattened(self._entries):
            entry.settled = True

    def kept(self) -> Iterator[ParamEntry]:
        """The entries of all parameters whose state the optimizer keeps, including removed parameters."""
        return flattened([*self._entries, self._absent])

    def _made(self, groups: Sequence[dict[str, Any]], known: Mapping[int, ParamEntry]) -> list[list[ParamEntry]]:
        params = [p for group in groups for p in group["params"]]
        _refuse_repeated(groups, params)
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
    return known[0] is group and identical(known[1], params)


def _refuse_repeated(groups: Sequence[dict[str, Any]], params: Sequence[Tensor]) -> None:
    """Raises a ValueError for a parameter that occurs twice in the groups: one step would update it twice at a time."""
    if len(set(map(id, params))) == len(params):
        return
    seen: dict[int, str] = {}
    for number, group in enumerate(groups):
        for place, p in enumerate(group["params"]):
            where = f"params[{place}] of parameter group {number}"
            if id(p) in seen:
                raise ValueError(f"{where} must be a parameter that no other place has, got that of {seen[id(p)]}")
            seen[id(p)] = where


def _free(number: int, taken: set[int]) -> int:
    """A key for a parameter without a name: its number, unless another one has it."""
    return number if number not in taken else 1 + max(key for key in taken if key < 2**63)


def address(t: Tensor) -> int:
    """The address of a tensor; 0 for a DTensor, whose local tensor no assignment to `.data` replaces."""
    return 0 if is_sharded(t) else t.data_ptr()


def label(name: str | int) -> str:
    """A parameter's name in errors."""
    return f"parameter {name!r}"


def flattened(groups: Iterable[Sequence[ParamEntry]]) -> Iterator[ParamEntry]:
    """The entries of all groups."""
    for entries in groups:
        yield from entries
