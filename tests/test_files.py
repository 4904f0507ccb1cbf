"""Checkpoint files: damaged ones are rejected, and loading is all or nothing."""

import copy
import errno
import io
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
    """A model, its optimizer and schedule."""

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
def test_all_parts_are_loaded(memory, tmp_path):
    path = tmp_path / "last.pt"
    source = Training(memory=memory).train(3)
    extra = {"epoch": 3, "rng": torch.get_rng_state(), "history": [(1, 0.5), (2, None)], "note": "warm"}
    collins.save(path, **source.parts, **extra)
    target = Training(seed=1, memory=memory).train(1)
    other_values = collins.load(path, **target.parts)
    assert same(target.values(), source.values())
    assert other_values.keys() == extra.keys()
    assert same(other_values, extra)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(path, weights_only=True)["epoch"] == 3  # torch.load alone can read it
    target.train(2)  # no loaded tensor uses memory of the file
    collins.save(path, **target.parts)
    assert collins.load(path, optimizer=source.optimizer).keys() == {"model", "scheduler", "scaler"}


def test_a_file_may_be_replaced_after_it_has_been_loaded(tmp_path):
    path = tmp_path / "last.pt"
    collins.save(path, t=torch.ones(1000))
    t = collins.load(path)["t"]
    collins.save(path, t=torch.zeros(1000))
    assert t.sum() == 1000
    assert collins.load(path)["t"].sum() == 0


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "whole.pt"
    collins.save(path, **Training().train(3).parts)
    return path.read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_rejected_and_nothing_changes(valid_file, tmp_path_factory, data):
    offset = data.draw(st.integers(0, len(valid_file) - 1))
    damage = data.draw(st.sampled_from(["cut", "flip", "insert", "zero the rest"]))
    contents = {
        "cut": valid_file[:offset],
        "flip": valid_file[:offset]
        + bytes([valid_file[offset] ^ 1 << data.draw(st.integers(0, 7))])
        + valid_file[offset + 1 :],
        "insert": valid_file[:offset] + b"x" + valid_file[offset:],
        "zero the rest": valid_file[:offset] + bytes(len(valid_file) - offset - 1) + b"\x01",
    }[damage]
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(contents)
    target = Training(seed=1).train(1)
    before = target.values()
    if contents == valid_file:
        return
    with pytest.raises(CheckpointError, match=r"damaged\.pt (is corrupted|does not end with the trailer)"):
        collins.load(path, **target.parts)
    assert same(target.values(), before)


def test_files_of_other_formats_are_rejected(tmp_path):
    torch.save({"model": 1}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"plain\.pt does not end with the trailer of collins\.save"):
        collins.load(tmp_path / "plain.pt")
    with pytest.raises(FileNotFoundError):
        collins.load(tmp_path / "none.pt")


def sealed(data):
    """A file with a valid seal and arbitrary content."""
    file = io.BytesIO()
    seal = collins.files._DigestingFile(file)
    seal.write(data)
    return file.getvalue() + seal.trailer()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda valid_file: b"not what torch.save writes", "cannot read"),
        (lambda valid_file: valid_file[: len(valid_file) // 2], "cannot read"),
        (lambda valid_file: valid_file.replace(b"PK\x01\x02", b"PK\x09\x09"), "cannot read"),
        (lambda valid_file: serialized([1, 2]), "must hold a dict of parts, got one list"),
        (lambda valid_file: serialized(torch.ones(3)), "must hold a dict of parts, got one Tensor"),
    ],
)
def test_a_file_with_a_valid_seal_and_invalid_content_is_rejected(valid_file, tmp_path, damage, text):
    path, target = tmp_path / "sealed.pt", Training(seed=1).train(1)
    path.write_bytes(sealed(damage(valid_file[: -collins.files._TRAILER])))
    before = target.values()
    with pytest.raises(CheckpointError, match=text):
        collins.load(path, **target.parts)
    assert same(target.values(), before)


@pytest.mark.parametrize(("number", "error"), [(errno.EINVAL, CheckpointError), (errno.EIO, OSError)])
def test_an_offset_outside_the_file_is_damage_and_a_disk_error_is_not(tmp_path, monkeypatch, number, error):
    path = tmp_path / "last.pt"
    collins.save(path, epoch=1)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(error) as caught:
        collins.load(path)
    assert type(caught.value) is error


def serialized(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class IgnoresLoading:
    """A part whose `load_state_dict` does nothing."""

    def state_dict(self):
        return {"kept": 1}

    def load_state_dict(self, state):
        if state != {"kept": 1}:
            raise KeyError("kept")


MISMATCHES = [
    (lambda: {"model": torch.nn.Linear(64, 64)}, "model of .* the file lacks"),
    (lambda: {"model": Training(width=96).model}, r"model of .* 0.weight must have its shape .*96.* got .*64"),
    (lambda: {"model": Training().model.double()}, r"model of .* must have its dtype torch.float64, got torch.float32"),
    (lambda: {"optimizer": Training(seed=1, compress_ratio=8).optimizer}, "optimizer of .* has moments"),
    (lambda: {"optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters())}, r"optimizer of .* groups of \[4\]"),
    (lambda: {"scaler": IgnoresLoading()}, "scaler of .* cannot be loaded: 'kept'"),
    (
        lambda: {"ema": Training().model},
        r"holds the parts \['model', 'optimizer', 'scheduler', 'scaler'\]; it has no 'ema'",
    ),
]


@pytest.mark.parametrize(("build", "text"), MISMATCHES, ids=[text[:30] for _, text in MISMATCHES])
def test_a_part_that_does_not_match_leaves_all_parts_unchanged(valid_file, tmp_path, build, text):
    path = tmp_path / "whole.pt"
    path.write_bytes(valid_file)
    target = Training(seed=1, lr=0.5).train(1)
    before = target.values()
    with pytest.raises(CheckpointError, match=text):
        collins.load(path, **{**target.parts, **build()})
    assert same(target.values(), before)


class Counting(torch.nn.Linear):
    """A model with extra state that is not a tensor."""

    count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        if state["count"] < 0:
            raise AssertionError("no count")
        self.count = state["count"]


def edited_content(change):
    """The contents of a checkpoint, one of them changed."""
    content = Training().train(3).values()
    change(content)
    return content


INVALID_PARTS = {
    "sparse weight": lambda c: c["model"].update({"1.weight": c["model"]["1.weight"].to_sparse()}),
    "no model": lambda c: c.update(model=3),
    "weight: list": lambda c: c["model"].update({"1.weight": [1.0]}),
    "sparse moment": lambda c: c["optimizer"]["state"][0].update(
        v_table=c["optimizer"]["state"][0]["v_table"].to_sparse()
    ),
    "state: list": lambda c: c["optimizer"].update(state=[0]),
    "no optimizer": lambda c: c.update(optimizer=[1]),
    "scheduler": lambda c: c.update(scheduler=[1]),
}


@pytest.mark.parametrize("case", INVALID_PARTS)
def test_a_part_of_the_wrong_type_leaves_all_parts_unchanged(case, tmp_path):
    path = tmp_path / "last.pt"
    collins.save(path, **edited_content(INVALID_PARTS[case]))
    target = Training(seed=1, lr=0.5).train(1)
    before = target.values()
    with pytest.raises(CheckpointError, match=r"^(model|optimizer|scheduler) of .* cannot be loaded"):
        collins.load(path, **target.parts)
    assert same(target.values(), before)


def without_step(state):
    del state["state"][1]["step"]


EDITS = {
    "state: list": lambda state: state.update(state=[0]),
    "one state: list": lambda state: state["state"].update({0: [1]}),
    "group: no params": lambda state: state["param_groups"].__setitem__(0, {}),
    "no step": without_step,  # AdamW detects it after replacing its state
    "a hook": lambda state: None,
}


@pytest.mark.parametrize("case", EDITS)
def test_a_state_that_another_optimizer_rejects_leaves_all_parts_unchanged(case, tmp_path):
    def train_parts(seed):
        torch.manual_seed(seed)
        net = torch.nn.Linear(4, 4)
        adamw = torch.optim.AdamW(net.parameters())
        net(torch.ones(2, 4)).sum().backward()
        adamw.step()
        return {"model": net, "optimizer": adamw}

    def values(parts):
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    path, source, target = tmp_path / "last.pt", train_parts(0), train_parts(1)
    content = values(source)
    EDITS[case](content["optimizer"])
    collins.save(path, **content)
    if case == "a hook":
        target["optimizer"].register_load_state_dict_post_hook(raise_locked)
    before, state = values(target), target["optimizer"].state
    with pytest.raises(CheckpointError, match=r"^optimizer of .* cannot be loaded"):
        collins.load(path, **target)
    assert same(values(target), before)
    assert target["optimizer"].state is state


def raise_locked(optimizer):
    raise AssertionError("locked")


def test_extra_state_of_a_model_is_restored_after_an_error(tmp_path):
    path, source = tmp_path / "last.pt", Counting(4, 4)
    source.count = -1
    collins.save(path, a=torch.nn.Linear(4, 4), b=source)
    target = {"a": torch.nn.Linear(4, 4), "b": Counting(4, 4)}
    before = copy.deepcopy({name: part.state_dict() for name, part in target.items()})
    with pytest.raises(CheckpointError, match=r"b of .* cannot be loaded: no count"):
        collins.load(path, **target)
    assert same({name: part.state_dict() for name, part in target.items()}, before)


def meta_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, device="meta"))


def test_weights_without_data_are_not_written(tmp_path):
    path = tmp_path / "last.pt"
    collins.save(path, epoch=1)
    with pytest.raises(
        TypeError, match=r"model\['1.weight'\] must be a tensor with data, got a tensor on the meta dev"
    ):
        collins.save(path, model=meta_model())
    assert collins.load(path) == {"epoch": 1}


def expanded_model():
    net = torch.nn.Linear(4, 4)
    del net.bias
    net.register_buffer("bias", torch.zeros(1).expand(4))
    return net


def inference_model():
    with torch.inference_mode():
        net = torch.nn.Linear(4, 4)
    return net


@pytest.mark.parametrize("build_model", [lambda: torch.nn.Linear(4, 4, device="meta"), expanded_model, inference_model])
def test_a_model_that_cannot_be_written_to_is_detected_before_any_part_is_loaded(build_model, tmp_path):
    path, first = tmp_path / "last.pt", torch.nn.Linear(4, 4)
    collins.save(path, a=torch.nn.Linear(4, 4), b=torch.nn.Linear(4, 4))
    before = copy.deepcopy(first.state_dict())
    with pytest.raises(
        CheckpointError, match=r"b of .* (bias|weight) (must be a tensor with data|cannot be written to)"
    ):
        collins.load(path, a=first, b=build_model())
    assert same(dict(first.state_dict()), dict(before))


def test_weights_that_require_gradients_are_loaded(tmp_path):
    path, source, target = tmp_path / "last.pt", torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    collins.save(path, model=source.state_dict(keep_vars=True))
    collins.load(path, model=target)
    assert torch.equal(target.weight, source.weight)
    assert target.weight.is_leaf


def test_a_part_must_have_load_state_dict(tmp_path):
    collins.save(tmp_path / "last.pt", epoch=3)
    with pytest.raises(CheckpointError, match=r"epoch of .* must have a load_state_dict, got 3"):
        collins.load(tmp_path / "last.pt", epoch=3)


def test_objects_that_cannot_be_loaded_again_are_not_saved(tmp_path):
    path = tmp_path / "last.pt"
    collins.save(path, epoch=1)
    with pytest.raises(TypeError, match=r"callback must have a state_dict, or consist of tensors.* got Unserializable"):
        collins.save(path, epoch=2, callback=Unserializable())
    assert collins.load(path) == {"epoch": 1}


class Unserializable:
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_files(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pt"
    collins.save(path, epoch=1)

    def raise_disk_full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, raise_disk_full)
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
    write = files._DigestingFile.write
    def halfway(self, data):
        if len(memoryview(data).cast("B")) > 100_000:
            write(self, memoryview(data).cast("B")[:50_000])
            self._file.flush()
            stop()
        return write(self, data)
    files._DigestingFile.write = halfway
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


@pytest.mark.parametrize(("moment", "epoch"), [("in the middle", 1), ("before the rename", 1), ("after the rename", 2)])
def test_a_process_killed_while_saving_leaves_a_complete_file(tmp_path, moment, epoch):
    path = tmp_path / "last.pt"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), moment], stdout=subprocess.PIPE, env=environment(), text=True
    ) as writer:
        assert writer.stdout.readline() == "there\n"
        writer.send_signal(signal.SIGKILL)
    content = collins.load(path)
    assert content["epoch"] == epoch
    assert torch.equal(content["t"], torch.full((100_000,), float(epoch)))
    partial_files = [file for file in tmp_path.iterdir() if file != path]
    assert len(partial_files) == (moment != "after the rename")
    for partial in partial_files:
        assert partial.name.startswith(".last.pt.")
        assert partial.suffix == ".partial"
        if moment == "in the middle":
            with pytest.raises(CheckpointError):
                collins.load(partial)
    collins.save(path, epoch=3)  # remaining temporary files do not prevent the next save
    assert collins.load(path) == {"epoch": 3}
