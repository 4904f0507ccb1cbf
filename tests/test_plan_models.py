"""Models of the planner: equal to those of transformers for every architecture, with the published counts."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from public_models import GEMMA_2_2B, LLAMA_3_8B, LLAMA_32_1B, MIXTRAL_8X7B, PUBLIC, QWEN_3_8B

from collins import Collins
from collins.offload import MemoryPolicy
from collins.offload.architectures import _width
from collins.offload.budget import Training, budget_of, requests_of
from collins.offload.cli import main
from collins.offload.models import model_of
from collins.offload.shapes import LARGE_VOCABULARY, llama, of_count
from collins.offload.trial import Machine, Trial, largest

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
PLENTY = ["--device-memory", "1000GiB", "--host-memory", "1000GiB"]
TABLES = partial(requests_of, dtype=torch.bfloat16, compress_ratio=32, min_K=1024, hash="block", table_dtype=None)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    kind: {"model_type": kind, **TINY, **keys}
    for kind, keys in {
        "llama": {},
        "mistral": {},
        "qwen2": {},
        "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 128},
        "qwen3": {"head_dim": 16},
        "gemma": {},
        "gemma2": {},
        "gemma3_text": {},
        "phi": {},
        "phi3": {},
        "gpt_neox": {},
        "falcon": {},
        "bloom": {},
        "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
        "olmo2": {},
        "cohere": {},
        "starcoder2": {},
        "mamba": {},
        "mixtral": EXPERTS,
        "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
        "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 32},
        "deepseek_v3": {**EXPERTS, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1},
        "gpt_oss": EXPERTS,
    }.items()
}
NESTED = {
    "model_type": "gemma3",
    "text_config": TINY,
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@pytest.fixture
def write(tmp_path):
    """Writes a config.json, and returns its path as text."""

    def write_config(keys, **more):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**keys, **more}))
        return str(path)

    return write_config


def run(capsys, *arguments):
    """The exit status, and what was printed."""
    status = main(["plan", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return status, printed.out


def error_of(capsys, *arguments):
    """The error of arguments that cannot be used."""
    assert main(["plan", *arguments, *PLENTY]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def build_model(keys, device):
    """The model as transformers builds it, without the planner."""
    config = transformers.AutoConfig.for_model(**keys)
    text = config.get_text_config()
    if (text.pad_token_id or 0) >= text.vocab_size:
        text.pad_token_id = 0
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config)


def parameters(model):
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize(("keys", "count"), PUBLIC.values(), ids=PUBLIC)
def test_published_models_have_their_published_counts(keys, count, write, capsys):
    model = model_of(write(keys))
    assert model.count == count
    assert list(model.parameters()) == parameters(build_model(keys, "meta"))
    assert run(capsys, write(keys), *PLENTY)[1].startswith(f"{write(keys)}: {count:,} parameters")


@pytest.mark.parametrize("keys", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_names_and_shapes_equal_those_of_the_trained_model(keys, write):
    model, real_model = model_of(write(keys)), build_model(keys, "cpu")
    assert list(model.parameters()) == parameters(real_model)
    assert model.layers == 3
    assert model.checkpointed == 3 * 64
    step = torch.float32.itemsize
    report = Collins(real_model.to(torch.bfloat16).named_parameters()).memory_report()
    assert [request.bytes for request in TABLES(model)] == [row.state_bytes - step for row in report.rows]


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("llama", 3 * 64 + 2 * 64 + 2 * 16 + 7 * 160),
        ("phi3", 3 * 64 + 2 * 64 + 2 * 16 + 7 * 160),  # one matrix for queries, keys and values, one for gate and up
        ("qwen3", 3 * 64 + 2 * 128 + 2 * 32 + 7 * 160),
        ("gpt2", 3 * 64 + 4 * 64 + 4 * 256),
        ("gpt_neox", 3 * 64 + 4 * 64 + 4 * 160),
        ("starcoder2", 3 * 64 + 2 * 64 + 2 * 16 + 4 * 160),
        ("mixtral", 3 * 64 + 2 * 64 + 2 * 16 + 2 * (7 * 160 + 2 * 64) + 2 * 4),
        ("qwen3_moe", 3 * 64 + 2 * 64 + 2 * 16 + 2 * (7 * 32 + 2 * 64) + 2 * 4),
    ],
)
def test_the_width_of_a_recomputed_block_by_hand(kind, width, write):
    assert model_of(write(ARCHITECTURES[kind])).recomputed == width


def test_experts_in_a_list_are_planned_like_experts_in_one_tensor(write):
    stacked = model_of(write(ARCHITECTURES["mixtral"])).blocks[0]
    separate = [(name, shape) for name, shape in stacked if "experts" not in name]
    for index in range(4):
        separate += [(f"mlp.experts.{index}.{part}.weight", (160, 64)) for part in ("w1", "w3")]
        separate += [(f"mlp.experts.{index}.w2.weight", (64, 160))]
    assert _width(tuple(separate), 64, 2) == _width(stacked, 64, 2)
    assert _width(stacked, 64, None) == _width(stacked, 64, 4) > _width(stacked, 64, 2)  # all, if it is unknown


@pytest.mark.parametrize(
    "name", ["Llama 2 7B", "Llama 3.1 70B", "Llama 3.2 1B", "Mistral 7B", "Qwen 2.5 7B", "GPT-2 XL"]
)
def test_without_transformers_the_figures_are_the_same(name, write, monkeypatch):
    keys, count = PUBLIC[name]
    from_config = model_of(write(keys))
    monkeypatch.setitem(sys.modules, "transformers", None)
    without_transformers = model_of(write(keys))
    assert without_transformers.count == count
    assert without_transformers == from_config
    assert budget_of(without_transformers, Training()) == budget_of(from_config, Training())


def test_a_nested_configuration_is_planned_completely_with_activations_of_the_text_model(write):
    model = model_of(write(NESTED))
    assert model.layers == 3
    assert model.hidden == 64
    assert model.block_name == "model.language_model.layers"
    assert any("vision_tower" in name for name, _ in model.before)
    expected = build_model(NESTED, "meta")
    assert list(model.parameters()) == parameters(expected)
    assert "activations are those of the text model, gemma3_text" in model.notes
    assert model_of(write(NESTED), 1000).count - model.count == 500 * 64  # the vocabulary is the text model's


def test_models_of_images_and_text_without_a_causal_class_are_planned_completely(write):
    text = {**TINY, "model_type": "llama"}
    model = model_of(write({"model_type": "llava", "text_config": text, "vision_config": NESTED["vision_config"]}))
    assert model.layers == 3
    assert any("vision" in name for name, _ in model.before)


def test_the_text_model_is_planned_if_the_whole_has_no_class(write):
    model = model_of(write({"model_type": "voxtral", "text_config": {**TINY, "model_type": "llama", "head_dim": 8}}))
    assert model.count == llama(3, 64, 160, 16, 500).count
    assert "only the text model, llama, of this voxtral is planned" in model.notes


def test_a_dense_model_of_an_architecture_with_mixtures(write):
    keys = {**TINY, "model_type": "granitemoehybrid", "num_local_experts": 0, "shared_intermediate_size": 160}
    keys |= {"mamba_n_heads": 8, "layer_types": ["attention"] * 3}
    assert model_of(write(keys)).layers == 3


def test_sizes_that_have_default_values_are_named(write, capsys):
    keys = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    printed = run(capsys, write(keys), *PLENTY)[1]
    defaults = "num_attention_heads 8, vocab_size 262,208"
    if "vocab_size 262,144" in printed:  # as other versions of transformers have it
        defaults = "num_attention_heads 8, vocab_size 262,144"
    assert f"note: not in the file, and taken from transformers' Gemma3TextConfig: {defaults}\n" in printed


def test_transformers_downloads_and_prints_nothing(write, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a plan opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    status, printed = run(capsys, write(ARCHITECTURES["phi3"], _name_or_path="some/model"), *PLENTY)
    assert status == 0
    assert "vocabulary 500" in printed


def test_transformers_is_imported_only_for_a_configuration():
    code = (
        "import sys; from collins.offload.cli import main; main(['plan', 'gpt2', *sys.argv[1:]]);"
        "sys.exit('transformers' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code, *PLENTY], cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == 0


def test_code_and_quantization_of_a_folder_are_ignored(write, capsys):
    keys = {
        **ARCHITECTURES["qwen3"],
        "auto_map": {"AutoModelForCausalLM": "modeling.Evil"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "torch_dtype": "float16",
        "_attn_implementation": "flash_attention_2",
    }
    status, printed = run(capsys, write(keys), *PLENTY)
    assert status == 0
    assert f"{model_of(write(ARCHITECTURES['qwen3'])).count:,} parameters" in printed
    assert "note: the file has a quantization_config (bitsandbytes), which the plan leaves out" in printed


@pytest.mark.parametrize("level", ["whole", "text_config"])
@pytest.mark.parametrize("quantization", [{"quant_method": "fp8"}, {}, "int4"], ids=str)
def test_a_quantization_config_is_mentioned(level, quantization, write, capsys):
    keys = {**LLAMA_3_8B, "quantization_config": quantization}
    if level == "text_config":
        keys = {**NESTED, "text_config": {**TINY, "quantization_config": quantization}}
    printed = run(capsys, write(keys), *PLENTY)[1]
    assert "note: the file has a quantization_config" in printed
    assert "(fp8)" in printed or quantization != {"quant_method": "fp8"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(encoding, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(json.dumps(LLAMA_32_1B).encode(encoding))
    assert model_of(str(path)).count == 1_235_814_400


def test_a_folder_is_accepted_in_place_of_its_configuration(write, tmp_path, capsys):
    assert model_of(str(Path(write(QWEN_3_8B)).parent)) == model_of(write(QWEN_3_8B))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: the folder has no config.json; a model is gpt2," in error_of(capsys, str(empty))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "model_type must be one that transformers "),
        (
            {"model_type": "qwen9"},
            "such as llama, qwen3, gemma2 or mixtral, got 'qwen9'; a parameter count works for any",
        ),
        ({"model_type": ["qwen3"]}, "got ['qwen3']"),
        ({"model_type": "t5"}, "model_type must be one with a causal language model in transformers "),
        ({"model_type": "clip"}, "got 'clip'; a parameter count works for any"),
        ({**QWEN_3_8B, "hidden_size": "4096"}, "hidden_size must be an int of at least 1, got '4096'"),
        ({**QWEN_3_8B, "num_hidden_layers": 0}, "num_hidden_layers must be an int of at least 1, got 0"),
        ({**MIXTRAL_8X7B, "num_local_experts": -8}, "num_local_experts must be an int of at least 1, got -8"),
        ({**NESTED, "text_config": {**TINY, "vocab_size": True}}, "vocab_size must be an int of at least 1, got True"),
        ({**QWEN_3_8B, "head_dim": False}, "head_dim must be an int of at least 1, got False"),
        ({**NESTED, "text_config": [1]}, "builds no gemma3 from it: "),
        ({**ARCHITECTURES["gpt_neox"], "num_attention_heads": 7}, "builds no gpt_neox from it: "),
    ],
)
def test_a_configuration_that_cannot_be_planned_names_file_and_key(keys, message, write, capsys):
    error = error_of(capsys, write(keys))
    assert f"error: {write(keys)}: " in error
    assert message in error


def trial_of(model, device, training, host=64 * GIB):
    return Trial(model, training, Machine(device, device, host, host), MemoryPolicy(), TABLES)


def smallest_device(model, training):
    """Bytes of the smallest device that `model` can be trained on, to a MiB."""
    low, high = 0, 2**42
    trial = trial_of(model, high, training, 2**42)
    while high - low > 2**20:
        middle = (low + high) // 2
        smaller_trial = replace(trial, machine=Machine(middle, middle, 2**42, 2**42))
        low, high = (low, middle) if smaller_trial.fits() else (middle, high)
    return high


@pytest.mark.parametrize("training", [Training(), Training(batch_size=4, seq_len=16384, loss_chunks=64)], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_a_count_does_not_fit_if_its_configuration_does_not(name, training, write):
    keys, count = PUBLIC[name]
    from_config = model_of(write(keys))
    needed = smallest_device(from_config, training) - 2**20
    for vocabulary in (LARGE_VOCABULARY, from_config.vocabulary):
        from_count = of_count(count, vocabulary)
        assert not trial_of(from_count, needed, training, 2**42).fits()
        assert sum(request.bytes for request in TABLES(from_count)) >= sum(
            request.bytes for request in TABLES(from_config)
        )
        assumed_budget, config_budget = budget_of(from_count, training), budget_of(from_config, training)
        for in_backward in (False, True):
            assert assumed_budget.held(in_backward) >= config_budget.held(in_backward)


def test_a_count_prints_its_assumptions_and_accepts_a_vocabulary(capsys):
    printed = run(capsys, "7B", *PLENTY)[1]
    assert printed.startswith("7B: 7,000,000,000 parameters (vocabulary 262,144)\n")
    assert "a vocabulary of 262,144 is assumed (--vocab sets it)" in printed
    printed = run(capsys, "7B", "--vocab", "32000", *PLENTY)[1]
    assert printed.startswith("7B: 7,000,000,000 parameters (vocabulary 32,000)\n")
    assert "note" not in printed
    assert model_of("7B", 32000).count == 7 * 10**9


@given(st.integers(1, 10**12), st.integers(1, 10**6))
def test_a_count_with_any_vocabulary_is_matched_exactly(count, vocabulary):
    model = of_count(count, vocabulary)
    assert model.count == count
    assert model.vocabulary == vocabulary
    assert all(dimension > 0 for _, shape in model.parameters() for dimension in shape)


@pytest.mark.parametrize("name", ["llama-7b", "gpt2-xl", "7B", "config"])
def test_the_proposed_model_is_the_largest_that_fits(name, write, capsys):
    model = write(GEMMA_2_2B) if name == "config" else name
    arguments = [model, "--device-memory", "24GiB", "--host-memory", "16GiB"]
    largest_sizes = json.loads(run(capsys, *arguments, "--fits", "--json")[1])["largest"]
    for option, largest_one in (("--seq-len", largest_sizes["seq_len"]), ("--batch", largest_sizes["batch"])):
        assert run(capsys, *arguments, option, str(largest_one))[0] == 0
        assert run(capsys, *arguments, option, str(largest_one + 1))[0] == 1
    printed = run(capsys, *arguments, "--fits")[1].splitlines()
    assert printed[-3].split()[:2] == ["sequence", f"{largest_sizes['seq_len']:,}"]
    assert printed[-2].split()[:2] == ["batch", f"{largest_sizes['batch']:,}"]
    assert printed[-1].split()[0] == "model"
    assert printed[-1].endswith(f"{largest_sizes['model']}: {largest_sizes['parameters']:,} parameters")


def test_the_largest_model_is_of_the_same_family(write, capsys):
    def model(*arguments):
        return json.loads(run(capsys, *arguments, "--host-memory", "64GiB", "--fits", "--json")[1])["largest"]

    assert model("llama-70b", "--device-memory", "24GiB")["model"] == "llama-7b"
    assert model("llama-1b", "--device-memory", "40GiB")["model"] == "llama-13b"
    assert model("gpt2", "--device-memory", "6GiB")["model"] == "gpt2-xl"
    assert model("gpt2", "--device-memory", "1MiB") == {
        "seq_len": None,
        "batch": None,
        "model": None,
        "parameters": None,
    }
    with_vocabulary = model("llama-1b", "--device-memory", "24GiB", "--vocab", "128256")
    assert with_vocabulary["parameters"] == model_of("llama-7b", 128256).count
    count_text = model("1B", "--device-memory", "24GiB")["model"]
    assert run(capsys, count_text, "--device-memory", "24GiB", "--host-memory", "64GiB")[0] == 0


def test_the_largest_of_a_configuration_has_more_or_fewer_layers(write):
    from_config = model_of(write(GEMMA_2_2B))
    for device in (6 * GIB, 24 * GIB):
        trial = trial_of(from_config, device, Training())
        largest_model = largest(trial, "config.json").model
        assert trial_of(from_config.with_layers(largest_model.layers), device, Training()).fits()
        assert not trial_of(from_config.with_layers(largest_model.layers + 1), device, Training()).fits()
        keys = {**GEMMA_2_2B, "num_hidden_layers": largest_model.layers}
        assert largest_model.count == model_of(write(keys)).count


def test_a_sequence_beyond_the_models_positions_is_marked(write, capsys):
    printed = run(capsys, write(GEMMA_2_2B, max_position_embeddings=4096), *PLENTY, "--fits")[1]
    assert "tokens, batch of 1; the model is configured for 4,096\n" in printed


def test_json_has_the_figures_of_the_text_and_the_documented_keys(write, capsys):
    arguments = ["llama-70b", "--vocab", "128256", "--device-memory", "139.8GiB", "--host-memory", "64GiB"]
    policy = str(ROOT / "examples" / "policies" / "70b-on-141gb.toml")
    status, printed = run(capsys, *arguments, "--policy", policy, "--fits", "--json")
    plan = json.loads(printed)
    assert status == 0
    assert plan["fits"] is True
    assert plan["in_backward"] is True
    assert plan["model"]["parameters"] == 70_553_706_496
    assert [mode["in_backward"] for mode in plan["modes"]] == [False, True]
    assert [mode["fits"] for mode in plan["modes"]] == [False, True]
    after_backward, in_backward_mode = plan["modes"]
    assert after_backward["weights"] == in_backward_mode["weights"] == 2 * 70_553_706_496
    assert after_backward["reason"].startswith("weights, gradients and activations alone exceed the device")
    assert in_backward_mode["reason"] is None
    assert in_backward_mode["tables_on_host"] == plan["tables"] > 13 * GIB
    parts = ("weights", "gradients", "checkpoints", "recomputed_block", "logits")
    for mode in plan["modes"]:
        assert mode["left"] == plan["machine"]["device_free"] - sum(mode[key] for key in parts)
    readme = (ROOT / "offload" / "README.md").read_text()
    for level in (plan, plan["model"], plan["training"], plan["machine"], plan["largest"], in_backward_mode):
        for key in level:
            assert f"`{key}`" in readme, key


def test_json_of_a_plan_that_does_not_fit_and_of_a_minimal_plan(capsys):
    status, printed = run(capsys, "70B", "--device-memory", "8GiB", "--host-memory", "64GiB", "--json", "--in-backward")
    plan = json.loads(printed)
    assert status == 1
    assert plan["fits"] is False
    assert plan["in_backward"] is None
    assert plan["largest"] is None
    assert plan["model"]["layers"] is None
    assert len(plan["modes"]) == 1
    assert plan["modes"][0]["tables_on_device"] is None


def test_batch_is_short_for_batch_size(capsys):
    assert run(capsys, "gpt2", "--batch", "3", *PLENTY) == run(capsys, "gpt2", "--batch-size", "3", *PLENTY)
