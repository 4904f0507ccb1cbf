"""`python -m collins plan`: its arguments, figures and exit status, and its output in offload/README.md."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from collins.offload import DeviceFigures, MemoryPolicy
from collins.offload.cli import main
from collins.offload.models import NAMED, model_of
from collins.offload.shapes import llama

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ROOT / "examples" / "policies"
PLENTY = ["--device-memory", "1000GiB", "--host-memory", "1000GiB"]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 500,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


def row(printed, label):
    """The cells after `label` in the first line that starts with it."""
    (line, *_) = [line for line in printed.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


def config(tmp_path, **keys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    return str(path)


@pytest.fixture
def without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # the import statement raises ImportError then


@pytest.fixture(params=["with transformers", "without transformers"])
def with_and_without(request):
    if request.param == "without transformers":
        request.getfixturevalue("without_transformers")
    else:
        pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("llama-1b", 1_104_218_112),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 68_976_648_192),
        ("7B", 7 * 10**9),
        ("350m", 350 * 10**6),
        ("1.3B", 13 * 10**8),
        ("1234567", 1234567),
        ("1", 1),
    ],
)
def test_models_by_name_and_by_count(name, count, capsys):
    assert model_of(name).count == count
    assert main(["plan", name, *PLENTY]) == 0
    assert f"{count:,} parameters" in capsys.readouterr().out


def test_70b_with_the_larger_vocabulary(capsys):
    assert model_of("llama-70b", 128256).count == 70_553_706_496
    arguments = ["--vocab", "128256", "--device-memory", "139.8GiB", "--host-memory", "64GiB"]
    arguments += ["--policy", str(POLICIES / "70b-on-141gb.toml")]
    assert main(["plan", "llama-70b", *arguments]) == 0
    printed = capsys.readouterr().out
    assert row(printed, "weights") == ["131.42", "GiB"] * 2
    assert row(printed, "gradients") == ["131.42", "GiB", "1.96", "GiB"]
    assert row(printed, "activations: checkpoints") == ["2.50", "GiB"] * 2
    assert row(printed, "tables on the host") == ["-", "13.17", "GiB"]
    assert row(printed, "fits") == ["no", "yes"]
    assert "Placement, in_backward=True" in printed
    assert len(printed.splitlines()) < 50  # equal shapes are grouped


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (LLAMA, llama(3, 64, 160, 64, 500)),
        ({**LLAMA, "num_key_value_heads": 2}, llama(3, 64, 160, 16, 500)),
        ({**LLAMA, "num_key_value_heads": None, "head_dim": None}, llama(3, 64, 160, 64, 500)),
        ({**LLAMA, "num_key_value_heads": 2, "head_dim": 16}, llama(3, 64, 160, 32, 500, query=128)),
        ({**LLAMA, "tie_word_embeddings": True}, llama(3, 64, 160, 64, 500, tied=True)),
        ({**LLAMA, "attention_bias": True}, llama(3, 64, 160, 64, 500, biased=("q", "k", "v", "o"))),
        ({**LLAMA, "mlp_bias": True}, llama(3, 64, 160, 64, 500, biased=("gate", "up", "down"))),
        ({**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}, llama(3, 64, 160, 16, 500)),
        (
            {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
            llama(3, 64, 160, 16, 500, tied=True, biased=("q", "k", "v")),
        ),
        (GPT2, model_of("gpt2")),
        ({**GPT2, "n_inner": None}, model_of("gpt2")),
    ],
)
def test_models_from_a_config(tmp_path, keys, expected, with_and_without):
    assert model_of(config(tmp_path, **keys)) == expected


def test_published_configs_have_the_published_counts(tmp_path):
    qwen = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    mistral = {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    assert model_of(config(tmp_path, **qwen)).count == 494_032_768  # Qwen2 0.5B
    assert model_of(config(tmp_path, **mistral)).count == 7_241_732_096  # Mistral 7B v0.1
    assert model_of(config(tmp_path, **mistral), 32768).count == 7_248_023_552  # v0.3
    assert model_of(config(tmp_path, **{**GPT2, "n_inner": 64})).count < model_of("gpt2").count


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden_size is missing"),
        ({**LLAMA, "model_type": "mistral"}, "num_key_value_heads is missing"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size must be an int of at least 1, got '64'"),
        ({**LLAMA, "vocab_size": None}, "vocab_size must be an int of at least 1, got None"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers must be an int of at least 1, got 0"),
        ({**LLAMA, "tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({**GPT2, "n_inner": True}, "n_inner must be an int of at least 1, got True"),
    ],
)
def test_an_invalid_config_is_rejected_with_file_and_key(tmp_path, keys, message, with_and_without, capsys):
    path = config(tmp_path, **keys)
    assert main(["plan", path, *PLENTY]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: {path}: " in printed.err
    assert message in printed.err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**LLAMA, "model_type": "mixtral"}, "model_type must be one of llama, mistral, qwen2, gpt2, got 'mixtral'"),
        ({}, "got None"),
    ],
)
def test_without_transformers_an_architecture_is_one_of_four(tmp_path, keys, message, without_transformers, capsys):
    path = config(tmp_path, **keys)
    assert main(["plan", path, *PLENTY]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: {path}: {message}" in printed.err or (not keys and message in printed.err)
    assert "with transformers installed any that it knows works" in printed.err


@pytest.mark.parametrize("content", ["{", "[1]", "\udc80"], ids=["cut short", "a list", "not text"])
def test_a_file_that_is_not_a_config(tmp_path, content, capsys):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main(["plan", str(path), *PLENTY]) == 2
    assert f"{path}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama-7b", *PLENTY], "got 'lama-7b'; is it 'llama-7b'?"),
        (["0", *PLENTY], "a parameter count must be in [1, 10^15], got '0'"),
        (["-7B", *PLENTY], "required: model"),
        (["7Q", *PLENTY], "got '7Q'"),
        (["7B", "--vocab", "0", *PLENTY], "must be an int of at least 1, got '0'"),
        (["no/config.json", *PLENTY], "no/config.json: no such file"),
        (["gpt2", "--device-memory", "1.5", "--host-memory", "1GiB"], "--device-memory must be an int of bytes or"),
        (["gpt2", "--device-memory", "10%", "--host-memory", "1GiB"], "got '10%'"),
        (
            ["gpt2", "--device-memory", "1GiB", "--host-memory", "1Gi"],
            "--host-memory must be in one of the units B, KB",
        ),
        (["gpt2", *PLENTY, "--policy", "hots"], "did you mean 'host'?"),
        (["gpt2", *PLENTY, "--policy", "no.toml"], "got 'no.toml', which is not a file"),
        (["gpt2", *PLENTY, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["gpt2", *PLENTY, "--ratio", "0.5"], "must be a number of at least 1, got '0.5'"),
        (["gpt2", *PLENTY, "--ratio", "nan"], "must be a number of at least 1, got 'nan'"),
        (["gpt2", *PLENTY, "--seq-len", "0"], "must be an int of at least 1, got '0'"),
        ([], "required: model"),
    ],
)
def test_bad_usage_is_exit_status_2(arguments, message, capsys):
    try:
        status = main(["plan", *arguments])
    except SystemExit as exit_error:
        status = exit_error.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


def test_a_plan_that_does_not_fit_has_exit_status_1(capsys):
    assert main(["plan", "llama-7b", "--device-memory", "8GiB", "--host-memory", "64GiB"]) == 1
    printed = capsys.readouterr().out
    assert row(printed, "fits") == ["no", "no"]
    remaining = row(printed, "left of the device for tables")
    assert remaining[0].startswith("-")
    assert remaining[2].startswith("-")
    reason = "weights, gradients and activations alone exceed the device by"
    assert f"Does not fit, step after backward: {reason} {remaining[0][1:]} GiB\n" in printed
    assert f"Does not fit, in_backward=True: {reason} {remaining[2][1:]} GiB\n" in printed
    assert main(["plan", "llama-7b", "--device-memory", "14.9GiB", "--host-memory", "512MiB"]) == 1
    assert "of tables fit neither on the device nor on the host" in capsys.readouterr().out


def test_the_way_to_step_is_an_option(capsys):
    arguments = ["plan", "llama-7b", "--device-memory", "23.5GiB", "--host-memory", "64GiB"]
    assert main(arguments) == 0
    assert main([*arguments, "--in-backward"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--no-in-backward"]) == 1
    printed = capsys.readouterr().out
    assert row(printed, "fits") == ["no"]
    assert "in_backward" not in printed


def test_options_have_their_documented_effect(capsys):
    def cells(label, *options):
        main(["plan", "llama-1b", *PLENTY, *options])
        return row(capsys.readouterr().out, label)[:2]

    assert cells("weights") == ["2.06", "GiB"]
    assert cells("weights", "--dtype", "float32") == ["4.11", "GiB"]
    assert cells("activations: checkpoints") == ["128.0", "MiB"]
    assert cells("activations: checkpoints", "--seq-len", "4096", "--batch-size", "2") == ["512.0", "MiB"]
    assert cells("activations: a chunk of logits") == ["62.5", "MiB"]
    assert cells("activations: a chunk of logits", "--loss-chunks", "1") == ["500.0", "MiB"]
    assert cells("tables on the device") == ["300.6", "MiB"]
    assert cells("tables on the device", "--table-dtype", "bfloat16") == ["131.9", "MiB"]
    assert cells("tables on the device", "--ratio", "64") == ["154.5", "MiB"]
    assert cells("tables on the device", "--ratio", "1") == ["8.23", "GiB"]
    assert cells("tables on the device", "--min-K", "2000000000") == ["8.23", "GiB"]


def test_without_sizes_it_measures_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "gpt2"]) == 2
    assert "no CUDA device here: give --device-memory" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("collins.offload.cli.device_figures", lambda _: DeviceFigures(2**34, 2**33, 1.0, 0, 0, 0))
    assert main(["plan", "gpt2"]) == 0
    assert "device 8.00 GiB" in capsys.readouterr().out


POLICY_RUNS = {
    "one-24gb-card.toml": {"auto": "device"},
    "70b-on-141gb.toml": {"host": "host"},
    "shared-card.toml": {"auto": "both"},
}


@pytest.mark.parametrize("path", sorted(POLICIES.iterdir()), ids=lambda path: path.name)
def test_the_example_policies_match_their_comments(path, monkeypatch, capsys):
    ((tier, expected),) = POLICY_RUNS[path.name].items()
    assert MemoryPolicy.of(path).tier == tier
    (command,) = [line for line in path.read_text().splitlines() if line.startswith("#   python -m collins ")]
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.removeprefix("#   python -m collins "))
    assert arguments[arguments.index("--policy") + 1] == f"examples/policies/{path.name}"
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    used_tiers = {tier for tier in ("device", "host") if row(printed, f"tables on the {tier}")[-2:] != ["0", "B"]}
    assert used_tiers == ({"device", "host"} if expected == "both" else {expected})


def test_the_readme_shows_the_output_of_the_command(monkeypatch, capsys):
    _, _, manual = (ROOT / "offload" / "README.md").read_text().partition("```console\n$ python -m collins ")
    block, _, _ = manual.partition("```")
    command, _, output = block.partition("\n")
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == output


def test_the_command_on_the_front_page_shows_the_bytes_that_it_claims(capsys):
    readme = (ROOT / "README.md").read_text()
    claimed = re.search(r"has\s+([\d.]+) GB \(([\d.]+) GiB\)\s+of optimizer state", readme)
    assert main(shlex.split(re.search(r"`python -m collins (plan [^`]+)`", readme)[1])) == 0
    assert f"\nTables take {claimed[2]} GiB." in capsys.readouterr().out
    assert math.isclose(float(claimed[1]) * 1e9, float(claimed[2]) * 2**30, rel_tol=0.01)


def test_the_readmes_table_of_optimizers_is_what_the_command_computes(monkeypatch, capsys):
    _, _, section = (ROOT / "offload" / "README.md").read_text().partition("| model | device | tokens | Collins |")
    lines = [line for line in section.partition("\n\n")[0].splitlines() if "GiB" in line]
    assert len(lines) == 8
    monkeypatch.chdir(ROOT)
    policy = ("--vocab", "128256", "--policy", "examples/policies/70b-on-141gb.toml")
    for line in lines:
        model, device, tokens, *texts = (cell.strip() for cell in line.strip("|").split("|"))
        sizes = ("--seq-len", tokens.replace(",", ""), "--device-memory", device, "--host-memory", "64GiB")
        main(["plan", model, *sizes, "--in-backward", "--json", *(policy if model == "llama-70b" else ())])
        plan = json.loads(capsys.readouterr().out)
        (mode,) = plan["modes"]
        parts = ("weights", "gradients", "checkpoints", "recomputed_block", "logits", "tables_on_device", "staging")
        collins = (sum(mode[key] or 0 for key in parts), mode["tables_on_host"] or 0, mode["fits"])
        cells = [
            collins,
            *(
                (alternative["device"], alternative["host"], alternative["fits"])
                for alternative in plan["alternatives"]
            ),
        ]
        expected = [f"{device / 2**30:.1f} / {host / 2**30:.1f}" for device, host, _ in cells]
        assert texts == [f"**{text}**" if cell[2] else text for text, cell in zip(expected, cells, strict=True)]


def test_other_optimizers_are_planned_from_the_same_figures(capsys):
    arguments = ("--device-memory", "24GiB", "--host-memory", "52GiB", "--dtype", "float32", "--json")
    main(["plan", "llama-1b", *arguments])
    plan = json.loads(capsys.readouterr().out)
    after_backward, in_backward = plan["modes"]
    activations = sum(after_backward[key] for key in ("checkpoints", "recomputed_block", "logits"))
    count = plan["model"]["parameters"]
    quantized = 2 * count + 8 * math.ceil(count / 256)
    weights_and_gradients = 8 * count + activations  # weights and gradients
    expected = {
        "AdamW": (weights_and_gradients + 8 * count, 0),
        "8-bit AdamW (bitsandbytes)": (weights_and_gradients + quantized, 0),
        "paged 8-bit AdamW (bitsandbytes)": (weights_and_gradients, quantized),
        "AdamW on the host (torchao)": (4 * count + in_backward["gradients"] + activations, 16 * count),
    }
    assert {
        alternative["name"]: (alternative["device"], alternative["host"]) for alternative in plan["alternatives"]
    } == expected
    for alternative in plan["alternatives"]:
        assert alternative["fits"] == (alternative["device"] <= 24 * 2**30 and alternative["host"] <= 52 * 2**30)


def test_it_runs_as_a_module():
    arguments = ("plan", "gpt2", "--device-memory", "100MiB", "--host-memory", "1GiB")
    process = subprocess.run(
        [sys.executable, "-m", "collins", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (1, "")
    assert "Does not fit" in process.stdout


def test_help_and_no_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # long lines are broken
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    output = capsys.readouterr().out
    assert all(name in output for name in NAMED)
    with pytest.raises(SystemExit, match="2"):
        main([])
