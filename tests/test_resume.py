"""Ten steps, a checkpoint, and ten steps in a new process bitwise equal twenty steps."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import environment, output_of, same
from resuming import CASES, HALF, STEPS, Run, checkpoint, result

import collins


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The folder in which another process has completed all runs that this one started."""
    folder = tmp_path_factory.mktemp("runs")
    for number, case in enumerate(CASES):
        collins.save(checkpoint(folder, number), **Run(**case).train(0, HALF).parts)
    output_of(sys.executable, Path(__file__).with_name("resuming.py"), folder, env=environment())
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number].values())))
def test_a_resumed_run_bitwise_equals_an_uninterrupted_one(resumed, number):
    checkpoint_state = torch.load(checkpoint(resumed, number), weights_only=True)
    actual = torch.load(result(resumed, number), weights_only=True)
    expected = Run(**CASES[number]).train(0, STEPS).state()
    assert same(actual, expected)
    assert not same(checkpoint_state["optimizer"], expected["optimizer"])
    assert any("layout" in state for state in actual["optimizer"]["state"].values())
