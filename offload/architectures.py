"""Names and shapes of any decoder that transformers supports, read from the model on the meta device.

Nothing is downloaded or allocated, and no code from a model's folder runs. transformers is imported when a
configuration is read, and only then.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from collins.offload.shapes import Shapes, Transformer
from collins.roles import roles_of_modules

_IN_BLOCK = re.compile(r"(.*?)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*experts)\.(\d+)\..+")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# Keys about the storage of weights or the location of code, which do not affect shapes.
_UNREAD = ("quantization_config", "auto_map", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation")


def transformers_or_none() -> ModuleType | None:
    """The transformers package; None where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        return None


def levels(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration, and those that it nests."""
    yield values
    for value in values.values():
        if isinstance(value, dict):
            yield from levels(value)


def from_transformers(
    transformers: ModuleType, where: str, values: dict[str, Any], vocabulary: int | None = None
) -> Transformer:
    """The causal language model that transformers builds from a configuration.

    If the configuration contains that of a text model, as for images and text, this is the whole model if transformers
    has a class for it, and otherwise the text model alone; a note says which.

    Args:
        transformers: the package.
        where: the name of the configuration in errors: its path.
        values: the configuration's keys and values.
        vocabulary: replaces the vocabulary of the configuration.

    Raises:
        ValueError: for a model_type that transformers does not know or for which it has no causal language model, and
            for values from which it cannot build a model.
    """
    kind = values.get("model_type")
    known = transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"{where}: model_type must be one that transformers {transformers.__version__} knows, such as llama, qwen3,"
            f" gemma2 or mixtral, got {kind!r}; a parameter count works for any"
        )
    version = transformers.__version__
    try:
        with _quiet(transformers):
            config = known[kind].from_dict(_shaping(values))
            config, build, notes = _buildable(transformers, config)
            text = config.get_text_config()
            _fit_vocabulary(text, vocabulary)
            with torch.device("meta"):
                model = build.from_config(config, attn_implementation="eager")
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        known = _transformer(text, shapes, (*notes, *_defaults(text, values)))
        return replace(known, by_module=roles_of_modules(model))
    except _NoDecoderError:
        raise ValueError(
            f"{where}: model_type must be one with a causal language model in transformers {version}, got {kind!r}; a"
            " parameter count works for any"
        ) from None
    except Exception as error:  # constructors of models may raise any exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{where}: transformers {version} builds no {kind} from it: {reason}") from error


class _NoDecoderError(Exception):
    """A configuration of something else than a causal language model."""


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Suppresses warnings on token ids, attention kernels or initialisation, which do not affect shapes."""
    logging = transformers.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _shaping(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` without the keys that do not affect shapes, in nested configurations too."""
    copied = copy.deepcopy(values)
    for level in levels(copied):
        for key in _UNREAD:
            level.pop(key, None)
    return copied


def _buildable(transformers: ModuleType, config: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """The configuration to build a model from, the class that builds it, and notes. The text model alone comes last."""
    text = config.get_text_config()
    nested = () if text is config else (f"activations are those of the text model, {text.model_type}",)
    causal, whole = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    if getattr(config, "is_encoder_decoder", False):
        raise _NoDecoderError
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return config, causal, nested
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return config, whole, nested
    if type(text) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return text, causal, (f"only the text model, {text.model_type}, of this {config.model_type} is planned",)
    raise _NoDecoderError


def _fit_vocabulary(text: Any, vocabulary: int | None) -> None:
    """Sets another vocabulary, and keeps the padding token within it, as embeddings require."""
    if vocabulary is not None:
        text.vocab_size = vocabulary
    padding = getattr(text, "pad_token_id", None)
    if isinstance(padding, int) and padding >= text.vocab_size:
        text.pad_token_id = 0


def _defaults(text: Any, values: dict[str, Any]) -> tuple[str, ...]:
    """A note on sizes that are missing in the file, which is common in nested configurations."""
    nested = list(levels(values))
    renamed: Mapping[str, str] = getattr(text, "attribute_map", {})
    absent = [
        f"{key} {getattr(text, key):,}"
        for key in _SIZES
        if isinstance(getattr(text, key, None), int)
        and not any(name in level for level in nested for name in (key, renamed.get(key, key)))
    ]
    if not absent:
        return ()
    return (f"not in the file, and taken from transformers' {type(text).__name__}: {', '.join(absent)}",)


def _transformer(text: Any, shapes: Sequence[tuple[str, tuple[int, ...]]], notes: tuple[str, ...]) -> Transformer:
    stack, first, stop = _stack(shapes, text.num_hidden_layers)
    blocks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes[first:stop]:
        index, inner = name.removeprefix(f"{stack}.").split(".", 1)
        blocks.setdefault(index, []).append((inner, shape))
    each = [tuple(block) for block in blocks.values()]
    hidden = text.hidden_size
    chosen = next((value for key in _EXPERTS_PER_TOKEN if isinstance(value := getattr(text, key, None), int)), None)
    widths = [_width(block, hidden, chosen) for block in dict.fromkeys(each)]
    return Transformer(
        hidden=hidden,
        vocabulary=text.vocab_size,
        gated=any(gated for _, gated in widths),
        checkpointed=max(text.num_hidden_layers, len(each)) * hidden,
        recomputed=max((width for width, _ in widths), default=0),
        before=tuple(shapes[:first]),
        blocks=tuple(each),
        after=tuple(shapes[stop:]),
        block_name=stack,
        positions=_positions(text),
        notes=notes,
    )


def _positions(text: Any) -> int | None:
    value = getattr(text, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _stack(shapes: Sequence[tuple[str, tuple[int, ...]]], layers: int) -> tuple[str, int, int]:
    """The name of the list of decoder blocks, and where in `shapes` they begin and end.

    It is the list with as many entries as the model has layers. If there are several or none, it is the list with the
    most elements, because vision towers have blocks of their own.
    """
    found: dict[str, list[tuple[int, str, int]]] = {}
    for place, (name, shape) in enumerate(shapes):
        if match := _IN_BLOCK.fullmatch(name):
            found.setdefault(match[1], []).append((place, match[2], math.prod(shape)))
    if not found:
        return "", len(shapes), len(shapes)

    def rank(stack: str) -> tuple[bool, int]:
        indices = {index for _, index, _ in found[stack]}
        return len(indices) == layers, sum(elements for _, _, elements in found[stack])

    stack = max(found, key=rank)
    return stack, found[stack][0][0], found[stack][-1][0] + 1


def _width(block: Shapes, hidden: int, experts_per_token: int | None) -> tuple[int, bool]:
    """`block_width` of a block read off its matrices, and whether its feed-forward network is gated.

    Each matrix leads from or to the hidden width; the other width is what it adds. Those of attention add up to
    2 q + 2 k, those of a feed-forward network to 3 f or, without a gate, to 2 f. Of experts count as many as a token is
    sent to, or all where the configuration does not say how many.
    """
    widths, experts = _grouped(block, hidden)
    total, any_gated = 3 * hidden, False
    for name, group in widths.items():
        if _ATTENTION.search(name):
            total += sum(group)
            continue
        gated = len(group) > 2 or max(group) == 2 * min(group)  # gate, up and down; or gate and up in one
        held = -(-7 * sum(group) // 3) if gated else 2 * sum(group)
        if name in experts:
            chosen = min(experts_per_token or experts[name], experts[name])
            held = chosen * (held + 2 * hidden)  # and a copy of the token before and after the expert
        total, any_gated = total + held, any_gated or gated
    return total, any_gated


def _grouped(block: Shapes, hidden: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """For each module, the widths that its matrices add (for one expert, if it has many) and the number of experts."""
    widths: dict[str, list[int]] = {}
    indices: dict[str, set[str]] = {}
    experts: dict[str, int] = {}
    for name, shape in block:
        if len(shape) < 2 or name.endswith("bias"):
            continue
        module = name.removesuffix(".weight").rpartition(".")[0]
        if listed := _EXPERT.fullmatch(name):
            module = listed[1]
            indices.setdefault(module, set()).add(listed[2])
            experts[module] = len(indices[module])
            if experts[module] > 1:
                continue
        elif module.endswith("experts") and len(shape) == 3:
            experts[module], shape = shape[0], shape[1:]
        widths.setdefault(module, []).append(_other(shape, hidden))
    return widths, experts


def _other(shape: tuple[int, ...], hidden: int) -> int:
    """The width of a matrix beside the hidden one; the larger one, if neither is the hidden width."""
    if len(shape) > 2:  # a convolution along the sequence
        return shape[0]
    if hidden not in shape:
        return max(shape)
    return shape[1] if shape[0] == hidden else shape[0]
