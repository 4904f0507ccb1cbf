"""Hugging Face `Trainer` trains with Collins, passed in both ways, and resumes bitwise."""

import math
import pickle
import re

import pytest
import torch
from clients import Repeater, StatisticsCalls, component, steps_taken
from helpers import OPTIONS, same

from collins import Collins, register
from collins.integrations import NAME

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STEPS, CLIP = 8, 0.5
WAYS = ("optimizers", "optimizer_cls_and_kwargs")
BY_NAME = {"optim": "collins", "optim_args": "min_K=16, rehash_period=3", "learning_rate": OPTIONS["lr"]}
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
    if way == "name":
        register()
        optimizer_arguments, settings = {}, {**settings, **BY_NAME, **arguments}
    elif way == "optimizers":
        optimizer_arguments = {"optimizers": (Collins(model.named_parameters(), **options), None)}
    else:
        optimizer_arguments = {"optimizer_cls_and_kwargs": (Collins, options)}
    tokens = torch.randint(64, (48, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return transformers.Trainer(
        model, transformers.TrainingArguments(folder, **settings), train_dataset=data, **optimizer_arguments
    )


def collins_of(run):
    """The optimizer inside Accelerate's wrapper."""
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    assert type(optimizer) is Collins
    return optimizer


def log_entries(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", [*WAYS, "name"])
def test_the_trainer_equals_manual_steps_with_clipping_and_schedule(tmp_path, way, precision):
    run = trainer(tmp_path, way, precision, save_strategy="no")
    repeater = Repeater(run.create_optimizer())
    run.train()
    assert collins_of(run) is repeater.first
    assert repeater.is_equal
    assert len(repeater.norms) == steps_taken(repeater.first) == STEPS
    compressed = {"m_table", "exp_avg_scale"}  # of matrices, and of token tables
    assert all(compressed & state.keys() for p, state in repeater.first.state.items() if p.numel() >= 512)
    for before, after in zip(log_entries(run, "grad_norm"), repeater.norms, strict=True):
        assert before > CLIP
        assert after == pytest.approx(CLIP, rel=2e-2 if precision == "bfloat16" else 1e-4)
    decays = [0.01] if way == "optimizers" else [0.1, 0.0]
    assert [group["weight_decay"] for group in repeater.first.param_groups] == decays
    rates = [OPTIONS["lr"] * factor for factor in (0, 0.5, *((1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)))]
    assert log_entries(run, "learning_rate") == pytest.approx(rates)


@pytest.mark.parametrize(
    ("way", "precision"), [*((way, precision) for way in WAYS for precision in PRECISIONS), ("name", "bfloat16")]
)
def test_a_resumed_run_bitwise_equals_an_uninterrupted_one(tmp_path, way, precision):
    uninterrupted, resumed = (trainer(tmp_path, way, precision) for _ in range(2))
    uninterrupted.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(log_entries(uninterrupted, "loss")) == STEPS
    assert log_entries(resumed, "loss") == log_entries(uninterrupted, "loss")
    assert same(resumed.model.state_dict(), uninterrupted.model.state_dict())
    resumed_state = collins_of(resumed).state_dict()
    assert steps_taken(collins_of(resumed)) == STEPS
    assert same(resumed_state, collins_of(uninterrupted).state_dict())
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in saved["state"].values()} == {STEPS // 2}
    assert not same(saved["state"], resumed_state["state"])


def test_a_checkpoint_of_other_tables_is_rejected(tmp_path):
    trainer(tmp_path).train()
    other = trainer(tmp_path, options={"seed": 1})
    with pytest.raises(
        ValueError, match="does not fit what was saved: state_dict has seed 0 where this optimizer has 1"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))


def test_accumulated_gradients_equal_those_of_the_large_batch(tmp_path):
    repeaters = []
    for size, rounds in ((2, 2), (4, 1)):
        run = trainer(
            tmp_path,
            save_strategy="no",
            max_grad_norm=0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=rounds,
        )
        repeaters.append(Repeater(run.create_optimizer()))
        run.train()
        assert repeaters[-1].is_equal
        assert steps_taken(repeaters[-1].first) == STEPS
    assert repeaters[0].norms[0] > 0
    for actual, expected in zip(*(repeater.gradients for repeater in repeaters), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_ineffective_clipping_in_backward_is_warned_of(tmp_path):
    """The Trainer clips gradients after their use, which gives one warning, unless the optimizer clips them."""
    results = []
    for max_norm in (None, CLIP):
        run = trainer(
            tmp_path,
            options={"in_backward": True, "max_grad_norm": max_norm},
            max_grad_norm=CLIP,
            gradient_accumulation_steps=1,
            save_strategy="no",
        )
        if max_norm is None:
            with pytest.warns(UserWarning, match=rf"^Trainer clips .* Pass max_grad_norm={CLIP}") as warned:
                run.train()
            assert len([w for w in warned if "max_grad_norm" in str(w.message)]) == 1
        else:
            run.train()
            assert float(collins_of(run).grad_norm) > CLIP
        results.append(run.model.state_dict())
    assert not same(*results)


def test_steps_in_backward_equal_steps_after_backward(tmp_path):
    results = []
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
        results.append((run.model.state_dict(), collins_of(run).state_dict()["state"], log_entries(run, "loss")))
    assert same(*results)


def test_by_name_it_gets_the_options_of_the_arguments_and_the_names_of_the_model(tmp_path):
    options = "compress_ratio=16,table_dtype=bfloat16,rehash_period=none,maximize=false,memory=host,seed=3"
    run = trainer(tmp_path, "name", optim_args=options, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    opt = run.create_optimizer()
    assert type(opt) is Collins
    assert (opt.seed, opt.memory.tier) == (3, "host")
    expected = {
        "lr": OPTIONS["lr"],
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "compress_ratio": 16,
        "table_dtype": torch.bfloat16,
        "rehash_period": None,
        "maximize": False,
    }
    for group, decay in zip(opt.param_groups, (0.1, 0.0), strict=True):
        assert {name: group[name] for name in expected} == expected
        assert group["weight_decay"] == decay
    names = {name for group in opt.param_groups for name in group["param_names"]}
    assert names == {name for name, _ in run.model.named_parameters()}
    rows = {row.name: row for row in opt.memory_report().rows}
    assert rows["parameter 'model.embed_tokens.weight'"].role == "tokens"


@pytest.mark.parametrize("option", ["lr=1", "betas=0.9", "eps=1", "weight_decay=0.1"])
def test_options_with_own_training_arguments_are_rejected_in_optim_args(tmp_path, option):
    run = trainer(tmp_path, "name", optim_args=f"min_K=16,{option}")
    with pytest.raises(ValueError, match=f"optim_args must not contain .* of TrainingArguments sets, got {option}"):
        run.create_optimizer()


def test_an_unknown_option_is_rejected(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'compression'"):
        trainer(tmp_path, "name", optim_args="compression=16").create_optimizer()


def test_the_name_is_a_choice_on_the_command_line_and_is_copied(tmp_path):
    register()
    register()
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    (arguments,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", "collins", "--optim_args", "min_K=16", "--use_cpu"]
    )
    assert arguments.optim == "collins"
    assert arguments.to_dict()["optim"] == "collins"
    assert pickle.loads(pickle.dumps(arguments)).optim is arguments.optim
    names = [member.value for member in type(arguments.optim)]
    assert names.count("collins") == 1
    with pytest.raises(ValueError, match="collin is not a valid OptimizerNames"):
        transformers.TrainingArguments(str(tmp_path), optim="collin", use_cpu=True)


def test_without_a_table_of_optimizers_the_error_names_the_alternative(monkeypatch):
    monkeypatch.delattr("transformers.trainer_optimizer._OPTIMIZER_HANDLERS")
    with pytest.raises(
        RuntimeError, match=re.escape(f"transformers {transformers.__version__} has no table of")
    ) as error:
        register("transformers")
    assert "Trainer(optimizer_cls_and_kwargs=(Collins, " in str(error.value)


def test_another_framework_is_rejected():
    with pytest.raises(ValueError, match="hosts must be 'transformers' or 'timm', got 'keras'"):
        register("keras")


class Reporter(transformers.TrainerCallback):
    """Records the logs that reporters such as TensorBoard's callback receive."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **others):
        self.logs.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_statistics_are_read_only_at_the_steps_that_the_trainer_logs(tmp_path, monkeypatch, strategy):
    from collins.integrations.transformers import log_statistics

    calls, reporter = StatisticsCalls(monkeypatch), Reporter()
    options = {**BY_NAME, "optim_args": BY_NAME["optim_args"] + ",max_grad_norm=0.5"}
    run = trainer(
        tmp_path,
        "name",
        **options,
        max_grad_norm=0,
        logging_steps=3,
        logging_first_step=True,
        logging_strategy=strategy,
        max_steps=-1,
        num_train_epochs=1,
        save_strategy="no",
    )  # of 12 steps
    run.add_callback(reporter)
    log_statistics(run)
    run.train()
    steps = [1, 3, 6, 9, 12] if strategy == "steps" else [1, 12]
    assert calls.read == steps
    assert calls.measured == ([step - 1 for step in steps] if strategy == "steps" else [0, 1])
    reported = [(step, logs) for step, logs in reporter.logs if "loss" in logs]
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert [step for step, _ in reported] == [entry["step"] for entry in history] == steps
    for logs in (*(logs for _, logs in reported), *history):
        assert logs["collins/grad_norm"] > 0.5
        assert (logs["collins/update_rms/0"] > 0) == (logs["learning_rate"] > 0)
        assert all(type(value) is float for name, value in logs.items() if name.startswith("collins/"))


def test_a_norm_that_is_not_computed_is_not_logged(tmp_path):
    from collins.integrations.transformers import log_statistics

    run = trainer(tmp_path, "name", max_steps=2, save_strategy="no")
    log_statistics(run)
    run.train()
    assert "collins/grad_norm" not in run.state.log_history[0]
    assert "collins/weight_rms/1" in run.state.log_history[0]


def test_other_optimizers_have_no_statistics_to_log(tmp_path):
    from collins.integrations.transformers import log_statistics

    run = trainer(tmp_path, "name", optim="adamw_torch", optim_args=None, save_strategy="no", max_steps=2)
    log_statistics(run)
    run.train()
    assert type(run.optimizer.optimizer) is torch.optim.AdamW
    assert not [name for entry in run.state.log_history for name in entry if name.startswith("collins/")]


# axolotl 0.19.0: integrations/base.py, `load_plugin` and `PluginManager`; cli/config.py, `prepare_plugins`;
# core/builders/base.py, `_configure_optimizer`, lines 466 to 480.


def test_axolotl_loads_the_plugin_and_names_the_optimizer(stand_in, tmp_path):
    stand_in("axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {"__init__": lambda self: None}))
    cfg = {
        "plugins": ["collins.integrations.axolotl.CollinsPlugin"],
        "optimizer": NAME,
        "optim_args": {"compress_ratio": 16, "min_K": 16, "table_dtype": "bfloat16", "memory": "host"},
    }
    plugins = [component(name)() for name in cfg["plugins"]]
    for plugin in plugins:
        plugin.register(cfg)
    options = ",".join(f"{key}={value}" for key, value in cfg["optim_args"].items())
    run = trainer(tmp_path, "name", optim=cfg["optimizer"], optim_args=options)
    for plugin in plugins:
        plugin.post_trainer_create(cfg, run)
    opt = run.create_optimizer()
    assert type(opt) is Collins
    assert opt.memory.tier == "host"
    assert {group["compress_ratio"] for group in opt.param_groups} == {16}
    first = run.callback_handler.callbacks[0]
    assert type(first) is component("collins.integrations.transformers.StatisticsCallback")
    for plugin in plugins:
        plugin.post_trainer_create({**cfg, "optimizer": "adamw_torch"}, run)
    assert run.callback_handler.callbacks.count(first) == 1
