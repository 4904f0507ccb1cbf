"""Trains a LLaMA of 70 billion parameters, all of them, on one device of 141 GB; or a smaller one on a smaller device.

PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python examples/train_70b.py --vocab 128256 --steps 5
python examples/train_70b.py --layers 32 --hidden 4096 --ffn 11008 --heads 32 --kv-heads 32 --tier auto
python examples/train_70b.py --device cpu --no-compile --layers 2 --hidden 64 --ffn 176 --heads 4 --kv-heads 2 \
    --vocab 256 --seq-len 64 --batch-size 8 --steps 30 --lr 1e-2 --tier host

Weights are random and in bfloat16, without a copy in float32; tokens are the bytes of Python's standard library. Blocks
are checkpointed and compiled, the loss is computed in chunks, and Collins steps each parameter while backward goes on.

It prints where everything will go, then trains. Each step is timed against a forward and backward on the same batch
whose gradients are dropped as they arrive: "optimizer adds" is what the median step takes beyond the median of those,
the first of each aside, which compiles.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from corpus import batches, clock, standard_library
from llama import Llama
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from collins import Collins
from collins.offload import (
    MemoryPolicy,
    PlacementPlan,
    device_figures,
    host_memory_free,
    host_memory_total,
    pinned_bytes,
    place,
)
from collins.offload.budget import Budget, Training, budget_of, requests_of
from collins.offload.shapes import llama
from collins.offload.sizes import size_text

POLICY = Path(__file__).parent / "policies" / "70b-on-141gb.toml"
CHUNKS = 8


@dataclass
class Run:
    """What a run showed, step by step; times in seconds."""

    plan: PlacementPlan
    losses: list[float] = field(default_factory=list)  # nats per token
    steps: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)  # forward and backward alone
    peaks: list[int] = field(default_factory=list)  # bytes on the device; none on the CPU
    pinned: int = 0  # bytes
    placement: tuple[PlacementPlan, ...] = ()

    @property
    def added(self) -> float | None:
        """The share of forward and backward that the optimizer adds to them."""
        if len(self.steps) < 2:
            return None
        return statistics.median(self.steps[1:]) / statistics.median(self.passes[1:]) - 1


def planned(args: argparse.Namespace) -> tuple[Budget, PlacementPlan]:
    """What the run will take, from shapes alone, and where its tables will go.

    Raises:
        MemoryError: when it does not fit, with the numbers.
    """
    key_value = args.kv_heads * args.hidden // args.heads
    model = llama(args.layers, args.hidden, args.ffn, key_value, args.vocab)
    budget = budget_of(model, Training(torch.bfloat16, args.batch_size, args.seq_len, CHUNKS))
    requests = requests_of(model, torch.bfloat16, compress_ratio=32, min_K=1024, hash="block", table_dtype=None)
    free, total = None, None
    if args.device.type == "cuda":
        figures = device_figures(args.device)
        free, total = figures.free - budget.held(in_backward=True), figures.total
        if free < 0:
            raise MemoryError(f"weights, gradients and activations exceed {args.device} by {size_text(-free)}")
    memory = {"host_free": host_memory_free(), "host_total": host_memory_total()}
    return budget, place(tuple(requests), args.policy, device_free=free, device_total=total, **memory)


def show(console: Console, budget: Budget, plan: PlacementPlan) -> None:
    table = Table("on the device", "size")
    lines = {
        "weights": budget.weights,
        "gradients, at most at once": budget.gradients_in_backward,
        "activations": budget.activations,
        "tables": plan.device_bytes,
        "staging ring": plan.staging_bytes,
    }
    for name, size in lines.items():
        table.add_row(name, size_text(size))
    console.print(table)
    console.print(plan.summary(), soft_wrap=True, highlight=False, markup=False)


def built(args: argparse.Namespace) -> Llama:
    """The model with random weights, which are first drawn on the device: nowhere else is there room."""
    with torch.device("meta"):
        model = Llama(args.layers, args.hidden, args.ffn, args.heads, args.kv_heads, args.vocab).to(torch.bfloat16)
    model.to_empty(device=args.device)
    torch.manual_seed(args.seed)
    model.fill()
    if args.compile:
        model.compile_blocks()
    return model


class Dropping:
    """While `on`, gradients are dropped as they arrive. To be made before the optimizer, whose hooks come after."""

    def __init__(self, model: Llama) -> None:
        self.on = False
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self)

    def __call__(self, p: Tensor) -> None:
        if self.on:
            p.grad = None


def train(args: argparse.Namespace, run: Run, console: Console) -> None:
    text = standard_library()
    model = built(args)
    dropping = Dropping(model)
    optimizer = Collins(model.parameters(), lr=args.lr, memory=args.policy, in_backward=True)
    tokens_per_step = args.batch_size * args.seq_len
    table = Table("step", "loss", "tokens/s", "peak on the device", "pinned on the host", "optimizer adds")
    data = batches(text, args.steps, args.batch_size, args.seq_len, args.seed, args.device)
    progress = tqdm(data, total=args.steps)
    for number, tokens in enumerate(progress, 1):
        if args.device.type == "cuda" and number > 1:  # the first step decides by the peak that was seen
            torch.cuda.reset_peak_memory_stats(args.device)
        started = clock(args.device)
        loss = model.loss(tokens, CHUNKS)
        loss.backward()
        optimizer.step()
        run.steps.append(clock(args.device) - started)
        run.losses.append(loss.item())
        if args.device.type == "cuda":
            run.peaks.append(torch.cuda.max_memory_allocated(args.device))
        dropping.on = True
        started = clock(args.device)
        model.loss(tokens, CHUNKS).backward()
        run.passes.append(clock(args.device) - started)
        dropping.on = False
        run.pinned = pinned_bytes()
        added = "" if run.added is None else f"{run.added:.1%}"
        speed = tokens_per_step / run.steps[-1]
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}", tokens_per_s=f"{speed:.0f}", optimizer_adds=added)
        peak = size_text(run.peaks[-1]) if run.peaks else ""
        table.add_row(str(number), f"{run.losses[-1]:.3f}", f"{speed:,.0f}", peak, size_text(run.pinned), added)
    run.placement = optimizer.placement
    console.print(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv-heads": 8, "vocab": 32000}
    for name, value in {**shape, "seq-len": 2048, "batch-size": 1, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-6, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", type=torch.device, default="cuda", help="(%(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="blocks (yes)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--tier", dest="policy", type=_policy, metavar="TIER", help="auto, device or host")
    where.add_argument("--policy", type=_policy, metavar="FILE", help=f"(policies/{POLICY.name} beside this script)")
    args = parser.parse_args(arguments)
    for name in (*shape, "seq-len", "batch-size", "steps"):
        if getattr(args, name.replace("-", "_")) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name.replace('-', '_'))}")
    if args.hidden % (2 * args.heads):
        parser.error(f"--hidden must be a multiple of twice --heads, got {args.hidden} and {args.heads}")
    if args.heads % args.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads, got {args.heads} and {args.kv_heads}")
    if args.vocab < 256:
        parser.error(f"--vocab must be at least 256, the number of bytes, got {args.vocab}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device must be one that is here, got {args.device}; --device cpu runs a small model")
    args.policy = _policy(str(POLICY)) if args.policy is None else args.policy
    return args


def _policy(text: str) -> MemoryPolicy:
    try:
        return MemoryPolicy.of(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: list[str] | None = None) -> Run:
    args = parse(arguments)
    console = Console()
    budget, plan = planned(args)
    show(console, budget, plan)
    run = Run(plan)
    train(args, run, console)
    return run


if __name__ == "__main__":
    main()
