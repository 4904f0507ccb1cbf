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
from compare.tasks import Paths, Task
from compare.workers import Job, JobEnd, Message, Pretraining, StepsTaken, Worker, perform, ready_workers, set_up


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
            lrs = rates.get(choice.name) or rates.get(None) or [rate * spec.unit for rate in task.rates]
            decays = (beta2s or task.beta2s) if spec.has_beta2 else (None,)
            runs += [Run(task, choice, lr, beta2, seed, data, device) for beta2 in decays for lr in lrs]
    return runs


@dataclass
class Outcome:
    """The outcome of the requested runs."""

    already_finished: list[Record] = field(default_factory=list)  # finished by an earlier command
    finished: list[Record] = field(default_factory=list)
    out_of_time: list[str] = field(default_factory=list)  # titles of jobs that the deadline prevented or stopped
    failed: dict[str, str] = field(default_factory=dict)  # error messages, by title


class Estimates:
    """Estimates of the duration of a job, from runs of the same task, settings, data and precision."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = list(records)

    def add(self, record: Record) -> None:
        self._records.append(record)

    def seconds(self, job: Job) -> float | None:
        """The median of runs of the same task and optimizer, or else the maximum of the same task; None if unknown."""
        if isinstance(job, Pretraining):
            return None
        identity = job.identity
        shared = ("task", "settings", "data", "precision")
        comparable = [
            r for r in self._records if not r["diverged"] and all(r[name] == identity[name] for name in shared)
        ]
        same: list[float] = [r["seconds"] for r in comparable if r["optimizer"] == identity["optimizer"]]
        others: list[float] = [r["seconds"] for r in comparable]
        return statistics.median(same) if same else max(others, default=None)


class Schedule:
    """The queue of the jobs of a comparison.

    Args:
        runs: all requested runs.
        path: the results file, which contains finished runs and to which results are appended.
        paths: the folders of data.
        deadline: a value of `time.time`. A job that is expected to end later is not started, and a job that has not
            ended by then is stopped.
    """

    def __init__(self, runs: Sequence[Run], path: Path, paths: Paths, deadline: float | None = None) -> None:
        self.path, self.paths, self.deadline = path, paths, deadline
        self.outcome = Outcome()
        before = results.latest(results.read(path))
        self.estimates = Estimates(before)
        record_of = {record["key"]: record for record in before}
        runs = list({run.key: run for run in runs}.values())
        self.outcome.already_finished = [record_of[run.key] for run in runs if run.key in record_of]
        pending = [run for run in runs if run.key not in record_of]
        self._waiting: list[Job] = [*self._pretrainings(pending), *pending]
        self._pretraining_pending = {job.task.name for job in self._waiting if isinstance(job, Pretraining)}
        self._pretraining_failed: set[str] = set()
        self.total = sum(job.steps for job in self._waiting)

    def _pretrainings(self, pending: Sequence[Run]) -> list[Pretraining]:
        tasks = {run.task.name: run.task for run in pending}
        pretrainings = []
        for task in tasks.values():
            plan = task.pretraining_plan(self.paths)
            if plan is not None and not plan.path.exists():
                assert isinstance(task, Finetune)
                pretrainings.append(Pretraining(task, plan))
        return pretrainings

    @property
    def jobs(self) -> int:
        """The number of jobs that have not been started."""
        return len(self._waiting)

    def next(self) -> Job | None:
        """The next job to start, or None. Jobs that would end after the deadline are counted in `out_of_time`."""
        for job in list(self._waiting):
            if isinstance(job, Run) and job.task.name in self._pretraining_pending:
                continue
            self._waiting.remove(job)
            if isinstance(job, Run) and job.task.name in self._pretraining_failed:
                self.outcome.failed[job.title] = "not started: its pretraining failed"
            elif self._would_exceed_deadline(job):
                self._mark_out_of_time(job)
            else:
                return job
        return None

    def _would_exceed_deadline(self, job: Job) -> bool:
        if self.deadline is None:
            return False
        return time.time() + (self.estimates.seconds(job) or 0.0) > self.deadline

    def _mark_out_of_time(self, job: Job) -> None:
        self.outcome.out_of_time.append(job.title)
        if isinstance(job, Pretraining):  # the runs that need its weights cannot be started
            self._pretraining_pending.discard(job.task.name)
            for run in [run for run in self._waiting if run.task.name == job.task.name]:
                self._waiting.remove(run)
                self.outcome.out_of_time.append(run.title)

    def end(self, job: Job, done: JobEnd, progress: Progress) -> None:
        """Records the outcome of a job, first in the results file."""
        if done.out_of_time:
            self._mark_out_of_time(job)
        elif done.failure is not None:
            self.outcome.failed[job.title] = done.failure
            if isinstance(job, Pretraining):
                self._pretraining_failed.add(job.task.name)
        elif done.record is not None:
            results.append(self.path, done.record)
            self.estimates.add(done.record)
            self.outcome.finished.append(done.record)
        if isinstance(job, Pretraining):
            self._pretraining_pending.discard(job.task.name)
        progress.write(f"{job.title}: {_description(done)}")


def _description(done: JobEnd) -> str:
    if done.out_of_time:
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
            _run_in_this_process(schedule, devices[0], threads, progress)
        else:
            _run_in_workers(schedule, devices, threads, progress)
    return schedule.outcome


def _run_in_this_process(schedule: Schedule, device: torch.device, threads: int, progress: Progress) -> None:
    before = torch.get_num_threads()
    set_up(device, threads)
    try:
        while (job := schedule.next()) is not None:
            progress_of = _JobProgress(progress, job.steps)
            done = perform(job, schedule.paths, device, schedule.deadline, progress_of.update)
            progress_of.finish()
            schedule.end(job, done, progress)
    finally:
        torch.set_num_threads(before)


def _run_in_workers(schedule: Schedule, devices: Sequence[torch.device], threads: int, progress: Progress) -> None:
    workers = [Worker(schedule.paths, device, threads) for device in devices[: schedule.jobs]]
    device_of = dict(zip(workers, devices, strict=False))
    progress_of: dict[Worker, _JobProgress] = {}
    try:
        while True:
            for worker in workers:
                if worker.job is None and (job := schedule.next()) is not None:
                    worker.begin(job, schedule.deadline)
                    progress_of[worker] = _JobProgress(progress, job.steps)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            for worker in ready_workers(busy, timeout=1.0):
                message, job = worker.receive(), worker.job
                assert job is not None
                if isinstance(message, StepsTaken):
                    progress_of[worker].update(message)
                    continue
                progress_of.pop(worker).finish()
                worker.job = None
                schedule.end(job, message, progress)
                if worker.has_ended and schedule.jobs:
                    workers.remove(worker)
                    workers.append(Worker(schedule.paths, device_of[worker], threads))
                    device_of[workers[-1]] = device_of.pop(worker)
    finally:
        for worker in workers:
            worker.stop()


class _JobProgress:
    """The progress of one job. `finish` counts its remaining steps, which a diverged or failed job does not take."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._remaining = progress, steps

    def update(self, message: Message) -> None:
        if isinstance(message, StepsTaken):
            self._remaining -= message.count
            self._progress.advance(message.count)

    def finish(self) -> None:
        self._progress.advance(self._remaining)
