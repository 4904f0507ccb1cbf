"""Checkpoints of a run, the settings that must agree to resume it, its learning rate and its progress.

Checkpoints are in NAME.checkpoints beside the run's output folder NAME, as step-N: a folder that `from_pretrained`
loads, with `training.pt` (the optimizer, the schedule and the state of the random number generators, by `collins.save`)
and `run.json` (the settings). Each is written atomically.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import collins
from collins import Collins
from collins.offload import PlacementPlan

TRAINING, SETTINGS = "training.pt", "run.json"
_OLD = ".old-"
_OF_EARLIER_RUNS = {"--accumulation-steps": 1}  # settings that they did not write, with their values


@dataclass
class Run:
    """The results of a run."""

    first: int  # the step it went on from
    steps: int  # in all
    packed: bool
    losses: dict[int, float] = field(default_factory=dict)  # by step, in nats per trained token
    held_out: dict[int, float] = field(default_factory=dict)
    placement: tuple[PlacementPlan, ...] = ()


class Checkpoints:
    """The checkpoints of the run that will end in the folder `out`."""

    def __init__(self, out: Path) -> None:
        self.root = out.with_name(f"{out.name}.checkpoints")

    def newest(self) -> tuple[int, Path] | None:
        """The last step that was saved, and its folder."""
        return max(self._numbered(), default=None)

    def save(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Saves a step, then removes all but the newest `keep`.

        A folder is renamed before it is removed, so that a partly removed folder never has its original name.
        """
        self.root.mkdir(exist_ok=True)
        path = self.root / f"step-{step}"
        with collins.whole_folder(path) as folder:
            write(folder)
        for _, old in sorted(self._numbered())[:-keep]:
            old.rename(self.root / f"{_OLD}{old.name}")
        for gone in self.root.glob(f"{_OLD}*"):
            shutil.rmtree(gone)
        return path

    def _numbered(self) -> list[tuple[int, Path]]:
        folders = [path for path in self.root.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
        return [(int(path.name[5:]), path) for path in folders]


def saved_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint."""
    file = checkpoint / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"got {type(settings).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: must be what this script wrote: {error}") from error
    return {**_OF_EARLIER_RUNS, **settings}


def refuse_others(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Raises a ValueError if a run would be resumed with other settings than it was begun with."""
    saved = saved_settings(checkpoint)
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{name} must be {saved.get(name)!r}, as in the run that {checkpoint} is of, got {value!r}; without"
                " --resume, and with another --out, a new run begins"
            )


def digest(file: Path) -> str:
    """A digest of what a file holds."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Restores the result of `random_state`; on another kind of device, the seed is used instead."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class Rate:
    """The share of --lr in each step, from 0: warm-up from 0, then half a cosine down to `least`."""

    def __init__(self, steps: int, warmup: float, least: float) -> None:
        self.steps, self.least = steps, least
        self.warmup = min(round(warmup * steps), steps - 1)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.least + (1 - self.least) * (1 + math.cos(math.pi * min(done, 1))) / 2


class Progress:
    """Shows a bar on a terminal, and lines elsewhere. Losses are read in groups, to synchronize less often."""

    def __init__(self, run: Run, optimizer: Collins, every: int) -> None:
        self._run, self._optimizer, self._every = run, optimizer, every
        self._bar = tqdm(total=run.steps, initial=run.first, disable=None, unit="step")
        self._waiting: dict[int, torch.Tensor] = {}
        self._tokens = 0  # of the steps whose losses are waiting
        self._since = time.perf_counter()

    def step(self, step: int, loss: torch.Tensor, tokens: int) -> None:
        self._waiting[step] = loss
        self._tokens += tokens
        self._bar.update()
        if step % self._every == 0 or step == self._run.steps:
            self.flush()

    def flush(self) -> None:
        """Takes the losses over.

        Raises:
            FloatingPointError: for one that is not finite.
        """
        if not self._waiting:
            return
        values = torch.stack(list(self._waiting.values())).tolist()
        self._run.losses.update(zip(self._waiting, values, strict=True))
        for step, value in zip(self._waiting, values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of step {step} is {value}: lower --lr, or look at the data")
        now = time.perf_counter()
        speed = self._tokens / (now - self._since)
        norm = self._optimizer.grad_norm
        shown = {
            "loss": f"{sum(values) / len(values):.4f}",
            **({} if norm is None else {"norm": f"{norm.item():.3f}"}),
            "lr": f"{self._optimizer.param_groups[0]['lr']:.2e}",
            "tokens/s": f"{speed:,.0f}",
        }
        if self._bar.disable:
            figures = ", ".join(f"{name} {value}" for name, value in shown.items())
            tqdm.write(f"step {max(self._waiting)}/{self._run.steps}: {figures}")
        else:
            self._bar.set_postfix(shown)
        self._waiting, self._tokens, self._since = {}, 0, now

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What takes time meanwhile is not training."""
        self.flush()
        yield
        self._since = time.perf_counter()

    def close(self) -> None:
        self.flush()
        self._bar.close()
