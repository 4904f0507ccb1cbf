"""The optimizers that are compared: their construction, their requirements, and the unit of their learning rates.

All of them use one learning rate for the whole model, and weight decay for all parameters except vectors. Optimizers
whose packages are not installed are left out, and the reason is printed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from collins import Collins, param_groups
from collins.rule import default_rho
from compare.peers import MasterWeights, Scale
from compare.training import AfterBackward, Drive, InBackward

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """The parameters of a model by kind: embeddings, output head, other matrices, vectors."""

    embeddings: list[Tensor]
    head: list[Tensor]
    matrices: list[Tensor]
    vectors: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Split:
        """Splits the parameters of a model, whose output head is the linear layer `model.head`, if it has one."""
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        last = getattr(model, "head", None)
        heads = {id(last.weight)} if isinstance(last, nn.Linear) else set()
        split = cls([], [], [], [])
        for p in model.parameters():
            kind = split.vectors if p.dim() < 2 else split.matrices
            if id(p) in tables:
                kind = split.embeddings
            elif id(p) in heads:
                kind = split.head
            kind.append(p)
        return split


BETA1 = 0.9  # of all optimizers, unless the option "beta1" sets it


@dataclass(frozen=True)
class Setup:
    """The model and the hyperparameters with which an optimizer is constructed for a run.

    `accumulate` is the number of backward passes per step, for optimizers that step in backward.
    """

    model: nn.Module
    lr: float
    beta2: float | None
    weight_decay: float
    clip: float
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    accumulate: int = 1

    @property
    def split(self) -> Split:
        return Split.of(self.model)

    @property
    def betas(self) -> tuple[float, float]:
        return BETA1, 0.999 if self.beta2 is None else self.beta2

    def groups(self) -> Groups:
        """The parameter groups of `collins.param_groups`, without names: vectors have no weight decay."""
        return [
            {**group, "params": [p for _, p in group["params"]]}
            for group in param_groups(self.model, weight_decay=self.weight_decay)
        ]


_UNDECAYED = {"weight_decay": 0.0}


def groups(*parts: tuple[list[Tensor], Mapping[str, Any]]) -> Groups:
    """Parameter groups of pairs of parameters and options, without empty groups."""
    return [{"params": params, **options} for params, options in parts if len(params) > 0]


@dataclass(frozen=True)
class Spec:
    """The specification of an optimizer.

    Args:
        name: its name on the command line.
        about: a description of one line.
        make: returns the optimizers of a run, given its setup: one, or one for each kind of parameters.
        has_beta2: whether it has a decay of second moments to sweep.
        unit: the ratio of its learning rates to AdamW's. The rates of the task, if no others are given, are multiplied
            by it, and weight decay is divided by it.
        packages: the packages that it needs, by a name for import and for pip.
        torch_class: the name of its class in `torch.optim`, if some versions of torch do not have it.
        on_gpu: whether it needs a GPU.
        options: names of the options that are accepted as `NAME:OPTION=VALUE`.
        settled: returns the options that identify a run in addition to the optimizer's name, given those in the name.
        computed: returns the bytes of its state, computed from shapes alone; None if they are not known.
        drive: the class that takes its steps; see `compare.training.Drive`.
    """

    name: str
    about: str
    make: Callable[[Setup], Sequence[Optimizer]]
    has_beta2: bool = True
    unit: float = 1.0
    packages: tuple[str, ...] = ()
    torch_class: str | None = None
    on_gpu: bool = False
    options: frozenset[str] = frozenset()
    settled: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda options: {}
    computed: Callable[[Setup], int] | None = None
    drive: Callable[[nn.Module, Sequence[Optimizer], float], Drive] = AfterBackward

    def missing(self, device: torch.device) -> str | None:
        """The reason why it cannot be used on a device, or None if it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            are = "is" if len(absent) == 1 else "are"
            return f"{' and '.join(absent)} {are} not installed: pip install {' '.join(absent)}"
        if self.torch_class is not None and not hasattr(torch.optim, self.torch_class):
            return f"torch {torch.__version__} has no torch.optim.{self.torch_class}"
        return "it needs a GPU" if self.on_gpu and device.type != "cuda" else None


def _adamw(setup: Setup) -> Sequence[Optimizer]:
    return [AdamW(setup.groups(), lr=setup.lr, betas=setup.betas, fused=True, **setup.options)]


def _adamw_bytes(setup: Setup) -> int:
    return sum(map(_adam_bytes, setup.model.parameters()))


def _adam_bytes(p: Tensor) -> int:
    """The bytes of two moments and a step counter."""
    return 2 * p.nbytes + _STEP


_STEP = torch.float32.itemsize


def _master_weights(setup: Setup) -> Sequence[Optimizer]:
    return [MasterWeights(setup.groups(), lr=setup.lr, betas=setup.betas)]


def _master_weights_bytes(setup: Setup) -> int:
    """The bytes of an fp32 copy, two fp32 moments and a step counter."""
    return sum(3 * torch.float32.itemsize * p.numel() + _STEP for p in setup.model.parameters())


def _muon(setup: Setup) -> Sequence[Optimizer]:
    """Muon for matrices, scaled to the RMS of AdamW's updates so that one learning rate fits both; else AdamW."""
    split, decay = setup.split, {"weight_decay": setup.weight_decay}
    rest = groups(([*split.embeddings, *split.head], decay), (split.vectors, _UNDECAYED))
    optimizers: list[Optimizer] = [AdamW(rest, lr=setup.lr, betas=setup.betas, fused=True)] if rest else []
    if split.matrices:
        muon = torch.optim.Muon(
            split.matrices,
            lr=setup.lr,
            weight_decay=setup.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.insert(0, muon)
    return optimizers


def _muon_bytes(setup: Setup) -> int:
    """The bytes of one momentum for matrices, and of AdamW's state for the rest."""
    split = setup.split
    rest = (*split.embeddings, *split.head, *split.vectors)
    return sum(p.nbytes for p in split.matrices) + sum(map(_adam_bytes, rest))


def _adafactor(setup: Setup) -> Sequence[Optimizer]:
    return [torch.optim.Adafactor(setup.groups(), lr=setup.lr)]


def _adafactor_bytes(setup: Setup) -> int:
    """The bytes of the row and column means of matrices, of the second moments of vectors, and of step counters."""
    total = 0
    for p in setup.model.parameters():
        *before, rows, columns = (1, 1, *p.shape)
        kept = math.prod(before) * (rows + columns) if p.dim() > 1 else columns
        total += kept * p.itemsize + _STEP
    return total


def _scale(setup: Setup) -> Sequence[Optimizer]:
    split, decay = setup.split, {"weight_decay": setup.weight_decay}
    parts = (
        (split.matrices, decay),
        (split.embeddings, {**decay, "inputs": 0}),
        (split.head, {**decay, "momentum": 0.9}),
    )
    vectors = groups((split.vectors, _UNDECAYED))
    adamw: list[Optimizer] = [AdamW(vectors, lr=setup.lr, betas=setup.betas, fused=True)] if vectors else []
    return [Scale(groups(*parts), lr=setup.lr), *adamw]


def _scale_bytes(setup: Setup) -> int:
    split = setup.split
    return sum(p.nbytes for p in split.head) + sum(map(_adam_bytes, split.vectors))


def _bitsandbytes(setup: Setup) -> Sequence[Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit(setup.groups(), lr=setup.lr, betas=setup.betas)]


def _torchao(bits: int) -> Callable[[Setup], Sequence[Optimizer]]:
    def make(setup: Setup) -> Sequence[Optimizer]:
        import torchao.optim

        cls = getattr(torchao.optim, f"AdamW{bits}bit")
        half = any(p.dtype == torch.bfloat16 for p in setup.model.parameters())
        return [cls(setup.groups(), lr=setup.lr, betas=setup.betas, bf16_stochastic_round=half)]

    return make


def _apollo(setup: Setup) -> Sequence[Optimizer]:
    """The authors' setting of APOLLO-Mini: one scale per matrix, from a projection of rank 1; AdamW for the rest."""
    from apollo_torch import APOLLOAdamW

    split, decay = setup.split, {"weight_decay": setup.weight_decay}
    projected = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128, "update_proj_gap": 200}
    parts = (
        ([*split.embeddings, *split.head], decay),
        (split.vectors, _UNDECAYED),
        (split.matrices, {**decay, **projected, "proj_type": "std"}),
    )
    return [APOLLOAdamW(groups(*parts), lr=setup.lr, betas=setup.betas)]


def _stable_spam(setup: Setup) -> Sequence[Optimizer]:
    from pytorch_optimizer import StableSPAM

    return [StableSPAM(setup.groups(), lr=setup.lr, betas=setup.betas, foreach=True)]


_PLACES = frozenset({"memory"})  # options that change no result
# Options whose defaults identify a run: the update rule and the formats. All others identify it only if they are given.
_RULE = (
    "role",
    "compress_ratio",
    "v_compress_ratio",
    "min_K",
    "hash",
    "decode",
    "residual_weight",
    "residual_square",
    "rehash_period",
    "table_dtype",
)
_GIVEN = frozenset(  # options that are set by the run or the spec
    {"params", "lr", "betas", "weight_decay", "seed", "in_backward", "accumulation_steps", "max_grad_norm"}
)


def _collins(name: str, about: str, *, in_backward: bool = False, **settled: Any) -> Spec:
    """Collins with some options, and the option "beta1". The defaults of its update rule identify a run, so that runs
    under other defaults are not mistaken for it.
    """
    known = {option: p.default for option, p in inspect.signature(Collins).parameters.items() if option not in _GIVEN}

    def built(setup: Setup, *, in_backward: bool) -> Collins:
        options = {**settled, **setup.options}
        betas = options.pop("beta1", BETA1), setup.betas[1]
        if in_backward:
            options |= {"in_backward": True, "max_grad_norm": setup.clip, "accumulation_steps": setup.accumulate}
        params = param_groups(setup.model, weight_decay=setup.weight_decay)
        optimizer: Collins = Collins(params, lr=setup.lr, betas=betas, seed=setup.seed, **options)
        return optimizer

    return Spec(
        name,
        about,
        lambda setup: [built(setup, in_backward=in_backward)],
        options=frozenset({*known, "beta1"}),
        settled=lambda options: _rule({**known, **settled, **options}),
        computed=lambda setup: built(setup, in_backward=False).memory_report().state_bytes,
        drive=InBackward if in_backward else AfterBackward,
    )


def _rule(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that identify a run, with the value of the residual's weight where it follows from others."""
    rule = {option: options[option] for option in _RULE}
    if rule["residual_weight"] is None:
        rule["residual_weight"] = default_rho(rule["decode"], options.get("beta1", BETA1))
    return rule


OPTIMIZERS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("adamw", "torch.optim.AdamW", _adamw, options=frozenset({"eps"}), computed=_adamw_bytes),
        _collins("collins", "Collins with its defaults"),
        _collins("collins-8", "Collins at ratio 8", compress_ratio=8),
        _collins("collins-128", "Collins at ratio 128", compress_ratio=128),
        _collins("collins-orthogonal", "Collins, orthogonalised momentum of matrices", decode="orthogonal"),
        _collins("collins-published", "the published Collins v0.1 update", hash="universal", decode="sketch"),
        _collins("collins-in-backward", "Collins, with steps and clipping in backward", in_backward=True),
        Spec(
            "adamw-masters",
            "AdamW on fp32 copies of the weights: for @bf16",
            _master_weights,
            computed=_master_weights_bytes,
        ),
        Spec(
            "muon",
            "torch.optim.Muon for matrices, AdamW for the rest",
            _muon,
            torch_class="Muon",
            computed=_muon_bytes,
        ),
        Spec(
            "adafactor",
            "torch.optim.Adafactor",
            _adafactor,
            has_beta2=False,
            unit=20.0,  # its learning rates are relative to the RMS of a tensor
            computed=_adafactor_bytes,
        ),
        Spec(
            "scale",
            "SCALE: normalised gradients, momentum only for the output head",
            _scale,
            has_beta2=False,
            computed=_scale_bytes,
        ),
        Spec("bitsandbytes-8bit", "bitsandbytes AdamW8bit", _bitsandbytes, packages=("bitsandbytes",), on_gpu=True),
        Spec("torchao-8bit", "torchao AdamW8bit", _torchao(8), packages=("torchao",)),
        Spec("torchao-4bit", "torchao AdamW4bit", _torchao(4), packages=("torchao",)),
        Spec("apollo-mini", "APOLLO-Mini", _apollo, packages=("apollo_torch", "bitsandbytes")),  # imports both
        Spec("stable-spam", "Stable-SPAM", _stable_spam, packages=("pytorch_optimizer",)),
    )
}


@dataclass(frozen=True)
class Choice:
    """An optimizer as given on the command line: `NAME[:OPTION=VALUE,...][@bf16]`.

    With `@bf16` the weights are bfloat16, without a copy in float32; otherwise they are float32. The optimizer is
    stored by name, so that a choice can be pickled and sent to another process.
    """

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: torch.dtype = torch.float32

    @classmethod
    def of(cls, text: str) -> Choice:
        """Parses a text.

        Raises:
            ValueError: for an unknown optimizer, option or dtype.
        """
        head, at, weights = text.partition("@")
        if at and weights != "bf16":
            raise ValueError(f"the dtype after @ must be bf16 (float32 if it is omitted), got {text!r}")
        name, _, rest = head.partition(":")
        if name not in OPTIMIZERS:
            raise ValueError(f"{name!r} is not an optimizer: choose from {', '.join(OPTIMIZERS)}")
        spec, options = OPTIMIZERS[name], {}
        for item in filter(None, rest.split(",")):
            option, equals, value = item.partition("=")
            if option not in spec.options or not equals:
                known = ", ".join(sorted(spec.options)) or "none"
                raise ValueError(f"must be OPTION=VALUE with an option of {name} (accepted: {known}), got {item!r}")
            options[option] = _value(value)
        return cls(name, options, torch.bfloat16 if at else torch.float32)

    @property
    def spec(self) -> Spec:
        return OPTIMIZERS[self.optimizer]

    @property
    def name(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items() if name not in _PLACES)
        return self.optimizer + (f":{options}" if options else "") + ("" if self.weights == torch.float32 else "@bf16")

    def described(self) -> dict[str, str]:
        """The options that identify a run and are not part of the name of the choice."""
        rule = self.spec.settled(self.options)
        return {name: str(value) for name, value in rule.items() if name not in self.options}


def identifying(optimizer: str, options: Mapping[str, str]) -> dict[str, str]:
    """The options of a finished run that identify a run in this version; options that it does not have are dropped."""
    try:
        known = Choice.of(optimizer).described()
    except ValueError:  # an optimizer or an option of an earlier version
        return dict(options)
    return {name: value for name, value in options.items() if name in known}


def _value(text: str) -> Any:
    found = getattr(torch, text.removeprefix("torch."), None)
    if isinstance(found, torch.dtype):
        return found
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
