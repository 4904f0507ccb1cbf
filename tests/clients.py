"""Shared by the tests of training frameworks: a small network, and an optimizer that repeats the steps of another."""

import importlib

import torch
from helpers import same

from collins import Collins


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))


def inputs(step, dtype=torch.float32):
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(step)).to(dtype)


def component(path):
    """The object that an import path in a configuration names, imported as the frameworks import it."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


class Repeater:
    """A second optimizer, on copies of the first one's parameters, that repeats its steps.

    After each step of the first optimizer, the second one steps with the same gradients and learning rates. The two
    stay bitwise equal only if the framework does nothing but step the first one."""

    def __init__(self, optimizer):
        self.first = optimizer
        groups = []
        for group in optimizer.param_groups:
            copies, names = [p.detach().clone() for p in group["params"]], group.get("param_names")
            groups.append({**group, "params": list(zip(names, copies, strict=True)) if names else copies})
            groups[-1].pop("param_names", None)
        self.second = Collins(groups)
        self.norms = []  # total norm of all gradients, of each step
        self.gradients = None  # the gradients of the first step
        optimizer.register_step_post_hook(self._repeat)  # runs after a closure, which computes the gradients

    def _repeat(self, *_):
        for group, copied_group in zip(self.first.param_groups, self.second.param_groups, strict=True):
            copied_group["lr"] = group["lr"]
            for p, q in zip(group["params"], copied_group["params"], strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
        grads = [q.grad for group in self.second.param_groups for q in group["params"] if q.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())
        self.gradients = self.gradients or grads
        self.second.step()

    @property
    def is_equal(self):
        """Whether parameters and state of both are bitwise equal, after at least one step."""
        pairs = [
            (p, q)
            for group, copied_group in zip(self.first.param_groups, self.second.param_groups, strict=True)
            for p, q in zip(group["params"], copied_group["params"], strict=True)
        ]
        are_equal = all(torch.equal(p, q) and same(self.first.state[p], self.second.state[q]) for p, q in pairs)
        return are_equal and len(self.norms) > 0


def steps_taken(optimizer):
    """The number of steps, which must be the same for all parameters."""
    (steps,) = {int(state["step"]) for state in optimizer.state.values()}
    return steps


class StatisticsCalls:
    """Records the calls of `Collins.statistics`: `read` holds the steps after which statistics were read, `measured`
    those after which measuring the next update was requested."""

    def __init__(self, monkeypatch):
        self.read, self.measured = [], []
        statistics = Collins.statistics

        def record(opt, updates=False):
            steps = {int(state["step"]) for state in opt.state.values()}
            (self.measured if updates else self.read).append(max(steps, default=0))
            return statistics(opt, updates)

        monkeypatch.setattr(Collins, "statistics", record)
