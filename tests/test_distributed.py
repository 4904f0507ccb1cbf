"""Data-parallel replicas: what `DistributedDataParallel` expects of an optimizer."""

import pytest
import torch
from ranks import run
from torch.distributed.tensor.debug import CommDebugMode

from collins import Collins

CASES = [
    (options, dtype)
    for options in ({}, {"hash": "universal"}, {"memory": "host"})
    for dtype in (torch.float32, torch.bfloat16)
]


def replica(rank, options, dtype):
    torch.manual_seed(rank)  # hashes must not come from here
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64)).to(dtype)
    ddp = torch.nn.parallel.DistributedDataParallel(net)  # takes rank 0's weights
    opt = Collins(ddp.parameters(), lr=1e-2, min_K=16, rehash_period=3, **options)
    talked = 0
    for step in range(6):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
        ddp(x).square().mean().backward()
        with CommDebugMode() as talk:
            opt.step()
        talked += talk.get_total_counts()
        opt.zero_grad()
    kept = [opt.state[p][name] for p in net.parameters() for name in opt.state[p] if name not in ("step", "layout")]
    return [*(p.detach() for p in net.parameters()), *kept], talked


def replicas(rank):
    return [replica(rank, options, dtype) for options, dtype in CASES]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What each case ended in on each of two ranks, all cases in one group of processes."""
    return list(zip(*run(2, replicas, folder=tmp_path_factory.mktemp("replicas")), strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case])))
def test_replicas_stay_the_same_to_the_bit_without_a_word(ended, case):
    (first, *talked), (second, *also) = ended[case]
    assert talked == also == [0]
    assert len(first) == 4 + 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
