"""Compares optimizers: tasks x optimizers x rates x seeds, on one or more GPUs or on the CPU. Nothing is downloaded.

python examples/compare_optimizers.py
python examples/compare_optimizers.py --list
python examples/compare_optimizers.py --task lm-60m --optimizers adamw collins muon --seeds 0 1 2 --gpus all
python examples/compare_optimizers.py --task lm-60m --optimizers adamw collins:compress_ratio=8 collins@bf16 \\
    --rates adamw=1e-3 adamw=1.4e-3 2e-3 2.8e-3 --beta2 0.99 0.999 --time-limit 540

Each finished run is a line of JSON in the results file and is not repeated. So the same command resumes an interrupted
comparison, and a command with more learning rates or seeds adds runs. At the end, tables in Markdown are printed and
written to a file, and figures are drawn: loss over steps, over bytes of state, and over the learning rate. All
optimizers of a task use the same model, data, schedule, clipping and weight decay, and one learning rate for the whole
model.

The text consists of files of installed packages, and so depends on the machine. Results contain a digest of their data;
results with different digests are not compared. `--text FOLDER` uses the text in a folder instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from compare import plots, results
from compare.arguments import add_text, at_least, cache_folder, checker, decay, folders, pairs, rates
from compare.devices import cpus, gpus, threads
from compare.digits import DIGITS
from compare.language import LANGUAGE_TASKS
from compare.optimizers import OPTIMIZERS, Choice
from compare.recommender import RECOMMENDER
from compare.report import tables
from compare.runs import Run
from compare.schedule import Outcome, Schedule, grid, run_all
from compare.tasks import Paths, Task

TASKS: dict[str, Task] = {task.name: task for task in (*LANGUAGE_TASKS, DIGITS, RECOMMENDER)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["lm-small"], help="tasks (default: lm-small)")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME[:OPTION=VALUE,...][@bf16]",
        help="optimizers (default: those of the task; see --list)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        default=[],
        metavar="RATE|NAME=RATE",
        help="learning rates, for all optimizers or for one (default: those of the task)",
    )
    parser.add_argument("--beta2", nargs="+", type=decay, help="decays of second moments (default: those of the task)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds (default: 0)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the tasks, such as steps=100"
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        default=["all"],
        metavar="all|none|NUMBER",
        help="GPUs (default: all, or the CPU if there is none)",
    )
    parser.add_argument("--processes", type=int, help="processes on the CPU (default: one per core)")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="time limit from the start of the command: runs that would end later are not started, or are stopped",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("compare_optimizers.jsonl"), help="results file (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache_folder(),
        help="folder for tokens and pretrained weights (default: %(default)s)",
    )
    add_text(parser, "the installed packages")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="only list the tasks, their settings, and the optimizers")
    only.add_argument(
        "--report", action="store_true", help="only create the tables and figures of the results file, without runs"
    )
    args, checked = parser.parse_args(arguments), checker(parser)
    if args.processes is not None:
        checked("processes", lambda: at_least(1, args.processes))
    if args.time_limit is not None:
        checked("time-limit", lambda: at_least(0, args.time_limit))
    args.gpus = checked("gpus", lambda: gpus(args.gpus))
    args.text = checked("text", lambda: folders(args.text))
    changes = checked("set", lambda: pairs(args.set))
    tasks = checked("set", lambda: [TASKS[name].with_settings(changes) for name in args.task])
    args.compared = checked("optimizers", lambda: [(task, choices(args.optimizers, task)) for task in tasks])
    names = [choice.name for _, task_choices in args.compared for choice in task_choices]
    args.rates = checked("rates", lambda: rates(args.rates, names))
    checked("results", lambda: results.read(args.results))
    return args


def choices(names: list[str] | None, task: Task) -> list[Choice]:
    return [Choice.of(name) for name in dict.fromkeys(task.optimizers if names is None else names)]


def requested_runs(args: argparse.Namespace, paths: Paths, device: torch.device) -> list[Run]:
    """The requested runs, except those whose optimizers cannot be used on the device, for which it prints the reason.

    Raises:
        ValueError: for a task whose data cannot be created.
    """
    runs = []
    for task, task_choices in args.compared:
        usable = []
        for choice in task_choices:
            missing = choice.spec.missing(device)
            if missing is None:
                usable.append(choice)
            else:
                print(f"{task.name}: {choice.name} is left out: {missing}")
        data = task.prepare(paths)
        runs += grid(task, usable, args.seeds, data=data, device=device.type, rates=args.rates, beta2s=args.beta2)
    return runs


def listing() -> str:
    lines = ["tasks"]
    for task in TASKS.values():
        settings = ", ".join(f"{name}={value}" for name, value in vars(task.settings).items())
        lines += [f"  {task.name}: {task.about}", f"    {settings}"]
    lines.append("optimizers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for spec in OPTIMIZERS.values():
        missing = spec.missing(device)
        lines.append(f"  {spec.name}: {spec.about}{f' (not available: {missing})' if missing else ''}")
    return "\n".join(lines)


def show(path: Path) -> None:
    """Prints and writes the tables of all results in a file, and draws the figures."""
    records = results.read(path)
    text = tables(records)
    print(f"\n{text}")
    path.with_suffix(".md").write_text(text)
    print(f"results: {path}, tables: {path.with_suffix('.md')}")
    reason = plots.missing()
    if reason is None:
        for figure in plots.figures(records, path.with_suffix("")):
            print(f"figure: {figure}")
    else:
        print(reason)


def main(arguments: list[str] | None = None) -> Outcome:
    start = time.time()
    args = parse(arguments)
    if args.list:
        print(listing())
        return Outcome()
    if args.report:
        show(args.results)
        return Outcome()
    paths = Paths(args.cache.expanduser().resolve(), args.text)
    try:
        runs = requested_runs(args, paths, args.gpus[0] if args.gpus else torch.device("cpu"))
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    removed = results.remove_incomplete_line(args.results)
    if removed:
        print(f"{args.results}: removed the last line, which was incomplete ({removed} bytes)")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if args.time_limit is None else start + args.time_limit
    schedule = Schedule(runs, args.results, paths, deadline)
    devices = args.gpus or cpus(args.processes, schedule.jobs)
    finished = len(schedule.outcome.already_finished)
    print(f"{len(runs)} runs, {finished} already finished; devices: {', '.join(map(str, devices))}")
    outcome = run_all(schedule, devices, threads(devices))
    show(args.results)
    for title in outcome.out_of_time:
        print(f"not finished within the time limit: {title}")
    for title, failure in outcome.failed.items():
        print(f"failed: {title}\n{failure}", file=sys.stderr)
    return outcome


if __name__ == "__main__":
    sys.exit(1 if main().failed else 0)
