"""Worker processes, one per device, which perform one job after another and report their progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from compare.language import Finetune
from compare.runs import Record, Run
from compare.tasks import Paths, PretrainingPlan
from compare.training import OutOfTimeError

_REPORT_INTERVAL = 0.5  # seconds between progress reports


@dataclass(frozen=True)
class Pretraining:
    """The job of pretraining the weights that the runs of a task need."""

    task: Finetune
    plan: PretrainingPlan

    @property
    def title(self) -> str:
        return self.plan.title

    @property
    def steps(self) -> int:
        return self.plan.steps

    def perform(self, paths: Paths, device: torch.device, callback: Any) -> None:
        self.task.pretrain(paths, device, callback)


Job = Run | Pretraining


@dataclass(frozen=True)
class StepsTaken:
    """A message: the number of steps since the last message."""

    count: int


@dataclass(frozen=True)
class JobEnd:
    """The last message of a job: its record, if it has one, or the reason why it was not finished."""

    record: Record | None = None
    out_of_time: bool = False
    failure: str | None = None


Message = StepsTaken | JobEnd


class ProgressReporter:
    """Sends the progress of a job every half a second, and stops the job at the deadline, a value of `time.time`.

    Args:
        send: a function that sends a message.
        deadline: None for no deadline.
    """

    def __init__(self, send: Any, deadline: float | None) -> None:
        self._send, self._deadline = send, deadline
        self._count, self._last = 0, time.monotonic()

    def __call__(self, steps: int) -> None:
        self._count += steps
        if self._deadline is not None and time.time() > self._deadline:
            raise OutOfTimeError
        if time.monotonic() - self._last >= _REPORT_INTERVAL:
            self.flush()

    def flush(self) -> None:
        if self._count:
            self._send(StepsTaken(self._count))
        self._count, self._last = 0, time.monotonic()


def perform(job: Job, paths: Paths, device: torch.device, deadline: float | None, send: Any) -> JobEnd:
    """Performs a job in this process. Its exceptions, except KeyboardInterrupt, are returned as a failure."""
    callback = ProgressReporter(send, deadline)
    try:
        record = job.perform(paths, device, callback)
        callback.flush()
        return JobEnd(record)
    except OutOfTimeError:
        return JobEnd(out_of_time=True)
    except Exception:  # an error of one optimizer does not end the other runs
        return JobEnd(failure=traceback.format_exc())
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Worker:
    """A worker process for one device."""

    def __init__(self, paths: Paths, device: torch.device, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=_work, args=(worker_end, paths, device, threads), daemon=True)
        self.process.start()
        worker_end.close()
        self.job: Job | None = None

    def begin(self, job: Job, deadline: float | None) -> None:
        self.job = job
        self.connection.send((job, deadline))

    def receive(self) -> Message:
        """The next message of the process, which `ready_workers` must have returned."""
        try:
            message: Message = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return JobEnd(failure=f"its process ended with exit code {self.process.exitcode}")
        return message

    @property
    def has_ended(self) -> bool:
        return not self.process.is_alive()

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def ready_workers(workers: Sequence[Worker], timeout: float) -> Iterator[Worker]:
    """The workers that have sent a message or ended, after waiting for at most `timeout` seconds."""
    by_connection = {worker.connection: worker for worker in workers}
    for connection in wait(list(by_connection), timeout):
        assert isinstance(connection, Connection)
        yield by_connection[connection]


def _work(connection: Connection, paths: Paths, device: torch.device, threads: int) -> None:
    set_up(device, threads)
    previous_kind = None
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            job, deadline = connection.recv()
            if previous_kind not in (None, kind_of(job)):
                torch.compiler.reset()  # graphs of other shapes and dtypes count towards the recompilation limit
            previous_kind = kind_of(job)
            connection.send(perform(job, paths, device, deadline, connection.send))


def kind_of(job: Job) -> tuple[str, torch.dtype]:
    """The kind of a job: jobs of the same kind use the same compiled graphs."""
    return job.task.name, job.choice.weights if isinstance(job, Run) else torch.float32


def set_up(device: torch.device, threads: int) -> None:
    """Sets the threads, the device and the matrix precision of this process."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
