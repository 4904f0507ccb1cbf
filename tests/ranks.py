"""Runs a function on several ranks, each a process of a gloo group, and hands back what each returned."""

import multiprocessing
import os
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, in a process that runs nothing else
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "collins"])


def run(world, function, *args, folder, timeout=120, backend="gloo", device="cpu"):
    """`[function(rank, *args) for each rank]`, on `world` ranks at once; fails with their tracebacks if one fails.

    Args:
        function: of a module that can be imported; what it returns is saved by `torch.save`.
        folder: for what the ranks leave behind, empty and this call's own.
        timeout: in seconds, after which all ranks are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, world, str(folder), backend, device, function, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in ranks) and not list(folder.glob("*.failed")):
            if time.monotonic() > end:
                pytest.fail(f"{function.__name__} took more than {timeout} s on {world} ranks")
            time.sleep(0.02)
        for process in ranks:
            process.join(2)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    failed = sorted(folder.glob("*.failed"))
    if failed:
        pytest.fail("\n".join(f"{path.stem}: {path.read_text()}" for path in failed))
    assert [process.exitcode for process in ranks] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank, world, folder, backend, device, function, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    warnings.simplefilter("error")
    # Of torch itself: what it deprecates in its own imports, and a barrier that guesses its device.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".*barrier", category=UserWarning)
    torch.set_num_threads(1)
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
        result = function(rank, *args)
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        with open(f"{folder}/rank {rank}.failed", "w") as file:
            file.write(traceback.format_exc())
        os._exit(1)  # the others may wait for this rank
