"""`Collins`, the optimizer: the public interface. Checks, programs, state and stores are in modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from collins.checkpoint import WITH_STATE, CheckedStateDict, ExpectedState, as_dict, loadable
from collins.clipping import LAST_NORM, Clipping
from collins.compile.tracing import register, trace_step, untraced
from collins.entries import Carried, Hash, ParamEntry
from collins.fused_backward import FusedBackward
from collins.groups import params_of, take_group
from collins.in_backward import BackwardSteps, refuse_accumulation
from collins.interrupts import HeldInterrupts
from collins.loading import load_into
from collins.measured import Measured
from collins.offload import MemoryPolicy, PlacementPlan
from collins.offload.backward import GradHooks
from collins.options import accumulation_of, check_options, max_norm_of, read_whole_options
from collins.parameter import expected_state
from collins.report import MemoryReport, report_row
from collins.stepper import Stepper


class Collins(Measured, FusedBackward, Optimizer):
    r"""AdamW with its moments in Count-Sketch tables, `compress_ratio` times smaller than AdamW's in fp32.

    With h, s the position and sign hashes of a parameter, c the load of a bucket (larger for V than for M), and g the
    gradient at step t:

        mu_b = (1/c) sum_{h(i)=b} s(i) g_i                q_b = (1/c) sum_{h(i)=b} g_i^2
        M_b <- beta1 M_b + (1 - beta1) mu_b               V_b <- beta2 V_b + (1 - beta2) q_b
        r_i = g_i - s(i) mu_{h(i)}
        m_i = s(i) M_{h(i)} / (1 - beta1^t)               v_i = V_{h(i)} / (1 - beta2^t)
        p_i <- (1 - lr wd) p_i - lr (m_i + rho r_i) / (sqrt(v_i + kappa r_i^2) + eps)

    At c = 1 the residual r is zero and this is AdamW. Under decode="orthogonal" matrices have no V, and are updated
    by X_i = s(i) M_{h(i)} + rho r_i and NS, which moves all singular values close to 1 (`collins.orthogonal`):
    p <- (1 - lr wd) p - lr 0.2 sqrt(max(rows, cols)) NS(X). At c = 1 this is Muon without Nesterov's term.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of parameter groups, as for `torch.optim.AdamW`; or a module,
            whose named parameters are used, with the roles that follow from its submodules. fp64, fp32, bf16 and fp16,
            any shape and strides.
        lr: learning rate, a float or a one-element tensor. Start with 2 to 4 times the best rate of AdamW.
        betas: decay rates of the two moments, each in [0, 1): any sequence of two numbers, kept as a tuple of floats.
        eps: added to the denominator.
        weight_decay: decoupled decay, per unit of lr.
        role: the kind of the parameters, which determines how their moments are stored: "matrix"; "tokens" for tables
            with one row per token, such as embeddings and output heads; "exact" for dense moments, as compress_ratio=1.
            "auto" finds the role of each parameter from its module, name and shape (`collins.roles`); the role is fixed
            from the first step on. `memory_report` shows each role and how it was found.
        compress_ratio: AdamW's 8 bytes of state per fp32 parameter, divided by ours, in a large model; at least 1. It
            determines loads and formats by role (`collins.schemes`). At 32 matrices have M in int4 at c = 4 and V in
            fp32 at c = 128, token tables M in int8 and V at c = 64. 1 keeps exact moments. Under decode="orthogonal"
            matrices have M in int4 at c = 2 (at 64: c = 4), with a scale for each 128 entries. M is in fp32 instead of
            integers up to 2 min_K entries. With a `table_dtype`, hash="universal" or decode="sketch", it is c itself.
        v_compress_ratio: with a `table_dtype`, c of the second moment, at least `compress_ratio`; None for the same c.
        min_K: parameters of at most this many elements keep exact moments; others get at least this many buckets.
        hash: "block" (a bucket is neighbours in memory; one pass, deterministic) or "universal" (Carter-Wegman).
        decode: "least_squares" (above); "residual", that of version 0.2 with sqrt(c) M in place of M; "sketch", the
            published Collins v0.1 update without residual; or "orthogonal" for parameters of role "matrix" with
            "least_squares" for all others; with AdamW's weight_decay, 2 to 4 times its lr and betas=(0.95, ...).
            Parameters of three dimensions are stacks of matrices; those of more are reshaped to (out, rest). It is for
            pretraining with large batches: its matrix products take 3 % of the operations of training a 7B model at
            513,000 tokens per step, and 30 % at a tenth of that. DTensors sharded over several ranks are refused.
        row_parts: under decode="orthogonal", the number of matrices into which each one is cut by rows, or the rows of
            each: 3 for a weight that consists of Q, K and V, (4096, 1024, 1024) if K and V have fewer rows.
        residual_weight: rho; None for 0.3, for 0.6 under decode="orthogonal", and for sqrt((1 - beta1) / (1 + beta1))
            under "residual". To fine-tune, use 0.8 and 1 to 1.4 times AdamW's lr.
        residual_square: kappa, the weight of r^2 in the denominator.
        rehash_period: steps T after which a bucket of hash="block" draws new signs and restarts M_b; None for never.
        table_dtype: None for formats by role. Otherwise the dtype of all tables: torch.float32, torch.bfloat16
            (stochastically rounded) or, for torch.float64 parameters only, torch.float64; or "int8" or "int4" for M in
            integers with a scale for each 64 entries (`collins.formats.IntFormat`) and V in float32. Exact moments use
            the wider of this (float32 by default) and the parameter's dtype. The settings of version 0.2 were
            decode="residual", table_dtype=torch.float32, rehash_period=100, residual_square=1.
        seed: hashes derive from it and the parameter's name, or number if it has none. Replicas must use the same seed.
        maximize: ascend instead of descend.
        stochastic_rounding: whether parameters and tables in 16 bits are rounded stochastically; None for True.
        compile: True for steps by torch.compile, False for eager steps. None chooses the fastest: on CUDA devices one
            launch of a Triton kernel for all tensors of a kind, on other accelerators torch.compile, on the CPU eager.
        capturable: whether the step may be captured in a CUDA graph, as for `torch.optim.AdamW`: step counters are on
            the device, and an `lr` that is a tensor on the device is read there.
        nonfinite: the handling of infinite and NaN gradients. "propagate": they spread to the moments and elements of
            their bucket, as in AdamW to those of their element. "skip": their bucket (with dense moments, their
            element) is not changed in this step, also if the square of a gradient overflows; this does not synchronize
            with the device. In both cases it is the whole matrix under decode="orthogonal". "error": raises a
            FloatingPointError before anything changes; it reads gradients once more and synchronizes. With
            in_backward=True, parameters whose gradients arrived earlier have been stepped by then.
        max_grad_norm: the largest norm that all gradients of a step may have together, over all groups, devices and
            ranks: inside the step gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)), with the same
            result as a step after `torch.nn.utils.clip_grad_norm_`. None for no limit; inf only measures `grad_norm`.
            With in_backward=True each gradient is multiplied, when it arrives, by
            min(1, max_grad_norm / (max(n, s) + 1e-6)), where n is the norm of the last step (0 in the first one) and s
            the norm of the gradients of this step so far, including this one; parameters that are sharded over several
            ranks are refused. `collins.clipping` has the bound of this, and the effect of norms that are not finite.
        memory: where moments are allocated. None: beside their parameters. Otherwise a `MemoryPolicy`, a tier's name
            ("auto", "device", "host"), a mapping of the policy's arguments, or the path of a TOML file. The placement
            is planned in the first step, when the peak of the activations is known; `placement` shows it.
        in_backward: whether each parameter is stepped, and its gradient freed, as soon as the gradient has arrived in
            backward. The results are bitwise the same, except for `max_grad_norm`, and for the order of sums in
            products of small matrices on CUDA devices under decode="orthogonal" (`collins.compile.matrices`). Call
            `step` after every backward: it ends the step. Closures, more backward passes than `accumulation_steps` and
            a GradScaler are refused. `clip_grad_norm_` finds no gradients and does nothing: set `max_grad_norm`.
        accumulation_steps: with in_backward=True, the number k of backward passes of a step, at most 256. Divide each
            loss by k, and call `step` after the last pass. Each pass is a partial step, an approximation of a part of
            the step with their sum (`collins.rule.partial_scalars`). decode="orthogonal" requires 1.

    All options but `compile`, `seed`, and those from `max_grad_norm` on may be set per group. All accept strings as in
    configuration files: lr="3e-3", betas="0.9,0.95", table_dtype="bfloat16", maximize="true".

    Limits: an element whose gradient is zero moves if other elements of its bucket have gradients. This affects pruned
    and masked weights, and rows of padding in parameters that are stored as a matrix. With role="exact" or
    compress_ratio=1 such elements change by weight decay only.

    Raises:
        ValueError, TypeError: for an option, parameter or gradient that cannot be used, naming it, its value and what
            is accepted, before anything has changed.
        FloatingPointError: for a gradient that is not finite, under nonfinite="error".

    State, in the names of `state_dict`: `step` (0-d), and either `m_table` and `v_table` with K entries in the shape of
    `collins.bucketing.moment_shape`, or, with a first moment for each element, `exp_avg` and `exp_avg_sq`. The int
    `layout` describes the encoding of tables (`collins.fingerprint`), and beside dense moments the key of stochastic
    rounding. `m_table_scale` and `exp_avg_scale` are the scales of integers. Matrices under decode="orthogonal" have no
    second moment.

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
        (2019). Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). Liu et al., "Muon is
        scalable for LLM training" (2025).
    """

    @untraced
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        role: str = "auto",
        compress_ratio: float = 32,
        v_compress_ratio: float | None = None,
        min_K: int = 1024,
        hash: str = "block",
        decode: str = "least_squares",
        row_parts: int | Sequence[int] = 1,
        residual_weight: float | None = None,
        residual_square: float = 2.0,
        rehash_period: int | None = 400,
        table_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool | None = None,
        compile: bool | None = None,
        capturable: bool = False,
        nonfinite: str = "propagate",
        max_grad_norm: float | None = None,
        memory: MemoryPolicy | str | Mapping[str, Any] | PathLike[str] | None = None,
        in_backward: bool = False,
        accumulation_steps: int = 1,
    ) -> None:
        self.compile, in_backward, self.seed, memory = read_whole_options(compile, in_backward, seed, memory)
        self.accumulation_steps = accumulation_of(accumulation_steps, in_backward)
        self.in_backward = False  # until all groups have been accepted
        self.memory = None if memory is None else MemoryPolicy.of(memory)
        self._clipping = Clipping(max_norm_of(max_grad_norm), in_backward)
        self._start(Carried())
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "role": role,
            "compress_ratio": compress_ratio,
            "v_compress_ratio": v_compress_ratio,
            "min_K": min_K,
            "hash": hash,
            "decode": decode,
            "row_parts": row_parts,
            "residual_weight": residual_weight,
            "residual_square": residual_square,
            "rehash_period": rehash_period,
            "table_dtype": table_dtype,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "capturable": capturable,
            "nonfinite": nonfinite,
        }
        check_options(defaults)
        super().__init__(params_of(params), defaults)
        if in_backward:
            self._step_in_backward()

    def _start(self, carried: Carried) -> None:
        """Creates the parts that every process and every copy has for itself: compiled code, host memory, hooks."""
        self.step_number = register(self)
        self._stepper = Stepper(self.seed, self.compile, self.memory, self._clipping, carried)
        self._backward: BackwardSteps | None = None
        self._grad_hooks: GradHooks | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._drain("a copy of the optimizer")
        kept = "seed", "compile", "in_backward", "accumulation_steps", "memory", "_clipping"
        own = {name: getattr(self, name) for name in kept}
        list(self._members())  # updates the entries to the current parameters
        return {**super().__getstate__(), **own, "_carried": self._stepper.carried()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        carried = state.pop("_carried", Carried())
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # the base class adds it here, for its own optimizers
        if "_stepper" not in self.__dict__:  # unpickled or copied
            self.__dict__.setdefault("_clipping", Clipping())  # as pickled by version 0.2
            self._start(carried)
            list(self._members())  # keys are assigned in the current order, which may change before the next step
            if self.in_backward:
                self._step_in_backward()
        if self._backward is not None:
            self._backward.invalidate()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer` does, after checking its options and its parameters.

        Raises:
            ValueError, TypeError: for an option out of range or of the whole optimizer, and for a parameter that is
                complex, sparse, not floating point, given twice or already present. The optimizer is then unchanged.
        """
        refuse_accumulation({**self.defaults, **param_group}, self.accumulation_steps)
        by_module = take_group(param_group, self.defaults, self._members())
        super().add_param_group(param_group)
        self._stepper.add_module_roles(by_module)
        self._watch()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one optimization step.

        If an exception is raised, weights, moments and counter of each parameter are either all stepped or all
        unchanged, in every tier, after backward and in it. There are two exceptions to this: a kernel or a compiled
        graph that fails after it has begun to write; and an eager step of a large parameter whose later pieces run out
        of memory twice, which raises a RuntimeError that says so. A KeyboardInterrupt is deferred until the step has
        ended, unless Ctrl-C is pressed again a second later.

        Args:
            closure: reevaluates the model and returns the loss; it runs with gradients enabled.

        Returns:
            The return value of the closure, or None.

        Raises:
            TypeError, ValueError: for a gradient that is sparse or whose shape, dtype or device is not its parameter's,
                an option that was set out of range, or a state that does not fit. Nothing has changed then.
            FloatingPointError, MemoryError: under nonfinite="error"; if the tables do not fit under the memory policy.
            RuntimeError: for the uses that `in_backward` refuses.
        """
        if closure is None and not self.in_backward and torch.compiler.is_dynamo_compiling():
            trace_step(self)
            return None
        if self._backward is not None:
            self._backward.check(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.perform()
        return loss

    def hash_of(self, param: Tensor) -> Hash | None:
        """The hash of a parameter of this optimizer, or None when its moments are dense.

        Coefficients of a `UniversalHash` may be set before the first step of its parameter; if they are set later, the
        next step raises an error. `deepcopy` and pickle copy them. Loading a state dict compares them, but does not set
        them: set the same coefficients before.

        Raises:
            ValueError: if the parameter is not in this optimizer.
        """
        return self._stepper.hash_of(self.param_groups, self.state, param)

    def memory_report(self) -> MemoryReport:
        """Bytes of state, total and per parameter; exact before the first step too, and for parameters on `meta`."""
        return MemoryReport(tuple(report_row(entry, self._stepper.role(entry)) for entry in self._members()))

    @property
    def placement(self) -> tuple[PlacementPlan, ...]:
        """The plans of the memory policy: one for each device, and one for each later addition of parameters."""
        return tuple(self._stepper.store.plans)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; moments on the host are complete until the next step begins.

        `table_dtype` is saved by name, since `torch.distributed.checkpoint` cannot gather and broadcast dtypes. The
        entry `with_state` of each group is the number of its parameters that have a state.
        """
        self._drain("state_dict()")
        result = super().state_dict()
        for group, own in zip(result["param_groups"], self.param_groups, strict=True):
            group["table_dtype"] = group["table_dtype"] and str(group["table_dtype"])
            if LAST_NORM in group:  # a number, which no later step overwrites
                group[LAST_NORM] = float(group[LAST_NORM])
            group[WITH_STATE] = sum(bool(self.state.get(p)) for p in own["params"])
        return result

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises the error that `load_state_dict` would raise for this state dict, and changes nothing."""
        self._loadable(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict bit for bit: moments keep their dtype, which may differ from the parameter's.

        Existing tensors are overwritten in place; others are allocated in the tier to which they belong. lr, betas,
        eps, weight_decay, residual_weight, residual_square and the entries of schedulers in groups are loaded; all
        other options keep the values of this optimizer.

        Raises:
            ValueError: for a state dict that is not one, or was saved under another bucketing, hash, seed or order of
                parameters, naming the parameter and the difference. The optimizer is then unchanged.
            RuntimeError: between two backward passes of a step with `accumulation_steps`, as from `state_dict`.
        """
        self._drain("load_state_dict()")
        load_into(self, as_dict(state_dict), list(self._members()), self._stepper, self._loadable)
        self._clipping.adopt(self.param_groups)

    def _loadable(self, state_dict: Mapping[str, Any]) -> CheckedStateDict:
        return loadable(state_dict, self.param_groups, tuple(self.defaults), self.expected_states())

    def expected_states(self) -> list[ExpectedState]:
        """The required state of each parameter, through all groups."""
        entries = list(self._members())
        for entry in entries:
            self._stepper.spec(entry)
        return [expected_state(entry, self.seed) for entry in entries]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def perform(self) -> None:
        """Performs a step with the current gradients; `step` calls it, in compiled code too.

        torch.compile does not trace it: the engine compiles graphs of its own, which changes of the learning rate, the
        gradients or the state do not invalidate.
        """
        with HeldInterrupts():
            self._stepper.update(self.param_groups, self.state, repeats=not self.in_backward)
            if self._backward is not None:
                self._backward.end()
                self._watch()  # parameters that require gradients since then

    def _step_in_backward(self) -> None:
        """Registers the hooks that step parameters when their gradients arrive."""
        self.in_backward = True
        self._backward = BackwardSteps(self.accumulation_steps)
        self._grad_hooks = GradHooks(self, Collins._update_one)
        # Makes a GradScaler pass its scale to `step` instead of looking for gradients: see BackwardSteps.check.
        self._step_supports_amp_scaling = True
        self._watch()

    def _watch(self) -> None:
        if self._grad_hooks is not None:
            self._grad_hooks.watch((entry.name, entry.p) for entry in self._members())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_one(self, p: Tensor) -> None:
        """Steps one parameter whose gradient has arrived."""
        assert self._backward is not None
        if torch.is_grad_enabled():  # backward(create_graph=True)
            with torch.no_grad():
                self._update_one(p)
        else:
            self._backward.receive(p, self._stepper, self.param_groups, self.state)

    def _members(self) -> Iterator[ParamEntry]:
        return self._stepper.entries(self.param_groups, self.state)
