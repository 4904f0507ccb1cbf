"""Language models: LLaMA decoders on byte-level BPE tokens, with random initial weights or pretrained on code."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from corpus import batches
from llama import Llama
from torch import Tensor
from torch.nn import functional

from compare.tasks import Paths, PretrainingPlan, Settings, Task, TaskError, Workload
from compare.text import Corpus, Tokens, installed_folders, standard_library
from compare.training import AfterBackward, StepCallback, train

_ROTARY_BASE = 10_000.0  # enough for contexts of a few hundred tokens
_CHUNK = 128  # tokens


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(Settings):
    """The settings of a task, and the shape of the decoder.

    A step uses `batch` windows of `context` tokens; validation uses `held_out` batches of the same size.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    context: int
    held_out: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden must be a multiple of twice heads, got {self.hidden} and {self.heads}")
        if not 257 <= self.vocabulary <= 65_536:
            raise ValueError(
                f"vocabulary must be 257 (all bytes and the end of a text) to 65536, got {self.vocabulary}"
            )

    def decoder(self, weights: torch.dtype, device: torch.device, seed: int) -> Llama:
        """A decoder with random weights, which are drawn on the CPU to be the same on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (self.layers, self.hidden, self.ffn, self.heads, self.heads, self.vocabulary)
            model = Llama(*sizes, checkpointed=False, rotary_base=_ROTARY_BASE)
            model.fill()
        return model.to(device, weights)


class LanguageWorkload(Workload):
    """A decoder and windows of text; its blocks and its loss are compiled on a GPU."""

    model: Llama

    def __init__(self, settings: LanguageSettings, model: Llama, text: tuple[Tensor, Tensor]) -> None:
        self.settings, self.model = settings, model
        self.train, self.held_out = text
        self.device = model.head.weight.device
        self.head_loss: Callable[..., Tensor] = HeadLoss.apply
        if self.device.type == "cuda":
            model.compile_blocks()
            self.head_loss = _compiled_head_loss()

    def batches(self, seed: int) -> Iterator[Tensor]:
        s = self.settings
        yield from batches(self.train, s.steps, s.batch, s.context, seed, self.device)

    def loss(self, batch: Tensor) -> Tensor:
        features = self.model.features(batch[:, :-1]).flatten(0, 1)
        return self.head_loss(features, self.model.head.weight, batch[:, 1:].flatten())

    def measure(self) -> dict[str, float]:
        s = self.settings
        windows = batches(self.held_out, s.held_out, s.batch, s.context, 1, self.device)
        return {"loss": statistics.fmean(self.loss(tokens).item() for tokens in windows)}


def head_loss(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: features (tokens, hidden), head (vocabulary, hidden), targets (tokens,)."""
    return functional.cross_entropy(functional.linear(features, head).float(), targets)


@lru_cache(maxsize=1)
def _compiled_head_loss() -> Callable[..., Tensor]:
    """The compiled loss, which all runs of a process share."""
    return torch.compile(head_loss, dynamic=False)


class HeadLoss(torch.autograd.Function):
    """`head_loss` on a CPU in half the time: in chunks that fit into its cache, with gradients computed in forward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        losses, grads = [], []
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_grad else None
        for x, target in zip(features.split(_CHUNK), targets.split(_CHUNK), strict=True):
            logits = functional.linear(x, head).float()
            probs = logits.softmax(1)
            rows = torch.arange(len(x))
            # The normaliser is computed from the most probable token, whose probability does not underflow.
            losses.append(logits.amax(1) - probs.amax(1).log() - logits[rows, target])
            if grad_head is not None:
                probs[rows, target] -= 1
                grads.append(probs.to(head.dtype) @ head)
                grad_head.addmm_(probs.T, x.float())
        if grad_head is not None:
            ctx.save_for_backward(torch.cat(grads), grad_head.to(head.dtype))
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_features, grad_head = ctx.saved_tensors
        scale = scale / len(grad_features)
        return grad_features * scale.to(grad_features.dtype), grad_head * scale.to(grad_head.dtype), None


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Task):
    """Pretraining of a decoder from random weights.

    Args:
        packages: whether to use the text of all installed packages. Otherwise only the sources of the standard library
            are used, which are tokenized in seconds.
    """

    settings: LanguageSettings
    packages: bool
    unit: str = "nats per token"

    def corpus(self, paths: Paths) -> Corpus:
        if paths.text:
            return Corpus(self.settings.vocabulary, paths.text, paths.text)
        roots = installed_folders() if self.packages else (standard_library(),)
        return Corpus(self.settings.vocabulary, roots, roots if self.packages else ())

    def tokens(self, paths: Paths) -> Tokens:
        return self.corpus(paths).tokens(paths.cache)

    def token_tensors(self, paths: Paths, kinds: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens for training and for validation."""
        tokens = self.tokens(paths)
        train, valid = (tokens.load(part, kinds, device) for part in ("train", "valid"))
        return train, valid

    def prepare(self, paths: Paths) -> str:
        tokens = self.tokens(paths)
        for kind in tokens.kinds:
            count = min(tokens.count(part, kind) for part in ("train", "valid"))
            if count <= self.settings.context:
                raise TaskError(
                    f"{self.name} needs more {kind}: {count} tokens are too few for windows of"
                    f" {self.settings.context} tokens; pass folders with more text"
                )
        return tokens.digest()

    def workload(self, paths: Paths, device: torch.device, weights: torch.dtype, seed: int) -> Workload:
        token_tensors = self.token_tensors(paths, self.tokens(paths).kinds, device)
        return LanguageWorkload(self.settings, self.settings.decoder(weights, device, seed), token_tensors)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(LanguageSettings):
    """The settings of a language task, and those of the pretraining on code by AdamW."""

    pretraining_steps: int
    pretraining_rate: float


@dataclass(frozen=True, kw_only=True)
class Finetune(LanguageModel):
    """Full fine-tuning, on prose, of a decoder that was pretrained on code without this prose."""

    settings: FinetuneSettings
    optimizers: tuple[str, ...] = (
        "adamw",
        "adamw-masters@bf16",
        "adamw@bf16",
        "collins@bf16",
        "collins-in-backward@bf16",
    )

    def corpus(self, paths: Paths) -> Corpus:
        corpus = super().corpus(paths)
        return replace(corpus, prose=corpus.prose or installed_folders(), disjoint=True)

    def pretraining_plan(self, paths: Paths) -> PretrainingPlan:
        s = self._pretraining_settings()
        identity = json.dumps([asdict(s), self.settings.pretraining_rate, self.tokens(paths).digest()], sort_keys=True)
        name = f"{self.name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.pt"
        return PretrainingPlan(f"{self.name}: pretraining on code", paths.cache / name, s.steps)

    def pretrain(self, paths: Paths, device: torch.device, callback: StepCallback) -> None:
        s, path = self._pretraining_settings(), self.pretraining_plan(paths).path
        model = s.decoder(torch.float32, device, seed=0)
        workload = LanguageWorkload(s, model, self.token_tensors(paths, ("code",), device))
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, self.settings.pretraining_rate, weight_decay=s.weight_decay, fused=True)
        precision = torch.bfloat16 if self.uses_autocast(device, torch.float32) else None
        train(workload, s, AfterBackward(model, [adamw], s.clip), seed=0, autocast=precision, callback=callback)
        temporary = path.with_suffix(".tmp")
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, temporary)
        temporary.replace(path)

    def workload(self, paths: Paths, device: torch.device, weights: torch.dtype, seed: int) -> Workload:
        model = self.settings.decoder(torch.float32, device, seed)
        model.load_state_dict(torch.load(self.pretraining_plan(paths).path, weights_only=True))
        return LanguageWorkload(self.settings, model.to(weights), self.token_tensors(paths, ("prose",), device))

    def _pretraining_settings(self) -> LanguageSettings:
        settings = {field.name: getattr(self.settings, field.name) for field in fields(LanguageSettings)}
        return LanguageSettings(**{**settings, "steps": self.settings.pretraining_steps})


_SMALL = {
    "batch": 16,
    "context": 64,
    "vocabulary": 8192,
    "hidden": 96,
    "layers": 2,
    "heads": 3,
    "ffn": 256,
    "held_out": 16,
    "points": 6,
}
_LARGE = {"batch": 64, "context": 256, "vocabulary": 32_000}
_60M = {**_LARGE, "hidden": 512, "layers": 8, "heads": 8, "ffn": 1376}
_130M = {**_LARGE, "hidden": 768, "layers": 12, "heads": 12, "ffn": 2048}

LM_SMALL = LanguageModel(
    name="lm-small",
    about="a decoder of 1.8M parameters on the sources of the standard library; a minute per run on one core",
    packages=False,
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
    settings=LanguageSettings(steps=300, **_SMALL),
)

LANGUAGE_TASKS: tuple[Task, ...] = (
    LM_SMALL,
    LanguageModel(
        name="lm-60m",
        about="LLaMA 60M on the text of installed packages; a minute per run on an H100",
        packages=True,
        rates=(1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3),
        beta2s=(0.95, 0.99, 0.999),
        autocast=True,
        settings=LanguageSettings(steps=3000, **_60M),
    ),
    LanguageModel(
        name="lm-130m",
        about="LLaMA 130M on the text of installed packages",
        packages=True,
        rates=(1e-3, 1.4e-3, 2e-3, 2.8e-3),
        beta2s=(0.95, 0.99, 0.999),
        autocast=True,
        settings=LanguageSettings(steps=5000, **_130M),
    ),
    Finetune(
        name="finetune",
        about="LLaMA 60M, pretrained on code, fine-tuned on documents and docstrings",
        packages=True,
        rates=(2e-4, 4e-4, 8e-4, 1.6e-3),
        autocast=True,
        settings=FinetuneSettings(steps=400, **_60M, pretraining_steps=3000, pretraining_rate=1e-3),
    ),
    Finetune(
        name="finetune-small",
        about="the decoder of lm-small, pretrained on the standard library, fine-tuned on documents and docstrings",
        packages=False,
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
        settings=FinetuneSettings(steps=150, **_SMALL, pretraining_steps=300, pretraining_rate=2e-3),
    ),
)
