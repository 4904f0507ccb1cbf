"""The examples run, at a small size."""

import json
import random
import re

import pytest
import torch
from helpers import Allocations
from torch.nn import functional

TINY_CARD = [
    *("7b", "--device", "cpu", "--no-compile", "--layers", "2", "--hidden", "64", "--ffn", "176", "--heads", "4"),
    *("--kv-heads", "2", "--vocab", "256", "--seq-len", "32", "--batch-size", "8", "--lr", "1e-2"),
]
CODES = ["own", "transformers"]


@pytest.fixture
def train_lm(load):
    return load("train_lm")


@pytest.fixture
def one_card(load):
    return load("measure_one_card")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with enough source files for training and validation, and a cache folder."""
    generator, folder = random.Random(0), tmp_path_factory.mktemp("sources")
    words = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(50)]
    for number in range(100):
        for suffix in (".py", ".md"):
            (folder / f"{number}{suffix}").write_text(" ".join(generator.choices(words, k=200)))
    return ["--text", str(folder), "--cache", str(tmp_path_factory.mktemp("cache"))]


SMALL = ["vocabulary=400", "hidden=64", "layers=1", "heads=2", "ffn=96", "context=16", "batch=4", "held_out=4"]


@pytest.fixture
def small(sources, monkeypatch, train_lm):
    """Arguments of a small training, in this process."""
    monkeypatch.setattr(train_lm, "cpus", lambda *_: [torch.device("cpu")])

    def arguments(steps, *more):
        return [*sources, "--set", *SMALL, f"steps={steps}", *more]

    return arguments


def test_the_clock_waits_for_the_current_stream_only(load, monkeypatch):
    """Copies back to the host go on under the next forward."""
    waited = []

    class Current:
        def synchronize(self):
            waited.append("current")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append("all"))
    clock = load("corpus").clock
    assert 0 <= clock(torch.device("cpu")) <= clock(torch.device("cuda"))
    assert waited == ["current"]


def test_train_lm_compares_the_optimizers(train_lm, small, tmp_path, capsys):
    picture = tmp_path / "loss.png"
    optimizers = ("--optimizers", "adamw", "collins", "collins-published")
    records = train_lm.main(small(60, *optimizers, "--rates", "1e-2", "collins=2e-2", "--out", str(picture)))
    assert [(r["optimizer"], r["lr"]) for r in records] == [
        ("adamw", 1e-2),
        ("collins", 2e-2),
        ("collins-published", 1e-2),
    ]
    for record in records:
        assert record["steps"][-1] == 60
        assert record["validation"][-1] < record["validation"][0] < 6.1  # nats; a uniform guess has 5.99
    assert records[1]["state_bytes"] < records[0]["state_bytes"] / 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    output, errors = capsys.readouterr()
    assert errors == ""  # no progress bar without a terminal
    for record in records:
        assert f"{record['state_bytes']:,}" in output
        assert f"{record['validation_loss']:.3f}" in output


def test_train_lm_sweeps_both_optimizers_at_as_many_rates(train_lm, small, tmp_path):
    records = train_lm.main(small(1, "--out", str(tmp_path / "loss.png")))
    rates = {name: [r["lr"] for r in records if r["optimizer"] == name] for name in ("adamw", "collins")}
    assert rates == {"adamw": [1e-3, 2e-3, 4e-3], "collins": [2e-3, 4e-3, 8e-3]}
    assert train_lm.LM_SMALL.settings.vocabulary == 8192
    assert train_lm.LM_SMALL.settings.steps == 300


def test_train_lm_is_repeatable_and_accepts_a_subset_of_optimizers(train_lm, small, tmp_path):
    arguments = small(5, "--optimizers", "collins", "--rates", "1e-2", "--out", str(tmp_path / "loss.png"))
    (first,), (second,) = train_lm.main(arguments), train_lm.main(arguments)
    assert first["validation"] == second["validation"]


@pytest.mark.parametrize(
    ("bad_arguments", "message"),
    [
        (["--set", "hidden=65"], "hidden must be a multiple of twice heads, got 65 and 3"),
        (["--rates", "sgd=1"], "NAME must be an optimizer that is compared (adamw, collins), got 'sgd=1'"),
        (["--optimizers", "sgd"], "'sgd' is not an optimizer"),
        (["--rates", "fast"], "must be a positive finite number, or NAME=NUMBER, got 'fast'"),
        (["--memory", "disk"], "argument --memory: memory must be"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--text", "nowhere"], "must be a folder, got nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_lm_rejects_invalid_arguments(train_lm, bad_arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_lm.main(bad_arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_train_lm_accepts_a_policy_file_with_the_same_result(train_lm, small, tmp_path, capsys):
    policy = tmp_path / "policy.toml"
    policy.write_text('[collins.memory]\ntier = "host"\ntransfer_size = "8KiB"\n')
    arguments = small(5, "--optimizers", "collins", "--rates", "1e-2", "--out", str(tmp_path / "loss.png"))
    (resident_run,), (host_run,) = train_lm.main(arguments), train_lm.main([*arguments, "--memory", str(policy)])
    assert host_run["validation"] == resident_run["validation"]
    assert host_run["optimizer"] == resident_run["optimizer"] == "collins"
    assert resident_run["placement"] == []
    (plan,) = host_run["placement"]
    assert "host" in plan
    assert f"collins, lr 0.01: placement of its tables\n{plan}" in capsys.readouterr().out


@pytest.mark.parametrize(("tier", "code"), [("host", "own"), ("auto", "own"), ("host", "transformers")])
def test_one_card_learns_and_reports(one_card, tier, code, capsys):
    if code == "transformers":
        pytest.importorskip("transformers")
    run = one_card.main([*TINY_CARD, "--code", code, "--policy", tier, "--steps", "10"])
    assert run.losses[0] == pytest.approx(5.545, abs=0.3)  # nats; a uniform guess
    assert run.losses[-1] < run.losses[0] - 1
    assert len(run.steps) == len(run.passes) == 10
    assert run.added > 0
    assert run.pinned == 0  # nothing is, on the CPU
    output, errors = capsys.readouterr()
    assert errors == ""  # no progress bar without a terminal
    (outcome,) = run.trial.outcomes()
    assert outcome.plan.summary().splitlines()[-1] in output
    assert output.index("staging ring") < output.index("tokens/s")
    assert f"{run.losses[-1]:.3f}" in output
    (placement,) = run.placement
    placement, planned_shapes = ([(r.shape, r.bytes, r.tier) for r in plan.rows] for plan in (placement, outcome.plan))
    assert placement == planned_shapes
    report = json.loads(output.splitlines()[-1])
    assert report["losses"] == run.losses
    assert report["tokens_per_s"] == pytest.approx(8 * 32 / report["step_s"])
    assert report["optimizer_adds"] == pytest.approx(report["step_s"] / report["forward_backward_s"] - 1)
    assert report["parameters"] == run.trial.model.count
    assert report["plan"]["tables"] == report["tables_on_device"] + report["tables_on_host"]
    adamw, *_, on_host = report["plan"]["alternatives"]
    assert adamw["device"] - on_host["device"] > 4 * report["parameters"]
    assert ("llama.py" in report["code"]) == (code == "own")


def test_one_card_applies_its_policy_file(one_card, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('[collins.memory]\ntier = "host"\nstaging_slots = 2\ntransfer_size = "32KiB"\n')
    run = one_card.main([*TINY_CARD, "--code", "own", "--steps", "1", "--policy", str(policy)])
    assert run.added is None
    assert run.placement[0].policy == one_card.MemoryPolicy.of(policy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile's own look at its inputs
def test_one_card_has_the_same_losses_with_compiled_layers(one_card):
    compiling = [argument for argument in TINY_CARD if argument != "--no-compile"]
    eager, compiled = (
        one_card.main([*arguments, "--code", "own", "--policy", "host", "--steps", "3"]).losses
        for arguments in (TINY_CARD, compiling)
    )
    assert compiled == pytest.approx(eager, rel=1e-2)  # in bfloat16
    assert compiled[-1] < compiled[0]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("7b", 6_738_415_616),
        ("8b", 8_030_261_248),
        ("13b", 13_015_864_320),
        ("70b", 70_553_706_496),
        ("70b --vocab 32000", 68_976_648_192),
    ],
)
def test_one_card_has_the_real_shapes(load, one_card, name, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = one_card.parse(name.split())
    shape = args.shape
    with torch.device("meta"):
        model = load("llama").Llama(shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.vocab)
    assert sum(p.numel() for p in model.parameters()) == count
    planned_shapes = one_card.shapes_of(args)
    assert [tuple(p.shape) for p in model.parameters()] == planned_shapes.shapes
    assert args.policy.tier == ("host" if "70b" in name else "auto")


@pytest.mark.parametrize("code", CODES)
def test_one_card_accepts_a_configuration(one_card, code, tmp_path, capsys):
    if code == "transformers":
        pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **sizes, **heads}))
    arguments = ["--code", code, "--device", "cpu", "--no-compile", "--seq-len", "16", "--steps", "2"]
    one_card.main([str(tmp_path), *arguments])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parameters"] == 63_680


def test_the_chunked_loss_equals_cross_entropy(load):
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (13, 40))
    targets = torch.randint(40, (13,), generator=generator)
    results = []
    for chunked in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, head)]
        if chunked:
            loss = load("chunked_loss").chunked_loss(*leaves, targets, 5)
        else:
            loss = functional.cross_entropy(leaves[0] @ leaves[1].T, targets)
        (3 * loss).backward()
        results.append((loss.double(), *(leaf.grad for leaf in leaves)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_chunked_loss_allocates_one_gradient_of_the_head(load):
    """No tensor is larger than the logits of a chunk, except the gradient of the head, which is not copied."""
    x, head = torch.randn(64, 4).requires_grad_(), torch.randn(1000, 4).requires_grad_()
    targets = torch.zeros(64, dtype=torch.long)
    loss = load("chunked_loss").chunked_loss(x, head, targets, 8)
    with Allocations() as allocations:
        loss.backward()
    assert allocations.shapes.count((1000, 4)) == 1
    assert max(torch.Size(shape).numel() for shape in allocations.shapes) == 8 * 1000


@pytest.mark.parametrize(
    ("bad_arguments", "message"),
    [
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--hidden", "66"], "--hidden must be a multiple of twice --heads, got 66 and 4"),
        (["--kv-heads", "3"], "--heads must be a multiple of --kv-heads, got 4 and 3"),
        (["--vocab", "100"], "--vocab must be at least 256"),
        (["--policy", "disk"], "memory must be"),
        (["--policy", "nowhere.toml"], "not a file"),
        (["--memory-limit", "24 cards"], "must be in one of the units"),
        (["--memory-limit", "24GiB"], "--memory-limit must be of a CUDA device, got --device cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_one_card_rejects_invalid_arguments(one_card, bad_arguments, message, capsys):
    with pytest.raises(SystemExit):
        one_card.main([*TINY_CARD, *bad_arguments])
    assert re.sub(r"\s+", " ", message) in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_one_card_rejects_files_that_are_not_models(one_card, capsys):
    with pytest.raises(SystemExit):
        one_card.main(["7c"])
    assert "model must be one of 7b, 8b, 13b, 14b, 32b, 70b, or a config.json, got '7c'" in capsys.readouterr().err


def test_one_card_reports_insufficient_memory(one_card, load, monkeypatch, capsys):
    monkeypatch.setattr(load("finetuning.forecast"), "host_memory_free", lambda: 10_000)
    with pytest.raises(SystemExit) as exit_info:
        one_card.main([*TINY_CARD, "--policy", "host"])
    assert exit_info.value.code == 1
    assert "out of memory: the weights take 244.6 KiB, and 9.8 KiB are free" in capsys.readouterr().err


@pytest.mark.cuda
def test_one_card_emulates_a_smaller_device(one_card, capsys):
    args = [*TINY_CARD, "--device", "cuda", "--code", "own", "--steps", "2", "--memory-limit", "2GiB"]
    try:
        run = one_card.main(args)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.trial.machine.device_free <= 2 << 30
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["memory_limit"] == 2 << 30
    assert 0 < report["peak_device"] < 2 << 30
    assert report["device"] == torch.cuda.get_device_name()
