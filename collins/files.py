"""Checkpoint files that are either whole or refused.

A file is what `torch.save` writes, followed by a seal: a magic word, the length and a BLAKE2b digest of all before it.
`torch.load(path, weights_only=True)` reads it as well, and looks at no seal.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from collins._torch_internals import tree_flatten, tree_map_only
from collins.checkpoint import saved_groups

_MAGIC = b"collins\x01"
_DIGEST = 32  # bytes
_SEAL = len(_MAGIC) + 8 + _DIGEST
_PIECE = 1 << 22


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint, or one that does not fit what it is to be loaded into."""


def save(path: str | os.PathLike[str], /, **parts: Any) -> None:
    """Writes a checkpoint so that `path` holds, at every moment, the whole old file or the whole new one.

    The file is written beside `path`, flushed to the disk, and then renamed over it. A process that is killed meanwhile
    leaves a file `.NAME.*.partial`, which nothing reads and which may be deleted. Tensors go to the file one after the
    other, so that no second copy of the parts is made.

    Args:
        path: of the file; its folder must exist.
        parts: by name, what has a `state_dict` (model, optimizer, scheduler, scaler) or values that
            `torch.load(weights_only=True)` can read: tensors, numbers, strings and containers of them.

    Raises:
        TypeError: for a part that could not be read back, or that holds sharded tensors, which are for
            `torch.distributed.checkpoint`; before anything is written.
        OSError: where the file cannot be written; `path` is then as it was.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(4, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/last.pt", model=model, epoch=3)
        ...     load(f"{folder}/last.pt", model=model)
        {'epoch': 3}
    """
    content = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    for name, part in content.items():
        _check_readable(name, part)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            sealed = _Sealed(file)
            torch.save(content, cast(IO[bytes], sealed))
            file.write(sealed.seal())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def load(path: str | os.PathLike[str], /, **parts: Any) -> dict[str, Any]:
    """Loads what `save` wrote into parts of the same names: all of them, or none.

    The file's digest is verified first. Then names, shapes and dtypes of models, and all that optimizers check, are
    checked before anything changes. Other parts, such as schedulers, get back what they held if one of them fails.
    Tensors are read from the file one at a time.

    Args:
        path: of the file.
        parts: by name, what has a `load_state_dict`.

    Returns:
        What else the file holds, by name, with tensors on the CPU.

    Raises:
        CheckpointError: for a file that is truncated, corrupted or not of `save`, that lacks a part, or whose part does
            not fit. All parts are then as they were.
        OSError: where the file cannot be read.
    """
    path = Path(path)
    _verify(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    missing = [name for name in parts if name not in content]
    if missing:
        raise CheckpointError(f"{path} holds the parts {list(content)}; it has no {', '.join(map(repr, missing))}")
    for name, part in parts.items():
        with _named(path, name):
            _check(part, content[name])
    before: list[tuple[Any, Any]] = []
    # Those first that no check can vouch for: they are small, and can be put back.
    for name in sorted(parts, key=lambda name: isinstance(parts[name], Module | Optimizer)):
        part, given = parts[name], content[name]
        with _named(path, name), _put_back(before):
            if not isinstance(part, Module | Optimizer):
                before.append((part, copy.deepcopy(part.state_dict())))
            in_place = isinstance(part, Module) or hasattr(part, "check_state_dict")
            part.load_state_dict(given if in_place else copy.deepcopy(given))  # others may keep what they are given
    rest = {name: value for name, value in content.items() if name not in parts}
    return cast(dict[str, Any], tree_map_only(Tensor, Tensor.clone, rest))


class _Sealed:
    """A file to write to, whose digest is taken on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.blake2b(digest_size=_DIGEST)
        self._length = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._length += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> bytes:
        return _MAGIC + self._length.to_bytes(8, "little") + self._digest.digest()


def _verify(path: Path) -> None:
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size - _SEAL
        digest = hashlib.blake2b(digest_size=_DIGEST)
        left = max(length, 0)
        while left and (piece := file.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
        seal = file.read(_SEAL)
    if length < 0 or seal[: len(_MAGIC)] != _MAGIC:
        raise CheckpointError(f"{path} does not end as collins.save ends a file: it is truncated, or of another kind")
    if seal != _MAGIC + length.to_bytes(8, "little") + digest.digest():
        raise CheckpointError(f"{path} is corrupted: its content is not what was written")


def _check_readable(name: str, part: Any) -> None:
    """Writes and reads the part without its tensors, which are what takes time."""
    if any(isinstance(leaf, Tensor) and hasattr(leaf, "device_mesh") for leaf in tree_flatten(part)[0]):
        raise TypeError(f"{name} holds sharded tensors (DTensor): save them with torch.distributed.checkpoint")
    skeleton = tree_map_only(Tensor, lambda _: None, part)
    file = io.BytesIO()
    try:
        torch.save(skeleton, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        kinds = sorted({type(leaf).__name__ for leaf in tree_flatten(skeleton)[0]})
        raise TypeError(
            f"{name} must have a state_dict, or be made of tensors, numbers, strings and containers of them, which"
            f" torch.load(weights_only=True) reads; got {', '.join(kinds)}"
        ) from error


def _check(part: Any, given: Any) -> None:
    """Raises for what a model or an optimizer would refuse to load."""
    if isinstance(part, Module):
        _check_model(part, given)
    elif hasattr(part, "check_state_dict"):
        part.check_state_dict(given)
    elif isinstance(part, Optimizer):
        saved_groups(given, part.param_groups)


def _check_model(model: Module, given: Mapping[str, Any]) -> None:
    own = model.state_dict()
    missing, unknown = [k for k in own if k not in given], [k for k in given if k not in own]
    if missing or unknown:
        raise ValueError(f"the file lacks {missing}; the model lacks {unknown}")
    for key, mine in own.items():
        if isinstance(mine, Tensor):
            for what in ("shape", "dtype"):
                saved, accepted = getattr(given[key], what, None), getattr(mine, what)
                if saved != accepted:
                    raise ValueError(f"{key} must have its {what} {accepted}, got {saved}")


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{name} of {path} cannot be loaded: {error}") from error


@contextlib.contextmanager
def _put_back(before: list[tuple[Any, Any]]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for part, state in before:
            part.load_state_dict(state)
        raise


def flush_folder(folder: Path) -> None:
    """Makes a rename outlast a power failure, where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
