"""Folders are complete or absent, whatever happens to the ranks that write them."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run

from collins import whole_folder


def names(root):
    return sorted(path.name for path in root.iterdir())


def make_folder(path, rank, meanwhile=lambda folder: None, **options):
    with whole_folder(path, **options) as folder:
        (folder / str(rank)).write_text("")
        meanwhile(folder)


def test_a_folder_appears_atomically_and_flushed(tmp_path, monkeypatch):
    calls = []
    rename, fsync = os.rename, os.fsync
    monkeypatch.setattr(os, "rename", lambda *args: (calls.append("rename"), rename(*args)))
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_ino), fsync(handle)))
    with whole_folder(tmp_path / "step-1") as folder:
        assert folder.parent == tmp_path
        assert not list(folder.iterdir())
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text(name)
        assert not list(tmp_path.glob("step*"))
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1/inner/b").read_text() == "inner/b"
    inodes = {path.stat().st_ino for path in (tmp_path / "step-1", *(tmp_path / "step-1").rglob("*"))}
    assert len(inodes) == 4
    assert set(calls[: calls.index("rename")]) == inodes
    assert calls[-2:] == ["rename", tmp_path.stat().st_ino]


def test_an_error_leaves_no_files_and_the_next_attempt_starts_again(tmp_path):
    with pytest.raises(KeyError):
        make_folder(str(tmp_path / "step-1"), "old", {}.__getitem__)
    assert names(tmp_path) == [".step-1.partial"]
    make_folder(tmp_path / "step-1", "new")
    assert names(tmp_path) == ["step-1"]
    assert names(tmp_path / "step-1") == ["new"]


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        (7, TypeError, "path must be a str or an os.PathLike, got 7"),
        ("", ValueError, "path must be one that ends with a folder name, got '.'"),
        ("there/..", ValueError, "path must be one that ends with a folder name, got 'there/..'"),
        ("nowhere/step-1", FileNotFoundError, "path must be in an existing folder, got nowhere/step-1"),
        ("there", FileExistsError, "path must not exist yet, got there"),
        ("dangling", FileExistsError, "path must not exist yet, got dangling"),
    ],
)
def test_paths_that_cannot_be_created_are_rejected(path, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(error, match=text), whole_folder(path):
        pytest.fail("entered")
    assert names(tmp_path) == ["dangling", "there"]


def test_a_folder_that_cannot_be_created_raises(tmp_path):
    (tmp_path / ".step-1.partial").write_text("a file, which is no earlier attempt")
    with pytest.raises(OSError, match=r"\.step-1\.partial"), whole_folder(tmp_path / "step-1"):
        pytest.fail("entered")


def write_together(rank, root):
    root = Path(root)
    make_folder(root / "step-1", rank)
    assert names(root / "step-1") == ["0", "1"]

    def fail_on_one(folder):
        if rank:
            raise KeyError

    with pytest.raises(KeyError if rank else RuntimeError, match=None if rank else "another rank has failed"):
        make_folder(root / "step-2", rank, fail_on_one)
    with pytest.raises(ValueError, match=r"path must be the same on all ranks, got \["):
        make_folder(root / f"step-{3 + rank}", rank)
    with pytest.raises(FileExistsError):
        make_folder(root / "step-1", rank)

    def create_the_path(folder):
        dist.barrier()  # until both have found that the path is free
        (root / "step-5").write_text("somebody else's")

    with pytest.raises(RuntimeError if rank else OSError, match="first rank has failed to flush" if rank else None):
        make_folder(root / "step-5", rank, create_the_path)
    assert (root / "step-5").is_file()
    group = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="group must be None, or a group that contains this process"):
            make_folder(root / "step-6", rank, group=group)
    else:
        make_folder(root / "step-6", rank, group=group)


def test_ranks_create_a_folder_together_or_not_at_all(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    run(2, write_together, str(root), folder=tmp_path / "ranks")
    assert names(root) == [".step-2.partial", ".step-5.partial", "step-1", "step-5", "step-6"]
