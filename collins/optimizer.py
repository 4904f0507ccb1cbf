"""`Collins`, the optimizer: groups, state, checks. It gathers the work of a step and hands it to the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from collins.compile import Engine
from collins.hashing import BlockHash, HashKey, UniversalHash, hash_key
from collins.layout import DECODES, HASHES, Layout, layout_of
from collins.report import MemoryReport, ParameterRow
from collins.rounding import ROUNDED
from collins.rule import scalars
from collins.update import Keys, Spec, Work

_PARAM_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16)

Hash = BlockHash | UniversalHash


class _Member(NamedTuple):
    """A parameter with its place: `key` counts through all groups and is what its hashes derive from."""

    p: Tensor
    group: dict[str, Any]
    key: int
    name: str


class _Plan(NamedTuple):
    """What follows from a parameter's size and its group's settings, kept from step to step."""

    settings: tuple[Any, ...]
    spec: Spec
    keys: Keys
    hash: Hash | None
    shapes: dict[str, tuple[int, ...]]  # of the moments, by name, the first one first
    dtype: torch.dtype  # of the moments


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
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled decay, per unit of lr.
        compress_ratio: elements per bucket, at least 1. 1 keeps exact moments.
        min_K: parameters of at most this many elements keep exact moments; others get at least this many buckets.
        hash: "block" (a bucket is neighbours in memory; one pass, deterministic) or "universal" (Carter-Wegman).
        decode: "residual" (above) or "sketch", the published Collins v0.1 update without residual.
        residual_weight: rho; None for sqrt((1 - beta1) / (1 + beta1)).
        rehash_period: steps T after which a bucket of hash="block" draws new signs and restarts M_b; None for never.
        table_dtype: dtype of the tables: torch.float32, torch.bfloat16 (half the bytes, stochastically rounded) or
            torch.float64. Dense moments use the wider of this and the parameter's dtype.
        seed: what every hash derives from, together with the parameter's place in the optimizer. Replicas must agree.
        maximize: ascend instead of descend.
        stochastic_rounding: whether parameters and tables in 16 bits are rounded stochastically; None for True.
        compile: whether the step runs through torch.compile; None compiles on accelerators and not on the CPU.

    All but `compile` and `seed` may be set per group.

    Raises:
        ValueError, TypeError: for an option, parameter or gradient that cannot be used, naming it, its value and what
            is accepted, before anything has changed.

    State, in the names of `state_dict`: `step` (0-d), and `m_table`, `v_table` of shape (K,), or `exp_avg`,
    `exp_avg_sq` shaped like a dense parameter.

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
    ) -> None:
        _require(isinstance(seed, int), "seed", seed, "an int")
        _require(compile is None or isinstance(compile, bool), "compile", compile, "True, False or None")
        self.seed = seed
        self.compile = compile
        self._engine = Engine(compile)
        self._plans: dict[Tensor, _Plan] = {}
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
        }
        check_options(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        hashes = {p: plan for p, plan in self._plans.items() if plan.hash is not None}
        return {**super().__getstate__(), "seed": self.seed, "compile": self.compile, "_plans": hashes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_engine" not in self.__dict__:  # unpickled or copied; compiled code stays behind
            self._engine = Engine(self.compile)
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
        check_options({**self.defaults, **param_group})
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
                raise TypeError(f"{label} has dtype {p.dtype}; Collins accepts {_listed(_PARAM_DTYPES)}")
            if id(p) in seen:
                raise ValueError(f"{label} of the new group is already in the optimizer as {seen[id(p)]}; give it once")
            seen[id(p)] = label
        super().add_param_group(param_group)

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def hash_of(self, param: Tensor) -> Hash | None:
        """The hash of a parameter of this optimizer, or None when its moments are dense.

        Coefficients set on a `UniversalHash` take effect from the next step on. They travel with `deepcopy` and pickle,
        not with `state_dict`, which holds what torch's own optimizers hold: set them again after loading.

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit: moments keep their dtype whatever the parameter's is.

        Moments that exist already are overwritten in place.

        Raises:
            ValueError: when groups or moments do not fit this optimizer's parameters; it is then as it was.
        """
        moments: dict[Tensor, dict[str, Tensor]] = {}
        present = {p: dict(state) for p, state in self.state.items()}

        def set_aside(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            # The base class would cast moments to the parameter's dtype: it gets to see everything else.
            moments.update(self._loadable_moments(given))
            others = {
                key: {name: value for name, value in state.items() if name not in _MOMENTS}
                for key, state in given["state"].items()
            }
            return {**given, "state": others}

        def put_back(_: Optimizer) -> None:
            for member in self._members():
                if "step" in self.state.get(member.p, ()):  # the base class would share it with the source
                    self.state[member.p]["step"] = torch.tensor(float(self.state[member.p]["step"]))
                for name, loaded in moments.get(member.p, {}).items():
                    moment = present.get(member.p, {}).get(name)
                    dtype = self._plan(member).dtype
                    if moment is None or moment.shape != loaded.shape or moment.dtype != dtype:
                        moment = torch.empty(loaded.shape, dtype=dtype, device=member.p.device)
                    self.state[member.p][name] = moment.copy_(loaded)

        hooks = (
            self.register_load_state_dict_pre_hook(set_aside),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _loadable_moments(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """The moments in a state dict, by parameter, after a check that each fits."""
        groups = state_dict["param_groups"]
        sizes, own = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if sizes != own:
            raise ValueError(f"state_dict has parameter groups of {sizes} parameters; this optimizer has {own}")
        options = [{**self.defaults, **group} for group in groups]
        for group in options:
            check_options(group)
        places = [(saved, group) for group in options for saved in group["params"]]
        moments = {}
        for (saved, group), member in zip(places, self._members(), strict=True):
            state = state_dict["state"].get(saved, {})
            found = {name: state[name] for name in _MOMENTS if name in state}
            if state:
                _check_moments(member.name, "state_dict", found, _moment_shapes(member.p, _layout(member.p, group)))
                moments[member.p] = found
        return moments

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update(self) -> None:
        """Checks everything, then performs the step. Code that compiles `step` calls this as it is: the engine compiles
        its own graphs, which no change of learning rate, gradients or state invalidates.
        """
        for group in self.param_groups:
            check_options(group)
        planned = [(member, self._plan(member)) for member in self._members() if member.p.grad is not None]
        for member, plan in planned:
            _check_gradient(member)
            self._check_state(member, plan)
        self._engine.run([self._work(member, plan) for member, plan in planned])

    def _members(self) -> Iterator[_Member]:
        key = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for place, p in enumerate(group["params"]):
                yield _Member(p, group, key, _label(names[place] if names else key))
                key += 1

    def _plan(self, member: _Member) -> _Plan:
        p, group, key, _ = member
        settings = (p.numel(), p.dtype, key, *(group[name] for name in _PLANNED))
        plan = self._plans.get(p)
        if plan is not None and plan.settings == settings:
            return plan
        layout, period = _layout(p, group), group["rehash_period"]
        hash: Hash | None = None
        if layout.hash == "block":
            hash = BlockHash(p.numel(), int(layout.load), seed=self.seed, key=key, period=period)
        elif layout.hash == "universal":
            hash = UniversalHash(p.numel(), layout.buckets, seed=self.seed, key=key)
        dtype = _moment_dtype(p, layout, group["table_dtype"])
        rounding = group["stochastic_rounding"] is not False and (p.dtype in ROUNDED or dtype in ROUNDED)
        rehash = layout.hash == "block" and period is not None
        spec = Spec(layout, group["decode"], rehash, rounding, group["maximize"])
        sign_key = hash.sign_key if isinstance(hash, BlockHash) else HashKey(0, 0)
        keys = Keys(sign_key, hash_key(self.seed, key, "round"), (0, 0, 0, 0), period or 0)
        plan = self._plans[p] = _Plan(settings, spec, keys, hash, _moment_shapes(p, layout), dtype)
        return plan

    def _work(self, member: _Member, plan: _Plan) -> Work:
        """One parameter's share of this step; makes its state on first use and counts the step."""
        p, group, _, _ = member
        _, spec, keys, hash, shapes, dtype = plan
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name, shape in shapes.items():
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        if isinstance(hash, UniversalHash):
            keys = keys._replace(universal=(hash.a, hash.b, hash.c, hash.d))
        state["step"] += 1
        lr = group["lr"]
        h = scalars(
            int(state["step"].item()),
            lr=lr.reshape(()) if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            residual_weight=group["residual_weight"],
        )
        first, second = (state[name] for name in shapes)
        return Work(p, cast(Tensor, p.grad), first, second, spec, keys, h)

    def _check_state(self, member: _Member, plan: _Plan) -> None:
        state = self.state.get(member.p)
        if state and not all(name in state and state[name].shape == shape for name, shape in plan.shapes.items()):
            held = {name: state[name] for name in _MOMENTS if name in state}
            _check_moments(member.name, "the optimizer", held, plan.shapes)

    def _report_row(self, member: _Member) -> ParameterRow:
        p, group, _, name = member
        layout = _layout(p, group)
        step_bytes = torch.float32.itemsize
        moments = sum(math.prod(shape) for shape in _moment_shapes(p, layout).values())
        return ParameterRow(
            name=name,
            shape=tuple(p.shape),
            hash=layout.hash,
            load=layout.load,
            state_bytes=step_bytes + moments * _moment_dtype(p, layout, group["table_dtype"]).itemsize,
            adamw_bytes=step_bytes + 2 * p.numel() * p.dtype.itemsize,
        )


_DENSE, _TABLES = ("exp_avg", "exp_avg_sq"), ("m_table", "v_table")
_MOMENTS = {*_DENSE, *_TABLES}
# The group options that a _Plan depends on.
_PLANNED = (
    "compress_ratio",
    "min_K",
    "hash",
    "decode",
    "rehash_period",
    "table_dtype",
    "maximize",
    "stochastic_rounding",
)


def _layout(p: Tensor, group: dict[str, Any]) -> Layout:
    return layout_of(p.numel(), compress_ratio=group["compress_ratio"], min_K=group["min_K"], hash=group["hash"])


def _moment_shapes(p: Tensor, layout: Layout) -> dict[str, tuple[int, ...]]:
    if layout.hash is None:
        return dict.fromkeys(_DENSE, tuple(p.shape))
    return dict.fromkeys(_TABLES, (layout.buckets,))


def _moment_dtype(p: Tensor, layout: Layout, table_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(p.dtype, table_dtype) if layout.hash is None else table_dtype


def _label(name: str | int) -> str:
    return f"parameter {name!r}"


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _number(value: object) -> float:
    """A real number as it is; anything else as NaN, which no range contains."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_options(group: dict[str, Any]) -> None:
    """Raises a ValueError that names the first option of a parameter group that is out of range."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        _require(lr.numel() == 1, "lr", lr, "a number or a tensor of one element")
        lr = float(lr) if lr.is_cpu else 0.0  # reading it from an accelerator would stall the device
    _require(0 <= _number(lr) < math.inf, "lr", group["lr"], "finite and at least 0")
    in_range = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= _number(beta) < 1 for beta in betas)
    _require(in_range, "betas", betas, "two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        _require(0 <= _number(group[name]) < math.inf, name, group[name], "finite and at least 0")
    _require(1 <= _number(group["compress_ratio"]) < math.inf, "compress_ratio", group["compress_ratio"], "at least 1")
    _require(_whole(group["min_K"]) and group["min_K"] >= 1, "min_K", group["min_K"], "an int of at least 1")
    _require(group["hash"] in HASHES, "hash", group["hash"], _listed(HASHES))
    _require(group["decode"] in DECODES, "decode", group["decode"], _listed(DECODES))
    rho, period = group["residual_weight"], group["rehash_period"]
    _require(rho is None or 0 <= _number(rho) < math.inf, "residual_weight", rho, "None, or finite and at least 0")
    _require(
        period is None or (_whole(period) and 1 <= period < 2**31),
        "rehash_period",
        period,
        "None or an int of at least 1",
    )
    _require(group["table_dtype"] in _TABLE_DTYPES, "table_dtype", group["table_dtype"], _listed(_TABLE_DTYPES))
    _require(isinstance(group["maximize"], bool), "maximize", group["maximize"], "True or False")
    rounding = group["stochastic_rounding"]
    _require(rounding is None or isinstance(rounding, bool), "stochastic_rounding", rounding, "True, False or None")


def _check_gradient(member: _Member) -> None:
    p, g = member.p, cast(Tensor, member.p.grad)
    if g.layout != torch.strided:
        raise TypeError(f"the gradient of {member.name} has layout {g.layout}; Collins accepts torch.strided gradients")
    for what in ("shape", "dtype", "device"):
        got, accepted = getattr(g, what), getattr(p, what)
        if got != accepted:
            raise ValueError(f"the gradient of {member.name} must have its {what} {accepted}, got {got}")


def _check_moments(name: str, where: str, found: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    got = {key: tuple(moment.shape) for key, moment in found.items()}
    if got != shapes:
        raise ValueError(
            f"{name} has moments {shapes} under its group's compress_ratio, min_K and hash; {where} holds {got}"
        )
