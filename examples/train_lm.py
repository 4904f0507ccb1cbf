"""Compares AdamW and Collins in training a small LLaMA on the sources of Python's standard library.

python examples/train_lm.py
python examples/train_lm.py --optimizers adamw collins collins-published muon --rates 1e-3 2e-3 4e-3 8e-3
python examples/train_lm.py --optimizers collins --rates 4e-3 --memory examples/policies/one-24gb-card.toml

The model is a decoder of 1.8M parameters with a vocabulary of 8,192 byte-level BPE tokens. Each optimizer is run at
three learning rates, and the plot shows its best run. This is the task `lm-small` of `compare_optimizers.py` with
smaller batches, so that six runs take two minutes on two cores. `compare_optimizers.py` has larger tasks, runs several
seeds, and stores its results.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from compare import plots
from compare.arguments import add_text, cache_folder, checker, folders, pairs, rates
from compare.devices import cpus, threads
from compare.language import LM_SMALL
from compare.optimizers import Choice
from compare.report import tables
from compare.runs import Record
from compare.schedule import Schedule, grid, run_all
from compare.tasks import Paths

from collins.offload import MemoryPolicy

SETTINGS = {"batch": "12"}
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "collins": (2e-3, 4e-3, 8e-3)}  # AdamW's loss at 8e-3 is above its best


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), help="optimizers (default: adamw collins)")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=[],
        metavar="RATE|NAME=RATE",
        help="learning rates, for all optimizers or for one (default: three for each optimizer)",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings, such as steps=1000")
    parser.add_argument("--seed", type=int, default=0, help="the seed (default: 0)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="the device (default: cpu, with one process per core)"
    )
    parser.add_argument(
        "--memory", metavar="FILE|TIER", help="the placement of Collins's tables: a TOML file with a policy, or a tier"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("train_lm.png"), help="PNG file of the loss plot (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder for tokens (default: %(default)s)")
    add_text(parser, "the standard library")
    args, checked = parser.parse_args(arguments), checker(parser)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: must be cpu, since CUDA is not available; got cuda")
    args.text = checked("text", lambda: folders(args.text))
    args.task = checked("set", lambda: LM_SMALL.with_settings({**SETTINGS, **pairs(args.set)}))
    args.choices = checked("optimizers", lambda: [Choice.of(name) for name in dict.fromkeys(args.optimizers)])
    args.rates = checked("rates", lambda: rates(args.rates, [choice.name for choice in args.choices]))
    if args.memory is not None:
        policy = checked("memory", lambda: MemoryPolicy.of(args.memory))
        args.choices = [with_memory(choice, policy) for choice in args.choices]
    return args


def with_memory(choice: Choice, policy: MemoryPolicy) -> Choice:
    if "memory" not in choice.spec.options:
        return choice
    return replace(choice, options={**choice.options, "memory": policy})


def main(arguments: list[str] | None = None) -> list[Record]:
    args = parse(arguments)
    device = torch.device(args.device)
    paths = Paths(args.cache.expanduser().resolve(), args.text)
    data = args.task.prepare(paths)
    swept = args.rates if None in args.rates else {**RATES, **args.rates}
    runs = grid(args.task, args.choices, [args.seed], data=data, device=args.device, rates=swept)
    with tempfile.TemporaryDirectory() as folder:
        devices = cpus(None, len(runs)) if device.type == "cpu" else [device]
        outcome = run_all(Schedule(runs, Path(folder) / "runs.jsonl", paths), devices, threads(devices))
    for title, failure in outcome.failed.items():
        print(f"failed: {title}\n{failure}")
    records = outcome.finished
    if not records:
        raise SystemExit(1)
    print(f"\n{tables(records)}")
    for record in records:
        for plan in record["placement"]:
            print(f"{record['optimizer']}, lr {record['lr']:g}: placement of its tables\n{plan}")
    reason = plots.missing()
    if reason is None:
        plots.curves_alone(records, args.out, "1.8M-parameter LLaMA on Python's standard library")
        print(f"loss plot: {args.out}")
    else:
        print(reason)
    return records


if __name__ == "__main__":
    main()
