"""Training runs that are interrupted. Run as a script with a folder of checkpoints, this file resumes them."""

import sys
from itertools import product
from pathlib import Path

import torch

import collins
from collins import Collins

STEPS, HALF = 20, 10

CASES = [
    dict(zip(("dtype", "hash", "memory", "in_backward", "compile"), values, strict=True))
    for values in [
        *product((torch.float32, torch.bfloat16), ("block", "universal"), (None, "host"), (False, True), (False,)),
        # Not "universal": its compiled scatter adds atomically, in an order that depends on the threads.
        *product((torch.float32, torch.bfloat16), ("block",), (None,), (False,), (True,)),
        (torch.bfloat16, "block", "host", True, True),
    ]
]


class Run:
    """A training run whose learning rate and betas change with every step."""

    def __init__(self, dtype, hash, memory, in_backward, compile):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 61)]
        self.model = torch.nn.Sequential(*layers).to(dtype)
        self.optimizer = Collins(
            self.model.parameters(),
            lr=0.02,
            min_K=16,
            rehash_period=4,  # signs change before and after the interruption
            table_dtype=dtype,
            hash=hash,
            memory=memory,
            in_backward=in_backward,
            compile=compile,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.02, total_steps=STEPS + 1)

    @property
    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def train(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 64, generator=generator).to(self.model[0].weight)
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return self

    def state(self):
        return {name: part.state_dict() for name, part in self.parts.items()}


def checkpoint(folder, number):
    return Path(folder) / f"{number}.pt"


def result(folder, number):
    return Path(folder) / f"{number}.end.pt"


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        if checkpoint(sys.argv[1], number).exists():
            run = Run(**case)
            collins.load(checkpoint(sys.argv[1], number), **run.parts)
            collins.save(result(sys.argv[1], number), **run.train(HALF, STEPS).state())
