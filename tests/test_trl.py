"""TRL's trainers train with Collins by its name, like every `Trainer` with `TrainingArguments`."""

import pytest
import torch
from clients import steps_taken

from collins import Collins, register

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    # TRL's defaults use a name that transformers has deprecated since.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

WORDS = ["<pad>", "<eos>", *"abcdefgh"]


def tokenizer():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def test_supervised_fine_tuning(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    arguments = SFTConfig(
        str(tmp_path),
        optim="collins",
        optim_args="compress_ratio=16,min_K=16,table_dtype=bfloat16",
        learning_rate=3e-3,
        max_steps=6,
        logging_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    data = Dataset.from_list([{"text": " ".join("abcdefgh" * 2)}] * 24)
    run = SFTTrainer(transformers.LlamaForCausalLM(config), arguments, train_dataset=data, processing_class=tokenizer())
    run.train()
    optimizer = run.optimizer.optimizer
    assert type(optimizer) is Collins
    assert steps_taken(optimizer) == 6
    assert {group["table_dtype"] for group in optimizer.param_groups} == {torch.bfloat16}
    assert any("m_table" in state for state in optimizer.state.values())
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
