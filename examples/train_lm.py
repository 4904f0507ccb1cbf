"""Trains a byte-level GPT on the sources of Python's standard library, once per optimizer, and compares them.

python examples/train_lm.py
python examples/train_lm.py --steps 3000 --device cuda --optimizers adamw collins --lr adamw=2e-3 collins=8e-3
python examples/train_lm.py --optimizers collins --memory examples/policies/one-24gb-card.toml

Each optimizer runs at the best rate of a sweep made beforehand with these defaults (one CPU thread, one rate at a time:
`--optimizers collins --lr 4e-3`). Validation loss after 300 steps, in nats per byte:

| lr     | adamw     | collins   | collins-sketch |
|--------|-----------|-----------|----------------|
| 1e-3   | 2.294     |           |                |
| 2e-3   | **2.252** |           | 2.405          |
| 3e-3   | 2.295     |           |                |
| 4e-3   | 2.322     | 2.282     | 2.347          |
| 6e-3   | 2.419     |           |                |
| 8e-3   | 2.639     | 2.238     | **2.337**      |
| 1.2e-2 |           | **2.216** |                |
| 1.6e-2 |           | 2.229     | 2.341          |
| 2.4e-2 |           | 2.290     |                |
| 3.2e-2 |           |           | 2.368          |
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from corpus import batches, clock, standard_library
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from collins import Collins
from collins.offload import MemoryPolicy, PlacementPlan

VOCABULARY = 256


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        fed: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + fed


class GPT(nn.Module):
    """A decoder-only transformer over bytes; logits of shape (batch, length, 256)."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                depth = 2 * layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each byte given those before it; `tokens` (batch, context + 1), int64."""
        logits: Tensor = self(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, object], float]] = {
    # name: class, its options, the best rate of the sweep above
    "adamw": (torch.optim.AdamW, {}, 2e-3),
    "collins": (Collins, {}, 1.2e-2),
    "collins-sketch": (Collins, {"decode": "sketch"}, 8e-3),
}


@dataclass
class Run:
    """What one training run showed."""

    name: str
    lr: float
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # validation, nats per byte
    state_bytes: int = 0
    milliseconds: float = 0.0  # median time of optimizer.step()
    parameters: int = 0
    placement: tuple[PlacementPlan, ...] = ()  # what --memory came to


def train(name: str, lr: float, text: Tensor, held_out: Tensor, args: argparse.Namespace) -> Run:
    """Trains a new model with one optimizer; the seed, the batches and the schedule are the same for all."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    model = GPT(args.layers, args.width, args.width // 32, args.context).to(device)
    make, options, _ = OPTIMIZERS[name]
    if make is Collins:
        options = {**options, "memory": args.memory}
    optimizer = make(model.parameters(), lr=lr, **options)
    warmup = max(args.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min((step + 1) / warmup, 1.0)
            * (0.55 + 0.45 * math.cos(math.pi * max(step - warmup, 0) / max(args.steps - warmup, 1)))
        ),
    )
    run = Run(name, lr, parameters=sum(p.numel() for p in model.parameters()))
    times = []
    data = batches(text, args.steps, args.batch, args.context, args.seed, device)
    progress = tqdm(data, total=args.steps, desc=f"{name} lr {lr:g}")
    for step, tokens in enumerate(progress, 1):
        model.loss(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        started = clock(device)
        optimizer.step()
        times.append(clock(device) - started)
        schedule.step()
        optimizer.zero_grad()
        if step % max(args.steps // 10, 1) == 0 or step == args.steps:
            run.steps.append(step)
            run.losses.append(evaluate(model, held_out, args))
            progress.set_postfix(validation=f"{run.losses[-1]:.3f}")
    held = (value for state in optimizer.state.values() for value in state.values())
    run.state_bytes = sum(value.nbytes for value in held if isinstance(value, torch.Tensor))
    run.placement = getattr(optimizer, "placement", ())
    run.milliseconds = 1e3 * statistics.median(times[len(times) // 4 :])
    return run


@torch.no_grad()
def evaluate(model: GPT, held_out: Tensor, args: argparse.Namespace) -> float:
    """Validation loss over the same 16 batches each time."""
    data = batches(held_out, 16, args.batch, args.context, 1, torch.device(args.device))
    return statistics.fmean(model.loss(tokens).item() for tokens in data)


def table(runs: list[Run]) -> Table:
    result = Table("optimizer", "lr", "validation loss", "state bytes", "bytes/param", "ms/step")
    for run in runs:
        result.add_row(
            run.name,
            f"{run.lr:g}",
            f"{run.losses[-1]:.3f}",
            f"{run.state_bytes:,}",
            f"{run.state_bytes / run.parameters:.2f}",
            f"{run.milliseconds:.1f}",
        )
    return result


def plot(runs: list[Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        axes.plot(run.steps, run.losses, marker="o", label=f"{run.name}, lr {run.lr:g}")
    axes.set(
        title="byte-level GPT on Python's standard library", xlabel="step", ylabel="validation loss (nats per byte)"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def rate(text: str) -> tuple[str | None, float]:
    """`3e-3` for every optimizer, or `collins=8e-3` for one."""
    name, _, value = text.rpartition("=")
    if name and name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"{name!r} is not an optimizer: choose from {', '.join(OPTIMIZERS)}")
    return name or None, float(value)


def policy(text: str) -> MemoryPolicy:
    try:
        return MemoryPolicy.of(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--lr", nargs="+", type=rate, default=[], metavar="RATE|NAME=RATE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("train_lm.png"), help="the loss plot, a PNG file")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--context", type=int, default=128, help="bytes the model sees")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memory",
        type=policy,
        metavar="FILE|TIER",
        help="where Collins keeps its tables: a policy's TOML file, or a tier",
    )
    args = parser.parse_args(arguments)
    if args.width % 32:
        parser.error(f"--width must be a multiple of 32, got {args.width}")
    return args


def main(arguments: list[str] | None = None) -> list[Run]:
    args = parse(arguments)
    text = standard_library()
    split = len(text) * 95 // 100
    rates = {name: OPTIMIZERS[name][2] for name in args.optimizers}
    for name, lr in args.lr:
        rates.update({name: lr} if name else dict.fromkeys(rates, lr))
    runs = [train(name, rates[name], text[:split], text[split:], args) for name in args.optimizers]
    Console().print(table(runs))
    for run in runs:
        for plan in run.placement:
            print(f"{run.name}: where its tables are\n{plan.summary()}")
    plot(runs, args.out)
    print(f"loss plot: {args.out}")
    return runs


if __name__ == "__main__":
    main()
