"""Data-parallel replicas: what `DistributedDataParallel` expects of an optimizer."""

import pytest
import torch
from helpers import OPTIONS, moments
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
    opt = Collins(ddp.parameters(), **OPTIONS, **options)
    talked = 0
    for step in range(6):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
        ddp(x).square().mean().backward()
        with CommDebugMode() as talk:
            opt.step()
        talked += talk.get_total_counts()
        opt.zero_grad()
    kept = [moment for p in net.parameters() for moment in moments(opt, p)]
    return [*(p.detach() for p in net.parameters()), *kept], talked


def replicas(rank):
    return [replica(rank, options, dtype) for options, dtype in CASES]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The results of each case on each of two ranks; one group of processes runs all cases."""
    return list(zip(*run(2, replicas, folder=tmp_path_factory.mktemp("replicas")), strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case])))
def test_replicas_stay_bitwise_equal_without_communication(ended, case):
    (first, *talked), (second, *also) = ended[case]
    assert talked == also == [0]
    scales = 0 if "hash" in CASES[case][0] else 2  # of first moments in integers
    assert len(first) == 4 + 2 * 4 + scales
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def stepping_in_backward(rank):
    net = torch.nn.Linear(64, 96)
    opt = Collins(net.parameters(), min_K=16, in_backward=True)
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match="in_backward must be False for parameters of DistributedDataParallel"):
        ddp(torch.randn(8, 64)).square().mean().backward()
    other = torch.nn.Linear(64, 96)
    of_others = Collins(other.parameters(), min_K=16, in_backward=True)
    other(torch.randn(8, 64)).square().mean().backward()
    of_others.step()
    return torch.equal(net.weight.detach(), before), len(opt.state), len(of_others.state)


def test_in_backward_is_rejected_for_replicas(tmp_path):
    assert run(2, stepping_in_backward, folder=tmp_path) == [(True, 0, 2)] * 2
