"""`Collins`, the optimizer: groups, state, checks. It gathers the work of a step and hands it to the engine."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from collins.bucketing import Bucketing, bucketing_of, moment_bytes, moment_dtype, moment_shape, within_rows
from collins.checkpoint import (
    DENSE,
    MOMENTS,
    TABLES,
    CheckedStateDict,
    ExpectedState,
    as_dict,
    check_moments,
    check_shape,
    loadable,
    writable,
)
from collins.compile import Engine
from collins.counters import Counters
from collins.fingerprint import LAYOUT, fingerprint
from collins.hashing import BlockHash, HashKey, UniversalHash, hash_key
from collins.nonfinite import require_finite
from collins.offload import MemoryPolicy, PlacementPlan
from collins.offload.backward import GradHooks, refuse_replicas
from collins.offload.slabs import TensorSpec
from collins.offload.tiers import Moments, StateRequest, TieredStore
from collins.options import check_options, check_table_dtype, listed, require, seed_of
from collins.repeat import POSSIBLE, Kept, Repeat
from collins.report import MemoryReport, ParameterRow
from collins.rounding import ROUNDED
from collins.rule import StepScalars, step_scalars
from collins.sharding import (
    Slice,
    agreed,
    is_flattened,
    is_placed_like,
    is_sharded,
    local,
    local_gradient,
    placed,
    slice_of,
)
from collins.update import HashKeys, UpdateSpec, UpdateTask

_PARAM_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Hash = BlockHash | UniversalHash


class ParamSpec(NamedTuple):
    """What follows from a parameter's size and its group's settings, kept from step to step."""

    spec: UpdateSpec
    keys: HashKeys
    hash: Hash | None
    numel: int  # of the parameter
    launch: Any  # the engine's
    settings: tuple[Any, ...]
    size: torch.Size  # of the parameter
    dtype: torch.dtype  # of the parameter
    device: torch.device  # of the parameter
    names: tuple[str, str]  # of the moments, the first one first
    shape: tuple[int, ...]  # of each moment
    moment_dtype: torch.dtype
    kind: type  # of the parameter
    slice: Slice | None  # of a sharded parameter, whose size and shapes above are those of the whole


class ParamEntry:
    """A parameter with its place: `key` counts through all groups and is what its hashes derive from."""

    __slots__ = ("counter", "first", "group", "key", "name", "p", "place", "plan", "second", "step")

    def __init__(self, p: Tensor, group: dict[str, Any], key: int, name: str) -> None:
        self.p = p
        self.group = group
        self.key = key
        self.name = name
        self.plan: ParamSpec | None = None
        # What was found in the parameter's state, and fits the plan.
        self.step: Tensor | None = None
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.place: torch.device | None = None  # of both
        self.counter: int | None = None  # the place of `step` among the optimizer's counters


_Ready = tuple[ParamEntry, Tensor]  # with its gradient


class _Again(NamedTuple):
    """What the next step may repeat, as long as rosters and options are what they were."""

    repeat: Repeat
    rosters: list[list[ParamEntry]]
    # Options, what plans depend on, counters of who was stepped.
    groups: list[tuple[dict[str, Any], tuple[Any, ...], list[int | None]]]


_WORK = tuple.__new__  # of a named tuple, without the cost of its keywords


class Collins(Optimizer):
    r"""AdamW whose moments live in Count-Sketch tables `compress_ratio` times smaller than the parameters.

    With h, s the position and sign hashes of a parameter, c the load of a bucket, and g its gradient at step t:

        mu_b = (1/c) sum_{h(i)=b} s(i) g_i                q_b = (1/c) sum_{h(i)=b} g_i^2
        M_b <- beta1 M_b + (1 - beta1) mu_b               V_b <- beta2 V_b + (1 - beta2) q_b
        r_i = g_i - s(i) mu_{h(i)}
        m_i = s(i) sqrt(c) M_{h(i)} / (1 - beta1^t)       v_i = V_{h(i)} / (1 - beta2^t)
        p_i <- (1 - lr wd) p_i - lr (m_i + rho r_i) / (sqrt(v_i + r_i^2) + eps)

    At c = 1 the residual r is zero and this is AdamW. State per parameter is 2 * itemsize(table_dtype) / c bytes.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of parameter groups, as for `torch.optim.AdamW`. fp64, fp32,
            bf16 and fp16, any shape and strides.
        lr: learning rate, a float or a one-element tensor. A rate 2 to 4 times AdamW's is the place to start.
        betas: decay rates of the two moments, each in [0, 1): any sequence of two numbers, kept as a tuple of floats.
        eps: added to the denominator.
        weight_decay: decoupled decay, per unit of lr.
        compress_ratio: elements per bucket, at least 1. 1 keeps exact moments.
        min_K: parameters of at most this many elements keep exact moments; others get at least this many buckets.
        hash: "block" (a bucket is neighbours in memory; one pass, deterministic) or "universal" (Carter-Wegman).
        decode: "residual" (above) or "sketch", the published Collins v0.1 update without residual.
        residual_weight: rho; None for sqrt((1 - beta1) / (1 + beta1)).
        rehash_period: steps T after which a bucket of hash="block" draws new signs and restarts M_b; None for never.
        table_dtype: dtype of the tables: torch.float32, torch.bfloat16 (half the bytes, stochastically rounded) or, for
            torch.float64 parameters only, torch.float64. Dense moments use the wider of this and the parameter's dtype.
        seed: what every hash derives from, together with the parameter's place in the optimizer. Replicas must agree.
        maximize: ascend instead of descend.
        stochastic_rounding: whether parameters and tables in 16 bits are rounded stochastically; None for True.
        compile: True steps through torch.compile, False eagerly. None takes the fastest: on CUDA devices one launch of
            a Triton kernel for all tensors of a kind, on other accelerators torch.compile, on the CPU eager steps.
        capturable: whether the step may be captured in a CUDA graph, as for `torch.optim.AdamW`: step counters live on
            the device, and `lr` is read there when it is a tensor on it.
        nonfinite: what an infinite or NaN gradient does. "propagate": it spreads to its bucket's moments and elements,
            as in AdamW to its element's. "skip": its bucket, or its element of dense moments, stays as it is in this
            step, and so it does where the square of a gradient overflows; the device is not waited for. "error": a
            FloatingPointError before anything changes; reads gradients once more and waits for the device. With
            in_backward=True, parameters whose gradients came earlier have been stepped by then.
        memory: where moments live: None beside their parameters; else a `MemoryPolicy`, a tier's name ("auto",
            "device", "host"), a mapping of the policy's arguments, or the path of a TOML file. Decided at the first
            step, when the activations' peak has been seen; `placement` tells what was decided.
        in_backward: whether each parameter is stepped, and its gradient freed, as soon as the gradient has arrived in
            backward; the results are the same to the bit. `step` then ends the step: call it after every backward.
            Closures, gradients accumulated over several backward passes and a GradScaler are refused. Clipping by the
            global norm finds no gradients any more and does nothing: it cannot be noticed here.

    All but `compile`, `seed`, `memory` and `in_backward` may be set per group.

    Raises:
        ValueError, TypeError: for an option, parameter or gradient that cannot be used, naming it, its value and what
            is accepted, before anything has changed.
        FloatingPointError: for a gradient that is not finite, under nonfinite="error".

    State, in the names of `state_dict`: `step` (0-d), and `m_table`, `v_table` with K entries in the shape of
    `collins.bucketing.moment_shape`, with `layout`, an int that says what they were encoded with
    (`collins.fingerprint`); or `exp_avg`, `exp_avg_sq` shaped like a dense parameter.

    Example:
        >>> model = torch.nn.Linear(512, 512)
        >>> opt = Collins(model.parameters(), lr=3e-3)
        >>> model(torch.randn(8, 512)).square().mean().backward()
        >>> opt.step()
        >>> opt.memory_report().state_bytes < 2 * 4 * 512 * 512 / 20
        True

    References:
        Loshchilov & Hutter, "Decoupled weight decay regularization" (2019). Charikar, Chen & Farach-Colton, "Finding
        frequent items in data streams" (2002). Spring et al., "Compressing gradient optimizers via count-sketches"
        (2019).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        compress_ratio: float = 32,
        min_K: int = 1024,
        hash: str = "block",
        decode: str = "residual",
        residual_weight: float | None = None,
        rehash_period: int | None = 100,
        table_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool | None = None,
        compile: bool | None = None,
        capturable: bool = False,
        nonfinite: str = "propagate",
        memory: MemoryPolicy | str | Mapping[str, Any] | PathLike[str] | None = None,
        in_backward: bool = False,
    ) -> None:
        require(compile is None or isinstance(compile, bool), "compile", compile, "True, False or None")
        require(isinstance(in_backward, bool), "in_backward", in_backward, "True or False")
        self.seed = seed_of(seed)
        self.compile = compile
        self.in_backward = False  # until all groups have been accepted
        self.memory = None if memory is None else MemoryPolicy.of(memory)
        self._make_engines()
        self._hashes: dict[Tensor, UniversalHash] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "compress_ratio": compress_ratio,
            "min_K": min_K,
            "hash": hash,
            "decode": decode,
            "residual_weight": residual_weight,
            "rehash_period": rehash_period,
            "table_dtype": table_dtype,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "capturable": capturable,
            "nonfinite": nonfinite,
        }
        check_options(defaults)
        super().__init__(params, defaults)
        if in_backward:
            self._step_in_backward()

    def _make_engines(self) -> None:
        """What is made anew in every process and every copy: compiled code, host memory, hooks."""
        self._engine = Engine(self.compile, busy_link=self.memory is not None)
        self._store = None if self.memory is None else TieredStore(self.memory)
        self._rosters: list[tuple[list[Tensor], list[ParamEntry]]] = []
        self._settings: list[tuple[Any, ...]] = []
        self._repeat: _Again | None = None
        self._last: list[ParamEntry] = []  # those stepped last in a step that looked at everything
        self._grad_hooks: GradHooks | None = None
        self._awaited: dict[int, ParamEntry] | None = (
            None  # by identity, from the first gradient to arrive until `step`
        )
        self._alone = False  # whether replicas have been looked for
        self._stepped: dict[int, ParamEntry] = {}  # those of them that have been stepped, by key
        self._shared: dict[tuple[int, int], StepScalars] = {}  # their numbers, by group and step
        self._counters = Counters()

    def __getstate__(self) -> dict[str, Any]:
        self._drain()
        own = ("seed", "compile", "in_backward", "memory", "_hashes")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # the base class adds it here, for its own optimizers
        if "_engine" not in self.__dict__:  # unpickled or copied
            self._make_engines()
            if self.in_backward:
                self._step_in_backward()
        self._awaited = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer` does, after checking its options and its parameters.

        Raises:
            ValueError, TypeError: for an option out of range, a parameter that is complex, sparse, not floating point,
                given twice or already present. The optimizer is then as it was.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group must be a dict with the key 'params', got {param_group!r}")
        options = {**self.defaults, **param_group}
        check_options(options)
        param_group.update({name: options[name] for name in self.defaults if name in param_group})
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):  # those two are the base class's to accept or refuse
            param_group["params"] = list(params)
        seen = {id(member.p): member.name for member in self._members()}
        for place, entry in enumerate([params] if isinstance(params, Tensor) else param_group["params"]):
            name, p = entry if isinstance(entry, tuple) else (place, entry)
            label = _label(name)
            if not isinstance(p, Tensor):
                continue  # refused by the base class
            if p.layout != torch.strided:
                raise TypeError(f"{label} has layout {p.layout}; Collins accepts torch.strided parameters")
            if p.dtype not in _PARAM_DTYPES:
                raise TypeError(f"{label} has dtype {p.dtype}; Collins accepts {listed(_PARAM_DTYPES)}")
            check_table_dtype(label, p.dtype, options["table_dtype"])
            if is_sharded(p):
                _slice(label, p, {**self.defaults, **param_group})
            if is_flattened(p):
                raise TypeError(
                    f"{label} was flattened and cut up by FullyShardedDataParallel, whose ranks would take their parts"
                    " for whole parameters; Collins accepts those that torch.distributed.fsdp.fully_shard has sharded"
                )
            if id(p) in seen:
                raise ValueError(f"{label} of the new group is already in the optimizer as {seen[id(p)]}; give it once")
            seen[id(p)] = label
        super().add_param_group(param_group)
        self._watch()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss; it runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: for a gradient that is sparse or whose shape, dtype or device is not its parameter's,
                or an option that was set out of range. Nothing has changed then.
            RuntimeError: for what `in_backward` refuses.
        """
        if self.in_backward:
            self._check_in_backward(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def hash_of(self, param: Tensor) -> Hash | None:
        """The hash of a parameter of this optimizer, or None when its moments are dense.

        Coefficients set on a `UniversalHash` take effect from the next step on. They travel with `deepcopy` and pickle;
        a state dict knows them, but does not set them: set the same ones before loading it.

        Raises:
            ValueError: when the parameter is not in this optimizer.
        """
        for member in self._members():
            if member.p is param:
                return self._plan(member).hash
        raise ValueError(f"param must be a parameter of this optimizer, got a {tuple(param.shape)} tensor that is not")

    def memory_report(self) -> MemoryReport:
        """Bytes of state, in all and per parameter; exact before the first step, and for parameters on `meta`."""
        return MemoryReport(tuple(self._report_row(member) for member in self._members()))

    @property
    def placement(self) -> tuple[PlacementPlan, ...]:
        """What the memory policy came to: a plan for each device, and for each time that parameters were new."""
        return tuple(self._store.plans) if self._store else ()

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; moments on the host are complete until the next step begins.

        `table_dtype` is in it by name: what `torch.distributed.checkpoint` gathers and broadcasts may hold no dtype.
        """
        self._drain()
        for member in self._members():
            state = self.state.get(member.p)
            if state:
                state.update(self._mark(member))  # coefficients of a hash may have been set since the state was made
        result = super().state_dict()
        for group in result["param_groups"]:
            group["table_dtype"] = str(group["table_dtype"])
        return result

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises what `load_state_dict` would raise for this state dict, and changes nothing."""
        self._loadable(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit: moments keep their dtype whatever the parameter's is.

        Tensors that exist already are overwritten in place; others are made on the tier where they belong. lr, betas,
        eps, weight_decay, residual_weight and what schedulers keep in a group come from the state dict; all other
        options stay as they are here.

        Raises:
            ValueError: when the state dict was saved under another layout, hash, seed or order of parameters, naming
                the parameter and the difference. The optimizer is then as it was.
        """
        self._drain()
        members = list(self._members())
        before = [dict(self.state.get(member.p, {})) for member in members]
        rates = [group["lr"] for group in self.param_groups]
        after: list[dict[str, Any]] = []

        def set_aside(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            # All that can fail happens here, before anything has changed.
            found = self._loadable(given)
            loaded = [member for member, saved in zip(members, found.states, strict=True) if saved]
            self._settle(loaded, loading=True)
            for member, state, saved in zip(members, before, found.states, strict=True):
                after.append({**saved.others_on(member.p.device), **self._room(member, state)} if saved else {})
            for member, state, saved in zip(members, after, found.states, strict=True):
                if saved:
                    state["step"].fill_(saved.step)
                    for name, moment in zip(self._plan(member).names, saved.moments, strict=True):
                        local(state[name]).copy_(moment)
                elif self._store is not None and member.p in self._store:
                    for moment in self._store.moments(member.p):
                        moment.zero_()  # so that the next step finds them as it finds new memory
            return {**given, "param_groups": found.groups, "state": found.rest}

        def put_back(_: Optimizer) -> None:
            self.state.update({m.p: state for m, state in zip(members, after, strict=True) if state})
            for group, rate in zip(self.param_groups, rates, strict=True):
                if isinstance(rate, Tensor):  # whoever holds on to it, a captured graph say, goes on seeing the rate
                    group["lr"] = rate.fill_(float(group["lr"]))

        hooks = (
            self.register_load_state_dict_pre_hook(set_aside),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            with torch.no_grad():  # state that requires gradients is overwritten as well
                super().load_state_dict(as_dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _loadable(self, state_dict: Mapping[str, Any]) -> CheckedStateDict:
        return loadable(state_dict, self.param_groups, tuple(self.defaults), self.expected_states())

    def expected_states(self) -> list[ExpectedState]:
        """What the state of each parameter must be, through all groups."""
        return [self._expected_state(member) for member in self._members()]

    def _expected_state(self, member: ParamEntry) -> ExpectedState:
        plan, hash = self._plan(member), self._plan(member).hash
        mark = None if hash is None else fingerprint(plan.size[0], hash, self.seed, member.key)
        sharded = None if plan.slice is None else member.p
        return ExpectedState(
            member.name, tuple(plan.size), plan.names, plan.shape, plan.moment_dtype, hash, mark, sharded
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update(self) -> None:
        """Checks everything, then performs the step. Code that compiles `step` calls this as it is: the engine compiles
        its own graphs, which no change of learning rate, gradients or state invalidates.
        """
        if self._repeated():
            return
        ready = self._ready()
        self._guard(ready)
        if self._store is None:
            works = self._works(ready)
            self._engine.run(works)
            self._repeat = self._to_repeat(ready, works)
        elif ready:
            new = [member for member in self._members() if member.first is None]
            if new:
                self._settle(new)
            params = [member.p for _, found in ready for member, _ in found]
            self._store.run(self._works(ready), params, self._engine.run)
            self._store.finish()
        self._stepped.clear()
        self._awaited = None
        self._watch()  # whoever takes gradients since

    def _to_repeat(
        self, ready: Sequence[tuple[dict[str, Any], list[_Ready]]], works: Sequence[UpdateTask]
    ) -> _Again | None:
        """What may take the next step in a fraction of this one's time on the host; None as long as parameters come and
        go, since to make it takes as long as a step.
        """
        members = [member for _, found in ready for member, _ in found]
        settled, self._last = members == self._last, members
        plain = POSSIBLE and all(not group["capturable"] and group["nonfinite"] != "error" for group, _ in ready)
        as_given = all(member.p.grad is g for _, found in ready for member, g in found)
        if not (members and settled and plain and as_given) or self.in_backward:
            return None
        course = self._engine.course(works)
        if course is None:
            return None
        kept = [
            Kept(("step", *cast(ParamSpec, m.plan).names), cast(tuple[Tensor, ...], (m.step, m.first, m.second)))
            for m in members
        ]
        stepped = {id(member) for member in members}
        others = [member.p for member in self._members() if id(member) not in stepped]
        groups = [(group, self._settings_of(group), [member.counter for member, _ in found]) for group, found in ready]
        repeat = Repeat([member.p for member in members], others, kept, self.state, course)
        return _Again(repeat, list(self._roster()), groups)

    def _repeated(self) -> bool:
        """Whether the step has been taken, being as the last one was."""
        again = self._repeat
        if again is None or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            return False
        rosters = list(self._roster())
        same = len(rosters) == len(again.rosters) and all(map(operator.is_, rosters, again.rosters))
        for group, settings, _ in again.groups:
            check_options(group)
            same = same and not group["capturable"] and self._settings_of(group) is settings
        run = again.repeat.ready(self.state) if same else None
        if run is None:
            self._repeat = None
            return False
        numbers: list[StepScalars] = []
        rows: list[int] = []
        for group, _, counters in again.groups:
            if counters:
                distinct, own = self._numbers_at(group, counters, len(numbers))
                numbers += distinct
                rows += own
        run(numbers, rows)
        return True

    def _step_in_backward(self) -> None:
        """From now on parameters are stepped as their gradients arrive."""
        self.in_backward = True
        self._lock = threading.Lock()  # gradients on several devices arrive in as many threads
        self._grad_hooks = GradHooks(self, Collins._update_one)
        # Asks a GradScaler to hand its scale over instead of finding no gradients: see _check_in_backward.
        self._step_supports_amp_scaling = True
        self._watch()

    def _ready(self) -> list[tuple[dict[str, Any], list[_Ready]]]:
        """The parameters that have a gradient, group by group, once everything about them has been checked."""
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        ready = []
        for members in self._roster():
            if members:
                group = members[0].group
                check_options(group)
                if capturing and not group["capturable"]:
                    raise RuntimeError("capturable must be True for a step that a CUDA graph captures, got False")
                settings = self._settings_of(group)
                ready.append((group, self._checked(members, settings)))
        return ready

    def _checked(self, members: Sequence[ParamEntry], settings: tuple[Any, ...]) -> list[_Ready]:
        """Those with a gradient. It looks at every parameter in every step, so it touches each as little as it can."""
        found, states, strided = [], self.state, torch.strided
        for member in members:
            p = member.p
            g = p.grad
            if g is None:
                continue
            plan = member.plan
            if plan is None or plan.settings is not settings:
                plan = self._plan(member, settings)
            _, _, _, _, _, _, size, dtype, device, _, _, _, kind, part = plan
            if p.dtype is not dtype or p.shape != size or type(p) is not kind or p.device != device:
                plan = self._plan(member, settings)
                _, _, _, _, _, _, size, dtype, device, _, _, _, kind, part = plan
            if g.dtype is not dtype or g.shape != size or g.layout is not strided or g.device != device:
                _check_gradient(member, g)
            if part is not None or type(g) is not Tensor or g.is_neg():
                g = _plain(member, g)
            state = states.get(p)
            if not (state and _holds(state, plan, member)):
                self._reset(member, plan, state)
            found.append((member, g))
        return found

    def _reset(self, member: ParamEntry, plan: ParamSpec, state: dict[str, Any] | None) -> None:
        """Has the state adopted, or made, before the member is stepped; refuses one that does not fit."""
        member.first = None
        if not state:
            return
        if not all(name in state and state[name].shape == plan.shape for name in plan.names):
            check_shape(member.name, "the optimizer", state, tuple(plan.size))
            held = {name: state[name] for name in MOMENTS if name in state}
            check_moments(member.name, "the optimizer", held, dict.fromkeys(plan.names, plan.shape))
        if not all(is_placed_like(state[name], member.p) for name in plan.names):
            raise ValueError(
                f"{member.name} has been sharded, or made whole, since its moments were made: build Collins after that"
            )
        for name in plan.names:
            if state[name].dtype != plan.moment_dtype:
                raise ValueError(
                    f"{name} of {member.name} must have the dtype {plan.moment_dtype}, which its group's table_dtype"
                    f" means for a parameter of {plan.dtype}, got {state[name].dtype}"
                )
            if not self._at_home(member, state[name]):
                raise ValueError(
                    f"{name} of {member.name} must be where its step needs it, got one on {state[name].device} for a"
                    f" parameter on {plan.device}: move both, or load_state_dict(state_dict()) once the parameter is"
                    " where it stays"
                )

    def _at_home(self, member: ParamEntry, moment: Tensor) -> bool:
        """Whether a moment is on the device where the parameter's are stepped, or staged for that."""
        if self._store is None:
            return moment.device == member.p.device
        return member.p not in self._store or self._store.serves(member.p)

    @staticmethod
    def _guard(ready: Sequence[tuple[dict[str, Any], list[_Ready]]]) -> None:
        guarded = [pair for group, found in ready if group["nonfinite"] == "error" for pair in found]
        if guarded:
            params = [member.p for member, _ in guarded]
            require_finite([(member.name, g) for member, g in guarded], lambda fine: agreed(fine, params))

    def _watch(self) -> None:
        if self._grad_hooks is not None:
            self._grad_hooks.watch((member.name, member.p) for member in self._members())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check_in_backward(self, closure: object) -> None:
        if closure is not None:
            raise RuntimeError(
                "closure must be None with in_backward=True, where parameters are stepped during backward: evaluate the"
                " model before step(), or build Collins with in_backward=False"
            )
        if hasattr(self, "found_inf"):
            self.__dict__.pop("found_inf", None)
            self.__dict__.pop("grad_scale", None)
            raise RuntimeError(
                "a GradScaler cannot be used with in_backward=True: parameters have been stepped with gradients that"
                " were still scaled. Train in bfloat16 without one, or build Collins with in_backward=False"
            )
        for member in self._stepped.values():
            if member.p.grad is not None:
                raise RuntimeError(_twice(member.name))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_one(self, p: Tensor) -> None:
        """The step of one parameter whose gradient has arrived; frees the gradient."""
        if torch.is_grad_enabled():  # backward(create_graph=True)
            with torch.no_grad():
                self._update_one(p)
            return
        with self._lock:
            g = p.grad
            if g is None:  # an earlier hook has taken it
                return
            if self._awaited is None:
                self._awaited = self._await()
            member = self._awaited.get(id(p))
            if member is None:  # taken out of its group since
                return
            if member.key in self._stepped:
                p.grad = None
                raise RuntimeError(_twice(member.name))
            _check_gradient(member, g)
            group, plan = member.group, cast(ParamSpec, member.plan)
            if plan.slice is not None or type(g) is not Tensor or g.is_neg():
                g = _plain(member, g)
            if group["nonfinite"] == "error":
                self._guard([(group, [(member, g)])])
            known = member.first is not None or p in self.state
            if member.first is None:
                self._adopt(member)
            hp = self._numbers_of_one(group, member)
            try:
                if self._store is None:
                    self._engine.run_one(_work(member, g, hp))
                else:
                    self._store.run_one(p, lambda staged: self._engine.run_one(_work(member, g, hp, staged)))
            except BaseException:
                if known:
                    self.state[p]["step"] -= 1
                else:
                    del self.state[p]
                    member.first = None
                raise
            self._stepped[member.key] = member
            p.grad = None

    def _await(self) -> dict[int, ParamEntry]:
        """All parameters, checked and housed before the first of them is stepped in this backward pass."""
        self._shared.clear()
        if not self._alone:
            refuse_replicas(member.p for member in self._members())
            self._alone = True
        awaited = {}
        for members in self._roster():
            if members:
                check_options(members[0].group)
                settings = self._settings_of(members[0].group)
            for member in members:
                plan, state = self._plan(member, settings), self.state.get(member.p)
                if not (state and _holds(state, plan, member)):
                    self._reset(member, plan, state)
                awaited[id(member.p)] = member
        new = [member for member in awaited.values() if member.first is None]
        if new:
            self._settle(new, early=True)
        return awaited

    def _members(self) -> Iterator[ParamEntry]:
        for members in self._roster():
            yield from members

    def _roster(self) -> Iterator[list[ParamEntry]]:
        """The parameters of each group, which whoever wraps a model may have replaced since the last call."""
        del self._rosters[len(self.param_groups) :]
        key = 0
        for number, group in enumerate(self.param_groups):
            params = group["params"]
            if number < len(self._rosters):
                known, members = self._rosters[number]
                same = len(known) == len(params) and all(map(operator.is_, known, params))
                if same and (not members or (members[0].key == key and members[0].group is group)):
                    key += len(members)
                    yield members
                    continue
            names = group.get("param_names")
            members = [
                ParamEntry(p, group, key + place, _label(names[place] if names else key + place))
                for place, p in enumerate(params)
            ]
            self._rosters[number : number + 1] = [(list(params), members)]
            key += len(members)
            yield members

    def _settings_of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What the plans of a group depend on: the same object for as long as nothing changes."""
        settings = tuple(group[name] for name in _PLANNED)
        for known in self._settings:
            if known == settings:
                return known
        self._settings.append(settings)
        return settings

    def _plan(self, member: ParamEntry, settings: tuple[Any, ...] | None = None) -> ParamSpec:
        p, group, key = member.p, member.group, member.key
        settings = self._settings_of(group) if settings is None else settings
        plan = member.plan
        same = plan is not None and plan.settings is settings and plan.kind is type(p)
        if plan is not None and same and (plan.size, plan.dtype, plan.device) == (p.shape, p.dtype, p.device):
            return plan
        check_table_dtype(member.name, p.dtype, group["table_dtype"])
        layout, period = _layout(p, group), group["rehash_period"]
        hash: Hash | None = None
        if layout.hash == "block":
            hash = BlockHash(p.numel(), int(layout.load), seed=self.seed, key=key, period=period)
        elif layout.hash == "universal":
            hash = self._hashes.get(p)
            if hash is None or (hash.numel, hash.buckets, hash.key) != (p.numel(), layout.buckets, key):
                hash = self._hashes[p] = UniversalHash(p.numel(), layout.buckets, seed=self.seed, key=key)
        dtype = moment_dtype(layout, p.dtype, group["table_dtype"])
        rounding = _rounds(p, dtype, group)
        rehash = layout.hash == "block" and period is not None
        skip = group["nonfinite"] == "skip"
        spec = UpdateSpec(layout.hash, layout.load, group["decode"], rehash, rounding, group["maximize"], skip)
        sign_key = hash.sign_key if isinstance(hash, BlockHash) else HashKey(0, 0)
        keys = HashKeys(sign_key, hash_key(self.seed, key, "round"), (0, 0, 0, 0), period or 0)
        shape = moment_shape(layout, tuple(p.shape))
        part = _slice(member.name, p, group)
        launch = self._engine.launch_of(spec, local(p), dtype, part.start if part else 0)
        names = _names(layout)
        plan = ParamSpec(
            spec, keys, hash, p.numel(), launch, settings, p.shape, p.dtype, p.device,
            names, shape, dtype, type(p), part,
        )  # fmt: skip
        member.plan = plan
        member.step = member.first = member.second = None
        return plan

    def _settle(self, members: Sequence[ParamEntry], *, early: bool = False, loading: bool = False) -> None:
        """Under a memory policy, gives every parameter's moments their home; those that exist elsewhere move in.

        Args:
            early: within backward, whose peak is still to come.
            loading: before any step: what depends on the peak is left for the first step to decide.
        """
        if self._store is None or (loading and self._store.waits):
            return
        plans = [self._plan(member) for member in members]
        self._store.settle(
            [
                StateRequest(m.name, m.p, TensorSpec(_here(plan), plan.moment_dtype))
                for m, plan in zip(members, plans, strict=True)
            ],
            early=early,
        )
        for member, plan in zip(members, plans, strict=True):
            state = self.state.get(member.p)
            if state:
                for name, home in zip(plan.names, self._store.moments(member.p), strict=True):
                    if name in state and local(state[name]) is not home:
                        state[name] = placed(home.copy_(local(state[name])), member.p, plan.shape)

    def _moments(self, member: ParamEntry, present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Where a parameter's moments are kept: what is there already if it fits, else new memory."""
        plan = self._plan(member)
        if self._store is not None and member.p in self._store:
            m, v = self._store.moments(member.p)
            return placed(m, member.p, plan.shape), placed(v, member.p, plan.shape)
        device = member.p.device if self._store is None else torch.device("cpu")
        kept = []
        for name in plan.names:
            moment = present.get(name)
            fits = writable(moment, plan.shape, plan.moment_dtype, device)
            if moment is None or not fits or not is_placed_like(moment, member.p):
                part = torch.zeros(_here(plan), dtype=plan.moment_dtype, device=device)
                moment = placed(part, member.p, plan.shape)
            kept.append(moment)
        return kept[0], kept[1]

    def _room(self, member: ParamEntry, present: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's state, to be filled: in the tensors that are present, as far as they fit."""
        step = present.get("step")
        device = member.p.device if member.group["capturable"] else torch.device("cpu")
        if not writable(step, (), torch.float32, device):
            step = torch.zeros((), device=device)
        moments = zip(self._plan(member).names, self._moments(member, present), strict=True)
        return {"step": step, **dict(moments), **self._mark(member)}

    def _mark(self, member: ParamEntry) -> dict[str, int]:
        """What a parameter's state says about its tables; nothing for dense moments."""
        own = self._expected_state(member).fingerprint
        return {} if own is None else {LAYOUT: own.packed()}

    def _works(self, ready: Sequence[tuple[dict[str, Any], list[_Ready]]]) -> list[UpdateTask]:
        """Each parameter's share of this step; makes its state on first use and counts the step."""
        works: list[UpdateTask] = []
        for group, found in ready:
            members = [member for member, _ in found]
            for member in members:
                if member.first is None:
                    self._adopt(member)
            numbers = self._numbers(group, members)
            works += [_work(member, g, hp) for (member, g), hp in zip(found, numbers, strict=True)]
        return works

    def _numbers(self, group: dict[str, Any], members: Sequence[ParamEntry]) -> Sequence[StepScalars]:
        """Counts the step of members of one group, and returns the numbers of each."""
        if not members:
            return ()
        if group["capturable"]:
            steps = [cast(Tensor, member.step) for member in members]
            torch._foreach_add_(steps, 1)
            together = _step_scalars(torch.stack(steps), group)
            columns = [x.unbind() if isinstance(x, Tensor) and x.ndim else [x] * len(steps) for x in together]
            return [StepScalars(*row) for row in zip(*columns, strict=True)]
        numbers, rows = self._numbers_at(group, [member.counter for member in members])
        return [numbers[row] for row in rows]

    def _numbers_at(
        self, group: dict[str, Any], counters: Sequence[int | None], first: int = 0
    ) -> tuple[list[StepScalars], list[int]]:
        """Counts the step of members of one group, at least one, by their counters: the numbers that they take, in rows
        from `first` on, and the row of each.
        """
        steps_taken = self._counters.count(counters)
        if (steps_taken == steps_taken[0]).all():
            return [_step_scalars(int(steps_taken[0]), group)], [first] * len(steps_taken)
        rows = {t: row for row, t in enumerate(dict.fromkeys(steps_taken.tolist()), first)}
        return [_step_scalars(int(t), group) for t in rows], list(map(rows.__getitem__, steps_taken.tolist()))

    def _numbers_of_one(self, group: dict[str, Any], member: ParamEntry) -> StepScalars:
        """As `_numbers`, for one whose gradient has arrived in backward: a step reads a group's options once."""
        if group["capturable"]:
            return self._numbers(group, [member])[0]
        steps_taken = self._counters.count_one(cast(int, member.counter))
        key = id(group), steps_taken
        if key not in self._shared:
            self._shared[key] = _step_scalars(steps_taken, group)
        return self._shared[key]

    def _adopt(self, member: ParamEntry) -> None:
        """Takes the parameter's state, loaded or copied, as the member's own; makes it if there is none."""
        plan, state = cast(ParamSpec, member.plan), self.state[member.p]
        if not state:
            state.update(self._room(member, {}))
        if member.group["capturable"]:
            state["step"] = state["step"].to(member.p.device)
        else:
            member.counter, state["step"] = self._counters.adopt(member.counter, int(state["step"]))
        member.step, member.first, member.second = state["step"], state[plan.names[0]], state[plan.names[1]]
        member.place = member.first.device

    def _drain(self) -> None:
        if self._store is not None:
            self._store.drain()

    def _report_row(self, member: ParamEntry) -> ParameterRow:
        p, group = member.p, member.group
        layout = _layout(p, group)
        step_bytes = torch.float32.itemsize
        return ParameterRow(
            name=member.name,
            shape=tuple(p.shape),
            hash=layout.hash,
            load=layout.load,
            state_bytes=step_bytes + moment_bytes(layout, p.dtype, group["table_dtype"]),
            adamw_bytes=step_bytes + 2 * p.numel() * p.dtype.itemsize,
        )


def _work(member: ParamEntry, g: Tensor, hp: StepScalars, staged: Moments | None = None) -> UpdateTask:
    """A member's share of a step, over its own moments or over those that are staged for it."""
    spec, keys, hash, numel, launch, *_, part = cast(ParamSpec, member.plan)
    if spec.hash == "universal":
        hash = cast(UniversalHash, hash)
        keys = keys._replace(universal=(hash.a, hash.b, hash.c, hash.d))
    m, v = (cast(Tensor, member.first), cast(Tensor, member.second)) if staged is None else staged
    p, start = member.p, 0
    if part is not None:
        p, m, v, start = local(p), local(m), local(v), part.start
    return _WORK(UpdateTask, (p, g, m, v, spec, keys, hp, numel, start, launch))


def _holds(state: dict[str, Any], plan: ParamSpec, member: ParamEntry) -> bool:
    """Whether the state still has the moments and the counter that the member knows, and these are what they were."""
    first, second = member.first, member.second
    if first is None or second is None:
        return False
    return (
        first.shape == second.shape == plan.shape
        and first.dtype is second.dtype is plan.moment_dtype
        and first.device == second.device == member.place
        and state.get(plan.names[0]) is first
        and state.get(plan.names[1]) is second
        and state.get("step") is member.step
    )


# The group options that a ParamSpec depends on.
_PLANNED = (
    "compress_ratio",
    "min_K",
    "hash",
    "decode",
    "rehash_period",
    "table_dtype",
    "maximize",
    "stochastic_rounding",
    "nonfinite",
)


def _layout(p: Tensor, group: dict[str, Any]) -> Bucketing:
    layout = bucketing_of(p.numel(), compress_ratio=group["compress_ratio"], min_K=group["min_K"], hash=group["hash"])
    return within_rows(layout, tuple(p.shape)) if is_sharded(p) else layout


def _rounds(p: Tensor, dtype: torch.dtype, group: dict[str, Any]) -> bool:
    """Whether a step rounds the parameter or its moments, of `dtype`, stochastically."""
    return group["stochastic_rounding"] is not False and (p.dtype in ROUNDED or dtype in ROUNDED)


def _slice(name: str, p: Tensor, group: dict[str, Any]) -> Slice | None:
    layout = _layout(p, group)
    return slice_of(name, p, layout, rounding=_rounds(p, moment_dtype(layout, p.dtype, group["table_dtype"]), group))


def _here(plan: ParamSpec) -> tuple[int, ...]:
    """The shape of this rank's part of each moment."""
    if plan.slice is None or plan.hash is None:
        return plan.shape if plan.slice is None else plan.slice.shape
    return plan.slice.shape[0], plan.shape[1]


def _names(layout: Bucketing) -> tuple[str, str]:
    return DENSE if layout.hash is None else TABLES


def _step_scalars(step: int | Tensor, group: dict[str, Any]) -> StepScalars:
    lr = group["lr"]
    return step_scalars(
        step,
        lr=lr.reshape(()) if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        residual_weight=group["residual_weight"],
    )


def _label(name: str | int) -> str:
    return f"parameter {name!r}"


def _twice(name: str) -> str:
    return (
        f"the gradient of {name} arrived twice before step(), and the second one is not used: with in_backward=True"
        " gradients cannot be accumulated over several backward passes, of which a reentrant checkpoint is one. Call"
        " step() after each, checkpoint with use_reentrant=False, or build Collins with in_backward=False"
    )


def _plain(member: ParamEntry, g: Tensor) -> Tensor:
    """A gradient as its parameter is stepped: as it lies in memory; this rank's part where the parameter is sharded."""
    if cast(ParamSpec, member.plan).slice is not None:
        return local_gradient(member.name, g, member.p)
    if is_sharded(g):
        raise TypeError(f"the gradient of {member.name} must be a plain tensor as the parameter is, got a DTensor")
    return g.resolve_neg()


def _check_gradient(member: ParamEntry, g: Tensor) -> None:
    p = member.p
    if g.dtype is p.dtype and g.shape == p.shape and g.device == p.device and g.layout is torch.strided:
        return
    if g.layout != torch.strided:
        raise TypeError(f"the gradient of {member.name} has layout {g.layout}; Collins accepts torch.strided gradients")
    for what in ("shape", "dtype", "device"):
        got, accepted = getattr(g, what), getattr(member.p, what)
        if got != accepted:
            raise ValueError(f"the gradient of {member.name} must have its {what} {accepted}, got {got}")
