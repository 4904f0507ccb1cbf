"""Checkpoint files: whole or refused, whatever happened to them; and loading is all or nothing."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import environment, same
from hypothesis import given, settings
from hypothesis import strategies as st

import collins
from collins import CheckpointError, Collins


class Training:
    """A model and all that goes with it."""

    def __init__(self, seed=0, width=64, memory=None, **options):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.BatchNorm1d(width))
        self.optimizer = Collins(self.model.parameters(), min_K=16, memory=memory, **options)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 5])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    @property
    def parts(self):
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }

    def train(self, steps):
        for step in range(steps):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            self.scaler.scale(self.model(x).tanh().square().mean()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def values(self):
        return copy.deepcopy({name: part.state_dict() for name, part in self.parts.items()})


@pytest.mark.parametrize("memory", [None, "host"])
def test_everything_comes_back(memory, tmp_path):
    path = tmp_path / "last.pt"
    source = Training(memory=memory).train(3)
    extra = {"epoch": 3, "rng": torch.get_rng_state(), "history": [(1, 0.5), (2, None)], "note": "warm"}
    collins.save(path, **source.parts, **extra)
    target = Training(seed=1, memory=memory).train(1)
    rest = collins.load(path, **target.parts)
    assert same(target.values(), source.values())
    assert rest.keys() == extra.keys()
    assert same(rest, extra)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(path, weights_only=True)["epoch"] == 3  # no tool of ours is needed to read it
    target.train(2)  # nothing that was loaded is tied to the file
    collins.save(path, **target.parts)
    assert collins.load(path, optimizer=source.optimizer).keys() == {"model", "scheduler", "scaler"}


def test_a_file_may_be_replaced_while_it_is_in_use(tmp_path):
    path = tmp_path / "last.pt"
    collins.save(path, t=torch.ones(1000))
    held = collins.load(path)["t"]
    collins.save(path, t=torch.zeros(1000))
    assert held.sum() == 1000
    assert collins.load(path)["t"].sum() == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "whole.pt"
    collins.save(path, **Training().train(3).parts)
    return path.read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_and_nothing_changes(whole, tmp_path_factory, data):
    at = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.sampled_from(["cut", "flip", "insert", "zero the rest"]))
    wrong = {
        "cut": whole[:at],
        "flip": whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :],
        "insert": whole[:at] + b"x" + whole[at:],
        "zero the rest": whole[:at] + bytes(len(whole) - at - 1) + b"\x01",
    }[damage]
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(wrong)
    target = Training(seed=1).train(1)
    before = target.values()
    if wrong == whole:
        return
    with pytest.raises(CheckpointError, match=r"damaged\.pt (is corrupted|does not end as collins\.save)"):
        collins.load(path, **target.parts)
    assert same(target.values(), before)


def test_files_of_others_are_refused(tmp_path):
    torch.save({"model": 1}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"plain\.pt does not end as collins\.save ends a file"):
        collins.load(tmp_path / "plain.pt")
    with pytest.raises(FileNotFoundError):
        collins.load(tmp_path / "none.pt")


class Stubborn:
    """A part that loads nothing."""

    def state_dict(self):
        return {"kept": 1}

    def load_state_dict(self, state):
        if state != {"kept": 1}:
            raise KeyError("kept")


MISFITS = [
    (lambda: {"model": torch.nn.Linear(64, 64)}, "model of .* the file lacks"),
    (lambda: {"model": Training(width=96).model}, r"model of .* 0.weight must have its shape .*96.* got .*64"),
    (lambda: {"model": Training().model.double()}, r"model of .* must have its dtype torch.float64, got torch.float32"),
    (lambda: {"optimizer": Training(seed=1, compress_ratio=8).optimizer}, r"optimizer of .* bucket load c 32 where"),
    (lambda: {"optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters())}, r"optimizer of .* groups of \[4\]"),
    (lambda: {"scaler": Stubborn()}, "scaler of .* cannot be loaded: 'kept'"),
    (
        lambda: {"ema": Training().model},
        r"holds the parts \['model', 'optimizer', 'scheduler', 'scaler'\]; it has no 'ema'",
    ),
]


@pytest.mark.parametrize(("misfit", "text"), MISFITS, ids=[text[:30] for _, text in MISFITS])
def test_one_part_that_does_not_fit_leaves_all_parts_as_they_were(whole, tmp_path, misfit, text):
    path = tmp_path / "whole.pt"
    path.write_bytes(whole)
    target = Training(seed=1, lr=0.5).train(1)
    before = target.values()
    with pytest.raises(CheckpointError, match=text):
        collins.load(path, **{**target.parts, **misfit()})
    assert same(target.values(), before)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    path = tmp_path / "last.pt"
    collins.save(path, epoch=1)
    with pytest.raises(TypeError, match=r"callback must have a state_dict, or be made of tensors.* got Stranger"):
        collins.save(path, epoch=2, callback=Stranger())
    assert collins.load(path) == {"epoch": 1}


class Stranger:
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pt"
    collins.save(path, epoch=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            collins.save(path, epoch=2)
    assert collins.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


WRITER = """
import os, sys, time, torch, collins

path, where = sys.argv[1:]
collins.save(path, epoch=1, t=torch.full((100_000,), 1.0))

def stop(*_):
    print("there", flush=True)
    time.sleep(600)

if where == "in the middle":
    files = collins.files
    write = files._Sealed.write
    def halfway(self, data):
        if len(memoryview(data).cast("B")) > 100_000:
            write(self, memoryview(data).cast("B")[:50_000])
            self._file.flush()
            stop()
        return write(self, data)
    files._Sealed.write = halfway
elif where == "before the rename":
    os.replace = stop
else:
    replace = os.replace
    def renamed(*names):
        replace(*names)
        stop()
    os.replace = renamed
collins.save(path, epoch=2, t=torch.full((100_000,), 2.0))
"""


@pytest.mark.parametrize(("where", "epoch"), [("in the middle", 1), ("before the rename", 1), ("after the rename", 2)])
def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path, where, epoch):
    path = tmp_path / "last.pt"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), where], stdout=subprocess.PIPE, env=environment(), text=True
    ) as writer:
        assert writer.stdout.readline() == "there\n"
        writer.send_signal(signal.SIGKILL)
    held = collins.load(path)
    assert held["epoch"] == epoch
    assert torch.equal(held["t"], torch.full((100_000,), float(epoch)))
    left = [file for file in tmp_path.iterdir() if file != path]
    assert len(left) == (where != "after the rename")
    for partial in left:
        assert partial.name.startswith(".last.pt.")
        assert partial.suffix == ".partial"
        if where == "in the middle":
            with pytest.raises(CheckpointError):
                collins.load(partial)
    collins.save(path, epoch=3)  # what is left behind is in nobody's way
    assert collins.load(path) == {"epoch": 3}
