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
from compare.tasks import Place, Preparation
from compare.training import OutOfTimeError

_TOLD_EVERY = 0.5  # seconds between progress reports


@dataclass(frozen=True)
class Making:
    """The job of pretraining the weights that the runs of a task need."""

    task: Finetune
    preparation: Preparation

    @property
    def title(self) -> str:
        return self.preparation.title

    @property
    def steps(self) -> int:
        return self.preparation.steps

    def perform(self, place: Place, device: torch.device, follower: Any) -> None:
        self.task.make(place, device, follower)


Job = Run | Making


@dataclass(frozen=True)
class Stepped:
    """A message: the number of steps since the last message."""

    count: int


@dataclass(frozen=True)
class Done:
    """The last message of a job: its record, if it has one, or the reason why it was not finished."""

    record: Record | None = None
    late: bool = False
    failure: str | None = None


Word = Stepped | Done


class Telling:
    """The follower of a job: sends its progress twice a second, and stops it at the deadline, a value of `time.time`.

    Args:
        tell: a function that sends a message.
        deadline: None for no deadline.
    """

    def __init__(self, tell: Any, deadline: float | None) -> None:
        self._tell, self._deadline = tell, deadline
        self._count, self._last = 0, time.monotonic()

    def __call__(self, steps: int) -> None:
        self._count += steps
        if self._deadline is not None and time.time() > self._deadline:
            raise OutOfTimeError
        if time.monotonic() - self._last >= _TOLD_EVERY:
            self.flush()

    def flush(self) -> None:
        if self._count:
            self._tell(Stepped(self._count))
        self._count, self._last = 0, time.monotonic()


def perform(job: Job, place: Place, device: torch.device, deadline: float | None, tell: Any) -> Done:
    """Performs a job in this process. Its exceptions, except KeyboardInterrupt, are returned as a failure."""
    follower = Telling(tell, deadline)
    try:
        record = job.perform(place, device, follower)
        follower.flush()
        return Done(record)
    except OutOfTimeError:
        return Done(late=True)
    except Exception:  # an error of one optimizer does not end the other runs
        return Done(failure=traceback.format_exc())
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Worker:
    """A worker process for one device."""

    def __init__(self, place: Place, device: torch.device, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, place, device, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def begin(self, job: Job, deadline: float | None) -> None:
        self.job = job
        self.connection.send((job, deadline))

    def hear(self) -> Word:
        """The next message of the process, which must be one of those that `heard` has returned."""
        try:
            word: Word = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return Done(failure=f"its process ended with exit code {self.process.exitcode}")
        return word

    @property
    def gone(self) -> bool:
        return not self.process.is_alive()

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def heard(workers: Sequence[Worker], timeout: float) -> Iterator[Worker]:
    """The workers that have sent a message or ended, after waiting for at most `timeout` seconds."""
    by_connection = {worker.connection: worker for worker in workers}
    for connection in wait(list(by_connection), timeout):
        assert isinstance(connection, Connection)
        yield by_connection[connection]


def _work(connection: Connection, place: Place, device: torch.device, threads: int) -> None:
    set_up(device, threads)
    previous = None
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            job, deadline = connection.recv()
            if previous not in (None, kind_of(job)):
                torch.compiler.reset()  # graphs of other shapes and dtypes count towards the recompilation limit
            previous = kind_of(job)
            connection.send(perform(job, place, device, deadline, connection.send))


def kind_of(job: Job) -> tuple[str, torch.dtype]:
    """The kind of a job: jobs of the same kind use the same compiled graphs."""
    return job.task.name, job.choice.weights if isinstance(job, Run) else torch.float32


def set_up(device: torch.device, threads: int) -> None:
    """Sets the threads, the device and the matrix precision of this process."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
