"""Values as they come from damaged files, other programs and slips of the hand: made from right ones, each by a seed.

A seed is a string such as "state dict/host/17". It is all that a case depends on, and what a failing one names.
"""

import contextlib
import copy
import math
import os
import random
import signal

import numpy as np
import torch

ONLY = os.environ.get("FUZZ_CASE")  # the seed of the one case to try
PATIENCE = 60  # seconds

ODD = [
    None, True, False, 0, 1, -1, 2**24, 2**31, 2**63, 2**70, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-300, 1e300,
    math.inf, -math.inf, math.nan, 1j, "", "x", "auto", "host", "0.1", "1e400", "10%", "2GiB", "int8", "torch.float32",
    b"", b"\x00", (), [], {}, set(), (0.9,), (0.9, 0.999), [0.9, 0.999, 0.5], {"params": []}, range(3), object, len,
    np.float32(0.1), np.int64(3), np.zeros(2), torch.float32, torch.device("meta"), torch.Size([2]),
]  # fmt: skip


class Cases:
    """The cases of one kind: how many ended in which way, and what a failing one adds to its error.

    Args:
        kind: with which their seeds begin.
        count: how many there are.
    """

    def __init__(self, *kind, count):
        self.kind = "/".join(kind)
        self.count = count
        self.ended = dict.fromkeys(("refused", "accepted"), 0)

    def __iter__(self):
        seeds = (f"{self.kind}/{number}" for number in range(self.count))
        yield from [ONLY] * ONLY.startswith(f"{self.kind}/") if ONLY else seeds

    @contextlib.contextmanager
    def case(self, seed):
        """A case, whose body tries a value and must end; yields what draws from its seed."""

        def hangs(*_):
            raise AssertionError(f"no end after {PATIENCE} s")

        before = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(PATIENCE)
        try:
            yield random.Random(seed)
        except BaseException as error:
            error.add_note(f"this case alone: FUZZ_CASE='{seed}' pytest -n 0 tests/test_fuzz.py")
            raise
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def end(self):
        """Prints the figures. A kind of which nothing is refused tries nothing."""
        print(f"{self.kind}: {self.ended}")
        assert ONLY or self.ended["refused"]


def odd(chance):
    """A value that nobody has asked for."""
    kind = chance.randrange(10)
    if kind < 6:
        return copy.copy(chance.choice(ODD))
    if kind < 8:
        shape = [chance.choice([0, 1, 2, 3, 40, 64]) for _ in range(chance.randrange(4))]
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
        return torch.zeros(shape, dtype=dtype) + chance.choice([0, 1])
    return [odd(chance) for _ in range(chance.randrange(3))] if kind == 8 else {odd_key(chance): odd(chance)}


def odd_key(chance):
    return chance.choice(["params", "state", "step", "layout", "m_table", "exp_avg", "lr", "x", 0, 1, 7, -1, None, 1.5])


def place_in(tree, chance):
    """A random container within a tree of containers, and a key of it; None for a tree without."""
    found, at = None, tree
    while isinstance(at, dict | list | tuple) and len(at):
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = chance.choice(keys)
        found, at = (at, key), at[key]
        if chance.random() < 0.25:
            break
    return found


def mutated(tree, chance):
    """A copy of a tree of containers in which one to three things are otherwise."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice([1, 1, 2, 3])):
        tree = _mutated_once(tree, chance)
    return tree


def _mutated_once(tree, chance):
    place = place_in(tree, chance)
    if place is None or chance.random() < 0.02:
        return odd(chance)
    container, key = place
    if isinstance(container, tuple):
        return tree
    kind = chance.choice(["odd", "odd", "delete", "add", "swap", "double", "near", "near", "near"])
    if kind == "delete":
        del container[key]
    elif kind == "add":
        if isinstance(container, dict):
            container[odd_key(chance)] = odd(chance)
        else:
            container.insert(key, odd(chance))
    elif kind == "near":
        container[key] = near(container[key], chance)
    elif kind == "odd":
        container[key] = odd(chance)
    else:
        _exchange(container, key, *place_in(tree, chance), both=kind == "swap")
        try:
            copy.deepcopy(tree)
        except RecursionError:  # one of the two was within the other
            container[key] = odd(chance)
    return tree


def _exchange(container, key, other, at, both):
    """Puts what is at another place here, and, for `both`, what was here there."""
    here, there = container[key], other[at]
    container[key] = there if both else copy.deepcopy(there)
    if both and not isinstance(other, tuple):
        other[at] = here


def near(value, chance):
    """A value that is nearly right."""
    if isinstance(value, torch.Tensor):
        try:
            return tensor_like(value, chance)()
        except (RuntimeError, TypeError):
            return odd(chance)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        as_float = float(value) if abs(value) < 2**1000 else math.inf
        others = [value + 1, -value, value * 2, as_float, str(value), value ^ (1 << chance.randrange(96))]
    elif isinstance(value, float):
        others = [value * 2, -value, value + 1, str(value), (value,)]
    elif isinstance(value, str):
        others = [value + "x", value[:-1], value.upper(), value.encode(), [value]]
    elif isinstance(value, list):
        others = [tuple(value), value[::-1], value[:-1], value + value, dict(enumerate(value))]
    elif isinstance(value, tuple):
        others = [list(value), value[::-1], value[:-1], (*value, *value)]
    elif isinstance(value, dict):
        others = [list(value.items()), list(value), dict(list(value.items())[:-1])]
    else:
        others = [odd(chance)]
    return chance.choice(others)


def tensor_like(t, chance):
    """Makes another tensor in the place of one."""
    return chance.choice([
        lambda: t.double(), lambda: t.bfloat16(), lambda: t.to(torch.int8), lambda: t.to("meta"), lambda: t.to_sparse(),
        lambda: t.flatten(), lambda: t[None], lambda: t.new_zeros(0), lambda: t.new_zeros(3),
        lambda: t.new_full(t.shape, math.nan if t.is_floating_point() else 1), lambda: t.clone().requires_grad_(),
        lambda: t.new_ones(1).expand(t.shape), lambda: t.t() if t.ndim == 2 else t, lambda: t.tolist(),
        lambda: t.numpy(), lambda: torch.nn.Parameter(t, requires_grad=False), lambda: -t,
        lambda: t.to(torch.complex64),
    ])  # fmt: skip


def damaged(data, chance, parts=()):
    """Bytes of a file in which one to three things are otherwise.

    Args:
        parts: as (start, end), which may be exchanged with each other, or one of which may be hit.
    """
    data = bytearray(data)
    kinds = ["flip", "flip", "flip", "cut", "insert", "delete", "zeros", "copy", *["swap"] * bool(parts)]
    for _ in range(chance.choice([1, 1, 2, 3])):
        kind = chance.choice(kinds)
        if parts and kind != "swap" and chance.random() < 0.5:
            start, end = chance.choice(parts)
            at = min(chance.randrange(start, end), len(data))
        else:
            at = chance.randrange(len(data) + 1)
        count = chance.choice([1, 2, 8, 64])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = chance.randbytes(count)
        elif kind == "delete":
            del data[at : at + count]
        elif kind == "zeros":
            data[at : at + count] = bytes(len(data[at : at + count]))
        elif kind == "copy":
            other = chance.randrange(len(data) + 1)
            data[at : at + count] = data[other : other + count]
        elif kind == "swap":
            (a, b), (c, d) = sorted(chance.choices(parts, k=2))
            if b <= c:  # parts do not overlap: two different ones
                data[:] = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    return bytes(data)
