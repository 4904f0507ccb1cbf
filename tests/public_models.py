"""Configurations of published models, with the number of parameters that each is published with."""

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA_3_8B = {**LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_3_70B = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_32_1B = {
    **LLAMA_3_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MISTRAL_7B = {**LLAMA_3_8B, "model_type": "mistral", "vocab_size": 32000}
QWEN_25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN_3_600M = {
    **QWEN_3_8B,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
QWEN_3_30B = {
    **QWEN_3_8B,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
GEMMA_2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
GEMMA_2_27B = {
    **GEMMA_2_2B,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
}
PHI_3_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
PHI_4 = {
    **PHI_3_MINI,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100352,
    "pad_token_id": 100349,
}
MIXTRAL_8X7B = {**MISTRAL_7B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
NEOX_20B = {
    "model_type": "gpt_neox",
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "vocab_size": 50432,
}
FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "vocab_size": 65024,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
}
GPT_2_XL = {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257}
SMOLLM_135M = {
    **LLAMA_2_7B,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
OLMOE_7B = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
}
DEEPSEEK_67B = {**LLAMA_3_70B, "intermediate_size": 22016, "num_hidden_layers": 95, "vocab_size": 102400}
COMMAND_R = {
    "model_type": "cohere",
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 256000,
}
BLOOM = {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}

PUBLIC = {
    "Llama 2 7B": (LLAMA_2_7B, 6_738_415_616),
    "Llama 3.1 8B": (LLAMA_3_8B, 8_030_261_248),
    "Llama 3.1 70B": (LLAMA_3_70B, 70_553_706_496),
    "Llama 3.2 1B": (LLAMA_32_1B, 1_235_814_400),
    "Mistral 7B": (MISTRAL_7B, 7_241_732_096),
    "Qwen 2.5 7B": (QWEN_25_7B, 7_615_616_512),
    "Qwen 3 8B": (QWEN_3_8B, 8_190_735_360),
    "Qwen 3 0.6B": (QWEN_3_600M, 596_049_920),
    "Qwen 3 30B-A3B": (QWEN_3_30B, 30_532_122_624),
    "Gemma 2 2B": (GEMMA_2_2B, 2_614_341_888),
    "Gemma 2 27B": (GEMMA_2_27B, 27_227_128_320),
    "Gemma 3 1B": (GEMMA_3_1B, 999_885_952),
    "Phi 3 mini": (PHI_3_MINI, 3_821_079_552),
    "Phi 4": (PHI_4, 14_659_507_200),
    "Mixtral 8x7B": (MIXTRAL_8X7B, 46_702_792_704),
    "GPT-NeoX 20B": (NEOX_20B, 20_554_567_680),
    "Falcon 7B": (FALCON_7B, 6_921_720_704),
    "GPT-2 XL": (GPT_2_XL, 1_557_611_200),
    "SmolLM2 135M": (SMOLLM_135M, 134_515_008),
    "OLMoE 1B-7B": (OLMOE_7B, 6_919_161_856),
    "DeepSeek 67B": (DEEPSEEK_67B, 67_425_001_472),
    "Command R": (COMMAND_R, 34_980_831_232),
    "BLOOM 176B": (BLOOM, 176_247_271_424),
}
