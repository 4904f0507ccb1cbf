"""Scheduling of runs on devices: finished runs are not repeated, idle devices get the next run, and time is limited."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compare import results
from compare.language import Finetune
from compare.optimizers import Choice
from compare.progress import Progress
from compare.runs import Record, Run
from compare.tasks import Place, Task
from compare.workers import Done, Job, Making, Stepped, Word, Worker, heard, perform, set_up


def grid(
    task: Task,
    choices: Sequence[Choice],
    seeds: Sequence[int],
    *,
    data: str,
    device: str,
    rates: Mapping[str | None, Sequence[float]],
    beta2s: Sequence[float] | None = None,
) -> list[Run]:
    """All runs of a task, in loops over seeds, optimizers, decays of the second moment, and learning rates.

    Args:
        rates: learning rates by the name of the optimizer; those under None are for all other optimizers. If there are
            none for an optimizer, those of the task are used.
        beta2s: decays of the second moment, for optimizers that have one; None for those of the task.
    """
    runs = []
    for seed in seeds:
        for choice in choices:
            spec = choice.spec
            own = rates.get(choice.name) or rates.get(None) or [rate * spec.unit for rate in task.rates]
            decays = (beta2s or task.beta2s) if spec.has_beta2 else (None,)
            runs += [Run(task, choice, lr, beta2, seed, data, device) for beta2 in decays for lr in own]
    return runs


@dataclass
class Outcome:
    """The outcome of the requested runs."""

    found: list[Record] = field(default_factory=list)  # finished by an earlier command
    finished: list[Record] = field(default_factory=list)
    late: list[str] = field(default_factory=list)  # titles of jobs that the deadline prevented or stopped
    failed: dict[str, str] = field(default_factory=dict)  # error messages, by title


class Estimates:
    """Estimates of the duration of a job, from runs of the same task, settings, data and precision."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = list(records)

    def add(self, record: Record) -> None:
        self._records.append(record)

    def seconds(self, job: Job) -> float | None:
        """The median of runs of the same task and optimizer, or else the maximum of the same task; None if unknown."""
        if isinstance(job, Making):
            return None
        identity = job.identity
        shared = ("task", "settings", "data", "precision")
        alike = [r for r in self._records if not r["diverged"] and all(r[name] == identity[name] for name in shared)]
        same: list[float] = [r["seconds"] for r in alike if r["optimizer"] == identity["optimizer"]]
        others: list[float] = [r["seconds"] for r in alike]
        return statistics.median(same) if same else max(others, default=None)


class Schedule:
    """The queue of the jobs of a comparison.

    Args:
        runs: all requested runs.
        path: the results file, which contains finished runs and to which results are appended.
        place: the folders of data.
        deadline: a value of `time.time`. A job that is expected to end later is not started, and a job that has not
            ended by then is stopped.
    """

    def __init__(self, runs: Sequence[Run], path: Path, place: Place, deadline: float | None = None) -> None:
        self.path, self.place, self.deadline = path, place, deadline
        self.outcome = Outcome()
        before = results.latest(results.read(path))
        self.estimates = Estimates(before)
        known = {record["key"]: record for record in before}
        runs = list({run.key: run for run in runs}.values())
        self.outcome.found = [known[run.key] for run in runs if run.key in known]
        pending = [run for run in runs if run.key not in known]
        self._waiting: list[Job] = [*self._makings(pending), *pending]
        self._unmade = {job.task.name for job in self._waiting if isinstance(job, Making)}
        self._unmakeable: set[str] = set()
        self.total = sum(job.steps for job in self._waiting)

    def _makings(self, pending: Sequence[Run]) -> list[Making]:
        tasks = {run.task.name: run.task for run in pending}
        makings = []
        for task in tasks.values():
            preparation = task.preparation(self.place)
            if preparation is not None and not preparation.path.exists():
                assert isinstance(task, Finetune)
                makings.append(Making(task, preparation))
        return makings

    @property
    def jobs(self) -> int:
        """The number of jobs that have not been started."""
        return len(self._waiting)

    def next(self) -> Job | None:
        """The next job that can be started, or None. Jobs that would end after the deadline are removed as late."""
        for job in list(self._waiting):
            if isinstance(job, Run) and job.task.name in self._unmade:
                continue
            self._waiting.remove(job)
            if isinstance(job, Run) and job.task.name in self._unmakeable:
                self.outcome.failed[job.title] = "not started: its pretraining failed"
            elif self._too_late(job):
                self._set_late(job)
            else:
                return job
        return None

    def _too_late(self, job: Job) -> bool:
        if self.deadline is None:
            return False
        return time.time() + (self.estimates.seconds(job) or 0.0) > self.deadline

    def _set_late(self, job: Job) -> None:
        self.outcome.late.append(job.title)
        if isinstance(job, Making):  # the runs that need its weights cannot be started
            self._unmade.discard(job.task.name)
            for run in [run for run in self._waiting if run.task.name == job.task.name]:
                self._waiting.remove(run)
                self.outcome.late.append(run.title)

    def end(self, job: Job, done: Done, progress: Progress) -> None:
        """Records the outcome of a job, first in the results file."""
        if done.late:
            self._set_late(job)
        elif done.failure is not None:
            self.outcome.failed[job.title] = done.failure
            if isinstance(job, Making):
                self._unmakeable.add(job.task.name)
        elif done.record is not None:
            results.add(self.path, done.record)
            self.estimates.add(done.record)
            self.outcome.finished.append(done.record)
        if isinstance(job, Making):
            self._unmade.discard(job.task.name)
        progress.say(f"{job.title}: {_ending(done)}")


def _ending(done: Done) -> str:
    if done.late:
        return "not finished within the time limit"
    if done.failure is not None:
        return f"failed: {done.failure.strip().splitlines()[-1]}"
    if done.record is None:
        return "finished"
    loss = done.record["validation_loss"]
    return f"{'diverged' if loss is None else f'{loss:.4f}'} in {done.record['seconds']:.0f} s"


def run_all(schedule: Schedule, devices: Sequence[torch.device], threads: int) -> Outcome:
    """Runs all jobs of a schedule, in one process per device, or in this process if the only device is one CPU."""
    with Progress(schedule.total) as progress:
        if [device.type for device in devices] == ["cpu"]:
            _run_here(schedule, devices[0], threads, progress)
        else:
            _run_there(schedule, devices, threads, progress)
    return schedule.outcome


def _run_here(schedule: Schedule, device: torch.device, threads: int, progress: Progress) -> None:
    before = torch.get_num_threads()
    set_up(device, threads)
    try:
        while (job := schedule.next()) is not None:
            shown = _Shown(progress, job.steps)
            done = perform(job, schedule.place, device, schedule.deadline, shown.hear)
            shown.finish()
            schedule.end(job, done, progress)
    finally:
        torch.set_num_threads(before)


def _run_there(schedule: Schedule, devices: Sequence[torch.device], threads: int, progress: Progress) -> None:
    workers = [Worker(schedule.place, device, threads) for device in devices[: schedule.jobs]]
    placed = dict(zip(workers, devices, strict=False))
    shown: dict[Worker, _Shown] = {}
    try:
        while True:
            for worker in workers:
                if worker.job is None and (job := schedule.next()) is not None:
                    worker.begin(job, schedule.deadline)
                    shown[worker] = _Shown(progress, job.steps)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            for worker in heard(busy, timeout=1.0):
                word, job = worker.hear(), worker.job
                assert job is not None
                if isinstance(word, Stepped):
                    shown[worker].hear(word)
                    continue
                shown.pop(worker).finish()
                worker.job = None
                schedule.end(job, word, progress)
                if worker.gone and schedule.jobs:
                    workers.remove(worker)
                    workers.append(Worker(schedule.place, placed[worker], threads))
                    placed[workers[-1]] = placed.pop(worker)
    finally:
        for worker in workers:
            worker.stop()


class _Shown:
    """The progress of one job. `finish` counts its remaining steps, which a diverged or failed job does not take."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._left = progress, steps

    def hear(self, word: Word) -> None:
        if isinstance(word, Stepped):
            self._left -= word.count
            self._progress.advance(word.count)

    def finish(self) -> None:
        self._progress.advance(self._left)
