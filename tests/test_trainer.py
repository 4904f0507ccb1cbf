"""Hugging Face `Trainer` trains with Collins, in both ways to hand it an optimizer, and resumes to the bit."""

import math

import pytest
import torch
from clients import Twin, steps_taken
from helpers import OPTIONS, same

from collins import Collins

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STEPS, CLIP = 8, 0.5
WAYS = ("optimizers", "optimizer_cls_and_kwargs")
PRECISIONS = {
    "float32": (torch.float32, {}),
    "autocast": (torch.float32, {"bf16": True}),
    "bfloat16": (torch.bfloat16, {}),
}


def trainer(folder, way="optimizers", precision="float32", options=None, **arguments):
    dtype, flags = PRECISIONS[precision]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    settings = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": CLIP,
        "max_steps": STEPS,
        "learning_rate": 7 * OPTIONS["lr"],  # of no effect on an optimizer that is given
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        **flags,
        **arguments,
    }
    options = {**OPTIONS, **(options or {})}
    if way == "optimizers":
        chosen = {"optimizers": (Collins(model.named_parameters(), **options), None)}
    else:
        chosen = {"optimizer_cls_and_kwargs": (Collins, options)}
    tokens = torch.randint(64, (48, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return transformers.Trainer(model, transformers.TrainingArguments(folder, **settings), train_dataset=data, **chosen)


def collins_of(run):
    """The optimizer inside of what Accelerate wraps around it."""
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    assert type(optimizer) is Collins
    return optimizer


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_steps_as_by_hand_with_clipping_and_its_schedule(tmp_path, way, precision):
    run = trainer(tmp_path, way, precision, save_strategy="no")
    twin = Twin(run.create_optimizer())
    run.train()
    assert collins_of(run) is twin.first
    assert twin.agrees
    assert len(twin.norms) == steps_taken(twin.first) == STEPS
    assert all("m_table" in state for p, state in twin.first.state.items() if p.numel() >= 512)
    for before, after in zip(logged(run, "grad_norm"), twin.norms, strict=True):
        assert before > CLIP
        assert after == pytest.approx(CLIP, rel=2e-2 if precision == "bfloat16" else 1e-4)
    decays = [0.01] if way == "optimizers" else [0.1, 0.0]
    assert [group["weight_decay"] for group in twin.first.param_groups] == decays
    rates = [OPTIONS["lr"] * factor for factor in (0, 0.5, *((1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)))]
    assert logged(run, "learning_rate") == pytest.approx(rates)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_in_the_bits_of_one_that_was_never_stopped(tmp_path, way, precision):
    whole, resumed = (trainer(tmp_path, way, precision) for _ in range(2))
    whole.train()
    halfway = tmp_path / f"checkpoint-{STEPS // 2}"
    resumed.train(resume_from_checkpoint=str(halfway))
    assert len(logged(whole, "loss")) == STEPS
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    ended = collins_of(resumed).state_dict()
    assert steps_taken(collins_of(resumed)) == STEPS
    assert same(ended, collins_of(whole).state_dict())
    saved = torch.load(halfway / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in saved["state"].values()} == {STEPS // 2}
    assert not same(saved["state"], ended["state"])


def test_a_checkpoint_of_other_tables_is_refused(tmp_path):
    trainer(tmp_path).train()
    other = trainer(tmp_path, options={"seed": 1})
    with pytest.raises(
        ValueError, match="does not fit what was saved: state_dict has seed 0 where this optimizer has 1"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    twins = []
    for size, rounds in ((2, 2), (4, 1)):
        run = trainer(
            tmp_path,
            save_strategy="no",
            max_grad_norm=0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=rounds,
        )
        twins.append(Twin(run.create_optimizer()))
        run.train()
        assert twins[-1].agrees
        assert steps_taken(twins[-1].first) == STEPS
    assert twins[0].norms[0] > 0
    for ours, theirs in zip(*(twin.gradients for twin in twins), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_clipping_in_backward_is_asked_of_the_optimizer(tmp_path):
    """The Trainer clips what has been used by then: one warning says so, unless the optimizer clips itself."""
    ended = []
    for limit in (None, CLIP):
        run = trainer(
            tmp_path,
            options={"in_backward": True, "max_grad_norm": limit},
            max_grad_norm=CLIP,
            gradient_accumulation_steps=1,
            save_strategy="no",
        )
        if limit is None:
            with pytest.warns(UserWarning, match=rf"^Trainer clips .* Give Collins max_grad_norm={CLIP}") as told:
                run.train()
            assert len([w for w in told if "max_grad_norm" in str(w.message)]) == 1
        else:
            run.train()
            assert float(collins_of(run).grad_norm) > CLIP
        ended.append(run.model.state_dict())
    assert not same(*ended)


def test_steps_in_backward_are_those_after_it(tmp_path):
    ended = []
    for in_backward in (False, True):
        run = trainer(
            tmp_path,
            options={"in_backward": in_backward, "memory": "host"},
            max_grad_norm=0,
            gradient_accumulation_steps=1,
            save_strategy="no",
        )
        before = {name: p.clone() for name, p in run.model.state_dict().items()}
        run.train()
        assert steps_taken(collins_of(run)) == STEPS
        assert not same(before, run.model.state_dict())
        ended.append((run.model.state_dict(), collins_of(run).state_dict()["state"], logged(run, "loss")))
    assert same(*ended)
