"""Folders of many files, written by many ranks, that are either complete or absent.

`torch.distributed.checkpoint` writes a file for each rank, then an index. If it is killed while it overwrites an older
checkpoint, it leaves new files with the old index. So the folder is written under a temporary name and then renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from collins.files import flush_folder
from collins.options import require


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> Iterator[Path]:
    """A context manager for a temporary folder, which is renamed to `path` when every rank has exited without an error.

    Every rank of the group enters and exits the context; both are collective operations. All files must be complete at
    exit: wait for the result of an asynchronous save first. Files are flushed to the disk before the folder is renamed.
    If a process is killed before the rename, or any rank fails, a folder `.NAME.partial` remains, which nothing reads
    and which the next call for `path` empties.

    Args:
        path: the folder, the same on all ranks. It must not exist, because no file system replaces a folder by another
            one atomically; its parent must exist, on a file system that all ranks share.
        group: the process group that writes; None for all processes. Without `torch.distributed` there is one process.

    Yields:
        The folder to write to, which exists and is empty.

    Raises:
        ValueError, TypeError: for a path without a folder name, a path that differs between ranks, or a group that does
            not contain this process.
        FileNotFoundError: if the parent does not exist.
        FileExistsError: if `path` exists. All of these are raised before anything is written.
        RuntimeError: if another rank has failed; `path` then does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with whole_folder(f"{root}/step-100") as folder:
        ...         _ = (folder / "weights").write_text("...")
        ...         print(os.listdir(root))
        ...     print(os.listdir(root))
        ['.step-100.partial']
        ['step-100']
    """
    path = _checked(path, group)
    partial = path.with_name(f".{path.name}.partial")
    _on_first(group, lambda: _emptied(partial), f"make {partial}")
    try:
        yield partial
    except Exception:
        with contextlib.suppress(Exception):  # raise the error of this rank, not one of the collective
            _gathered(False, group)
        raise
    if not all(success is True for success in _gathered(True, group)):
        raise RuntimeError(f"another rank has failed to write its part of {partial}; {path} was not created")
    _on_first(group, lambda: _published(partial, path), f"flush {partial} and rename it to {path}")


def _checked(path: str | os.PathLike[str], group: dist.ProcessGroup | None) -> Path:
    """The path, after all ranks have checked that it can be created."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or an os.PathLike, got {path!r}")
    path = Path(path)
    require(path.name not in ("", ".."), "path", str(path), "one that ends with a folder name")
    require(_rank(group) >= 0, "group", group, "None, or a group that contains this process")
    problem: OSError | None = None
    if not path.parent.is_dir():
        problem = FileNotFoundError(f"path must be in an existing folder, got {path}")
    elif os.path.lexists(path):
        problem = FileExistsError(f"path must not exist yet, got {path}: write each checkpoint to a new folder")
    found = _gathered((str(path), problem), group)
    paths = sorted({str(theirs) for theirs, _ in found})
    require(len(paths) == 1, "path", paths, "the same on all ranks")
    for _, theirs in found:
        if theirs is not None:
            raise theirs
    return path


def _emptied(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()


def _published(partial: Path, path: Path) -> None:
    for entry in (*partial.rglob("*"), partial):
        if entry.is_dir():
            flush_folder(entry)
        else:
            _flush_file(entry)
    os.rename(partial, path)
    flush_folder(path.parent)


def _flush_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _on_first(group: dist.ProcessGroup | None, act: Callable[[], None], what: str) -> None:
    """Calls `act` on the first rank while the others wait; raises on all ranks if it fails."""
    failed: OSError | None = None
    if _rank(group) == 0:
        try:
            act()
        except OSError as error:
            failed = error
    if not all(success is True for success in _gathered(failed is None, group)):
        raise failed or RuntimeError(f"the first rank has failed to {what}")


def _rank(group: dist.ProcessGroup | None) -> int:
    """The rank of this process in the group; negative if it is not a member."""
    return dist.get_rank(group) if _distributed() else 0


def _gathered(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all ranks of the group: an all-gather."""
    if not _distributed():
        return [mine]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, mine, group=group)
    return values


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
