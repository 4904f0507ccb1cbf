"""Collins under `accelerate.Accelerator`: prepared, accumulated, clipped, saved, loaded and copied."""

import pickle

import pytest
import torch
from clients import Repeater, inputs, network, steps_taken
from helpers import OPTIONS, same

from collins import Collins

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STEPS, ROUNDS, CLIP = 8, 2, 0.05
MEMORY = (None, "host")


class Run:
    def __init__(self, precision="no", rounds=ROUNDS, clip=CLIP, **options):
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=rounds, step_scheduler_with_optimizer=False
        )
        model = network()
        self.collins = Collins(model.named_parameters(), **{**OPTIONS, **options})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.collins, STEPS)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, self.collins, schedule)
        self.clip = clip

    def train(self, first=0, last=STEPS):
        rounds = self.accelerator.gradient_accumulation_steps
        for batch in range(first * rounds, last * rounds):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(inputs(batch)).square().mean())
                if self.accelerator.sync_gradients and self.clip:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                if self.accelerator.sync_gradients:
                    assert not self.optimizer.step_was_skipped
                    self.schedule.step()
                self.optimizer.zero_grad()
        return self

    def state(self):
        return self.model.state_dict(), self.collins.state_dict(), self.schedule.state_dict()


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulated_and_clipped_steps_equal_manual_steps(precision, memory):
    run = Run(precision, memory=memory)
    assert run.optimizer.optimizer is run.collins
    repeater = Repeater(run.collins)
    run.train()
    assert repeater.is_equal
    assert len(repeater.norms) == steps_taken(run.collins) == STEPS
    assert repeater.norms[0] == pytest.approx(CLIP, rel=1e-3)
    assert max(repeater.norms) < CLIP * 1.001
    assert run.collins.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_accumulated_gradients_are_the_mean_of_their_batches():
    run = Run(clip=None)
    repeater = Repeater(run.collins)
    run.train(0, 1)
    model = network()
    (sum(model(inputs(batch)).square().mean() for batch in range(ROUNDS)) / ROUNDS).backward()
    torch.testing.assert_close(repeater.gradients, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_resumes_bitwise_from_a_loaded_state(tmp_path, precision, memory):
    uninterrupted = Run(precision, memory=memory).train(0, STEPS // 2)
    uninterrupted.accelerator.save_state(str(tmp_path))
    halfway = pickle.loads(pickle.dumps(uninterrupted.state()))
    expected = uninterrupted.train(STEPS // 2).state()
    resumed = Run(precision, memory=memory)
    resumed.accelerator.load_state(str(tmp_path))
    assert same(resumed.state(), halfway)
    assert same(resumed.train(STEPS // 2).state(), expected)
    assert not same(halfway, expected)


def test_loading_into_an_optimizer_that_has_stepped_keeps_its_tensors(tmp_path):
    run = Run().train(0, 2)
    run.accelerator.save_state(str(tmp_path))
    saved = pickle.loads(pickle.dumps(run.state()))
    table = run.collins.state[run.model[0].weight]["m_table"]
    run.train(2, 4)
    assert not same(run.state(), saved)
    run.accelerator.load_state(str(tmp_path))
    assert same(run.state(), saved)
    assert run.collins.state[run.model[0].weight]["m_table"] is table


def test_a_prepared_optimizer_can_be_pickled():
    run = Run(rounds=1).train(0, 2)  # Accelerate's copy would not account for accumulated gradients
    run.model, run.optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    run.collins = run.optimizer.optimizer
    run.schedule.step = lambda: None  # it still belongs to the optimizer that was copied
    repeater = Repeater(run.collins)
    repeater.second.load_state_dict(run.collins.state_dict())
    run.train(2, 4)
    assert repeater.is_equal
    assert steps_taken(run.collins) == 4


def test_steps_in_backward_equal_steps_after_backward():
    after_backward, within = (Run(rounds=1, clip=None, in_backward=in_backward) for in_backward in (False, True))
    assert same(within.train().state()[:1], after_backward.train().state()[:1])
    assert steps_taken(within.collins) == STEPS


def test_in_backward_rejects_accumulation():
    with pytest.raises(RuntimeError, match="arrived twice before step"):
        Run(rounds=2, clip=None, in_backward=True).train(0, 1)
