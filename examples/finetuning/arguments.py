"""The arguments of `finetune.py`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from collins.offload import MemoryPolicy
from collins.options import accumulation_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line, those of the process if None; exits with status 2 for one out of range."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_FOLDER")
    add("--data", type=Path, required=True, metavar="FILE", help="training data, JSON lines")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the trained model; must not exist yet")
    add("--resume", action="store_true", help="resume from the newest checkpoint, if there is one")
    add("--eval-data", type=Path, metavar="FILE", help="evaluation data, JSON lines; replaces --eval-fraction")
    add(
        "--eval-fraction",
        type=float,
        default=0.02,
        help="fraction of the lines of --data to hold out (default: %(default)s)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="number of steps; replaces --epochs")
    length.add_argument("--epochs", type=float, default=1.0, help="passes over the data (default: %(default)s)")
    add("--batch-size", type=int, default=1, metavar="ROWS", help="rows of a backward pass (default: %(default)s)")
    add(
        "--accumulation-steps",
        type=_accumulation,
        default=1,
        metavar="K",
        help="batches of a step, each in a partial step; the loss is the mean over all their targets; the last step of"
        " --epochs may have fewer (%(default)s)",
    )
    add("--seq-len", type=int, metavar="TOKENS", help="length of a row (default: 2048, or the model's maximum)")
    add("--lr", type=float, default=2e-5, help="learning rate, 1 to 1.4 times that of AdamW (default: %(default)s)")
    add("--warmup", type=float, default=0.03, help="fraction of the steps for warm-up (default: %(default)s)")
    add("--min-lr", type=float, default=0.1, help="final learning rate as a fraction of --lr (default: %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="(default: %(default)s)")
    add("--max-grad-norm", type=float, metavar="NORM", help="clip gradients to this norm (default: no clipping)")
    add("--compress-ratio", type=float, default=32, help="compress_ratio of Collins (default: %(default)s)")
    add("--residual-weight", type=float, default=0.8, help="residual_weight of Collins (default: %(default)s)")
    add(
        "--policy",
        type=memory_policy,
        metavar="FILE|TIER",
        help="memory policy: a file, auto, device or host (default: auto on a GPU)",
    )
    add("--save-every", type=int, default=500, metavar="STEPS", help="between checkpoints (default: %(default)s)")
    add("--eval-every", type=int, default=500, metavar="STEPS", help="between evaluations (default: %(default)s)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="between log lines (default: %(default)s)")
    add("--keep", type=int, default=1, metavar="N", help="number of checkpoints to keep (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add(
        "--device",
        type=torch.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (default: %(default)s)")
    add("--loss-chunks", type=int, default=8, metavar="N", help="number of chunks of the logits (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the layers (default: on a GPU)")
    add(
        "--recompute", action=argparse.BooleanOptionalAction, default=True, help="checkpoint activations (default: yes)"
    )
    add("--attention", metavar="NAME", help="attn_implementation of transformers: sdpa, eager, flash_attention_2 ...")
    add("--deterministic", action="store_true", help="use deterministic kernels, even if they are slower")
    args = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "seq_len", "save_every", "eval_every", "log_every", "keep", "loss_chunks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("epochs", "lr", "max_grad_norm"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 2**63:
            parser.error(f"--{name.replace('_', '-')} must be above 0 and below 2**63, got {value}")
    if not 1 <= args.compress_ratio < math.inf:
        parser.error(f"--compress-ratio must be at least 1, got {args.compress_ratio}")
    if not 0 <= args.residual_weight < 2**63:
        parser.error(f"--residual-weight must be at least 0 and below 2**63, got {args.residual_weight}")
    for name in ("eval_fraction", "warmup", "min_lr", "weight_decay"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be in [0, 1], got {getattr(args, name)}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device must be one that is here, got {args.device}")
    on_gpu = args.device.type == "cuda"
    args.compile = on_gpu if args.compile is None else args.compile
    args.policy = MemoryPolicy() if args.policy is None and on_gpu else args.policy
    return args


def _accumulation(text: str) -> int:
    try:
        return accumulation_of(text, in_backward=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def memory_policy(text: str) -> MemoryPolicy:
    """Parses --policy: a file or the name of a tier."""
    try:
        return MemoryPolicy.of(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
