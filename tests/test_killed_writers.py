"""Processes are killed at random moments while they save: the path is always complete, and others can go on.

At a few moments in the suite, at 100 by name:

    pytest -n 0 tests/test_killed_writers.py --hypothesis-profile=thorough
"""

import random
import time

import torch
from hypothesis import settings
from ranks import _CONTEXT as CONTEXT

import collins
from collins import CheckpointError, whole_folder

KILLS = 100 if settings.get_current_profile_name() == "thorough" else 10
ELEMENTS = 100_000


def write_files(path, first, saved):
    """Repeatedly saves a file in which all values are the same number."""
    for number in range(first, 10_000):
        collins.save(path, number=number, t=torch.full((ELEMENTS,), float(number)), u=[number] * 100)
        saved.set()


def write_folders(root, first, saved):
    """Repeatedly saves a folder of files in which all values are the same number."""
    for number in range(first, 10_000):
        with whole_folder(root / f"step-{number}") as folder:
            assert not list(folder.iterdir())  # remains of an earlier process are removed
            for rank in range(4):
                (folder / f"{rank}").write_text(f"{number}" * 20_000)
        saved.set()


def kill_at_random(writer, path, check):
    """Starts a writer `KILLS` times and kills it at a random moment after a save; `check` returns where to go on."""
    rng, start, moments = random.Random(0), 1, set()
    for _ in range(KILLS):
        saved = CONTEXT.Event()
        process = CONTEXT.Process(target=writer, args=(path, start, saved))
        process.start()
        assert saved.wait(60)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        start, has_partial = check()
        moments.add(has_partial)
    assert True in moments  # some in the middle of a save


def test_a_file_is_complete_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "last.pt"

    def check():
        content = collins.load(path)
        number = content["number"]
        assert torch.equal(content["t"], torch.full((ELEMENTS,), float(number)))
        assert content["u"] == [number] * 100
        partial = [file for file in tmp_path.iterdir() if file != path]
        assert len(partial) <= 1
        for file in partial:
            try:
                partial_number = collins.load(file)["number"]
            except CheckpointError:
                partial_number = number + 1
            assert partial_number == number + 1  # complete, but not yet renamed
            file.unlink()
        return number + 1, bool(partial)

    kill_at_random(write_files, path, check)


def test_folders_are_complete_whenever_their_writer_is_killed(tmp_path):
    def check():
        numbers = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
        assert numbers == list(range(1, len(numbers) + 1))
        for number in numbers[-3:]:
            for rank in range(4):
                assert (tmp_path / f"step-{number}" / f"{rank}").read_text() == f"{number}" * 20_000
        partial = [path.name for path in tmp_path.glob(".*")]
        assert partial in ([], [f".step-{numbers[-1] + 1}.partial"])
        return numbers[-1] + 1, bool(partial)

    kill_at_random(write_folders, tmp_path, check)
