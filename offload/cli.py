"""`python -m collins plan`: plans the memory of a training run, without the model and without the device."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from collins.bucketing import HASHES
from collins.offload.budget import Training, requests_of
from collins.offload.forecast import as_json, as_text
from collins.offload.memory import device_figures, host_memory_free, host_memory_total
from collins.offload.models import NAMED, model_of
from collins.offload.policy import MemoryPolicy
from collins.offload.shapes import LARGE_VOCABULARY
from collins.offload.sizes import parse_size
from collins.offload.trial import Machine, Trial, largest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TABLE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_EPILOG = """\
sizes: 139.8GiB and 512MiB are powers of 1024, 141GB is a power of 1000. Cards sold as "141 GB" and "24 GB" have about
139.8GiB and 23.5GiB, according to torch.cuda.mem_get_info() on them. Digits alone are bytes.
models: with transformers installed, all causal language models that it supports are accepted; they are built on the
meta device, and nothing is downloaded. Without it, the model_type must be llama, mistral, qwen2 or gpt2.
exit status: 0 if the training fits, 1 if it does not, 2 for invalid arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (that of the process, if None).

    Returns:
        The exit status: 0 when the training fits, 1 when it does not, 2 for a value that cannot be used.

    Raises:
        SystemExit: with status 2 from the argument parser itself, with 0 for --help.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _plan(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"python -m collins plan: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m collins", description="Tools of the Collins optimizer.")
    plan = parser.add_subparsers(required=True, metavar="command").add_parser(
        "plan",
        help="plan the memory of a training run",
        description="Plans the device and host memory of a training run, and the placement of the optimizer's tables.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_training(plan)
    _add_memory(plan)
    _add_tables(plan)
    plan.add_argument(
        "--fits", action="store_true", help="also the longest sequence, largest batch and largest model that fit"
    )
    plan.add_argument("--json", action="store_true", help="print JSON; offload/README.md lists its keys")
    return parser


def _add_training(plan: argparse.ArgumentParser) -> None:
    named = ", ".join(NAMED)
    plan.add_argument(
        "model",
        help=f"{named}; a path to a Hugging Face config.json or its folder; or a parameter count: 7B, 1234567",
    )
    plan.add_argument(
        "--vocab",
        type=_least(1),
        metavar="N",
        help=f"replaces the model's vocabulary, or {LARGE_VOCABULARY:,} for a count",
    )
    plan.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="for weights, gradients (%(default)s)")
    plan.add_argument("--seq-len", type=_least(1), default=2048, metavar="N", help="tokens per sequence (%(default)s)")
    plan.add_argument(
        *("--batch", "--batch-size"),
        dest="batch_size",
        type=_least(1),
        default=1,
        metavar="N",
        help="sequences per batch (%(default)s)",
    )
    plan.add_argument(
        "--loss-chunks", type=_least(1), default=8, metavar="N", help="number of pieces of the logits (%(default)s)"
    )
    plan.add_argument(
        "--in-backward",
        action=argparse.BooleanOptionalAction,
        help="step in backward, or after it; default: after it if that fits, else in backward",
    )


def _add_memory(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--device-memory", metavar="SIZE", help="device memory; default: that of this machine's device")
    plan.add_argument("--host-memory", metavar="SIZE", help="host memory; default: the free memory of this machine")
    plan.add_argument(
        "--policy", default="auto", metavar="FILE", help="a policy's TOML file, or a tier: auto, device, host (auto)"
    )


def _add_tables(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--ratio", type=_ratio, default=32, metavar="C", help="compress_ratio (%(default)s)")
    plan.add_argument("--min-K", type=_least(1), default=1024, metavar="N", help="min_K (%(default)s)")
    plan.add_argument("--hash", choices=HASHES, default="block", help="(%(default)s)")
    plan.add_argument(
        "--table-dtype",
        choices=_TABLE_DTYPES,
        help="default: formats by role and ratio",
    )


def _least(lowest: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text) if text.isdecimal() else lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be an int of at least {lowest}, got {text!r}")
        return value

    return whole


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return value


def _plan(arguments: argparse.Namespace) -> int:
    training = Training(
        _DTYPES[arguments.dtype], arguments.batch_size, arguments.seq_len, loss_chunks=arguments.loss_chunks
    )
    policy = MemoryPolicy.of(arguments.policy)
    trial = Trial(
        model_of(arguments.model, arguments.vocab),
        training,
        Machine(*_device_memory(arguments.device_memory), *_host_memory(arguments.host_memory)),
        policy,
        partial(
            requests_of,
            dtype=training.dtype,
            compress_ratio=arguments.ratio,
            min_K=arguments.min_K,
            hash=arguments.hash,
            table_dtype=_TABLE_DTYPES.get(arguments.table_dtype),
        ),
        (False, True) if arguments.in_backward is None else (arguments.in_backward,),
    )
    outcomes = trial.outcomes()
    found = largest(trial, arguments.model) if arguments.fits else None
    if arguments.json:
        print(json.dumps(as_json(arguments.model, trial, outcomes, found), indent=2))
    else:
        print(as_text(arguments.model, trial, outcomes, found))
    return 0 if any(outcome.plan is not None for outcome in outcomes) else 1


def _device_memory(given: str | None) -> tuple[int, int]:
    """Free and total bytes: of the size given, else of this machine's current device."""
    if given is not None:
        size = parse_size("--device-memory", given, relative=False).fixed
        return size, size
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: give --device-memory, such as --device-memory 23.5GiB")
    figures = device_figures(torch.device("cuda"))
    return figures.free, figures.total


def _host_memory(given: str | None) -> tuple[int, int]:
    if given is not None:
        size = parse_size("--host-memory", given, relative=False).fixed
        return size, size
    return host_memory_free(), host_memory_total()
