"""Token tables are found in public architectures: by modules, by names only, and by shapes only.

Each architecture is built by transformers on the meta device with its published widths and three layers, so that the
matrices of its blocks share their numbers of rows, as they do in the whole model; or its names and shapes are listed.
"""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from public_models import (
    BLOOM,
    COMMAND_R,
    DEEPSEEK_67B,
    FALCON_7B,
    GEMMA_2_2B,
    GEMMA_3_1B,
    GPT_2_XL,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    LLAMA_32_1B,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    NEOX_20B,
    OLMOE_7B,
    PHI_3_MINI,
    PHI_4,
    QWEN_3_8B,
    QWEN_3_30B,
    QWEN_3_600M,
    QWEN_25_7B,
    SMOLLM_135M,
)
from torch import nn

from collins.roles import found_roles, roles_of_modules

CAUSAL, MASKED, SEQ_TO_SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
IMAGES, IMAGES_AND_TEXT = "AutoModelForImageClassification", "AutoModelForImageTextToText"


class Model(NamedTuple):
    """A model of transformers, and its token tables in order, as they are found by module, by name and by shape."""

    kind: str  # the automatic class of transformers, or the class itself
    keys: dict  # the configuration
    by_module: list[str]
    by_name: list[str] | None = None  # None: the same as by module
    by_shape: list[str] | None = None  # likewise


def three_layers(published, **more):
    """A published configuration in three layers."""
    layers = {key: 3 for key in ("num_hidden_layers", "n_layer") if key in published}
    return {**published, **layers, **more}


EMBEDDING, UNTIED = ["model.embed_tokens"], ["model.embed_tokens", "lm_head"]
MODELS = {
    "LLaMA 1 7B": Model(CAUSAL, three_layers(LLAMA_2_7B), UNTIED),
    "LLaMA 3 8B": Model(CAUSAL, three_layers(LLAMA_3_8B), UNTIED),
    "LLaMA 3 70B": Model(CAUSAL, three_layers(LLAMA_3_70B), UNTIED),
    "LLaMA 3.2 1B": Model(CAUSAL, three_layers(LLAMA_32_1B), EMBEDDING),
    "LLaMA 4": Model(
        IMAGES_AND_TEXT,
        {"model_type": "llama4", "text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}},
        ["language_model.model.embed_tokens", "language_model.lm_head"],
    ),
    "Mistral 7B": Model(CAUSAL, three_layers(MISTRAL_7B), UNTIED),
    "Mixtral 8x7B": Model(CAUSAL, three_layers(MIXTRAL_8X7B), UNTIED),
    "Qwen 2 0.5B": Model(
        CAUSAL,
        three_layers(
            QWEN_25_7B,
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        EMBEDDING,
    ),
    "Qwen 2.5 7B": Model(CAUSAL, three_layers(QWEN_25_7B), UNTIED),
    "Qwen 2 57B-A14B": Model(CAUSAL, {"model_type": "qwen2_moe", "num_hidden_layers": 3, "num_experts": 8}, UNTIED),
    "Qwen 2 VL 72B": Model(
        IMAGES_AND_TEXT,
        {"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 3}},
        ["model.language_model.embed_tokens", "lm_head"],
    ),
    "Qwen 3 8B": Model(CAUSAL, three_layers(QWEN_3_8B), UNTIED),
    "Qwen 3 0.6B": Model(CAUSAL, three_layers(QWEN_3_600M), EMBEDDING),
    "Qwen 3 30B-A3B": Model(CAUSAL, three_layers(QWEN_3_30B), UNTIED),
    "Gemma 2 2B": Model(CAUSAL, three_layers(GEMMA_2_2B), EMBEDDING),
    "Gemma 3 1B": Model(CAUSAL, three_layers(GEMMA_3_1B), EMBEDDING),
    "Gemma 3 4B": Model(  # the 4,096 positions of an image have the shape of a token table
        IMAGES_AND_TEXT,
        {
            "model_type": "gemma3",
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 3},
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 3,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
            },
        },
        ["model.vision_tower.embeddings.position_embedding", "model.language_model.embed_tokens"],
    ),
    "Gemma 3n": Model(  # one matrix projects to all 35 layers
        CAUSAL,
        {"model_type": "gemma3n_text", "num_hidden_layers": 35},
        ["model.embed_tokens", "model.embed_tokens_per_layer", "model.per_layer_model_projection"],
    ),
    "Phi 3 mini": Model(CAUSAL, three_layers(PHI_3_MINI), UNTIED),
    "Phi 4": Model(CAUSAL, three_layers(PHI_4), UNTIED),
    "GPT-2 XL": Model(CAUSAL, three_layers(GPT_2_XL), ["transformer.wte"]),
    "GPT-2 XL, untied": Model(
        CAUSAL, three_layers(GPT_2_XL, tie_word_embeddings=False), ["transformer.wte", "lm_head"]
    ),
    "GPT-NeoX 20B": Model(CAUSAL, three_layers(NEOX_20B), ["gpt_neox.embed_in", "lm_head"]),
    "GPT-OSS": Model(CAUSAL, {"model_type": "gpt_oss", "num_hidden_layers": 3, "num_local_experts": 8}, UNTIED),
    "Falcon 7B": Model(CAUSAL, three_layers(FALCON_7B), ["transformer.word_embeddings"]),
    "BLOOM 176B": Model(CAUSAL, three_layers(BLOOM), ["transformer.word_embeddings"]),
    "OPT 125M": Model(CAUSAL, {"model_type": "opt", "num_hidden_layers": 3}, ["model.decoder.embed_tokens"]),
    "SmolLM2 135M": Model(CAUSAL, three_layers(SMOLLM_135M), EMBEDDING),
    "OLMoE 1B-7B": Model(CAUSAL, three_layers(OLMOE_7B), UNTIED),
    "DeepSeek 67B": Model(CAUSAL, three_layers(DEEPSEEK_67B), UNTIED),
    "DeepSeek V2 Lite": Model(  # only the first layer is dense: two matrices have the same number of rows
        CAUSAL,
        {
            "model_type": "deepseek_v2",
            "num_hidden_layers": 3,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "vocab_size": 102400,
        },
        UNTIED,
        by_shape=[
            "model.embed_tokens",
            "model.layers.0.mlp.gate_proj",
            "model.layers.0.mlp.up_proj",
            "lm_head",
        ],
    ),
    "DeepSeek V3": Model(
        CAUSAL, {"model_type": "deepseek_v3", "num_hidden_layers": 3, "n_routed_experts": 8, "n_group": 2}, UNTIED
    ),
    "Command R": Model(CAUSAL, three_layers(COMMAND_R), EMBEDDING),
    "Mamba": Model(CAUSAL, {"model_type": "mamba", "num_hidden_layers": 3}, ["backbone.embeddings"]),
    "RWKV 4": Model(CAUSAL, {"model_type": "rwkv", "num_hidden_layers": 3}, ["rwkv.embeddings", "head"]),
    "T5 small": Model(SEQ_TO_SEQ, {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3}, ["shared"]),
    "BART large": Model(SEQ_TO_SEQ, {"model_type": "bart", "encoder_layers": 3, "decoder_layers": 3}, ["model.shared"]),
    "BERT base": Model(MASKED, {"model_type": "bert", "num_hidden_layers": 3}, ["bert.embeddings.word_embeddings"]),
    "BERT base, untied": Model(
        MASKED,
        {"model_type": "bert", "num_hidden_layers": 3, "tie_word_embeddings": False},
        ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
    ),
    "RoBERTa base": Model(
        MASKED,
        {"model_type": "roberta", "num_hidden_layers": 3, "vocab_size": 50265},
        ["roberta.embeddings.word_embeddings"],
    ),
    "ALBERT": Model(  # all layers share their weights
        MASKED,
        {"model_type": "albert"},
        ["albert.embeddings.word_embeddings"],
        by_shape=["albert.embeddings.word_embeddings", "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"],
    ),
    "I-BERT": Model(
        MASKED, {"model_type": "ibert", "num_hidden_layers": 3}, ["ibert.embeddings.word_embeddings"]
    ),  # its embedding has a class of its own
    "ViT base": Model(IMAGES, {"model_type": "vit", "num_hidden_layers": 3, "num_labels": 1000}, []),
    "ViT base, ImageNet-21k": Model(
        IMAGES, {"model_type": "vit", "num_hidden_layers": 3, "num_labels": 21843}, ["classifier"]
    ),
    "MusicGen": Model(  # 2,048 tokens are too few for the shape alone
        "MusicgenForCausalLM",
        {"model_type": "musicgen_decoder", "num_hidden_layers": 3},
        [*(f"model.decoder.embed_tokens.{i}" for i in range(4)), *(f"lm_heads.{i}" for i in range(4))],
        by_shape=[],
    ),
    "CANINE": Model(  # hashes of characters, which only modules identify
        "CanineModel",
        {"model_type": "canine", "num_hidden_layers": 3},
        [f"char_embeddings.HashBucketCodepointEmbedder_{i}" for i in range(8)],
        by_name=[],
        by_shape=[],
    ),
}


def blocks(prefix, **shapes):
    """Names and shapes of the matrices of three blocks."""
    return [
        (f"{prefix}.{i}.{name.replace('_0', '')}.weight", shape) for i in range(3) for name, shape in shapes.items()
    ]


GPT = {"attn.c_attn": (2304, 768), "attn.c_proj": (768, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
LLAMA = {"attention.wq": (4096, 4096), "attention.wo": (4096, 4096)}
LLAMA |= {"feed_forward.w1": (11008, 4096), "feed_forward.w2": (4096, 11008), "feed_forward.w3": (11008, 4096)}
T5 = {"layer.0.SelfAttention.q": (768, 768), "layer.1.DenseReluDense.wi_0": (2048, 768)}
T5 |= {"layer.1.DenseReluDense.wi_1": (2048, 768), "layer.1.DenseReluDense.wo": (768, 2048)}

# Names and shapes of parameters, the token tables found by names, and those found by shapes (None: the same).
LISTED = {
    "LLaMA 2 7B, as Meta and torchtitan name it": (
        [("tok_embeddings.weight", (32000, 4096)), *blocks("layers", **LLAMA), ("output.weight", (32000, 4096))],
        ["tok_embeddings", "output"],
        None,
    ),
    "nanoGPT": (
        [
            ("transformer.wte.weight", (50304, 768)),
            ("transformer.wpe.weight", (1024, 768)),
            *blocks("transformer.h", **GPT),
        ],
        ["transformer.wte"],
        None,
    ),
    "GPT over bytes": (
        [("transformer.wte.weight", (256, 768)), *blocks("transformer.h", **GPT), ("lm_head.weight", (256, 768))],
        ["transformer.wte", "lm_head"],
        [],
    ),
    "DeepSeek V3, as its own code names it, with a module that predicts a second token": (
        [
            ("embed.weight", (129280, 7168)),
            *blocks("layers", **LLAMA),
            ("layers.3.embed_tokens.weight", (129280, 7168)),
            ("layers.3.shared_head.head.weight", (129280, 7168)),
            ("head.weight", (129280, 7168)),
        ],
        ["embed", "layers.3.embed_tokens", "head"],
        [],
    ),
    "Megatron GPT": (
        [
            ("embedding.word_embeddings.weight", (50432, 1024)),
            ("embedding.position_embeddings.weight", (8192, 1024)),
            *blocks("decoder.layers", **{"mlp.linear_fc1": (4096, 1024), "mlp.linear_fc2": (1024, 4096)}),
            ("output_layer.weight", (50432, 1024)),
        ],
        ["embedding.word_embeddings", "embedding.position_embeddings", "output_layer"],  # positions by their shape
        None,
    ),
    "T5 1.1 base, untied": (
        [
            ("shared.weight", (32128, 768)),
            *blocks("encoder.block", **T5),
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 12)),
            *blocks("decoder.block", **T5),
            ("lm_head.weight", (32128, 768)),
        ],
        ["shared", "lm_head"],
        None,
    ),
    "fairseq transformer": (
        [
            ("encoder.embed_tokens.weight", (42024, 1024)),
            *blocks("encoder.layers", **{"fc1": (4096, 1024), "fc2": (1024, 4096)}),
            ("decoder.embed_tokens.weight", (40480, 1024)),
            ("decoder.output_projection.weight", (40480, 1024)),
        ],
        ["encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"],
        None,
    ),
    "ViT-B/16 of timm": (
        [
            ("cls_token", (1, 1, 768)),
            ("pos_embed", (1, 197, 768)),
            ("patch_embed.proj.weight", (768, 3, 16, 16)),
            *blocks("blocks", **{"attn.qkv": (2304, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}),
            ("head.weight", (1000, 768)),
        ],
        [],
        [],
    ),
    "DLRM": (
        [
            ("emb_l.0.weight", (1460, 16)),
            ("emb_l.1.weight", (583, 16)),
            ("emb_l.2.weight", (10131227, 16)),
            ("bot_l.0.weight", (512, 13)),
            ("top_l.0.weight", (512, 367)),
        ],
        ["emb_l.0", "emb_l.1", "emb_l.2"],
        ["emb_l.2"],
    ),
    "two towers": (
        [
            ("user_embedding.weight", (100000, 32)),
            ("towers.0.item_emb.weight", (20000, 32)),
            ("towers.0.mlp.fc.weight", (64, 32)),
            ("towers.1.table.weight", (30000, 32)),  # within a block, with a name that identifies nothing
        ],
        ["user_embedding", "towers.0.item_emb"],
        ["user_embedding", "towers.0.item_emb", "towers.1.table"],
    ),
    "PEFT, fine-tuning embeddings whole": (
        [
            ("base_model.model.model.embed_tokens.modules_to_save.default.weight", (32000, 4096)),
            *blocks("base_model.model.model.layers", **{"q.lora_A.default": (8, 4096), "q.lora_B.default": (4096, 8)}),
            ("base_model.model.lm_head.modules_to_save.default.weight", (32000, 4096)),
        ],
        [f"base_model.model.{name}.modules_to_save.default" for name in ("model.embed_tokens", "lm_head")],
        None,
    ),
    "a stage of a pipeline with the head alone": (
        [*blocks("layers", **LLAMA), ("output.weight", (32000, 4096))],
        ["output"],
        None,
    ),
}


def token_tables(params, roles):
    """The names of the modules whose weights are token tables."""
    return [
        name.removesuffix(".weight") for (name, _), role in zip(params, roles, strict=True) if role.kind == "tokens"
    ]


def build_model(kind, keys):
    """The model on the meta device."""
    transformers = pytest.importorskip("transformers")
    keys = copy.deepcopy(keys)
    config = transformers.CONFIG_MAPPING[keys.pop("model_type")](**keys)
    config.get_text_config().pad_token_id = 0  # some are beyond the vocabulary
    model = getattr(transformers, kind)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.from_config(config) if kind.startswith("Auto") else model(config)


@pytest.mark.parametrize("architecture", MODELS)
def test_token_tables_of_a_public_architecture(architecture):
    kind, keys, by_module, by_name, by_shape = MODELS[architecture]
    model = build_model(kind, keys)
    params = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert token_tables(params, found_roles(params, roles_of_modules(model))) == by_module
    assert token_tables(params, found_roles(params)) == (by_module if by_name is None else by_name)
    nameless = [(None, shape) for _, shape in params]
    assert token_tables(params, found_roles(nameless)) == (by_module if by_shape is None else by_shape)


@pytest.mark.parametrize("architecture", LISTED)
def test_token_tables_of_an_architecture_by_names_and_shapes(architecture):
    params, by_name, by_shape = LISTED[architecture]
    assert token_tables(params, found_roles(params)) == by_name
    nameless = [(None, shape) for _, shape in params]
    assert token_tables(params, found_roles(nameless)) == (by_name if by_shape is None else by_shape)


@pytest.mark.parametrize(("architecture", "layers", "extra"), [
    ("LLaMA 1 7B", 1, ["mlp.gate_proj", "mlp.up_proj"]),
    ("LLaMA 1 7B", 2, []),
    ("GPT-NeoX 20B", 1, ["attention.query_key_value", "mlp.dense_h_to_4h"]),
    ("GPT-NeoX 20B", 2, ["attention.query_key_value", "mlp.dense_h_to_4h"]),
    ("GPT-NeoX 20B", 3, []),
])  # fmt: skip
def test_by_shapes_only_models_of_one_or_two_layers_have_more_tables(architecture, layers, extra):
    kind, keys, by_module, *_ = MODELS[architecture]
    model = build_model(kind, {**keys, "num_hidden_layers": layers})
    params = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert token_tables(params, found_roles(params)) == by_module
    names = token_tables(params, found_roles([(None, shape) for _, shape in params]))
    block_weights = [name for name in names if name not in by_module]
    assert [name.partition("layers.")[2].partition(".")[2] for name in block_weights] == extra * layers


@pytest.mark.parametrize("architecture", ["Mixtral 8x7B", "GPT-2 XL", "ViT base", "Mamba"])
def test_all_other_weights_are_matrices_and_vectors_exact(architecture):
    """This includes stacks of experts, transposed weights of GPT-2, convolutions and the recurrence of Mamba."""
    kind, keys, by_module, *_ = MODELS[architecture]
    model = build_model(kind, keys)
    params = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    dimensions = set()
    for (name, shape), role in zip(params, found_roles(params, roles_of_modules(model)), strict=True):
        if name.removesuffix(".weight") not in by_module:
            vector = sum(size > 1 for size in shape) < 2
            assert role == (("exact", "vector") if vector else ("matrix", "shape")), name
            dimensions.add(len(shape))
    assert dimensions >= {"Mixtral 8x7B": {1, 2, 3}, "ViT base": {1, 2, 3, 4}}.get(architecture, {1, 2})


def test_reasons_name_how_a_table_was_found():
    model = build_model(*MODELS["BERT base, untied"][:2])
    assert {name: role.reason for name, role in roles_of_modules(model).items()} == {
        "bert.embeddings.word_embeddings.weight": "module: nn.Embedding",
        "cls.predictions.decoder.weight": "module: head as wide as word_embeddings",
    }
    tied = roles_of_modules(build_model(*MODELS["BERT base"][:2]))
    assert [*tied.values()] == [("tokens", "module: nn.Embedding, tied to decoder")]
    (other,) = roles_of_modules(build_model(*MODELS["I-BERT"][:2])).values()
    assert other == ("tokens", "module: QuantEmbedding, tied to decoder")
    params = [("embed.weight", (300, 32)), ("head.weight", (300, 32)), ("a", (5000, 8)), ("b", (64, 64)), ("c", (9,))]
    assert found_roles(params) == [
        ("tokens", "name: embed"),
        ("tokens", "name: as many rows as embed"),
        ("tokens", "shape"),
        ("matrix", "shape"),
        ("exact", "vector"),
    ]


@pytest.mark.parametrize(("rows", "columns", "count", "kind"), [
    (4096, 2048, 2, "tokens"),
    (4095, 1024, 1, "matrix"),
    (4096, 2049, 1, "matrix"),
    (4096, 2048, 3, "matrix"),
])  # fmt: skip
def test_the_shape_of_a_token_table(rows, columns, count, kind):
    params = [(None, (rows, columns))] * count + [(None, (2048, rows)), (None, (rows,)), (None, (rows, 4, 4))]
    assert [role.kind for role in found_roles(params)][:count] == [kind] * count


def test_embeddings_of_positions_and_types_are_not_token_tables():
    """Positions and kinds of tokens occur in every step. Many positions have the shape of a token table."""

    class LearnedPositionalEmbedding(nn.Embedding):
        pass

    model = nn.ModuleDict({
        "wpe": nn.Embedding(1024, 64),
        "embed_positions": nn.Embedding(8192, 64),
        "token_type_embeddings": nn.Embedding(2, 768),
        "relative_attention_bias": nn.Embedding(32, 64),
        "learned": LearnedPositionalEmbedding(513, 64),
        "bags": nn.EmbeddingBag(512, 64),
    })  # fmt: skip
    params = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert roles_of_modules(model).keys() == {"bags.weight"}
    assert token_tables(params, found_roles(params, roles_of_modules(model))) == ["embed_positions", "bags"]


def test_linear_layers_within_blocks_are_not_heads():
    """A feed-forward layer may have the same width as a small vocabulary."""

    def block():
        return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(64, 8192), nn.ReLU(), nn.Linear(8192, 64))})

    model = nn.ModuleDict({"table": nn.Embedding(8192, 64), "layers": nn.ModuleList([block(), block(), block()]),
                           "out": nn.Linear(64, 8192)})  # fmt: skip
    params = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert token_tables(params, found_roles(params, roles_of_modules(model))) == ["table", "out"]


def test_a_parametrized_embedding_and_a_single_one():
    table = nn.Embedding(300, 32)
    assert roles_of_modules(table) == {"weight": ("tokens", "module: nn.Embedding")}
    nn.utils.parametrize.register_parametrization(table, "weight", nn.Identity())
    model = nn.Sequential(table, nn.Linear(32, 300, bias=False))
    assert roles_of_modules(model) == {
        "0.parametrizations.weight.original": ("tokens", "module: nn.Embedding"),
        "1.weight": ("tokens", "module: head as wide as 0"),
    }
