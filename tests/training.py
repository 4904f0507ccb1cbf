"""A small model with the features that make steps in backward difficult, and training runs for bitwise comparison."""

import torch
from helpers import OPTIONS, bits, on_machine
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from collins import Collins

TIERS = {
    "resident": None,
    "device": "device",
    "host": {"tier": "host", "transfer_size": 900, "staging_slots": 2},
    "mixed": {"device_budget": "6KiB", "transfer_size": 900, "staging_slots": 2},
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """An embedding, blocks, one more block that only some calls use, and a head that may be tied to the embedding."""

    def __init__(self, *, tied=False, checkpointed=None, odd=False, compiled=None):
        super().__init__()
        width = 21 if odd else 24
        self.tokens = nn.Embedding(61, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.optional = Block(width)
        self.head = nn.Linear(width, 61, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.checkpointed = checkpointed  # as `use_reentrant`, or None
        for block in self.blocks if compiled else ():
            block.compile(backend=compiled)

    def forward(self, tokens, optional):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return self.head(self.optional(x) if optional else x)


def make_model(dtype=torch.float32, device="cpu", **model):
    torch.manual_seed(0)
    return Model(**model).to(device, dtype)


def backward(model, step):
    """Computes gradients of step `step`, or in backward takes the steps that follow; every second step uses the whole
    model."""
    device = next(model.parameters()).device
    tokens = torch.randint(61, (4, 7), generator=torch.Generator().manual_seed(step)).to(device)
    logits = model(tokens[:, :-1], optional=step % 2 == 0).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.item()


def take_steps(model, opt, steps, schedule=None):
    for step in steps:
        backward(model, step)
        opt.step()
        opt.zero_grad()
        if schedule is not None:
            schedule.step()


def train_model(steps=7, params=lambda model: model.parameters(), schedule=None, model=None, machine=None, **options):
    """A model after some steps, and its optimizer, on a machine with the given properties (see `on_machine`)."""
    model = make_model(**(model or {}))
    opt = Collins(params(model), **{**OPTIONS, **options})
    if machine is not None:
        on_machine(opt, **machine)
    take_steps(model, opt, range(steps), None if schedule is None else schedule(opt))
    return model, opt


def same_bits(first, second):
    """Whether two (model, optimizer) pairs are bitwise equal in weights and state."""
    (model, opt), (other_model, other_opt) = first, second
    states, other_states = opt.state_dict()["state"], other_opt.state_dict()["state"]
    assert states.keys() == other_states.keys()
    pairs = list(zip(model.parameters(), other_model.parameters(), strict=True))
    for key, state in states.items():
        assert state.keys() == other_states[key].keys()
        pairs += [(value, other_states[key][name]) for name, value in state.items()]
    return all(
        getattr(a, "dtype", int) == getattr(b, "dtype", int) and torch.equal(*map(bits, (a, b))) for a, b in pairs
    )
