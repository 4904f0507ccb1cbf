"""What the tests of training frameworks share: a tiny network, and a twin that shows what a framework did."""

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
    """What a configuration names, as all frameworks that import it find it."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


class Twin:
    """A second optimizer, on copies of the first one's parameters, that repeats its steps by hand.

    Each time the first one has stepped, the twin steps with the gradients and the learning rates that were there. The
    two stay alike to the bit only while whoever drives the first one does no more and no less than to step it.
    """

    def __init__(self, optimizer):
        self.first = optimizer
        groups = []
        for group in optimizer.param_groups:
            copies, names = [p.detach().clone() for p in group["params"]], group.get("param_names")
            groups.append({**group, "params": list(zip(names, copies, strict=True)) if names else copies})
            groups[-1].pop("param_names", None)
        self.second = Collins(groups)
        self.norms = []  # of all gradients together, in each step
        self.gradients = None  # those of the first step
        optimizer.register_step_post_hook(self._repeat)  # after a closure, which makes the gradients, has run

    def _repeat(self, *_):
        for group, own in zip(self.first.param_groups, self.second.param_groups, strict=True):
            own["lr"] = group["lr"]
            for p, q in zip(group["params"], own["params"], strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
        found = [q.grad for group in self.second.param_groups for q in group["params"] if q.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(found).item())
        self.gradients = self.gradients or found
        self.second.step()

    @property
    def agrees(self):
        """Whether parameters and state are the same to the bit, after at least one step."""
        pairs = [
            (p, q)
            for group, own in zip(self.first.param_groups, self.second.param_groups, strict=True)
            for p, q in zip(group["params"], own["params"], strict=True)
        ]
        alike = all(torch.equal(p, q) and same(self.first.state[p], self.second.state[q]) for p, q in pairs)
        return alike and len(self.norms) > 0


def steps_taken(optimizer):
    """The number of steps that all parameters have seen."""
    (steps,) = {int(state["step"]) for state in optimizer.state.values()}
    return steps


class Asked:
    """`Collins.statistics` as it is called: which steps it was asked of, and after which ones to measure the next."""

    def __init__(self, monkeypatch):
        self.read, self.measured = [], []
        statistics = Collins.statistics

        def recorded(opt, updates=False):
            taken = {int(state["step"]) for state in opt.state.values()}
            (self.measured if updates else self.read).append(max(taken, default=0))
            return statistics(opt, updates)

        monkeypatch.setattr(Collins, "statistics", recorded)
