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
    collectives = 0
    for step in range(6):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
        ddp(x).square().mean().backward()
        with CommDebugMode() as comm_debug:
            opt.step()
        collectives += comm_debug.get_total_counts()
        opt.zero_grad()
    moments_of_params = [moment for p in net.parameters() for moment in moments(opt, p)]
    return [*(p.detach() for p in net.parameters()), *moments_of_params], collectives


def replicas(rank):
    return [replica(rank, options, dtype) for options, dtype in CASES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each case on each of two ranks; one group of processes runs all cases."""
    return list(zip(*run(2, replicas, folder=tmp_path_factory.mktemp("replicas")), strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case])))
def test_replicas_stay_bitwise_equal_without_communication(results, case):
    (tensors, *collectives), (other_tensors, *other_collectives) = results[case]
    assert collectives == other_collectives == [0]
    scales = 0 if "hash" in CASES[case][0] else 2  # of first moments in integers
    assert len(tensors) == 4 + 2 * 4 + scales
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))


def stepping_in_backward(rank):
    net = torch.nn.Linear(64, 96)
    opt = Collins(net.parameters(), min_K=16, in_backward=True)
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match="in_backward must be False for parameters of DistributedDataParallel"):
        ddp(torch.randn(8, 64)).square().mean().backward()
    other = torch.nn.Linear(64, 96)
    other_opt = Collins(other.parameters(), min_K=16, in_backward=True)
    other(torch.randn(8, 64)).square().mean().backward()
    other_opt.step()
    return torch.equal(net.weight.detach(), before), len(opt.state), len(other_opt.state)


def test_in_backward_is_rejected_for_replicas(tmp_path):
    assert run(2, stepping_in_backward, folder=tmp_path) == [(True, 0, 2)] * 2
