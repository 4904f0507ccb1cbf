"""The examples run, at a size for tests."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--layers", "1", "--width", "64", "--context", "16", "--batch", "4"]


@pytest.fixture
def train_lm():
    spec = importlib.util.spec_from_file_location("train_lm", EXAMPLES / "train_lm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_lm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_lm"]


def test_train_lm_compares_the_optimizers(train_lm, tmp_path, capsys):
    picture = tmp_path / "loss.png"
    runs = train_lm.main(["--steps", "60", "--lr", "1e-2", "collins=2e-2", "--out", str(picture), *TINY])
    assert [(run.name, run.lr) for run in runs] == [("adamw", 1e-2), ("collins", 2e-2), ("collins-sketch", 1e-2)]
    for run in runs:
        assert run.steps[-1] == 60
        assert run.losses[-1] < run.losses[0] < 5.6  # nats; a uniform guess has 5.545
    assert runs[1].state_bytes < runs[0].state_bytes / 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for run in runs:
        assert f"{run.state_bytes:,}" in shown
        assert f"{run.losses[-1]:.3f}" in shown


def test_train_lm_repeats_itself_and_takes_a_subset(train_lm, tmp_path):
    arguments = ["--steps", "5", "--optimizers", "collins", "--out", str(tmp_path / "loss.png"), *TINY]
    (first,), (second,) = train_lm.main(arguments), train_lm.main(arguments)
    assert first.losses == second.losses


@pytest.mark.parametrize("wrong", [["--width", "65"], ["--lr", "sgd=1"], ["--optimizers", "sgd"], ["--lr", "fast"]])
def test_train_lm_refuses_what_it_cannot_run(train_lm, wrong, capsys):
    with pytest.raises(SystemExit):
        train_lm.main(wrong)
    assert wrong[1].partition("=")[0] in capsys.readouterr().err
