"""`python -m collins plan`: what fits where, for a model that need not exist on a device that need not be here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from collins.bucketing import HASHES
from collins.offload.budget import Budget, Training, budget_of, requests_of
from collins.offload.memory import device_figures, host_memory_free, host_memory_total
from collins.offload.models import NAMED, model_of
from collins.offload.plan import PlacementPlan, place
from collins.offload.policy import MemoryPolicy
from collins.offload.shapes import Transformer
from collins.offload.sizes import parse_size, size_text
from collins.table import as_table

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TABLE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_EPILOG = """\
sizes: 139.8GiB and 512MiB are powers of 1024, 141GB is a power of 1000. A card sold as "141 GB" or "24 GB" has about as
many GiB: 139.8GiB and 23.5GiB, as torch.cuda.mem_get_info() tells there.
exit status: 0 when the training fits, 1 when it does not, 2 for arguments that cannot be used."""


@dataclass(frozen=True)
class _Outcome:
    """One way to step, tried: the plan, or why there is none."""

    in_backward: bool
    left: int  # of the device, for tables and staging; negative when all else does not fit
    plan: PlacementPlan | None
    reason: str


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
        help="say what a training run takes, what fits where, and why",
        description="Says what a training run takes of the device and the host, and where the optimizer's tables go.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument(
        "model", help=f"{', '.join(NAMED)}; a path to a Hugging Face config.json; or a parameter count: 7B, 1234567"
    )
    plan.add_argument("--vocab", type=_least(1), metavar="N", help="vocabulary, in place of the model's own")
    plan.add_argument("--device-memory", metavar="SIZE", help="of the device; default: what this one's has free")
    plan.add_argument("--host-memory", metavar="SIZE", help="of the host; default: what this one has free")
    plan.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of weights and gradients (%(default)s)")
    plan.add_argument("--seq-len", type=_least(1), default=2048, metavar="N", help="tokens a sequence (%(default)s)")
    plan.add_argument("--batch-size", type=_least(1), default=1, metavar="N", help="sequences at once (%(default)s)")
    plan.add_argument(
        "--loss-chunks", type=_least(1), default=8, metavar="N", help="pieces that logits are cut into (%(default)s)"
    )
    plan.add_argument(
        "--in-backward",
        action=argparse.BooleanOptionalAction,
        help="step in backward, or after it; default: after it if that fits, else in backward",
    )
    plan.add_argument(
        "--policy", default="auto", metavar="FILE", help="a policy's TOML file, or a tier: auto, device, host (auto)"
    )
    plan.add_argument("--ratio", type=_ratio, default=32, metavar="C", help="compress_ratio (%(default)s)")
    plan.add_argument("--min-K", type=_least(1), default=1024, metavar="N", help="min_K (%(default)s)")
    plan.add_argument("--hash", choices=HASHES, default="block", help="(%(default)s)")
    plan.add_argument("--table-dtype", choices=_TABLE_DTYPES, default="float32", help="(%(default)s)")
    return parser


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
    policy = MemoryPolicy.of(arguments.policy)
    model = model_of(arguments.model, arguments.vocab)
    device_free, device_total = _device_memory(arguments.device_memory)
    host_free, host_total = _host_memory(arguments.host_memory)
    training = Training(
        _DTYPES[arguments.dtype], arguments.batch_size, arguments.seq_len, loss_chunks=arguments.loss_chunks
    )
    budget = budget_of(model, training)
    requests = tuple(
        requests_of(
            model,
            training.dtype,
            compress_ratio=arguments.ratio,
            min_K=arguments.min_K,
            hash=arguments.hash,
            table_dtype=_TABLE_DTYPES[arguments.table_dtype],
        )
    )

    def tried(in_backward: bool) -> _Outcome:
        left = device_free - budget.held(in_backward)
        if left < 0:
            reason = f"weights, gradients and activations alone exceed the device by {size_text(-left)}"
            return _Outcome(in_backward, left, None, reason)
        try:
            plan = place(
                requests,
                policy,
                device_free=left,
                device_total=device_total,
                host_free=host_free,
                host_total=host_total,
            )
        except MemoryError as error:
            return _Outcome(in_backward, left, None, str(error))
        return _Outcome(in_backward, left, plan, "")

    wanted = arguments.in_backward
    outcomes = [tried(in_backward) for in_backward in (False, True) if wanted in (None, in_backward)]
    print(_header(arguments.model, model, arguments))
    print(f"device {size_text(device_free)}, host {size_text(host_free)} free\n")
    print(_table(budget, device_free, outcomes))
    print(f"\n{_formulas(model)}\n")
    adamw = 2 * model.count * training.dtype.itemsize
    tables = sum(request.bytes for request in requests)
    print(f"Tables take {size_text(tables)}; AdamW's moments, in {arguments.dtype}, would take {size_text(adamw)}.\n")
    for outcome in outcomes:
        if outcome.plan is not None:
            print(f"Placement, {_mode(outcome.in_backward)}:\n\n{outcome.plan.summary()}")
            return 0
    for outcome in outcomes:
        print(f"Does not fit, {_mode(outcome.in_backward)}: {outcome.reason}")
    return 1


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


def _header(name: str, model: Transformer, arguments: argparse.Namespace) -> str:
    vocabulary = "" if model.vocabulary is None else f", vocabulary {model.vocabulary:,}"
    return (
        f"{name}: {model.count:,} parameters ({model.layers} layers, hidden {model.hidden:,}{vocabulary})\n"
        f"{arguments.dtype}, batch of {arguments.batch_size} x {arguments.seq_len:,} tokens,"
        f" activation checkpointing, loss in {arguments.loss_chunks} chunks"
    )


def _mode(in_backward: bool) -> str:
    return "in_backward=True" if in_backward else "step after backward"


def _table(budget: Budget, device_free: int, outcomes: Sequence[_Outcome]) -> str:
    """One column for each way to step: what is on the device, and what is left for tables."""

    def columns(figure: Callable[[_Outcome], int | None]) -> list[str]:
        return ["-" if (value := figure(outcome)) is None else size_text(value) for outcome in outcomes]

    def planned(figure: Callable[[PlacementPlan], int]) -> list[str]:
        return columns(lambda outcome: None if outcome.plan is None else figure(outcome.plan))

    lines = [
        ["weights", *columns(lambda _: budget.weights)],
        ["gradients", *columns(lambda o: budget.gradients_in_backward if o.in_backward else budget.gradients)],
        ["activations: checkpoints", *columns(lambda _: budget.checkpoints)],
        ["activations: one block recomputed", *columns(lambda _: budget.recomputed)],
        ["activations: a chunk of logits", *columns(lambda _: budget.logits)],
        ["left of the device for tables", *columns(lambda o: o.left)],
        ["tables on the device", *planned(lambda plan: plan.device_bytes)],
        ["staging ring on the device", *planned(lambda plan: plan.staging_bytes)],
        ["tables on the host", *planned(lambda plan: plan.host_bytes)],
        ["fits", *("no" if outcome.plan is None else "yes" for outcome in outcomes)],
    ]
    return as_table(["", *(_mode(outcome.in_backward) for outcome in outcomes)], lines)


def _formulas(model: Transformer) -> str:
    inner = 7 if model.gated else 4
    lines = [
        "checkpoints = layers x tokens x hidden x bytes of the dtype",
        f"one block = tokens x (3 hidden + 2 query + 2 key-value + {inner} feed-forward widths) x bytes of the dtype",
    ]
    if model.vocabulary is None:
        lines.append("logits are not counted: the vocabulary is unknown")
    else:
        lines.append("logits = tokens / chunks x vocabulary x 8 bytes, with their gradients in float32")
    return "\n".join(lines)
