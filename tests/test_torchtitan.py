"""Collins in torchtitan's optimizer containers: groups by pattern, flat state, checkpoints of DCP, schedules."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from clients import Repeater, inputs, network, steps_taken
from helpers import OPTIONS, same

from collins import Collins

titan = pytest.importorskip("torchtitan.components.optimizer")
integration = pytest.importorskip("collins.integrations.torchtitan")

STEPS = 8
TABLES = {**OPTIONS, "weight_decay": 0.1}
IMPLEMENTATIONS = ("for-loop", "foreach", "fused")  # put into every group, whatever the optimizer


class Run:
    """Exact moments for biases, and tables for weights; or AdamW for biases."""

    def __init__(self, implementation="for-loop", parts=None, biases="Collins", seed=0, **options):
        self.parts = parts or [network()]
        exact = {"lr": 5e-3, "compress_ratio": 1} if biases == "Collins" else {"lr": 5e-3}
        config = integration.CollinsOptimizers.Config(
            param_groups=[
                titan.ParamGroupConfig(pattern=r"bias$", optimizer_name=biases, optimizer_kwargs=exact),
                titan.ParamGroupConfig(pattern=r".*", optimizer_name="Collins", optimizer_kwargs={**TABLES, **options}),
            ],
            implementation=implementation,
            optimizer_factory_kwargs_by_name={"Collins": {"seed": seed}},
        )
        self.container = config.build(model_parts=self.parts)
        self.schedules = titan.LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.container, training_steps=STEPS
        )

    def train(self, first=0, last=STEPS):
        for step in range(first, last):
            for part in self.parts:
                for stage in part.values() if isinstance(part, torch.nn.ModuleDict) else [part]:
                    stage(inputs(step)).square().mean().backward()
            self.container.step()
            self.schedules.step()
            self.container.zero_grad()
        return self

    def weights(self):
        return [part.state_dict() for part in self.parts]

    def checkpoint(self):
        return {"model": self.parts[0], "optimizer": self.container, "lr_scheduler": self.schedules}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_container_with_groups_by_pattern_equals_manual_steps(implementation):
    run = Run(implementation)
    (optimizer,) = run.container
    repeater = Repeater(optimizer)
    run.train()
    assert repeater.is_equal
    assert steps_taken(optimizer) == STEPS
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.bias", "2.bias"],
        ["0.weight", "2.weight"],
    ]
    assert [optimizer.hash_of(p) is None for group in optimizer.param_groups for p in group["params"]] == [
        *(True, True),
        *(False, False),
    ]
    assert run.schedules.get_metrics().keys() == {"lr/Collins/0", "lr/Collins/1"}


def test_it_can_be_used_with_another_optimizer():
    run = Run(biases="AdamW").train()
    assert [type(optimizer) for optimizer in run.container] == [torch.optim.AdamW, Collins]
    assert all(steps_taken(optimizer) == STEPS for optimizer in run.container)
    for name, p in run.parts[0].state_dict().items():
        assert not torch.equal(p, network().state_dict()[name])


def test_flat_state_is_created_before_the_first_step_and_changes_nothing():
    run, untouched = Run(), Run()
    flat_state = run.container.state_dict()
    assert same(run.weights(), untouched.weights())
    assert all(p.grad is None for p in run.parts[0].parameters())
    tables = ("m_table", "m_table_scale", "v_table", "layout")
    for name, moments in (("0.weight", tables), ("0.bias", ("exp_avg", "exp_avg_sq"))):
        assert {key for key in flat_state if key.startswith(f"state.{name}.")} == {
            f"state.{name}.{key}" for key in ("step", *moments)
        }
    assert flat_state["param_groups.0.weight.lr"] == run.container.optimizers[0].param_groups[1]["lr"]
    assert all(
        isinstance(value, (torch.Tensor, int, float)) for key, value in flat_state.items() if key.startswith("state.")
    )


# torch's, wherever a checkpoint is written by a single process.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
# torchtitan's container of schedules asks torch's for a rate out of turn when it is loaded.
@pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_resumes_bitwise_from_a_checkpoint(tmp_path, implementation, dtype):
    uninterrupted = Run(implementation, table_dtype=dtype).train(0, STEPS // 2)
    dcp.save(uninterrupted.checkpoint(), checkpoint_id=tmp_path, no_dist=True)
    resumed = Run(implementation, table_dtype=dtype)
    dcp.load(state := resumed.checkpoint(), checkpoint_id=tmp_path, no_dist=True)
    assert state["optimizer"] is resumed.container
    assert same(resumed.container.state_dict(), uninterrupted.container.state_dict())
    assert same(resumed.train(STEPS // 2).weights(), uninterrupted.train(STEPS // 2).weights())
    assert same(resumed.container.state_dict(), uninterrupted.container.state_dict())
    assert steps_taken(resumed.container.optimizers[0]) == STEPS
    assert same(resumed.schedules.state_dict(), uninterrupted.schedules.state_dict())


def test_a_flat_state_of_another_seed_is_rejected_and_nothing_changes():
    run, other = Run().train(), Run(seed=1).train()
    before = other.container.state_dict()
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in before.items()}
    with pytest.raises(ValueError, match="has seed 0 where this optimizer has 1"):
        other.container.load_state_dict(run.container.state_dict())
    assert same(other.container.state_dict(), before)


def test_hooks_of_the_container_run():
    run = Run()
    calls = []
    run.container.register_step_pre_hook(lambda *_: calls.append("before"))
    run.container.register_step_post_hook(lambda *_: calls.append("after"))
    run.train(0, 2)
    assert calls == ["before", "after"] * 2


def stages(*split):
    """Parts of a pipeline: the stages of each name in a module of their own."""
    return [torch.nn.ModuleDict({name: network() for name in names}) for names in split]


def test_every_part_of_a_pipeline_has_its_own_optimizer():
    run, resumed = (Run(parts=stages("a", "b")) for _ in range(2))
    repeaters = [Repeater(optimizer) for optimizer in run.container]
    run.train(0, STEPS // 2)
    assert len(repeaters) == 2
    for repeater in repeaters:
        assert repeater.is_equal
    for part, saved in zip(resumed.parts, run.weights(), strict=True):
        part.load_state_dict(saved)
    resumed.container.load_state_dict(run.container.state_dict())
    assert same(resumed.container.state_dict(), run.container.state_dict())


def test_a_flat_state_of_another_pipeline_split_resumes_bitwise():
    """Hashes derive from a parameter's name, which does not depend on the split."""
    run, other = Run(parts=stages("a", "b")).train(0, 2), Run(parts=stages("ab")).train(50, 52)
    other.parts[0].load_state_dict({name: value for weights in run.weights() for name, value in weights.items()})
    other.container.load_state_dict(run.container.state_dict())
    for r in (run, other):
        r.train(2, STEPS)
    assert same({name: value for weights in run.weights() for name, value in weights.items()}, other.weights()[0])


def test_the_default_configuration_is_collins_for_all_parameters():
    config = integration.default_collins(lr=1e-2, min_K=16, weight_decay=0.2, seed=3, memory="host")
    container = config.build(model_parts=[network()])
    assert type(container) is integration.CollinsOptimizers
    (optimizer,) = container
    assert type(optimizer) is Collins
    (group,) = optimizer.param_groups
    assert [group[name] for name in ("lr", "betas", "weight_decay", "min_K")] == [1e-2, (0.9, 0.95), 0.2, 16]
    assert group["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (optimizer.seed, optimizer.memory.tier) == (3, "host")
    container.model_parts[0](inputs(0)).square().mean().backward()
    container.step()
    assert steps_taken(optimizer) == 1
