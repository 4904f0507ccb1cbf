"""DeepSpeed's flat partitions are refused before anything has changed, and its wrappers of whole parameters are not.

DeepSpeed compiles operators when it starts: here stand classes that do to an optimizer what its own do (0.19.8:
`DeepSpeedZeroOptimizer` in runtime/zero/stage_1_and_2.py, line 584, which then steps once with zeros;
`FP16_UnfusedOptimizer` in runtime/fp16/unfused_optimizer.py, line 88; their bases in runtime/base_optimizer.py).
"""

import sys
import types

import pytest
import torch

from collins import Collins


@pytest.fixture
def deepspeed(monkeypatch):
    base = types.ModuleType("deepspeed.runtime.base_optimizer")

    class DeepSpeedOptimizer:
        pass

    class ZeROOptimizer(DeepSpeedOptimizer):
        pass

    base.DeepSpeedOptimizer, base.ZeROOptimizer = DeepSpeedOptimizer, ZeROOptimizer
    monkeypatch.setitem(sys.modules, base.__name__, base)
    return base


def zero(base, optimizer):
    class DeepSpeedZeroOptimizer(base.ZeROOptimizer):
        def __init__(self):
            self.optimizer = optimizer
            for group in optimizer.param_groups:
                flat = torch.cat([p.detach().flatten() for p in group["params"]]).requires_grad_()
                flat.grad = torch.zeros_like(flat)
                group["params"] = [flat]

    return DeepSpeedZeroOptimizer()


def unfused(base, optimizer):
    class FP16_UnfusedOptimizer(base.DeepSpeedOptimizer):  # noqa: N801
        def __init__(self):
            self.optimizer = optimizer
            for group in optimizer.param_groups:
                group["params"] = [p.detach().clone().float().requires_grad_() for p in group["params"]]

    return FP16_UnfusedOptimizer()


def collins(dtype=torch.float32):
    torch.manual_seed(0)
    return Collins(torch.nn.Linear(64, 64, dtype=dtype).named_parameters(), min_K=16, lr=1e-2)


def test_flat_partitions_are_rejected_at_every_step(deepspeed):
    opt, bystander = collins(), collins()
    wrapper = zero(deepspeed, opt)
    (flat,) = wrapper.optimizer.param_groups[0]["params"]
    before = flat.detach().clone()
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"DeepSpeedZeroOptimizer of DeepSpeed has replaced parameters by flat .* Set ZeRO stage 0",
        ):
            opt.step()
    assert torch.equal(flat, before)
    assert not opt.state
    bystander.param_groups[0]["params"][0].grad = torch.ones(64, 64)
    bystander.step()
    assert len(bystander.state) == 1


def test_copies_of_whole_parameters_are_stepped(deepspeed):
    opt = collins(torch.bfloat16)
    wrapper = unfused(deepspeed, opt)
    p = wrapper.optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[p].keys() >= {"step", "m_table", "v_table", "layout"}
