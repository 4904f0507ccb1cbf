"""Checkpoint files that are either complete or rejected.

A file has the content that `torch.save` writes, followed by a trailer: a magic word, the length, and a BLAKE2b digest
of everything before the trailer. `torch.load(path, weights_only=True)` can read such a file; it ignores the trailer.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from collins._torch_internals import keystr, tree_flatten, tree_leaves_with_path, tree_map_only
from collins.checkpoint import saved_groups
from collins.readable import without_data

_MAGIC = b"collins\x01"
_DIGEST = 32  # bytes
_TRAILER = len(_MAGIC) + 8 + _DIGEST
_PIECE = 1 << 22


class CheckpointError(ValueError):
    """A file is not a complete checkpoint, or does not fit the objects into which it is loaded."""


def save(path: str | os.PathLike[str], /, **parts: Any) -> None:
    """Writes a checkpoint atomically: at every moment, `path` is either the complete old file or the complete new one.

    The file is written beside `path`, flushed to the disk, and then renamed to `path`. A process that is killed while
    it writes leaves a file `.NAME.*.partial`, which nothing reads and which may be deleted. Tensors are written one
    after another, so no second copy of the parts is made.

    Args:
        path: the file; its folder must exist.
        parts: by name, objects with a `state_dict` (model, optimizer, scheduler, scaler), or values that
            `torch.load(weights_only=True)` can read: tensors, numbers, strings and containers of them.

    Raises:
        TypeError: before anything is written, for a part that could not be read back, that holds tensors without data
            (on the meta device, as weights that accelerate has offloaded), or that holds sharded tensors, which
            `torch.distributed.checkpoint` saves.
        OSError: if the file cannot be written; `path` is then unchanged.

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
            digesting = _DigestingFile(file)
            torch.save(content, cast(IO[bytes], digesting))
            file.write(digesting.trailer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def load(path: str | os.PathLike[str], /, **parts: Any) -> dict[str, Any]:
    """Loads a file that `save` wrote into parts of the same names: all of them, or none.

    The file's digest is verified first. Then the names, shapes, dtypes and layouts of models, and everything in the
    state of a Collins optimizer, are checked before anything changes. Other parts, such as schedulers, other
    optimizers, and models with state beside tensors, are restored if one of them fails to load. Tensors are read from
    the file one at a time.

    Args:
        path: the file.
        parts: by name, objects with a `load_state_dict`.

    Returns:
        All other parts of the file, by name, with tensors on the CPU.

    Raises:
        CheckpointError: for a file that is truncated, corrupted or not written by `save`, that lacks a part, or with a
            part that does not fit. All parts are then unchanged.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    _verify(path)
    content = _read(path)
    missing = [name for name in parts if name not in content]
    if missing:
        raise CheckpointError(f"{path} holds the parts {list(content)}; it has no {', '.join(map(repr, missing))}")
    for name, part in parts.items():
        with _named(path, name):
            _check(part, content[name])
    with contextlib.ExitStack() as undo:
        # Parts that cannot be checked are loaded first, since only they are restored after a failure.
        for name in sorted(parts, key=lambda name: _is_checked(parts[name])):
            part, given = parts[name], content[name]
            with _named(path, name):
                if not _is_checked(part):
                    undo.callback(_restorer(part))
                in_place = isinstance(part, Module) or hasattr(part, "check_state_dict")
                part.load_state_dict(given if in_place else copy.deepcopy(given))  # others may keep references to it
        undo.pop_all()
    rest = {name: value for name, value in content.items() if name not in parts}
    return cast(dict[str, Any], tree_map_only(Tensor, Tensor.clone, rest))


class _DigestingFile:
    """A file to write to, which computes the digest of the written data."""

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

    def trailer(self) -> bytes:
        return _MAGIC + self._length.to_bytes(8, "little") + self._digest.digest()


def _read(path: Path) -> dict[str, Any]:
    """The parts in a file, by name; others than `save` may have sealed it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is that of an offset outside the file
            raise
        raise CheckpointError(f"{path} holds what torch.load(weights_only=True) cannot read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dict of parts, got one {type(content).__name__}")
    return content


def _verify(path: Path) -> None:
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size - _TRAILER
        digest = hashlib.blake2b(digest_size=_DIGEST)
        left = max(length, 0)
        while left and (piece := file.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
        trailer = file.read(_TRAILER)
    if length < 0 or trailer[: len(_MAGIC)] != _MAGIC:
        raise CheckpointError(
            f"{path} does not end with the trailer of collins.save: it is truncated, or another kind of file"
        )
    if trailer != _MAGIC + length.to_bytes(8, "little") + digest.digest():
        raise CheckpointError(f"{path} is corrupted: its content does not match its digest")


def _check_readable(name: str, part: Any) -> None:
    """Checks that the part can be written and read back, without its tensors, since these would take time."""
    tensors = [(at, leaf) for at, leaf in tree_leaves_with_path(part) if isinstance(leaf, Tensor)]
    if any(hasattr(leaf, "device_mesh") for _, leaf in tensors):
        raise TypeError(f"{name} holds sharded tensors (DTensor): save them with torch.distributed.checkpoint")
    for at, leaf in tensors:
        problem = without_data(leaf)
        if problem is not None:
            raise TypeError(f"{name}{keystr(at)} must be a tensor with data, got {problem}: load its weights first")
    skeleton = tree_map_only(Tensor, lambda _: None, part)
    file = io.BytesIO()
    try:
        torch.save(skeleton, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        kinds = sorted({type(leaf).__name__ for leaf in tree_flatten(skeleton)[0]})
        raise TypeError(
            f"{name} must have a state_dict, or consist of tensors, numbers, strings and containers of them, which"
            f" torch.load(weights_only=True) reads; got {', '.join(kinds)}"
        ) from error


def _check(part: Any, given: Any) -> None:
    """Raises an error for state that a model or an optimizer cannot load."""
    if not hasattr(part, "load_state_dict"):
        raise TypeError(f"it must have a load_state_dict, got {part!r}")
    if isinstance(part, Module):
        _check_model(part, given)
    elif hasattr(part, "check_state_dict"):
        part.check_state_dict(given)
    elif isinstance(part, Optimizer):
        saved_groups(given, part.param_groups)


def _check_model(model: Module, given: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"the file must hold a dict of tensors, got {type(given).__name__}")
    own = model.state_dict()
    missing, unknown = [k for k in own if k not in given], [k for k in given if k not in own]
    if missing or unknown:
        raise ValueError(f"the file lacks {missing}; the model lacks {unknown}")
    for key, mine in own.items():
        if isinstance(mine, Tensor):
            for what in ("shape", "dtype", "layout"):
                saved, accepted = getattr(given[key], what, None), getattr(mine, what)
                if saved != accepted:
                    raise ValueError(f"{key} must have its {what} {accepted}, got {saved}")
            for where, tensor in (("the file", given[key]), ("the model", mine)):
                problem = without_data(tensor)
                if problem is not None:
                    raise ValueError(f"{key} must be a tensor with data, {where} has {problem}")
            if mine.is_inference() or _overlaps(mine):
                raise ValueError(f"{key} cannot be written to: it is an inference tensor, or an expanded one")


def _overlaps(t: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do."""
    strided = t.layout == torch.strided
    return strided and any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True))


def _is_checked(part: Any) -> bool:
    """Whether `_check` checks everything that can make loading fail."""
    if isinstance(part, Module):
        return all(isinstance(value, Tensor) for value in part.state_dict().values())
    return hasattr(part, "check_state_dict")


def _restorer(part: Any) -> Callable[[], Any]:
    """A function that restores the current state of a part."""
    if type(part).load_state_dict is Optimizer.load_state_dict:  # replaces the state without changing the old one
        held = {name: part.__dict__[name] for name in ("state", "param_groups")}
        return lambda: part.__dict__.update(held)
    # The copy is on the host, since device memory may not suffice for a second copy.
    state = tree_map_only(Tensor, lambda t: t.detach().to("cpu"), part.state_dict())
    state = copy.deepcopy(state)
    return lambda: part.load_state_dict(state)


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{name} of {path} cannot be loaded: {error}") from error


def flush_folder(folder: Path) -> None:
    """Flushes a folder to the disk, so that a rename survives a power failure, where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
