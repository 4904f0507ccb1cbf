"""The models that `plan` accepts: a named shape, a Hugging Face configuration, or a number of parameters."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from collins.offload.architectures import from_transformers, levels, transformers_or_none
from collins.offload.shapes import LARGE_VOCABULARY, Transformer, gpt2, llama, of_count

# The LLaMA shapes have the 32,000 tokens of LLaMA 1 and 2 unless another vocabulary is given; llama-1b has the layers
# of LLaMA 3.2 1B, and an untied head. qwen-14b has the matrices of Qwen 3 14B, qwen-32b those of Qwen 2.5 32B, with its
# biases. The name of a family ends at the first hyphen; members are in ascending order.
NAMED: dict[str, Callable[[int | None], Transformer]] = {
    "gpt2": lambda vocabulary: gpt2(vocabulary=vocabulary or 50257),
    "gpt2-medium": lambda vocabulary: gpt2(24, 1024, vocabulary or 50257),
    "gpt2-large": lambda vocabulary: gpt2(36, 1280, vocabulary or 50257),
    "gpt2-xl": lambda vocabulary: gpt2(48, 1600, vocabulary or 50257),
    "llama-1b": lambda vocabulary: llama(16, 2048, 8192, 512, vocabulary or 32000),
    "llama-7b": lambda vocabulary: llama(32, 4096, 11008, 4096, vocabulary or 32000),
    "llama-13b": lambda vocabulary: llama(40, 5120, 13824, 5120, vocabulary or 32000),
    "llama-70b": lambda vocabulary: llama(80, 8192, 28672, 1024, vocabulary or 32000),
    "qwen-14b": lambda vocabulary: llama(40, 5120, 17408, 1024, vocabulary or 151936),
    "qwen-32b": lambda vocabulary: llama(64, 5120, 27648, 1024, vocabulary or 152064, biased=("q", "k", "v")),
}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?)", re.IGNORECASE)
_POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_LLAMAS = ("llama", "mistral", "qwen2")
_SIZES = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "head_dim", "vocab_size"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads"),
    *("num_local_experts", "num_experts", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size"),
)
MOST_PARAMETERS = 10**15


def model_of(text: str, vocabulary: int | None = None) -> Transformer:
    """The model that `text` names: one of `NAMED`, a config.json or its folder, or a count ("7B", "350M", "1234567").

    Args:
        vocabulary: replaces the model's vocabulary, or `LARGE_VOCABULARY` for a count.

    Raises:
        ValueError: for other texts, for an unknown architecture, and for a key that is missing or out of range.
        FileNotFoundError: for a path that does not exist, or a folder without a config.json.
    """
    if text in NAMED:
        return NAMED[text](vocabulary)
    count = _COUNT.fullmatch(text)
    if count:
        return _counted(text, count, vocabulary)
    path = Path(text)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{text}: the folder has no config.json; a model is {_accepted()}")
    if not path.is_file():
        if path.suffix == ".json" or len(path.parts) > 1:
            raise FileNotFoundError(f"{text}: no such file; a model is {_accepted()}")
        close = difflib.get_close_matches(text, NAMED, n=1)
        raise ValueError(f"model must be {_accepted()}, got {text!r}{f'; is it {close[0]!r}?' if close else ''}")
    return from_config(path, vocabulary)


def family_of(text: str) -> tuple[str, ...]:
    """The names in `NAMED` of the family of `text`, smallest first; empty if `text` is not a named shape."""
    return tuple(name for name in NAMED if name.split("-")[0] == text.split("-")[0]) if text in NAMED else ()


def _counted(text: str, written: re.Match[str], vocabulary: int | None) -> Transformer:
    whole, _, decimals = written[1].partition(".")
    power = _POWERS[written[2].upper()] - len(decimals)
    digits = int(whole + decimals)
    parameters = digits * 10**power if power >= 0 else digits // 10**-power
    if not 1 <= parameters <= MOST_PARAMETERS:
        raise ValueError(f"a parameter count must be in [1, 10^15], got {text!r}")
    if vocabulary is not None:
        return of_count(parameters, vocabulary)
    note = (
        f"a count says nothing of shapes: a vocabulary of {LARGE_VOCABULARY:,} is assumed (--vocab sets it), and each"
        " figure is on the safe side; a config.json gives the model's own"
    )
    return replace(of_count(parameters), notes=(note,))


def _accepted() -> str:
    return f"{', '.join(NAMED)}, a path to a Hugging Face config.json or its folder, or a parameter count such as 7B"


def from_config(path: Path, vocabulary: int | None = None) -> Transformer:
    """The model that a Hugging Face `config.json` describes.

    With transformers installed, names and shapes are those of the model that it builds on the meta device. Without, the
    model_type must be llama, mistral, qwen2 or gpt2.

    Args:
        vocabulary: replaces the vocabulary of the configuration.

    Raises:
        ValueError: naming the file, the key, its value and what is accepted.
    """
    config = _read(path)
    kind, transformers = config.get("model_type"), transformers_or_none()
    if kind in (*_LLAMAS, "gpt2"):
        model = _described(path, config if vocabulary is None else {**config, "vocab_size": vocabulary})
        if transformers is not None:
            model = from_transformers(transformers, str(path), config, vocabulary)
    elif transformers is not None:
        _checked(path, config)
        model = from_transformers(transformers, str(path), config, vocabulary)
    else:
        names = ", ".join((*_LLAMAS, "gpt2"))
        raise ValueError(
            f"{path}: model_type must be one of {names}, got {kind!r}; with transformers installed any that it knows"
            " works, and a parameter count always does"
        )
    return replace(model, notes=(*model.notes, *_quantization(config)))


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())  # in UTF-8, UTF-16 or UTF-32, with or without a byte order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(config).__name__}")
    return config


def _checked(path: Path, config: dict[str, Any]) -> None:
    """Raises a ValueError with file and key for invalid sizes, before transformers raises a less specific one."""
    for level in levels(config):
        read = _Config(path, level)
        for key in _SIZES:
            value = level.get(key)
            without = value == 0 and "expert" in key  # a dense model of an architecture that has mixtures
            if value is not None and not isinstance(value, list) and not without:  # a list has one for each layer
                read.integer(key)


def _quantization(config: dict[str, Any]) -> tuple[str, ...]:
    """A note if the checkpoint's weights are quantized, since the plan is for training all weights unquantized."""
    for level in levels(config):
        quantization = level.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            named = f" ({method})" if isinstance(method, str) else ""
            return (
                f"the file has a quantization_config{named}, which the plan leaves out: all weights are planned in the"
                " training dtype",
            )
    return ()


def _described(path: Path, config: dict[str, Any]) -> Transformer:
    """The model of a configuration of one of the four architectures that need no transformers."""
    kind = config.get("model_type")
    read = _Config(path, config)
    if kind == "gpt2":
        return gpt2(
            layers=read.integer("n_layer"),
            hidden=read.integer("n_embd"),
            vocabulary=read.integer("vocab_size"),
            feed_forward=read.integer("n_inner", 4 * read.integer("n_embd")),
            context=read.integer("n_positions"),
            tied=read.flag("tie_word_embeddings", True),
        )
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    width = read.integer("head_dim", hidden // heads)
    biased: tuple[str, ...] = ()
    if kind == "qwen2":  # whatever its config says
        biased = ("q", "k", "v")
    elif kind == "llama":
        biased += ("q", "k", "v", "o") if read.flag("attention_bias", False) else ()
        biased += ("gate", "up", "down") if read.flag("mlp_bias", False) else ()
    model = llama(
        layers=read.integer("num_hidden_layers"),
        hidden=hidden,
        feed_forward=read.integer("intermediate_size"),
        key_value=width * read.integer("num_key_value_heads", heads if kind == "llama" else None),
        vocabulary=read.integer("vocab_size"),
        query=width * heads,
        tied=read.flag("tie_word_embeddings", False),
        biased=biased,
    )
    positions = config.get("max_position_embeddings")
    return replace(model, positions=positions if isinstance(positions, int) and positions > 0 else None)


class _Config:
    """Typed access to the keys of a configuration, with errors that name the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        """The int under `key`; `default` if the key is absent or null, as in files of older models."""
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
