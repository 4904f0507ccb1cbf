"""Steps parameters, after backward or in it: checks them, places and adopts their state, and runs a program.

All steps take this path. A step is checked and becomes a `StepProgram`, which later steps run again as long as only
gradients and scalars change. A step in backward is a program of one parameter, made when its gradient has arrived.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collins.clipping import UNSCALED, Clipping
from collins.compile import Engine
from collins.compile.program import ProgramGroup, ScalarsOf, StepProgram, scalars_under
from collins.devices import is_capturing
from collins.entries import Carried, Hash, ParamEntries, ParamEntry, ParamSpec, flattened
from collins.formats import TensorSpec
from collins.fused_backward import SingleSteps
from collins.hashing import UniversalHash
from collins.identical import identical
from collins.interrupts import HeldInterrupts
from collins.offload import MemoryPolicy
from collins.offload.staging import StateRequest
from collins.offload.tiers import ResidentStore, Store, TieredStore
from collins.options import check_options
from collins.parameter import check_state, gradient_of, has_moments, role_of, settings_of, spec_of, task_of
from collins.readable import writable
from collins.roles import Role
from collins.rule import StepScalars, partial_scalars
from collins.sharding import is_placed_like, is_sharded, local, placed, refuse_flat_partitions, sharded_over
from collins.state import StepCounters, adopt, drop, mark
from collins.statistics import Statistics
from collins.update import UpdateTask

Groups = Sequence[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]


class Part(NamedTuple):
    """A partial step of one step; see `collins.rule.partial_scalars`."""

    number: int  # from 0
    parts: int  # how many make up a step


WHOLE = Part(0, 1)


class Stepper:
    """Steps the parameters of one optimizer, whose groups and state are passed to each call.

    Args:
        seed, compile, memory, clipping: those of the optimizer.
        carried: the part of the entries that a copy of an optimizer takes over.
    """

    def __init__(
        self,
        seed: int,
        compile: bool | None,
        memory: MemoryPolicy | None,
        clipping: Clipping,
        carried: Carried,
    ) -> None:
        self.seed = seed
        self.clipping = clipping
        self.statistics = Statistics()
        self.engine = Engine(compile, busy_link=memory is not None)
        self.store: Store = ResidentStore() if memory is None else TieredStore(memory)
        self.single_steps = SingleSteps()
        self._entries = ParamEntries(carried)
        self._counters = StepCounters()
        self._known_roster: list[list[ParamEntry]] = []
        self._settings: list[tuple[Any, ...]] = []
        self._program: StepProgram | None = None  # the last step's, where the next one may run it again
        self._last: list[ParamEntry] = []  # the entries of the last program that was made

    def entries(self, groups: Groups, states: States) -> Iterator[ParamEntry]:
        """The parameters of all groups."""
        return flattened(self._roster(groups, states))

    def role(self, entry: ParamEntry) -> Role:
        """The role of a parameter under the current options."""
        self._entries.find_roles()
        return role_of(entry)

    def add_module_roles(self, by_module: Mapping[str, Role]) -> None:
        """Adds roles that follow from modules, by parameter name."""
        self._entries.add_module_roles(by_module)

    def carried(self) -> Carried:
        """The part of the entries that a copy of the optimizer takes over."""
        return self._entries.carried()

    def _roster(self, groups: Groups, states: States) -> list[list[ParamEntry]]:
        roster = self._entries.by_group(groups, states)
        if roster is not self._known_roster:
            refuse_flat_partitions(groups)
            self._known_roster = roster
            # Frees the moments of removed parameters.
            self.store.retain(entry.p for entry in self._entries.kept())
            self._counters.retain(self._entries.kept())
            self.engine.retain(entry.task for entry in self._entries.kept() if entry.task is not None)
            self._program, self._last = None, []
        return roster

    def spec(self, entry: ParamEntry, settings: tuple[Any, ...] | None = None) -> ParamSpec:
        """The spec of a parameter under the current options."""
        self._entries.find_roles()
        settings = self._settings_of(entry.group) if settings is None else settings
        if entry.spec is None or not entry.spec.fits(entry.p, settings):
            entry.respec(spec_of(entry, settings, self.seed, self.engine.launch_of))
        return entry.known_spec

    def hash_of(self, groups: Groups, states: States, param: Tensor) -> Hash | None:
        """The hash of a parameter, None where its moments are dense.

        Raises:
            ValueError: when the parameter is in none of the groups.
        """
        for entry in self.entries(groups, states):
            if entry.p is param:
                return self.spec(entry).hash
        raise ValueError(f"param must be a parameter of this optimizer, got a {tuple(param.shape)} tensor that is not")

    def update(self, groups: Groups, states: States, *, repeats: bool = True) -> None:
        """Performs a step of all parameters that have a gradient; after steps in backward, of the remaining ones.

        Args:
            groups, states: those of the optimizer.
            repeats: whether later steps may run the program of this one.
        """
        alone = self.single_steps.end()
        self.store.refresh()
        self.statistics.begin(groups, anew=repeats and not alone)
        bound = self.matching(groups, states)
        if bound is not None:
            assert self._program is not None
            self._run(self._program, bound, groups)
        else:
            self._update_anew(groups, states, repeats=repeats)
        self.end(groups, states)
        self.store.finish()

    def end(self, groups: Groups, states: States) -> None:
        """Ends a step: computes its gradient norm and its statistics."""
        if self.clipping.max_norm is not None:
            self.clipping.end((entry.p for entry in self.entries(groups, states)), groups)
        self.statistics.end(groups)

    def _run(self, program: StepProgram, bound: Any, groups: Groups) -> None:
        scalars_of: ScalarsOf = scalars_under
        if self.clipping.max_norm is not None:
            self.clipping.adopt(groups)
            grads, _ = bound
            # Computed at its first use, after the program has checked the gradients.
            scale = functools.cache(lambda: self.clipping.scale([entry.p for entry in program.entries], grads))
            scalars_of = lambda group, step: scalars_under(group, step, scale().of(group))  # noqa: E731
        with self.statistics.stepping(program.entries, program.skippable):
            program.run(bound, scalars_of)

    def _update_anew(self, groups: Groups, states: States, *, repeats: bool) -> None:
        """A step with a new program. State that it allocates is dropped again for parameters that are not stepped."""
        new: list[ParamEntry] = []
        program = None
        try:
            program, bound = self._build(groups, states, new, repeats=repeats)
            self._run(program, bound, groups)
        except BaseException:
            stepped = {program.entries[number] for number in program.stepped} if program else set()
            drop([entry for entry in new if entry not in stepped], states)
            raise

    def matching(self, groups: Groups, states: States) -> Any:
        """This step's gradients, prepared for the last step's program; None if that cannot be run again."""
        same = self._roster(groups, states) is (self._program and self._program.roster)
        program = self._program
        if program is None or is_capturing():
            return None
        for group, options in zip(program.groups, program.options, strict=True):
            if options.changed():
                settings = self._settings_of(group.options)
                same = same and not group.options["capturable"] and settings is group.settings
        bound = program.matches(states) if same else None
        if bound is None:
            self._program = None
        return bound

    def _build(
        self, groups: Groups, states: States, new: list[ParamEntry], *, repeats: bool
    ) -> tuple[StepProgram, Any]:
        """Checks everything, and makes the program of this step.

        Args:
            groups, states, repeats: as for `update`.
            new: entries whose state is allocated are appended to it.

        Returns:
            The program, and this step's gradients as prepared by `StepProgram.bind`.
        """
        capturing = is_capturing()
        roster = self._roster(groups, states)
        found: list[ProgramGroup] = []
        grads: list[Tensor] = []
        for entries in filter(None, roster):
            group = entries[0].group
            check_options(group)
            if capturing and not group["capturable"]:
                raise RuntimeError("capturable must be True for a step that a CUDA graph captures, got False")
            settings = self._settings_of(group)
            given = [(entry, g) for entry in entries if (g := entry.p.grad) is not None]
            own = [entry for entry, _ in given]
            if own:
                self._entries.find_roles()
            known = identical([states.get(entry.p) for entry in own], [entry.state for entry in own])
            for entry, g in given:
                if not (known and entry.accepts(g, settings)):
                    self._check(entry, states, settings)
                    given_g, g = g, gradient_of(entry, g)
                    entry.accept(given_g, states.get(entry.p) or {})
                grads.append(g)
            found.append(ProgramGroup(group, settings, own))
        stepping = [entry for group in found for entry in group.entries]
        self._adopt(stepping, states, flattened(roster), new)
        executor = self.store.executor(self.engine, list(map(self._task, stepping)), [e.p for e in stepping], grads)
        program = StepProgram(found, executor, self._counters, roster)
        # While the set of parameters with gradients changes, no program is run again, and setting guards would only
        # cost as much time as the step itself.
        settled, self._last = stepping == self._last, stepping
        if settled and repeats:
            stepped = set(stepping)
            program.guard(grads, [entry.p for entry in flattened(roster) if entry not in stepped], states)
            self._program = program
        return program, program.bind(grads)

    def _check(self, entry: ParamEntry, states: States, settings: tuple[Any, ...]) -> None:
        """Raises an error for a parameter or a state that cannot be stepped."""
        spec = self.spec(entry, settings)
        state = states.get(entry.p) or {}
        if entry.holds(state) and self._counters.attached(entry.counter):
            if isinstance(spec.hash, UniversalHash):  # its coefficients may have been set
                check_state(entry, state, self.seed, self.store)
            return
        entry.forget()
        check_state(entry, state, self.seed, self.store)

    def _adopt(
        self, entries: Sequence[ParamEntry], states: States, every: Iterable[ParamEntry], new: list[ParamEntry]
    ) -> None:
        """Places and adopts the state of checked entries; entries that had none are appended to `new`."""
        unknown = [entry for entry in entries if entry.moments is None]
        if unknown:
            self.place([entry for entry in every if can_step(entry)])
            new += (entry for entry in unknown if not has_moments(states.get(entry.p) or {}))
            for entry in unknown:
                adopt(entry, states, self.store, self._counters, self.seed)

    def place(self, entries: Iterable[ParamEntry], *, early: bool = False, loading: bool = False) -> None:
        """Allocates memory for the moments of entries that have none; see `collins.offload.tiers.Store`."""
        self._entries.settle()
        specs = [(entry, self.spec(entry)) for entry in entries]
        requests = [StateRequest(entry.name, entry.p, spec.local_tensors, spec.role) for entry, spec in specs]
        self.store.place(requests, early=early, loading=loading)

    def state_to_load(self, entry: ParamEntry, present: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a parameter's state, to be filled; those in `present` are reused where they fit."""
        spec, step = self.spec(entry), present.get("step")
        device = entry.p.device if entry.group["capturable"] else torch.device("cpu")
        if not writable(step, (), torch.float32, device):
            step = torch.zeros((), dtype=torch.float32, device=device)
        given = [self._present(entry, present.get(name), due) for name, due in spec.tensors.items()]
        tensors = self.store.tensors_to_load(entry.p, spec.local_tensors, given)
        state: dict[str, Any] = {"step": step}
        for (name, due), tensor, old in zip(spec.tensors.items(), tensors, given, strict=True):
            state[name] = present[name] if tensor is old else placed(tensor, entry.p, due.shape)
        mark(entry, state, self.seed)
        return state

    def _present(self, entry: ParamEntry, moment: Any, due: TensorSpec) -> Tensor | None:
        """This rank's part of a moment if it can be loaded into, else None."""
        fits = writable(moment, due.shape, due.dtype, getattr(moment, "device", torch.device("cpu")))
        return local(moment) if fits and is_placed_like(moment, entry.p) else None

    def _settings_of(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """The settings of a group: the same object as long as they are equal."""
        settings = settings_of(group)
        for known in self._settings:
            if known == settings:
                return known
        self._settings.append(settings)
        return settings

    # Steps in backward.

    def begin(self, groups: Groups, states: States) -> dict[int, ParamEntry]:
        """Checks and places all parameters that backward may step, before the first one; returns them by identity."""
        self.store.refresh()
        self.statistics.begin(groups)
        self.clipping.adopt(groups)
        pending: dict[int, ParamEntry] = {}
        for entries in filter(None, self._roster(groups, states)):
            check_options(entries[0].group)
            settings = self._settings_of(entries[0].group)
            for entry in filter(can_step, entries):
                self._check(entry, states, settings)
                if self.clipping.max_norm is not None and is_sharded(entry.p) and sharded_over(entry.p):
                    raise RuntimeError(_sharded(entry.name))
                pending[id(entry.p)] = entry
        if any(entry.moments is None for entry in pending.values()):
            self.place(pending.values(), early=True)
        return pending

    def check(self, entry: ParamEntry, states: States) -> None:
        """Raises an error for a parameter that cannot be stepped under the current options and state."""
        check_options(entry.group)
        self._check(entry, states, self._settings_of(entry.group))

    def update_one(
        self,
        entry: ParamEntry,
        g: Tensor,
        states: States,
        scalars: dict[tuple[int, int, int], StepScalars],
        stepped: Callable[[ParamEntry], None],
        part: Part = WHOLE,
    ) -> None:
        """Steps one of the parameters that `begin` has checked.

        Args:
            entry: the parameter.
            g: its gradient.
            states: those of the optimizer.
            scalars: the scalars of this step by group, step number and partial step, which are added here.
            stepped: called once the parameter has been stepped, also if something is raised after that.
            part: which partial step of the step it is; the first where the parameter has no state yet.
        """

        def shared(group: dict[str, Any], step: int | Tensor) -> StepScalars:
            if isinstance(step, Tensor):
                return partial_scalars(scalars_under(group, step, scale.of(group)), *part)
            key = id(group), step, part.number
            if key not in scalars:
                scalars[key] = partial_scalars(scalars_under(group, step), *part)
            own = scalars[key]
            return own if scale is UNSCALED else own._replace(grad_scale=scale.of(group))

        grads = [gradient_of(entry, g)]
        scale = self.clipping.scale_of_one(entry.p, grads[0])
        new: list[ParamEntry] = []
        program: StepProgram | None = None
        with HeldInterrupts():
            try:
                self._adopt([entry], states, [entry], new)
                if new:
                    part = part._replace(number=0)
                program = entry.program or self._program_of_one(entry)
                with self.statistics.stepping(program.entries, program.skippable):
                    program.run(program.bind(grads), shared, advance=int(part.number == 0))
                    stepped(entry)
            except BaseException:
                if program is not None and program.stepped:
                    stepped(entry)
                else:
                    drop(new, states)
                raise

    def _task(self, entry: ParamEntry) -> UpdateTask:
        if entry.task is not None:
            return entry.task
        skips = entry.known_spec.update.skip
        return task_of(entry, self.statistics.skips.counter(local(entry.p).device) if skips else None)

    def _program_of_one(self, entry: ParamEntry) -> StepProgram:
        executor = self.store.executor_of_one(self.engine, self._task(entry), entry.p)
        group = ProgramGroup(entry.group, entry.known_spec.settings, [entry])
        program = StepProgram([group], executor, self._counters, [])
        if entry.known_spec.slice is None:  # a sharded parameter may have another local tensor in the next step
            entry.program = program
        return program


def can_step(entry: ParamEntry) -> bool:
    """Whether a parameter may be stepped; frozen parameters need no moments."""
    return entry.p.requires_grad or entry.p.grad is not None


def _sharded(name: str) -> str:
    return (
        f"max_grad_norm must be None with in_backward=True for {name}, which is sharded over several ranks: each sees"
        " its part of a gradient, and uses it before the norm over all ranks is known. Build Collins with"
        " in_backward=False, which clips by that norm"
    )
