"""Data-parallel replicas: what `DistributedDataParallel` expects of an optimizer."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor.debug import CommDebugMode

from collins import Collins


def replica(rank, world, path, dtype, options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)  # hashes must not come from here
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64)).to(dtype)
    ddp = torch.nn.parallel.DistributedDataParallel(net)  # takes rank 0's weights
    opt = Collins(ddp.parameters(), lr=1e-2, min_K=16, rehash_period=3, **options)
    for step in range(6):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
        ddp(x).square().mean().backward()
        with CommDebugMode() as talk:
            opt.step()
        assert talk.get_total_counts() == 0
        opt.zero_grad()
    kept = [opt.state[p][name] for p in net.parameters() for name in opt.state[p] if name not in ("step", "layout")]
    torch.save([*(p.detach() for p in net.parameters()), *kept], f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"hash": "universal"}, {"memory": "host"}], ids=str)
def test_replicas_stay_the_same_to_the_bit_without_a_word(options, dtype, tmp_path):
    world = 2
    mp.spawn(replica, (world, str(tmp_path), dtype, options), nprocs=world)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world))
    assert len(first) == 4 + 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
