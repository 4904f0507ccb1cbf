"""What `plan` takes for a model: a named shape, a Hugging Face config.json, or a number of parameters."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collins.offload.shapes import Transformer, gpt2, llama, of_count

# The LLaMA shapes have the 32,000 tokens of LLaMA 1 and 2 unless another vocabulary is asked for; llama-1b has the
# layers of LLaMA 3.2 1B, and a head of its own.
NAMED: dict[str, Callable[[int | None], Transformer]] = {
    "gpt2": lambda vocabulary: gpt2(vocabulary=vocabulary or 50257),
    "llama-1b": lambda vocabulary: llama(16, 2048, 8192, 512, vocabulary or 32000),
    "llama-7b": lambda vocabulary: llama(32, 4096, 11008, 4096, vocabulary or 32000),
    "llama-13b": lambda vocabulary: llama(40, 5120, 13824, 5120, vocabulary or 32000),
    "llama-70b": lambda vocabulary: llama(80, 8192, 28672, 1024, vocabulary or 32000),
}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?)", re.IGNORECASE)
_POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_LLAMAS = ("llama", "mistral", "qwen2")


def model_of(text: str, vocabulary: int | None = None) -> Transformer:
    """The model that `text` names: one of `NAMED`, a path to a config.json, or a count ("7B", "350M", "1234567").

    Args:
        vocabulary: in place of the model's own.

    Raises:
        ValueError: for what is none of these, for an unknown architecture, a key that is missing or out of range, and
            a vocabulary for a count.
        FileNotFoundError: when a path leads nowhere.
    """
    if text in NAMED:
        return NAMED[text](vocabulary)
    count = _COUNT.fullmatch(text)
    if count:
        if vocabulary is not None:
            raise ValueError(f"a vocabulary needs a named shape or a config.json, got {vocabulary} for {text!r}")
        whole, _, decimals = count[1].partition(".")
        power = _POWERS[count[2].upper()] - len(decimals)
        digits = int(whole + decimals)
        parameters = digits * 10**power if power >= 0 else digits // 10**-power
        if not 1 <= parameters <= 10**15:
            raise ValueError(f"a parameter count must be in [1, 10^15], got {text!r}")
        return of_count(parameters)
    path = Path(text)
    if not path.is_file():
        if path.suffix == ".json" or len(path.parts) > 1:
            raise FileNotFoundError(f"{text}: no such file; a model is {_accepted()}")
        close = difflib.get_close_matches(text, NAMED, n=1)
        raise ValueError(f"model must be {_accepted()}, got {text!r}{f'; is it {close[0]!r}?' if close else ''}")
    return from_config(path, vocabulary)


def _accepted() -> str:
    return f"{', '.join(NAMED)}, a path to a Hugging Face config.json, or a parameter count such as 7B"


def from_config(path: Path, vocabulary: int | None = None) -> Transformer:
    """The model that a Hugging Face `config.json` describes: model_type llama, mistral, qwen2 or gpt2."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(config).__name__}")
    kind = config.get("model_type")
    read = _Config(path, config)
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    if kind == "gpt2":
        return gpt2(
            layers=read.integer("n_layer"),
            hidden=read.integer("n_embd"),
            vocabulary=read.integer("vocab_size"),
            feed_forward=read.integer("n_inner", 4 * read.integer("n_embd")),
            context=read.integer("n_positions"),
            tied=read.flag("tie_word_embeddings", True),
        )
    if kind not in _LLAMAS:
        names = ", ".join((*_LLAMAS, "gpt2"))
        raise ValueError(f"{path}: model_type must be one of {names}, got {kind!r}; a parameter count works for any")
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    width = read.integer("head_dim", hidden // heads)
    biased: tuple[str, ...] = ()
    if kind == "qwen2":  # whatever its config says
        biased = ("q", "k", "v")
    elif kind == "llama":
        biased += ("q", "k", "v", "o") if read.flag("attention_bias", False) else ()
        biased += ("gate", "up", "down") if read.flag("mlp_bias", False) else ()
    return llama(
        layers=read.integer("num_hidden_layers"),
        hidden=hidden,
        feed_forward=read.integer("intermediate_size"),
        key_value=width * read.integer("num_key_value_heads", heads if kind == "llama" else None),
        vocabulary=read.integer("vocab_size"),
        query=width * heads,
        tied=read.flag("tie_word_embeddings", False),
        biased=biased,
    )


class _Config:
    """Typed look-ups in a config, with errors that name the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        """`default` stands in where the key is absent or null, as files of older models have it."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if key not in self.values:
            raise ValueError(f"{self.path}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.path}: {key} must be an int of at least 1, got {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {key} must be true or false, got {value!r}")
        return value
