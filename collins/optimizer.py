"""`Collins`, the optimizer: what users call. Checks, programs, state and stores stand in modules of their own."""

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
    r"""AdamW whose moments live in Count-Sketch tables, `compress_ratio` times smaller than AdamW's in fp32.

    With h, s the position and sign hashes of a parameter, c the load of a bucket, which V has more of than M, and g its
    gradient at step t:

        mu_b = (1/c) sum_{h(i)=b} s(i) g_i                q_b = (1/c) sum_{h(i)=b} g_i^2
        M_b <- beta1 M_b + (1 - beta1) mu_b               V_b <- beta2 V_b + (1 - beta2) q_b
        r_i = g_i - s(i) mu_{h(i)}
        m_i = s(i) sqrt(c) M_{h(i)} / (1 - beta1^t)       v_i = V_{h(i)} / (1 - beta2^t)
        p_i <- (1 - lr wd) p_i - lr (m_i + rho r_i) / (sqrt(v_i + kappa r_i^2) + eps)

    At c = 1 the residual r is zero and this is AdamW. Under decode="orthogonal" matrices have no V, and with X_i =
    sqrt(c) s(i) M_{h(i)} + rho r_i and NS, which brings all singular values close to 1 (`collins.orthogonal`):

        p <- (1 - lr wd) p - lr 0.2 sqrt(max(rows, cols)) NS(X)

    At c = 1 this is Muon without Nesterov's term.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of parameter groups, as for `torch.optim.AdamW`; or a module,
            which stands for its named parameters and tells their roles. fp64, fp32, bf16 and fp16, any shape and
            strides.
        lr: learning rate, a float or a one-element tensor. 1.4 to 2 times AdamW's is the place to start.
        betas: decay rates of the two moments, each in [0, 1): any sequence of two numbers, kept as a tuple of floats.
        eps: added to the denominator.
        weight_decay: decoupled decay, per unit of lr.
        role: what the parameters are, which decides how their moments are stored: "matrix"; "tokens" for tables with
            one row for each token, such as embeddings and output heads; "exact" for dense moments, as compress_ratio=1.
            "auto" finds the role of each from its module, name and shape (`collins.roles`); it stays the same from the
            first step on. `memory_report` tells what was found, and by what.
        compress_ratio: the 8 bytes that AdamW keeps of an fp32 parameter over ours, at least 1, in a large model: it
            chooses loads and formats by role (`collins.schemes`). 32 is M in int4 at c = 4 and V in fp32 at c = 128
            for matrices, M in int8 and V at c = 64 for token tables. 1 keeps exact moments. Under decode="orthogonal"
            it is M in int4 at c = 2, and 64 at c = 4, with scales for each 128, for matrices. With a `table_dtype`, or
            hash="universal" or decode="sketch", it is c itself.
        v_compress_ratio: with a `table_dtype`, c of the second moment where it is to be coarser; None for the same.
        min_K: parameters of at most this many elements keep exact moments; others get at least this many buckets.
        hash: "block" (a bucket is neighbours in memory; one pass, deterministic) or "universal" (Carter-Wegman).
        decode: "residual" (above); "sketch", the published Collins v0.1 update without residual; or "orthogonal", for
            parameters of role "matrix", beside "residual" for others, with lr and weight_decay as for AdamW and
            betas=(0.95, ...). Parameters of three dimensions are stacks of matrices; of more, taken as (out, rest). It
            is for pretraining in large batches: its products take 3 % of the operations of training a 7B model at
            564,000 tokens a step, and 30 % at a tenth of that. A DTensor that several ranks share is refused.
        row_parts: under decode="orthogonal", into how many matrices each one is cut by rows, or the rows of each: 3 for
            a weight that holds Q, K and V one below another, (4096, 1024, 1024) with fewer rows of K and V.
        residual_weight: rho; None for sqrt((1 - beta1) / (1 + beta1)).
        residual_square: kappa.
        rehash_period: steps T after which a bucket of hash="block" draws new signs and restarts M_b; None for never.
        table_dtype: None for formats by role. Else that of all tables: torch.float32, torch.bfloat16 (stochastically
            rounded) or, for torch.float64 parameters only, torch.float64; "int8" or "int4" for M in integers with a
            scale for each 64 (`collins.formats.IntFormat`) beside V in float32. Exact moments use the wider of this, or
            float32, and the parameter's dtype. Version 0.2 is table_dtype=torch.float32, rehash_period=100,
            residual_square=1.
        seed: what every hash derives from, together with the parameter's name, or its number among the parameters where
            it has none. Replicas must agree.
        maximize: ascend instead of descend.
        stochastic_rounding: whether parameters and tables in 16 bits are rounded stochastically; None for True.
        compile: True steps through torch.compile, False eagerly. None takes the fastest: on CUDA devices one launch of
            a Triton kernel for all tensors of a kind, on other accelerators torch.compile, on the CPU eager steps.
        capturable: whether the step may be captured in a CUDA graph, as for `torch.optim.AdamW`: step counters live on
            the device, and `lr` is read there when it is a tensor on it.
        nonfinite: what an infinite or NaN gradient does. "propagate": it spreads to its bucket's moments and elements,
            as in AdamW to its element's. "skip": its bucket, or its element of dense moments, stays as it is in this
            step, and so it does where the square of a gradient overflows; the device is not waited for. In both it is
            the whole matrix that decode="orthogonal" steps. "error": a FloatingPointError before anything changes;
            reads gradients once more and waits for the device. With in_backward=True, parameters whose gradients came
            earlier have been stepped by then.
        max_grad_norm: the largest norm that the gradients of one step may have together, over all groups, devices and
            ranks: larger ones are multiplied by min(1, max_grad_norm / (norm + 1e-6)) inside the step, which is that
            after `torch.nn.utils.clip_grad_norm_`. None for any; inf to measure `grad_norm` alone. With
            in_backward=True each is multiplied, as it arrives, by min(1, max_grad_norm / (max(n, s) + 1e-6)): n is the
            norm of the last step (0 in the first), s that of what has arrived in this step, itself included;
            parameters sharded over several ranks are refused. `collins.clipping` has what that bounds, and what a norm
            does that is not finite.
        memory: where moments live: None beside their parameters; else a `MemoryPolicy`, a tier's name ("auto",
            "device", "host"), a mapping of the policy's arguments, or the path of a TOML file. Decided at the first
            step, when the activations' peak has been seen; `placement` tells what was decided.
        in_backward: whether each parameter is stepped, and its gradient freed, as soon as the gradient has arrived in
            backward; but for `max_grad_norm`, and the order of sums in products of small matrices on CUDA devices under
            decode="orthogonal" (`collins.compile.matrices`), the results are the same to the bit. `step` then ends the
            step: call it after every backward. Closures, more backward passes than `accumulation_steps` and a
            GradScaler are refused. `clip_grad_norm_` finds no gradients and does nothing: set `max_grad_norm`.
        accumulation_steps: with in_backward=True, of how many backward passes k one step uses the gradients, at most
            256; divide each loss by k, and call `step` after the last. Each pass is a partial step, close to a part of
            the step with their sum (`collins.rule.partial_scalars`). decode="orthogonal" refuses more than 1.

    All but `compile`, `seed`, `max_grad_norm` and what follows it may be set per group. Strings as in
    configuration files will do for all of them: lr="3e-3", betas="0.9,0.95", table_dtype="bfloat16", maximize="true".

    Limits: an element whose gradient is zero moves where others of its bucket have gradients, as weights that are
    pruned or masked do, and rows of padding that are stored as a matrix. role="exact" or compress_ratio=1 leaves such
    elements to weight decay alone.

    Raises:
        ValueError, TypeError: for an option, parameter or gradient that cannot be used, naming it, its value and what
            is accepted, before anything has changed.
        FloatingPointError: for a gradient that is not finite, under nonfinite="error".

    State, in the names of `state_dict`: `step` (0-d), and `m_table`, `v_table` with K entries in the shape of
    `collins.bucketing.moment_shape`, with `layout`, an int that says what they were encoded with
    (`collins.fingerprint`); or, with a first moment for each element, `exp_avg` and `exp_avg_sq`. `m_table_scale` and
    `exp_avg_scale` are the scales of integers. Matrices under decode="orthogonal" have no second moment. What is
    rounded stochastically has a `layout` beside dense moments too, which says what the random bits derive from.

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
        decode: str = "residual",
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
        """What is made anew in every process and every copy: compiled code, host memory, hooks."""
        self.step_number = register(self)
        self._stepper = Stepper(self.seed, self.compile, self.memory, self._clipping, carried)
        self._backward: BackwardSteps | None = None
        self._grad_hooks: GradHooks | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._drain("a copy of the optimizer")
        kept = "seed", "compile", "in_backward", "accumulation_steps", "memory", "_clipping"
        own = {name: getattr(self, name) for name in kept}
        list(self._members())  # what is known is known of the parameters of now
        return {**super().__getstate__(), **own, "_carried": self._stepper.carried()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        carried = state.pop("_carried", Carried())
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # the base class adds it here, for its own optimizers
        if "_stepper" not in self.__dict__:  # unpickled or copied
            self.__dict__.setdefault("_clipping", Clipping())  # as pickled by version 0.2
            self._start(carried)
            list(self._members())  # keys go by the order of now, which may change before the next step
            if self.in_backward:
                self._step_in_backward()
        if self._backward is not None:
            self._backward.look_again()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer` does, after checking its options and its parameters.

        Raises:
            ValueError, TypeError: for an option out of range, a parameter that is complex, sparse, not floating point,
                given twice or already present. The optimizer is then as it was.
        """
        refuse_accumulation({**self.defaults, **param_group}, self.accumulation_steps)
        by_module = take_group(param_group, self.defaults, self._members())
        super().add_param_group(param_group)
        self._stepper.told(by_module)
        self._watch()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one optimization step.

        Whatever is raised while parameters are stepped, each of them is either stepped - its weights, moments and
        counter - or all of these are as they were, in every tier, after backward and in it. Two things are beyond that:
        a kernel or a compiled graph that fails after it has begun to write; and an eager step of a large parameter
        whose later pieces find no memory when they are tried again, which ends in a RuntimeError that says so. A
        KeyboardInterrupt comes once the step has ended, unless Ctrl-C is pressed again a second later.

        Args:
            closure: reevaluates the model and returns the loss; it runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: for a gradient that is sparse or whose shape, dtype or device is not its parameter's,
                an option that was set out of range, or a state that does not fit. Nothing has changed then.
            RuntimeError: for what `in_backward` refuses.
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

        Coefficients set on a `UniversalHash` before its parameter is first stepped take effect; later ones are refused
        by the next step. They travel with `deepcopy` and pickle; a state dict knows them, but does not set them: set
        the same ones before loading it.

        Raises:
            ValueError: when the parameter is not in this optimizer.
        """
        return self._stepper.hash_of(self.param_groups, self.state, param)

    def memory_report(self) -> MemoryReport:
        """Bytes of state, in all and per parameter; exact before the first step, and for parameters on `meta`."""
        return MemoryReport(tuple(report_row(entry, self._stepper.role(entry)) for entry in self._members()))

    @property
    def placement(self) -> tuple[PlacementPlan, ...]:
        """What the memory policy came to: a plan for each device, and for each time that parameters were new."""
        return tuple(self._stepper.store.plans)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; moments on the host are complete until the next step begins.

        `table_dtype` is in it by name: what `torch.distributed.checkpoint` gathers and broadcasts may hold no dtype.
        Each group says in `with_state` for how many of its parameters there is a state.
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
        """Raises what `load_state_dict` would raise for this state dict, and changes nothing."""
        self._loadable(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit: moments keep their dtype whatever the parameter's is.

        Tensors that exist already are overwritten in place; others are made on the tier where they belong. lr, betas,
        eps, weight_decay, residual_weight, residual_square and what schedulers keep in a group come from the state
        dict; all other options stay as they are here.

        Raises:
            ValueError: when the state dict was saved under another bucketing, hash, seed or order of parameters, naming
                the parameter and the difference. The optimizer is then as it was.
        """
        self._drain("load_state_dict()")
        load_into(self, as_dict(state_dict), list(self._members()), self._stepper, self._loadable)
        self._clipping.adopt(self.param_groups)

    def _loadable(self, state_dict: Mapping[str, Any]) -> CheckedStateDict:
        return loadable(state_dict, self.param_groups, tuple(self.defaults), self.expected_states())

    def expected_states(self) -> list[ExpectedState]:
        """What the state of each parameter must be, through all groups."""
        entries = list(self._members())
        for entry in entries:
            self._stepper.spec(entry)
        return [expected_state(entry, self.seed) for entry in entries]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def perform(self) -> None:
        """Performs a step with the gradients that parameters have; what `step` calls, also in compiled code.

        Code that compiles `step` calls this as it is: the engine compiles its own graphs, which no change of learning
        rate, gradients or state invalidates.
        """
        with HeldInterrupts():
            self._stepper.update(self.param_groups, self.state, repeats=not self.in_backward)
            if self._backward is not None:
                self._backward.end()
                self._watch()  # whoever takes gradients since

    def _step_in_backward(self) -> None:
        """From now on parameters are stepped as their gradients arrive."""
        self.in_backward = True
        self._backward = BackwardSteps(self.accumulation_steps)
        self._grad_hooks = GradHooks(self, Collins._update_one)
        # Asks a GradScaler to hand its scale over instead of finding no gradients: see BackwardSteps.check.
        self._step_supports_amp_scaling = True
        self._watch()

    def _watch(self) -> None:
        if self._grad_hooks is not None:
            self._grad_hooks.watch((entry.name, entry.p) for entry in self._members())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_one(self, p: Tensor) -> None:
        """The step of one parameter whose gradient has arrived."""
        assert self._backward is not None
        if torch.is_grad_enabled():  # backward(create_graph=True)
            with torch.no_grad():
                self._update_one(p)
        else:
            self._backward.receive(p, self._stepper, self.param_groups, self.state)

    def _members(self) -> Iterator[ParamEntry]:
        return self._stepper.entries(self.param_groups, self.state)
