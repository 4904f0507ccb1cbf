"""Checkpoint files that are either whole or refused.

A file is what `torch.save` writes, followed by a seal: a magic word, the length and a BLAKE2b digest of all before it.
`torch.load(path, weights_only=True)` reads it as well, and looks at no seal.
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
from collins.checkpoint import saved_groups, without_data

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
        TypeError: for a part that could not be read back, that holds tensors without data (on the meta device, where
            weights are that accelerate has offloaded), or sharded tensors, which are for
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

    The file's digest is verified first. Then names, shapes, dtypes and layouts of models, and all that Collins checks,
    are checked before anything changes. Other parts, such as schedulers and other optimizers, and models that keep
    more than tensors, get back what they held if one of them fails. Tensors are read from the file one at a time.

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
    content = _read(path)
    missing = [name for name in parts if name not in content]
    if missing:
        raise CheckpointError(f"{path} holds the parts {list(content)}; it has no {', '.join(map(repr, missing))}")
    for name, part in parts.items():
        with _named(path, name):
            _check(part, content[name])
    with contextlib.ExitStack() as undo:
        # Those first that no check can vouch for: they can be put back.
        for name in sorted(parts, key=lambda name: _is_checked(parts[name])):
            part, given = parts[name], content[name]
            with _named(path, name):
                if not _is_checked(part):
                    undo.callback(_to_put_back(part))
                in_place = isinstance(part, Module) or hasattr(part, "check_state_dict")
                part.load_state_dict(given if in_place else copy.deepcopy(given))  # others may keep what they are given
        undo.pop_all()
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
            f"{name} must have a state_dict, or be made of tensors, numbers, strings and containers of them, which"
            f" torch.load(weights_only=True) reads; got {', '.join(kinds)}"
        ) from error


def _check(part: Any, given: Any) -> None:
    """Raises for what a model or an optimizer would refuse to load."""
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
    """Whether `_check` has looked at all that loading depends on."""
    if isinstance(part, Module):
        return all(isinstance(value, Tensor) for value in part.state_dict().values())
    return hasattr(part, "check_state_dict")


def _to_put_back(part: Any) -> Callable[[], Any]:
    """What gives a part back the state that it has now."""
    if type(part).load_state_dict is Optimizer.load_state_dict:  # which replaces its state, and changes none of it
        held = {name: part.__dict__[name] for name in ("state", "param_groups")}
        return lambda: part.__dict__.update(held)
    # On the host: other optimizers, and models, may leave no room for a second copy on their device.
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
    """Makes a rename outlast a power failure, where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
