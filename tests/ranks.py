"""Runs a function on several ranks, each a process of a gloo group, and returns their results."""

import multiprocessing
import os
import socket
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, in a process that runs nothing else
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "collins"])


def run(world, function, *args, folder, timeout=120, backend="gloo", device="cpu", kill_at=None):
    """Returns `[function(rank, *args) for each rank]`, run on `world` ranks at once; fails with their tracebacks if one
    fails.

    Args:
        function: defined in a module that can be imported; its result is passed through `torch.save`.
        folder: an empty folder for this call, which receives the files of the ranks.
        timeout: in seconds, after which all ranks are killed.
        backend: of the process group; None if the function creates its group from the environment.
        kill_at: a path; when it exists, all ranks are killed by SIGKILL, and None is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, world, port, str(folder), backend, device, function, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in ranks) and not list(folder.glob("*.failed")):
            if time.monotonic() > deadline:
                pytest.fail(f"{function.__name__} took more than {timeout} s on {world} ranks")
            if kill_at is not None and kill_at.exists():
                return None
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
    assert kill_at is None, f"no rank has created {kill_at}"
    assert [process.exitcode for process in ranks] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _rank(rank, world, port, folder, backend, device, function, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    warnings.simplefilter("error")
    # From torch: deprecations in its own imports, a barrier without a device, and storages in version 2.9.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".*barrier", category=UserWarning)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
    torch.set_num_threads(1)
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        if backend is not None:
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
        result = function(rank, *args)
        torch.save(result, f"{folder}/{rank}.pt")
        if backend is not None:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        with open(f"{folder}/rank {rank}.failed", "w") as file:
            file.write(traceback.format_exc())
        os._exit(1)  # other ranks may wait for this one
