"""Folders of many files, written by many ranks, that are whole or not there at all.

`torch.distributed.checkpoint` writes a file for each rank, then an index. Killed while it does so over an older
checkpoint, it leaves new files under the old index. So a folder is written aside and renamed into its place.
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
    """A folder to write to, which is renamed to `path` once every rank has left the context without an error.

    Every rank of the group enters and leaves it; both are collective operations. What has been written by then counts:
    leave it once an asynchronous save has its result. Files are flushed to the disk before the folder is renamed.
    Processes that are killed before, or an error on any rank, leave a folder `.NAME.partial`, which nothing reads and
    the next attempt at `path` empties.

    Args:
        path: of the folder, the same on all ranks and not there yet: no file system replaces one folder by another at
            one moment. Its parent must be there, on a file system that all ranks share.
        group: of the processes that write; None for all of them. Without `torch.distributed` there is one process.

    Yields:
        The folder to write to, there and empty.

    Raises:
        ValueError, TypeError: for a path that names no folder, that is not the same on all ranks, or a group that this
            process is not in.
        FileNotFoundError: when the parent is not there.
        FileExistsError: when something is at `path`. All of these are raised before anything is written.
        RuntimeError: when another rank has failed; nothing is at `path` then.

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
        with contextlib.suppress(Exception):  # the error of this rank is the one to see
            _votes(False, group)
        raise
    if not all(vote is True for vote in _votes(True, group)):
        raise RuntimeError(f"another rank has failed to write its part of {partial}; nothing is at {path}")
    _on_first(group, lambda: _published(partial, path), f"flush {partial} and rename it to {path}")


def _checked(path: str | os.PathLike[str], group: dist.ProcessGroup | None) -> Path:
    """The path, once all ranks have found that it can be made."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or an os.PathLike, got {path!r}")
    path = Path(path)
    require(path.name not in ("", ".."), "path", str(path), "that of a folder with a name of its own")
    require(_rank(group) >= 0, "group", group, "None, or one that this process is in")
    problem: OSError | None = None
    if not path.parent.is_dir():
        problem = FileNotFoundError(f"path must be in a folder that is there, got {path}")
    elif os.path.lexists(path):
        problem = FileExistsError(f"path must not be there yet, got {path}: give each checkpoint a folder of its own")
    found = _votes((str(path), problem), group)
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
    """Has the first rank act, and the others wait for it; raises on all of them if it fails."""
    failed: OSError | None = None
    if _rank(group) == 0:
        try:
            act()
        except OSError as error:
            failed = error
    if not all(vote is True for vote in _votes(failed is None, group)):
        raise failed or RuntimeError(f"the first rank has failed to {what}")


def _rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group; negative if it is not in it."""
    return dist.get_rank(group) if _distributed() else 0


def _votes(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What each rank of the group says; all of them wait here for each other."""
    if not _distributed():
        return [mine]
    votes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(votes, mine, group=group)
    return votes


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
