"""Checks, loads and saves a model's folder. All errors are found before anything is loaded.

transformers loads and saves the weights, because it knows which tensors of a file make up a parameter (for example the
experts of a mixture). It builds the model on the meta device and reads each tensor from its file directly to the
device; only the tensor that is being read is in memory twice.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from collins.offload.architectures import levels

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TRAINABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD = "5GB"  # of weights in a file, which are on the host while it is written
# Files beside weights and configuration that belong to the model: tokenizers, templates, terms.
_BEGINNINGS = (
    *("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece", "tekken"),
    *("preprocessor_config", "processor_config", "generation_config", "license", "notice", "use_policy"),
)
_ENDINGS = (".model", ".tiktoken", ".jinja")
_TEMPLATES = "additional_chat_templates"


class Header(NamedTuple):
    """The entry of one tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFolder:
    """A folder that a model can be loaded from.

    Attributes:
        values: of its config.json.
        config: the same, as transformers reads it: that of the text model where the class takes only that.
        build: the class of transformers.
        vocabulary: rows of the input embedding.
        positions: the longest sequence that the model is configured for, if its configuration says.
        unread: tensors in the files that the model has no place for.
    """

    path: Path
    values: Mapping[str, Any]
    config: Any
    build: Any
    vocabulary: int
    positions: int | None
    unread: tuple[str, ...]


def transformers_module() -> ModuleType:
    """transformers, with its warnings turned off, and its progress bars too if standard error is not a terminal.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
        importlib.import_module("accelerate")  # transformers loads to a device through it
    except ImportError as error:
        raise ValueError(f'{error.name} must be installed: pip install ".[examples]"') from error
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """Suppresses transformers' reports of missing tensors, which raise an error here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def open_folder(path: Path) -> ModelFolder:
    """The folder, after everything that loading depends on has been checked; no tensor is read.

    Raises:
        ValueError: naming the file, what is wrong with it and what is accepted.
    """
    values = read_config(path)
    headers = read_headers(path)
    transformers = transformers_module()
    config, build = _class_of(transformers, path, values)
    meta, unread = _tried(transformers, path, config, build, headers)
    embedding = meta.get_input_embeddings()
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ModelFolder(
        path,
        values,
        config,
        build,
        vocabulary=embedding.weight.shape[0],
        positions=positions if isinstance(positions, int) and positions > 0 else None,
        unread=unread,
    )


def read_config(path: Path) -> dict[str, Any]:
    """The values of the folder's config.json, of a model that can be trained in full.

    Raises:
        ValueError: for a folder that is not there, has no config.json, or one that is not a JSON object or quantized.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ValueError(f"{path}: must be a model's folder: there is none")
    if not file.is_file():
        raise ValueError(f"{path}: must be a model's folder, with a config.json: it has none")
    values = _json_object(file)
    for level in levels(values):
        if level.get("quantization_config") is not None:
            raise ValueError(
                f"{file}: has a quantization_config, and quantized weights cannot be trained in full: take the"
                " checkpoint that was quantized"
            )
    return values


def read_headers(path: Path) -> dict[str, Header]:
    """Names, dtypes and shapes of all tensors of a folder, from the beginnings of its files.

    Raises:
        ValueError: where there are no weights, an index and its shards disagree, or a file is truncated.
    """
    if (path / WEIGHTS).is_file():
        return read_header(path / WEIGHTS)
    index = path / INDEX
    if not index.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f"; it has {', '.join(others)}, which save_pretrained of transformers can convert" if others else ""
        raise ValueError(f"{path}: must have its weights in {WEIGHTS}, or in shards with {INDEX}{found}")
    names = _json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: must map each tensor to its file under 'weight_map', got {names!r:.100}")
    headers: dict[str, Header] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: shards must be files beside it, got {shard!r}")
        if not (path / shard).is_file():
            raise ValueError(f"{index}: names the shard {shard}, which is not there: the download is not complete")
        headers.update(read_header(path / shard))
    lost = [name for name in names if name not in headers]
    if lost:
        raise ValueError(f"{path / names[lost[0]]}: must hold {lost[0]}, by {INDEX}: it does not")
    return headers


def read_header(file: Path) -> dict[str, Header]:
    """The tensors of a safetensors file, which consists of the length of a JSON header in 8 bytes, the header, and the
    tensors at the offsets in the header.

    Raises:
        ValueError: for a file that is truncated, longer than its header says, or of another kind.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length <= size - 8 else b""
    try:
        if not text:
            raise ValueError
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        headers = {name: Header(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{file}: must be a safetensors file: its header cannot be read, or it is truncated") from None
    if end != size:
        problem = "it is truncated" if size < end else "it was not written by safetensors"
        raise ValueError(f"{file}: must have {end:,} bytes, by its own header, got {size:,}: {problem}")
    return headers


def _json_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(values).__name__}")
    return values


def _class_of(transformers: ModuleType, path: Path, values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The configuration and the class that a model is built from. No code of the folder is run."""
    kind, where = values.get("model_type"), path / "config.json"
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # constructors of configurations may raise any exception
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: model_type must be one that transformers {transformers.__version__} knows, got {kind!r}:"
            f" {reason}"
        ) from error
    mapping, text = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, config.get_text_config()
    if type(config) not in mapping or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{where}: model_type must be that of a causal language model, got {kind!r}")
    build = mapping[type(config)]
    return (text if build.config_class is type(text) else config), build


def _tried(
    transformers: ModuleType, path: Path, config: Any, build: Any, headers: Mapping[str, Header]
) -> tuple[Any, tuple[str, ...]]:
    """The model on the meta device, loaded with tensors without data; and the names that it has no place for."""
    tensors = {
        name: torch.empty(header.shape, dtype=_TRAINABLE.get(header.dtype, torch.uint8), device="meta")
        for name, header in headers.items()
    }
    try:
        with quiet(transformers):
            model, found = build.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.bfloat16,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # so may those of models
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path}: transformers builds no {build.__name__} from it: {reason}") from error
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{path}: must have all weights of {build.__name__}; missing: {missing[0]}{more}")
    if mismatched:
        name, given, wanted = mismatched[0]
        raise ValueError(
            f"{path}: {name} must have the shape {tuple(wanted)}, by config.json, got {tuple(given)} in the file"
        )
    parameters = {name for name, _ in model.named_parameters()}
    for name, header in headers.items():
        if name in parameters and header.dtype not in _TRAINABLE:
            accepted = ", ".join(_TRAINABLE)
            raise ValueError(f"{path}: {name} must be in one of the formats {accepted}, got {header.dtype}")
    return model, tuple(sorted(found["unexpected_keys"]))


def load_model(
    folder: ModelFolder, weights: Path, dtype: torch.dtype, device: torch.device, attention: str | None = None
) -> Any:
    """The model, each weight read from its file to the device, in `dtype`.

    Args:
        folder: of the model.
        weights: the folder to read weights from: the model's own, or a checkpoint of it.
        attention: which of transformers' implementations of attention; None for its default.

    Raises:
        ValueError: for an `attention` that the model does not have.
    """
    transformers = transformers_module()
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with quiet(transformers):
            model = folder.build.from_pretrained(
                weights,
                config=folder.config,
                dtype=dtype,
                device_map={"": device},
                local_files_only=True,
                use_safetensors=True,
                **options,
            )
    except (ValueError, ImportError) as error:
        raise ValueError(f"{weights}: {' '.join(str(error).split())}") from error
    return model


def save_model(target: Path, model: Any, source: ModelFolder) -> None:
    """Writes a folder that `from_pretrained` loads: weights in shards of 5 GB, and the source's files beside them.

    config.json is that of the source, with the current class and dtype: transformers would write it in the format of
    its own version, which other versions may not read. For the same reason the tokenizer and the generation
    configuration are copied.
    """
    transformers = transformers_module()
    with quiet(transformers):
        if (source.path / "generation_config.json").is_file():
            # Published ones may hold what transformers refuses to write. The source's file takes its place below.
            model.generation_config = transformers.GenerationConfig()
        model.save_pretrained(target, max_shard_size=_SHARD)
    if type(source.config) is type(model.config) and source.values.get("model_type") == model.config.model_type:
        text = json.dumps(_described(source.values, model), indent=2, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")
    for file in sorted(source.path.iterdir()):
        name = file.name.lower()
        if file.is_file() and (name.startswith(_BEGINNINGS) or name.endswith(_ENDINGS)):
            shutil.copyfile(file, target / file.name)
    if (source.path / _TEMPLATES).is_dir():
        shutil.copytree(source.path / _TEMPLATES, target / _TEMPLATES)


def _described(values: Mapping[str, Any], model: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(values))
    result["architectures"] = [type(model).__name__]
    name = str(model.dtype).removeprefix("torch.")
    if not {"dtype", "torch_dtype"} & result.keys():
        result["dtype"] = name
    for level in levels(result):
        for key in ("dtype", "torch_dtype"):
            if key in level:
                level[key] = name
    return result
