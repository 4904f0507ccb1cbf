"""The comparison of optimizers: every task and optimizer at a small size, resuming, tables, and messages."""

import dataclasses
import importlib.util
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import EXAMPLES, ROOT, environment, examples
from torch import nn
from torch.nn import functional

from collins import Collins
from collins.rule import DECODES

CPU = torch.device("cpu")
DECODER = ["vocabulary=300", "hidden=16", "layers=1", "heads=2", "ffn=24", "context=8", "batch=4", "held_out=2"]
TINY = {
    "lm-small": DECODER,
    "lm-60m": DECODER,
    "lm-130m": DECODER,
    "finetune": [*DECODER, "pretraining_steps=2"],
    "finetune-small": [*DECODER, "pretraining_steps=2"],
    "digits": ["hidden=16", "layers=1", "heads=2", "batch=8"],
    "recommender": ["users=40", "items=50", "interactions=6", "hidden=8", "batch=16"],
}


@pytest.fixture(scope="module")
def command(load):
    return load("compare_optimizers")


@pytest.fixture(scope="module")
def words():
    generator = random.Random(0)
    return ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(200)]


@pytest.fixture(scope="module")
def text(tmp_path_factory, words):
    """A folder with enough source files and documents for training and validation."""
    generator, folder = random.Random(1), tmp_path_factory.mktemp("text")
    for number in range(120):
        for suffix in (".py", ".md"):
            (folder / f"{number}{suffix}").write_text(" ".join(generator.choices(words, k=120)))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_figures(load, monkeypatch):
    """Drawing figures takes seconds. Tests of figures undo this."""
    monkeypatch.setattr(load("compare.plots"), "missing", lambda: "no figures in this test")


@pytest.fixture
def arguments(text, cache, tmp_path):
    """The arguments of a small comparison."""

    def arguments(task="lm-small", *more, steps=2, settings=()):
        return [
            *("--task", task, "--set", f"steps={steps}", *TINY[task], *settings),
            *("--text", str(text), "--cache", str(cache), "--results", str(tmp_path / "runs.jsonl")),
            *("--gpus", "none", "--processes", "1", *more),
        ]

    return arguments


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", TINY)
def test_each_task_runs(command, arguments, task, tmp_path, capsys):
    if task == "digits":
        pytest.importorskip("sklearn")
    outcome = command.main(arguments(task, "--rates", "1e-3"))
    assert not outcome.failed
    assert not outcome.out_of_time
    results = records(tmp_path / "runs.jsonl")
    assert {record["optimizer"] for record in results} == set(command.TASKS[task].optimizers)
    for record in results:
        assert record["steps"] == [1, 2]
        assert math.isfinite(record["validation_loss"])
        assert record["validation_loss"] == record["validation"][-1]
        assert record["state_bytes"] > 0
        assert record["state_bytes_7b"] > 1e9
        assert record["precision"] == ("bfloat16" if record["optimizer"].endswith("@bf16") else "float32")
    output, table = capsys.readouterr().out, (tmp_path / "runs.md").read_text()
    assert table in output
    for record in results:
        assert f"| {record['optimizer']} |" in table
        assert f"{record['state_bytes']:,}" in table


def test_every_task_and_optimizer_is_trained_in_a_test(command):
    assert command.TASKS.keys() == TINY.keys()


def optimizer_names():
    with examples() as import_example:
        return list(import_example("compare.optimizers").OPTIMIZERS)


@pytest.mark.filterwarnings("ignore:OptimState4bit does not implement _stable_hash_for_caching")  # torchao's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", optimizer_names())
def test_each_optimizer_learns_and_uses_the_computed_number_of_bytes(load, name, dtype):
    optimizers, training = load("compare.optimizers"), load("compare.training")
    spec = optimizers.OPTIMIZERS[name]
    missing = spec.missing(CPU)
    if missing is not None:
        pytest.skip(missing)
    torch.manual_seed(0)
    model = load("llama").Llama(1, 32, 160, 2, 2, 160, checkpointed=False).to(dtype)
    setup = optimizers.Setup(model, spec.unit * 1e-2, 0.99 if spec.has_beta2 else None, 0.1, clip=1.0)
    opts = spec.make(setup)
    train_step = spec.drive(model, opts, 1.0)
    tokens = torch.randint(160, (4, 9))

    def loss():
        logits = model.head(model.features(tokens[:, :-1])).float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    losses = [train_step([loss]).item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    assert train_step.times.median() > 0
    state_bytes = training.state_bytes(opts)
    if spec.computed is not None:
        # Collins has its counters in one tensor.
        assert 0 <= state_bytes - spec.computed(setup) <= 512
    parameters = sum(p.numel() for p in model.parameters())
    bound = 12 if name == "adamw-masters" else 8  # bytes per parameter: two fp32 moments, and an fp32 copy
    assert state_bytes <= bound * parameters + 16 * len(list(model.parameters()))


def test_master_weights_step_as_fp32_weights_that_get_the_gradients_of_bf16(load):
    torch.manual_seed(0)
    weights, gradients = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(3, 8, 16, dtype=torch.bfloat16)
    p, reference = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.float())
    masters = load("compare.peers").MasterWeights([p], lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1)
    adamw = torch.optim.AdamW([reference], lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for g in gradients:
        p.grad, reference.grad = g, g.float()
        masters.step()
        adamw.step()
        assert torch.equal(p, reference.bfloat16())
        assert torch.equal(masters.state[p]["master"], reference)


def test_all_optimizers_are_swept_over_the_same_rates(load, command):
    schedule, choice = load("compare.schedule"), load("compare.optimizers").Choice.of
    task = command.TASKS["lm-60m"]
    names = ("adamw", "collins", "muon", "scale", "collins@bf16")
    runs = schedule.grid(task, [choice(name) for name in names], [0, 1], data="", device="cuda", rates={})
    points = {name: {(run.lr, run.beta2) for run in runs if run.choice.name == name} for name in names}
    assert points["adamw"] == points["collins"] == points["muon"] == points["collins@bf16"]
    assert {lr for lr, _ in points["scale"]} == set(task.rates)
    assert {beta2 for _, beta2 in points["adamw"]} == {0.95, 0.99, 0.999}
    assert {beta2 for _, beta2 in points["scale"]} == {None}
    assert len({run.key for run in runs}) == len(runs) == 2 * (4 * 15 + 5)
    rates = {"adamw": [3.0], None: [4.0]}
    runs = schedule.grid(task, [choice("adamw")], [0], data="", device="cuda", rates=rates)
    assert {run.lr for run in runs} == {3.0}


def test_a_changed_setting_digest_or_option_is_a_different_run(load, command):
    make_run, choice = load("compare.runs").Run, load("compare.optimizers").Choice.of
    task = command.TASKS["lm-small"]
    base = make_run(task, choice("collins"), 1e-3, 0.999, 0, "data", "cpu")
    others = [
        dataclasses.replace(base, task=task.with_settings({"clip": "2.0"})),
        dataclasses.replace(base, choice=choice("collins:min_K=64")),
        dataclasses.replace(base, choice=choice("collins@bf16")),
        dataclasses.replace(base, lr=2e-3),
        dataclasses.replace(base, beta2=0.99),
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, data="other"),
    ]
    assert len({run.key for run in (base, *others)}) == 8
    assert dataclasses.replace(base).key == base.key


def test_a_changed_default_of_collins_is_a_different_run(load, command, monkeypatch):
    optimizers = load("compare.optimizers")
    run = load("compare.runs").Run(
        command.TASKS["lm-small"], optimizers.Choice.of("collins"), 1e-3, 0.999, 0, "data", "cpu"
    )
    before, spec = run.key, optimizers.OPTIMIZERS["collins"]
    changed_spec = dataclasses.replace(spec, settled=lambda options: {**spec.settled(options), "rehash_period": 12_345})
    monkeypatch.setitem(optimizers.OPTIMIZERS, "collins", changed_spec)
    assert run.key != before


def test_beta1_is_an_option_that_identifies_a_run(load):
    optimizers = load("compare.optimizers")
    run, task = load("compare.runs").Run, load("compare_optimizers").TASKS["lm-small"]
    choices = [optimizers.Choice.of(text) for text in ("collins", "collins:beta1=0.95", "collins:beta1=0.9")]
    assert len({run(task, choice, 1e-3, 0.999, 0, "data", "cpu").key for choice in choices}) == 3
    model = torch.nn.Linear(4, 4)
    for choice, beta1 in zip(choices, (0.9, 0.95, 0.9), strict=True):
        setup = optimizers.Setup(model, 1e-3, 0.99, 0.1, 1.0, options=choice.options)
        (built,) = choice.spec.make(setup)
        assert {group["betas"] for group in built.param_groups} == {(beta1, 0.99)}


def test_the_weight_of_the_residual_identifies_a_run(load, monkeypatch):
    choice = load("compare.optimizers").Choice
    assert choice.of("collins").described()["residual_weight"] == "0.3"
    assert choice.of("collins-orthogonal").described()["residual_weight"] == "0.6"
    weight = choice.of("collins:decode=residual").described()["residual_weight"]
    assert float(weight) == pytest.approx((0.1 / 1.9) ** 0.5)
    assert "residual_weight" not in choice.of("collins:residual_weight=0.8").described()
    monkeypatch.setitem(DECODES, "least_squares", dataclasses.replace(DECODES["least_squares"], rho=0.7))
    assert choice.of("collins").described()["residual_weight"] == "0.7"


def test_a_new_option_of_collins_is_not_a_different_run(command, arguments, tmp_path):
    path, more = tmp_path / "runs.jsonl", ("--optimizers", "collins", "--rates", "1e-3")
    command.main(arguments("lm-small", *more))
    (record,) = records(path)
    before = {**record, "key": "of another version", "options": {**record["options"], "an_old_option": "1"}}
    path.write_text(json.dumps(before) + "\n")
    outcome = command.main(arguments("lm-small", *more))
    assert len(outcome.already_finished) == 1
    assert not outcome.finished
    before["options"]["rehash_period"] = "12345"
    path.write_text(json.dumps(before) + "\n")
    assert len(command.main(arguments("lm-small", *more)).finished) == 1


def without_times(tables, results):
    """The tables of records whose times are set to zero."""
    return tables([{**record, "optimizer_ms": 0.0} for record in results])


def test_a_killed_comparison_is_resumed_with_the_same_table(command, load, arguments, tmp_path, capsys):
    rates = ("--rates", "1e-3", "2e-3", "--optimizers", "adamw", "collins")
    path = tmp_path / "runs.jsonl"
    command.main(arguments("lm-small", *rates, steps=30))
    uninterrupted = records(path)
    path.unlink()

    command_line = [sys.executable, str(EXAMPLES / "compare_optimizers.py"), *arguments("lm-small", *rates, steps=30)]
    process = subprocess.Popen(command_line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None or path.exists(), process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()

    content = path.read_bytes()
    assert content.endswith(b"\n")
    finished = records(path)
    path.write_bytes(content + b'{"key": "cut off')  # what a full disk may leave
    capsys.readouterr()
    outcome = command.main(arguments("lm-small", *rates, steps=30))
    assert path.read_bytes().startswith(content)
    assert len(outcome.already_finished) == len(finished)
    assert len(outcome.finished) == 4 - len(finished)
    results = records(path)
    assert len({record["key"] for record in results}) == len(results) == 4
    assert "removed the last line, which was incomplete (16 bytes)" in capsys.readouterr().out
    tables = load("compare.report").tables
    assert without_times(tables, results) == without_times(tables, uninterrupted)


def test_workers_share_the_runs_and_a_killed_worker_is_replaced(command, load, arguments, tmp_path, monkeypatch):
    worker, begin, killed = load("compare.workers").Worker, load("compare.workers").Worker.begin, []

    def begin_and_kill_the_first(self, job, deadline):
        begin(self, job, deadline)
        if not killed:
            killed.append(job.title)
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(worker, "begin", begin_and_kill_the_first)
    rates = ("--rates", "1e-3", "2e-3", "4e-3", "--optimizers", "adamw", "--processes", "2")
    outcome = command.main(arguments("lm-small", *rates))
    assert outcome.failed.keys() == set(killed)
    assert "its process ended with exit code -9" in outcome.failed[killed[0]]
    assert len(outcome.finished) == 2
    monkeypatch.undo()
    retry = command.main(arguments("lm-small", *rates, "--processes", "1"))  # what failed is not finished
    assert len(retry.already_finished) == 2
    assert len(retry.finished) == 1
    alone = tmp_path / "alone.jsonl"
    command.main(arguments("lm-small", *rates, "--processes", "1", "--results", str(alone)))
    losses = [{r["lr"]: r["validation"] for r in records(path)} for path in (tmp_path / "runs.jsonl", alone)]
    assert losses[0] == losses[1]


def test_a_failed_run_is_reported_and_the_others_are_run(command, arguments, tmp_path, capsys):
    outcome = command.main(
        arguments("lm-small", "--optimizers", "collins:compress_ratio=0.5", "adamw", "--rates", "1e-3")
    )
    (title,) = outcome.failed
    assert title == "lm-small: collins:compress_ratio=0.5 lr 0.001 beta2 0.999 seed 0"
    output = capsys.readouterr()
    assert f"failed: {title}" in output.err
    assert "compress_ratio must be" in output.err
    assert [record["optimizer"] for record in records(tmp_path / "runs.jsonl")] == ["adamw"]


def test_divergence_is_shown_in_the_table(command, arguments, tmp_path):
    command.main(arguments("lm-small", "--optimizers", "adamw", "--rates", "1e-3", "1e30", steps=4))
    results = {record["lr"]: record for record in records(tmp_path / "runs.jsonl")}
    assert results[1e30]["diverged"]
    assert results[1e30]["validation_loss"] is None
    assert "| adamw | 0.999 | **" in (tmp_path / "runs.md").read_text()
    assert " | diverged |" in (tmp_path / "runs.md").read_text()


@pytest.mark.parametrize("has_record", [False, True], ids=["unknown", "known"])
def test_runs_that_would_exceed_the_time_limit_are_skipped_and_listed(command, arguments, tmp_path, capsys, has_record):
    path, limit = tmp_path / "runs.jsonl", "0"
    if has_record:  # that such a run takes a thousand seconds
        command.main(arguments("lm-small", "--optimizers", "adamw", "--rates", "1e-3"))
        (record,) = records(path)
        path.write_text(json.dumps({**record, "seconds": 1000.0}) + "\n")
        limit = "900"
    before = path.read_bytes() if has_record else None
    outcome = command.main(
        arguments("lm-small", "--optimizers", "adamw", "--rates", "1e-3", "2e-3", "--time-limit", limit)
    )
    out_of_time = [f"lm-small: adamw lr {lr} beta2 0.999 seed 0" for lr in ("0.001", "0.002")][has_record:]
    assert outcome.out_of_time == out_of_time
    assert not outcome.finished
    output = capsys.readouterr().out
    for title in out_of_time:
        assert f"not finished within the time limit: {title}" in output
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_run_is_stopped_at_its_deadline(load, command, arguments, tmp_path):
    workers, messages = load("compare.workers"), []
    callback = workers.ProgressReporter(messages.append, time.time() - 1)
    with pytest.raises(load("compare.training").OutOfTimeError):
        callback(1)
    more = ("--optimizers", "adamw", "--rates", "1e-3", "--time-limit", "3")
    outcome = command.main(arguments("lm-small", *more, steps=1_000_000))
    assert outcome.out_of_time == ["lm-small: adamw lr 0.001 beta2 0.999 seed 0"]
    assert not (tmp_path / "runs.jsonl").exists()


def test_pretraining_is_run_once_and_not_for_finished_runs(command, arguments, capsys):
    more = ("--optimizers", "adamw", "--rates", "1e-3")
    command.main(arguments("finetune-small", *more, settings=["pretraining_rate=3e-3"]))
    assert "finetune-small: pretraining on code: finished" in capsys.readouterr().out
    outcome = command.main(arguments("finetune-small", *more, "--seeds", "0", "1", settings=["pretraining_rate=3e-3"]))
    assert len(outcome.already_finished) == len(outcome.finished) == 1
    assert "pretraining on code" not in capsys.readouterr().out


def test_runs_whose_pretraining_failed_are_reported(command, load, arguments, monkeypatch):
    def pretrain(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(load("compare.language").Finetune, "pretrain", pretrain)
    more = ("--optimizers", "adamw", "--rates", "1e-3", "--seeds", "0", "1")
    outcome = command.main(arguments("finetune-small", *more, settings=["pretraining_rate=5e-3"]))
    assert list(outcome.failed) == [
        "finetune-small: pretraining on code",
        "finetune-small: adamw lr 0.001 beta2 0.999 seed 0",
        "finetune-small: adamw lr 0.001 beta2 0.999 seed 1",
    ]


def record_of(optimizer, lr, seed, loss, **more):
    record = {
        "task": "lm-small",
        "optimizer": optimizer,
        "lr": lr,
        "beta2": 0.999,
        "seed": seed,
        "settings": {"steps": 300, "batch": 16},
        "data": "0123456789ab",
        "precision": "float32",
        "options": {},
        "validation_loss": loss,
        "diverged": loss is None,
        "steps": [150, 300],
        "validation": [5.0, loss],
        "parameters": 1_000_000,
        "weight_bytes": 4_000_000,
        "state_bytes": 8_000_000,
        "state_bytes_7b": 53_910_000_000,
        "optimizer_ms": 1.5,
        "seconds": 10.0,
    }
    return {**record, **more}


RECORDS = [
    record_of("adamw", 1e-3, 0, 4.163),
    record_of("adamw", 2e-3, 0, 3.9081),
    record_of("adamw", 2e-3, 1, 3.9301),
    record_of("adamw", 4e-3, 0, 3.90),  # the least, but of one seed
    record_of("adamw", 2e-3, 0, 4.05, beta2=0.95),
    record_of("collins", 4e-3, 0, 3.75, state_bytes=250_000, state_bytes_7b=1_690_000_000, optimizer_ms=20.0),
    record_of("collins", 8e-3, 0, 3.69, state_bytes=250_000, state_bytes_7b=1_690_000_000, optimizer_ms=20.25),
    record_of("collins", 1.6e-2, 0, None, state_bytes=250_000),
    record_of("scale", 1e-3, 0, None, beta2=None, state_bytes=80_000, state_bytes_7b=None),
    record_of("adamw", 1e-3, 0, 2.0, task="digits", data="", settings={"steps": 600}),
    record_of("collins", 8e-3, 0, 1.0, options={"rehash_period": "100"}),
    record_of("collins", 8e-3, 0, 3.69, state_bytes=250_000, state_bytes_7b=1_690_000_000, optimizer_ms=20.25),
    record_of("adamw", 1e-3, 0, 4.1625),  # run again: the later one counts
]

TABLES = """\
## lm-small (steps 300, batch 16; data 0123456789ab)

| optimizer | beta2 | lr | seeds | validation loss | standard deviation | minus adamw | state bytes | per parameter | for a 7B LLaMA | weights, bytes per parameter | ms per optimizer step |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| collins | 0.999 | 0.008 | 1 | 3.690 |  | -0.229 | 250,000 | 0.25 | 1.69 GB | 4.00 | 20.2 |
| adamw | 0.999 | 0.002 | 2 | 3.919 | 0.016 | +0.000 | 8,000,000 | 8.00 | 53.91 GB | 4.00 | 1.5 |
| scale |  | 0.001 | 1 | diverged |  |  | 80,000 | 0.08 |  | 4.00 | 1.5 |

| optimizer | beta2 | 0.001 | 0.002 | 0.004 | 0.008 | 0.016 |
| --- | --- | --- | --- | --- | --- | --- |
| adamw | 0.95 |  | 4.050 |  |  |  |
| adamw | 0.999 | 4.162 | **3.919** | 3.900 |  |  |
| collins | 0.999 |  |  | 3.750 | **3.690** | diverged |
| scale |  | **diverged** |  |  |  |  |

Not shown, since their options or precision differ from those of the last run: 1 runs.

## digits (steps 600)

| optimizer | beta2 | lr | seeds | validation loss | standard deviation | minus adamw | state bytes | per parameter | for a 7B LLaMA | weights, bytes per parameter | ms per optimizer step |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| adamw | 0.999 | 0.001 | 1 | 2.000 |  | +0.000 | 8,000,000 | 8.00 | 53.91 GB | 4.00 | 1.5 |

| optimizer | beta2 | 0.001 |
| --- | --- | --- |
| adamw | 0.999 | **2.000** |
"""  # noqa: E501


def test_the_tables_and_figures_of_a_results_file(command, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    path = tmp_path / "fixed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    command.main(["--report", "--results", str(path)])
    assert path.with_suffix(".md").read_text() == TABLES
    assert TABLES in capsys.readouterr().out
    for task in ("lm-small", "digits"):
        assert (tmp_path / f"fixed-{task}.png").read_bytes().startswith(b"\x89PNG")
    assert len(records(path)) == len(RECORDS)


def test_a_figure_of_many_optimizers_has_the_best_options_of_each(load):
    names = ["adamw", "collins", "collins:min_K=1", "collins@bf16", "collins:min_K=1@bf16", "collins:min_K=2", "muon"]
    losses = [3.0, 2.0, 1.0, 2.0, 2.5, 4.0, 5.0]
    report = load("compare.report")
    pairs = zip(names, losses, strict=True)
    cells = tuple(report.Cell(name, None, 1e-3, ({"validation_loss": loss},)) for name, loss in pairs)
    group = report.Group("lm-small", {}, "", cells)
    shown = load("compare.plots").drawn
    assert shown(group) == ["adamw", "collins:min_K=1", "collins@bf16", "muon"]
    assert shown(dataclasses.replace(group, cells=cells[:6])) == names[:6]


def test_without_matplotlib_there_are_tables_and_a_note(command, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    path = tmp_path / "fixed.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n")
    hide(monkeypatch, "matplotlib")
    command.main(["--report", "--results", str(path)])
    assert "no figures: matplotlib is not installed (pip install matplotlib)" in capsys.readouterr().out
    assert path.with_suffix(".md").exists()
    assert not list(tmp_path.glob("*.png"))


def hide(monkeypatch, *names):
    """Makes importing these packages fail as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def test_an_optimizer_that_is_not_installed_is_reported_and_skipped(command, arguments, capsys, monkeypatch):
    hide(monkeypatch, "torchao", "apollo_torch", "bitsandbytes")
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    outcome = command.main(
        arguments(
            "lm-small",
            "--optimizers",
            "muon",
            "torchao-4bit",
            "apollo-mini",
            "bitsandbytes-8bit",
            "adamw",
            "--rates",
            "1e-3",
        )
    )
    assert [record["optimizer"] for record in outcome.finished] == ["adamw"]
    output = capsys.readouterr().out
    for line in (
        f"lm-small: muon is left out: torch {torch.__version__} has no torch.optim.Muon",
        "lm-small: torchao-4bit is left out: torchao is not installed: pip install torchao",
        "lm-small: apollo-mini is left out: apollo_torch and bitsandbytes are not installed: pip install apollo_torch"
        " bitsandbytes",
        "lm-small: bitsandbytes-8bit is left out: bitsandbytes is not installed: pip install bitsandbytes",
    ):
        assert line in output


@pytest.mark.parametrize(
    ("task", "package", "message"),
    [
        ("digits", "sklearn", "digits needs scikit-learn, which contains the images: pip install scikit-learn"),
        ("lm-small", "tokenizers", "language tasks need the package `tokenizers`: pip install tokenizers"),
    ],
)
def test_a_task_names_a_missing_package(command, arguments, monkeypatch, tmp_path, task, package, message):
    hide(monkeypatch, package)
    with pytest.raises(SystemExit, match=message):
        command.main(arguments(task, "--cache", str(tmp_path / "new")))


def test_too_little_text_is_rejected(command, arguments, tmp_path):
    with pytest.raises(SystemExit, match=r"too few files of code \(\.py, \.pyi\) for training and validation in "):
        command.main(arguments("lm-small", "--text", str(tmp_path), "--cache", str(tmp_path / "new")))
    with pytest.raises(SystemExit, match="are too few for windows of 100000 tokens; pass folders with more text"):
        command.main(arguments("lm-small", settings=["context=100000"]))


@pytest.mark.parametrize(
    ("bad_arguments", "message"),
    [
        (["--task", "imagenet"], "argument --task: invalid choice: 'imagenet'"),
        (["--optimizers", "sgd"], "argument --optimizers: 'sgd' is not an optimizer: choose from adamw, collins"),
        (["--optimizers", "adamw@fp8"], "argument --optimizers: the dtype after @ must be bf16"),
        (["--optimizers", "adamw:rank=1"], "OPTION=VALUE with an option of adamw (accepted: eps), got 'rank=1'"),
        (["--optimizers", "collins:seed=1"], "must be OPTION=VALUE with an option of collins (accepted: "),
        (["--rates", "fast"], "argument --rates: must be a positive finite number, or NAME=NUMBER, got 'fast'"),
        (["--rates", "-1"], "argument --rates"),
        (["--rates", "inf"], "argument --rates: must be a positive finite number"),
        (["--rates", "muon=1e-3"], "NAME must be an optimizer that is compared (adamw, collins), got 'muon=1e-3'"),
        (["--beta2", "1.0"], "argument --beta2: must be at least 0 and less than 1, got 1.0"),
        (["--seeds", "one"], "argument --seeds: invalid int value: 'one'"),
        (["--set", "steps"], "argument --set: must be NAME=VALUE, got 'steps'"),
        (["--set", "rank=1"], "argument --set: lm-small has no setting 'rank', only steps, batch"),
        (["--set", "steps=2.5"], "argument --set: steps of lm-small must be a whole number, got '2.5'"),
        (["--set", "steps=0"], "argument --set: steps must be at least 1, got 0"),
        (["--set", "clip=0.0"], "argument --set: clip must be above 0, got 0.0"),
        (["--set", "weight_decay=inf"], "argument --set: weight_decay must be at least 0, got inf"),
        (["--set", "warmup=2"], "argument --set: warmup must be 0 to 1, got 2.0"),
        (["--set", "heads=5"], "argument --set: hidden must be a multiple of twice heads, got 96 and 5"),
        (["--set", "vocabulary=100"], "vocabulary must be 257 (all bytes and the end of a text) to 65536, got 100"),
        (["--set", "accumulate=3"], "argument --set: batch must be a multiple of accumulate, got 16 and 3"),
        (["--gpus", "tpu"], "argument --gpus: must be all, none or numbers of GPUs"),
        (["--gpus", "99"], "argument --gpus: must be all, none or numbers of GPUs"),
        (["--processes", "0"], "argument --processes: must be at least 1, got 0"),
        (["--time-limit", "-1"], "argument --time-limit: must be at least 0, got -1"),
        (["--text", "nowhere"], "argument --text: must be a folder, got nowhere"),
        (["--results", str(ROOT / "pyproject.toml")], "line 1: not JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_are_rejected_by_name(command, capsys, bad_arguments, message):
    with pytest.raises(SystemExit):
        command.main(bad_arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_of_another_kind_is_not_appended_to(command, arguments, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(SystemExit):
        command.main(arguments("lm-small", "--results", str(path)))
    assert "line 1: not the record of a run" in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == '{"a": 1}\n'


def test_the_list_names_every_task_and_optimizer(command, load, capsys):
    command.main(["--list"])
    output = capsys.readouterr().out
    for name in (*command.TASKS, *load("compare.optimizers").OPTIMIZERS):
        assert f"\n  {name}: " in output


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_is_shown_on_a_terminal_only(command, arguments, monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    output = []
    for number, stream in enumerate((io.StringIO(), Terminal())):
        monkeypatch.setattr(sys, "stderr", stream)
        command.main(
            arguments(
                "lm-small", "--optimizers", "adamw", "--rates", "1e-3", "--results", str(tmp_path / f"{number}.jsonl")
            )
        )
        output.append(stream.getvalue())
    assert output[0] == ""
    assert "2/2" in output[1]
    assert "step" in output[1]


def test_it_runs_without_tqdm(command, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    outcome = command.main(arguments("lm-small", "--optimizers", "adamw", "--rates", "1e-3"))
    assert len(outcome.finished) == 1
    output = capsys.readouterr()
    assert "lm-small: adamw lr 0.001 beta2 0.999 seed 0: " in output.out
    assert output.err == ""


def test_text_is_identified_by_content_and_not_by_path(load, text, tmp_path, cache):
    corpus = load("compare.text").Corpus
    copy = tmp_path / "moved"
    (copy / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted(text.iterdir())):
        for folder in (copy, copy / "deep"):  # each content twice
            (folder / f"other{number}{path.suffix}").write_bytes(path.read_bytes())
    (copy / "short.py").write_text("x = 1\n")
    (copy / "data.py").write_text("0123456789" * 100)
    (copy / "latin.py").write_bytes("é ".encode("latin-1") * 400)
    first, second = (corpus(300, (root,), (root,)).tokens(cache) for root in (text, copy))
    assert first.folder != second.folder
    assert first.digests == second.digests
    assert first.digest() == second.digest()
    assert first.kinds == ("code", "prose")
    held_out, train = (first.load(part, ("code",), CPU) for part in ("valid", "train"))
    assert 0 < len(held_out) < len(train) / 5
    assert train.max() < 300
    assert (train == 0).sum() + (held_out == 0).sum() == 120  # the end of each text


def test_text_for_finetuning_is_prose_that_is_not_in_the_code(load, tmp_path, cache, words):
    text_module, generator = load("compare.text"), random.Random(2)

    def sentence(count):
        return " ".join(generator.choices(words, k=count))

    corpus = text_module.Corpus(300, (tmp_path,), (tmp_path,), disjoint=True)
    docstring_sources = 0
    for number in range(200):
        docstring = sentence(80)
        path = tmp_path / f"{number}.py"
        function = f'def f():\n    """Short."""\n    return """\n      {docstring}\n      """'
        path.write_text(f'"""{docstring}"""\nx = {number}\n\n{function}')
        file = text_module.File(path, bytes([number % 256] * 32), path.read_text())
        code, prose = corpus._code(file), corpus._prose(file)
        docstring_sources += file.is_docstring_source
        assert (code, prose) == (("", f"{docstring}\n\n{docstring}") if file.is_docstring_source else (file.text, ""))
    assert 0 < docstring_sources < 100
    (tmp_path / "METADATA").write_text(f"Name: collins\nRequires: torch\n\n{sentence(100)}")
    (tmp_path / "data.txt").write_text(" ".join(map(str, range(500))))
    files = {path.name: text_module.File(path, bytes(32), path.read_text()) for path in tmp_path.iterdir()}
    assert corpus._prose(files["METADATA"]) == files["METADATA"].text.split("\n\n", 1)[1]
    assert corpus._prose(files["data.txt"]) == ""
    tokens = corpus.tokens(cache)
    assert tokens.kinds == ("code", "prose")
    assert min(tokens.count(part, kind) for part in ("train", "valid") for kind in tokens.kinds) > 0


def test_tokens_are_cached(load, text, cache, monkeypatch):
    text_module = load("compare.text")
    corpus = text_module.Corpus(310, (text,))
    tokens = corpus.tokens(cache)
    assert tokens.kinds == ("code",)
    monkeypatch.setattr(text_module, "_texts", None)
    assert corpus.tokens(cache) == tokens


def test_an_interrupted_tokenization_leaves_no_files(load, text, tmp_path, monkeypatch):
    text_module = load("compare.text")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_module, "_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text_module.Corpus(300, (text,)).tokens(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_installed_text_includes_the_standard_library_and_the_packages_of_this_interpreter(load):
    roots = load("compare.text").installed_folders()
    assert any((root / "torch").is_dir() for root in roots)
    assert any((root / "dataclasses.py").is_file() for root in roots)


def test_the_loss_in_chunks_equals_cross_entropy(load):
    language = load("compare.language")
    generator = torch.Generator().manual_seed(0)
    features, head = (torch.randn(rows, 16, generator=generator) for rows in (300, 50))
    targets = torch.randint(50, (300,), generator=generator)
    results = []
    for loss in (language.head_loss, language.HeadLoss.apply):
        leaves = [t.clone().requires_grad_() for t in (features, 20 * head)]  # most probabilities underflow
        value = loss(*leaves, targets)
        (3 * value).backward()
        results.append((value, *(leaf.grad for leaf in leaves)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_scale_follows_its_formulas(load):
    scale = load("compare.peers").Scale
    w, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    rms = {1: torch.tensor([[12.5**0.5], [2**0.5]]), 0: torch.tensor([[4.5**0.5, 10**0.5]])}
    for inputs in (0, 1):
        p = nn.Parameter(w.clone())
        opt = scale([{"params": [p], "inputs": inputs}], lr=0.1, weight_decay=0.5)
        p.grad = g.clone()
        opt.step()
        torch.testing.assert_close(p.detach(), 0.95 * w - 0.1 * g / rms[inputs])
        assert not opt.state[p]
    p = nn.Parameter(w.clone())
    opt = scale([{"params": [p], "momentum": 0.9}], lr=0.1)
    for _ in range(2):
        p.grad = g.clone()
        opt.step()
    torch.testing.assert_close(opt.state[p]["momentum"], 0.19 * g)
    torch.testing.assert_close(p.detach(), w - 0.2 * g / rms[1])  # the scale of a momentum cancels


def test_the_rate_has_a_linear_warmup_and_a_cosine_decay(load):
    settings = load("compare.tasks").Settings(steps=110, batch=1, warmup=10 / 110, final=0.1)
    rates = [load("compare.training").rate_at(step, settings) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_an_optimizer_may_step_in_backward(load):
    training = load("compare.training")
    results, x = [], torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        opt = Collins(model, lr=1e-2, min_K=16, in_backward=in_backward)
        train_step = (training.InBackward if in_backward else training.AfterBackward)(model, [opt], math.inf)
        for _ in range(3):
            train_step([lambda model=model: model(x).square().mean()])
        assert all(p.grad is None for p in model.parameters())
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_a_run_in_backward_takes_partial_steps(command, load, arguments, tmp_path, monkeypatch):
    calls, optimizers = [], load("compare.optimizers")
    monkeypatch.setattr(
        optimizers, "Collins", lambda *args, **options: calls.append(options) or Collins(*args, **options)
    )
    path = tmp_path / "results.jsonl"
    more = ("--optimizers", "collins-in-backward", "--rates", "1e-3", "--results", str(path))
    command.main(arguments("lm-small", *more, steps=2, settings=["accumulate=2"]))
    assert calls[0]["accumulation_steps"] == 2
    assert records(path)[0]["validation_loss"] is not None


def test_accumulated_steps_equal_those_of_the_whole_batch(command, arguments, tmp_path):
    losses = []
    for parts in (1, 2):
        path = tmp_path / f"{parts}.jsonl"
        more = ("--optimizers", "adamw", "--rates", "1e-3", "--results", str(path))
        command.main(arguments("lm-small", *more, steps=5, settings=[f"accumulate={parts}"]))
        losses.append(records(path)[0]["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_state_bytes_finds_nested_tensors_and_counts_storages_once(load):
    class Projector:
        def __init__(self):
            self.matrix, self.state = torch.zeros(10), self  # which refers to itself

    p = nn.Parameter(torch.zeros(4))
    opt = torch.optim.SGD([p], lr=1.0)
    shared = torch.zeros(100)
    opt.state[p] = {"a": shared[:50], "b": shared[50:], "c": [torch.zeros(3), {"d": torch.zeros(2)}], "e": Projector()}
    assert load("compare.training").state_bytes([opt]) == 4 * (100 + 3 + 2 + 10)


def test_interactions_follow_zipf_and_can_be_learned(load, command):
    recommender = load("compare.recommender")
    settings = command.TASKS["recommender"].with_settings({"users": "500", "items": "500"}).settings
    train, held_out, lowest_loss = recommender.interactions(settings)
    assert len(train) == 500 * (settings.interactions - settings.held_out)
    assert len(held_out) == 500 * settings.held_out
    counts = torch.bincount(train[:, 2], minlength=500).float()
    assert counts[:50].sum() > 5 * counts[-50:].sum()
    popular = (counts + 1) / (counts + 1).sum()
    assert lowest_loss < -popular[held_out[:, 2]].log().mean() - 0.1
    repeated = recommender.interactions.__wrapped__(settings)
    assert torch.equal(repeated[0], train)


def test_digits_are_shifted_by_at_most_one_pixel(load):
    pytest.importorskip("sklearn")
    digits = load("compare.digits")
    batch = torch.zeros(2, 65, dtype=torch.long)
    batch[:, 9 * 3] = 7
    batch[:, -1] = 4
    shifted = digits._shifted(batch, torch.tensor([[[1], [1]], [[0], [2]]]))
    assert torch.equal(shifted[0], batch[0])
    assert shifted[1, :-1].view(8, 8)[4, 2] == 7
    assert shifted[1, :-1].sum() == 7
    assert shifted[1, -1] == 4
