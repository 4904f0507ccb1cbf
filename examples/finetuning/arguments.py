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
    add("--data", type=Path, required=True, metavar="FILE", help="JSON lines")
    add("--out", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    add("--resume", action="store_true", help="from the newest checkpoint, if there is one")
    add("--eval-data", type=Path, metavar="FILE", help="JSON lines to be held out, in place of a fraction of --data")
    add("--eval-fraction", type=float, default=0.02, help="of the lines of --data, held out (%(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="in place of --epochs")
    length.add_argument("--epochs", type=float, default=1.0, help="(%(default)s)")
    add("--batch-size", type=int, default=1, metavar="ROWS", help="of a backward pass (%(default)s)")
    add(
        "--accumulation-steps",
        type=_accumulation,
        default=1,
        metavar="K",
        help="batches of a step, each in a partial step; the loss is the mean over all their targets; the last step of"
        " --epochs may have fewer (%(default)s)",
    )
    add("--seq-len", type=int, metavar="TOKENS", help="of a row (2048, or the model's positions if those are fewer)")
    add("--lr", type=float, default=2e-5, help="1.4 to 2 times what AdamW would be given (%(default)s)")
    add("--warmup", type=float, default=0.03, help="share of the steps in which the rate rises (%(default)s)")
    add("--min-lr", type=float, default=0.1, help="share of --lr that the cosine ends at (%(default)s)")
    add("--weight-decay", type=float, default=0.01, help="(%(default)s)")
    add("--max-grad-norm", type=float, metavar="NORM", help="of a step's gradients, which are clipped to it (no limit)")
    add("--compress-ratio", type=float, default=32, help="of the optimizer's tables (%(default)s)")
    add("--policy", type=_policy, metavar="FILE|TIER", help="where tables are: auto, device, host (auto on a GPU)")
    add("--save-every", type=int, default=500, metavar="STEPS", help="(%(default)s)")
    add("--eval-every", type=int, default=500, metavar="STEPS", help="(%(default)s)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="(%(default)s)")
    add("--keep", type=int, default=1, metavar="N", help="newest checkpoints that are kept (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights (%(default)s)")
    add("--loss-chunks", type=int, default=8, metavar="N", help="pieces that logits are cut into (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="layers (on a GPU)")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True, help="layers, in backward (yes)")
    add("--attention", metavar="NAME", help="transformers' attn_implementation: sdpa, eager, flash_attention_2 ...")
    add("--deterministic", action="store_true", help="kernels that repeat themselves to the bit, where they are slower")
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


def _policy(text: str) -> MemoryPolicy:
    try:
        return MemoryPolicy.of(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
