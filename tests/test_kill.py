"""Sharded training that is killed while it saves resumes on fewer ranks with the same result."""

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import EXAMPLES
from ranks import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from collins import Collins, whole_folder

STEPS, EVERY, BATCH, CONTEXT = 12, 4, 8, 16


class HaltingWriter(dcp.FileSystemWriter):
    """Writes half of the first file of rank 1, creates a marker file, and blocks; other ranks write their files."""

    def __init__(self, path, marker):
        super().__init__(path)
        self.marker = marker

    def write_data(self, plan, planner):
        results = super().write_data(plan, planner)
        if dist.get_rank() == 1:
            (file, *_) = sorted(Path(self.path).glob("__1_*"))
            with open(file, "r+b") as handle:
                handle.truncate(file.stat().st_size // 2)
            self.marker.touch()
            time.sleep(600)
        return results


def train(rank, root, kill_in_save=None, zero_moments=False):
    """Resumes from the newest complete checkpoint, and trains to the end; saves every few steps.

    Args:
        root: the folder of checkpoints, "step-4" and so on.
        kill_in_save: (step, moment, path): in the save at `step`, "writing" or "written", make a file at `path`, and
            wait.
        zero_moments: whether to go on with empty moments, which is not what a resumed run may do.

    Returns:
        The step it went on from, the validation loss at the end, in nats per byte, and what it took for checkpoints.
    """
    sys.path.insert(0, str(EXAMPLES))
    from corpus import batches, standard_library
    from llama import Llama

    class Decoder(Llama):
        def forward(self, tokens):
            return self.head(self.features(tokens))

        def loss(self, tokens):
            logits = self(tokens[:, :-1])
            return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    root = Path(root)
    torch.manual_seed(0)
    model = Decoder(layers=1, hidden=64, ffn=176, heads=2, kv_heads=2, vocab=256, checkpointed=False)
    model.fill()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = Collins(model.named_parameters(), lr=1e-2, min_K=64, rehash_period=5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=STEPS, eta_min=1e-3)

    def content(step):
        weights, moments = get_state_dict(model, opt)
        return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "step": step}

    checkpoints = sorted(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    first = 0
    if checkpoints:
        state = content(0)
        dcp.load(state, checkpoint_id=checkpoints[-1])
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    if zero_moments:
        for state in opt.state.values():
            for name in state.keys() - {"step", "layout"}:
                state[name].to_local().zero_()

    text = standard_library()[: 1 << 20]
    split = len(text) * 9 // 10
    part = slice(rank * BATCH // dist.get_world_size(), (rank + 1) * BATCH // dist.get_world_size())
    data = list(batches(text[:split], STEPS, BATCH, CONTEXT, 0, torch.device("cpu")))
    for step in range(first + 1, STEPS + 1):
        model.loss(data[step - 1][part]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad()
        if step % EVERY == 0:
            save_step, moment, marker = kill_in_save or (0, None, None)
            with whole_folder(root / f"step-{step}") as folder:
                writer = (
                    HaltingWriter(folder, marker)
                    if (save_step, moment) == (step, "writing")
                    else dcp.FileSystemWriter(folder)
                )
                dcp.save(content(step), storage_writer=writer)
                if (save_step, moment) == (step, "written"):
                    marker.touch()
                    time.sleep(600)
    held_out = next(iter(batches(text[split:], 1, 64, CONTEXT, 1, torch.device("cpu"))))
    with torch.no_grad():
        return first, model.loss(held_out).item(), [path.name for path in checkpoints]


def test_a_run_killed_while_it_saves_resumes_on_fewer_ranks_with_the_same_result(tmp_path):
    pytest.importorskip("matplotlib.font_manager")  # of the example: makes its cache, which ranks would wait for

    def folder_of(name):
        return {"folder": tmp_path / name}

    (tmp_path / "never").mkdir()
    root = tmp_path / "killed"
    root.mkdir()
    ((_, expected, _), *_) = run(4, train, tmp_path / "never", **folder_of("4 ranks"))

    # Within a file: rank 1 has written half of its file, and there is no index yet.
    marker = tmp_path / "writing"
    run(4, train, root, (8, "writing", marker), **folder_of("4 ranks, killed"), kill_at=marker)
    assert sorted(path.name for path in root.iterdir()) == [".step-8.partial", "step-4"]
    partial = root / ".step-8.partial"
    assert not (partial / ".metadata").exists()
    halves = {path.name: path.stat().st_size for path in partial.glob("__1_*")}

    # All files are written, but not every rank has reported it.
    marker = tmp_path / "written"
    run(2, train, root, (8, "written", marker), **folder_of("2 ranks, killed"), kill_at=marker)
    assert sorted(path.name for path in root.iterdir()) == [".step-8.partial", "step-4"]
    assert (partial / ".metadata").exists()
    assert all((partial / name).stat().st_size != size for name, size in halves.items())
    assert not list(partial.glob("__3_*"))  # of the four ranks before

    contents = {path.name: path.read_bytes() for path in (root / "step-4").iterdir()}
    ((_, loss_without_moments, _), *_) = run(
        2, train, _copied(root, tmp_path / "forgetting"), None, True, **folder_of("forgetting")
    )
    results = run(2, train, root, **folder_of("2 ranks"))
    assert results[0] == results[1]
    first, loss, checkpoints = results[0]
    assert (first, checkpoints) == (4, ["step-4"])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss_without_moments != pytest.approx(expected, rel=1e-3)  # the difference that this precision can resolve
    assert sorted(path.name for path in root.iterdir()) == ["step-12", "step-4", "step-8"]
    assert {path.name: path.read_bytes() for path in (root / "step-4").iterdir()} == contents


def _copied(root, to):
    import shutil

    shutil.copytree(root, to)
    return to
