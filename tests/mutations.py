"""Invalid values as damaged files, other programs and mistakes produce them, derived from valid ones by a seed.

A seed is a string such as "state dict/host/17". A case depends on its seed only, and a failing case prints it."""

import contextlib
import copy
import itertools
import math
import os
import random
import signal

import numpy as np
import torch

ONLY = os.environ.get("FUZZ_CASE")  # the seed of the only case to run
TIME_LIMIT = 60  # seconds
MOST_VALID = 30  # cases of a kind that may all be valid; up to half of them are, for example with an additional entry

VALUES = [
    None, True, False, 0, 1, -1, 2**24, 2**31, 2**63, 2**70, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-300, 1e300,
    math.inf, -math.inf, math.nan, 1j, "", "x", "auto", "host", "0.1", "1e400", "10%", "2GiB", "int8", "torch.float32",
    b"", b"\x00", (), [], {}, set(), (0.9,), (0.9, 0.999), [0.9, 0.999, 0.5], {"params": []}, range(3), object, len,
    np.float32(0.1), np.int64(3), np.zeros(2), torch.float32, torch.device("meta"), torch.Size([2]),
]  # fmt: skip


class Cases:
    """The cases of one kind: counts how they ended, and adds the seed to the error of a failing case.

    Args:
        kind: the beginning of their seeds.
        count: their number, which is exceeded if none of them is rejected."""

    def __init__(self, *kind, count):
        self.kind = "/".join(kind)
        self.count = count
        self.ended = dict.fromkeys(("refused", "accepted"), 0)

    def __iter__(self):
        """The seeds of `count` cases. If all of these are valid, more until one is rejected, up to `MOST_VALID`."""
        if ONLY:
            yield from [ONLY] * ONLY.startswith(f"{self.kind}/")
            return
        for number in itertools.count():
            if number >= (self.count if self.ended["refused"] else max(self.count, MOST_VALID)):
                return
            yield f"{self.kind}/{number}"

    @contextlib.contextmanager
    def case(self, seed):
        """Runs a case, whose body uses a mutated value and must end within `TIME_LIMIT`; yields a random generator."""

        def fail(*_):
            raise AssertionError(f"no end after {TIME_LIMIT} s")

        before = signal.signal(signal.SIGALRM, fail)
        signal.alarm(TIME_LIMIT)
        try:
            yield random.Random(seed)
        except BaseException as error:
            error.add_note(f"run this case alone: FUZZ_CASE='{seed}' pytest -n 0 tests/test_fuzz.py")
            raise
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def end(self):
        """Prints the counts, and fails if no case was rejected, since the mutations then have no effect."""
        print(f"{self.kind}: {self.ended}")
        assert ONLY or self.ended["refused"]


def random_value(rng):
    """A random value that is not derived from a valid one."""
    kind = rng.randrange(10)
    if kind < 6:
        return copy.copy(rng.choice(VALUES))
    if kind < 8:
        shape = [rng.choice([0, 1, 2, 3, 40, 64]) for _ in range(rng.randrange(4))]
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
        return torch.zeros(shape, dtype=dtype) + rng.choice([0, 1])
    return [random_value(rng) for _ in range(rng.randrange(3))] if kind == 8 else {random_key(rng): random_value(rng)}


def random_key(rng):
    return rng.choice(["params", "state", "step", "layout", "m_table", "exp_avg", "lr", "x", 0, 1, 7, -1, None, 1.5])


def random_entry(tree, rng):
    """A random container in a tree of containers, and one of its keys; None if there is none."""
    entry, node = None, tree
    while isinstance(node, dict | list | tuple) and len(node):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(keys)
        entry, node = (node, key), node[key]
        if rng.random() < 0.25:
            break
    return entry


def mutated(tree, rng):
    """A copy of a tree of containers with one to three mutations."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        tree = _mutated_once(tree, rng)
    return tree


def _mutated_once(tree, rng):
    entry = random_entry(tree, rng)
    if entry is None or rng.random() < 0.02:
        return random_value(rng)
    container, key = entry
    if isinstance(container, tuple):
        return tree
    kind = rng.choice(["replace", "replace", "delete", "add", "swap", "double", "perturb", "perturb", "perturb"])
    if kind == "delete":
        del container[key]
    elif kind == "add":
        if isinstance(container, dict):
            container[random_key(rng)] = random_value(rng)
        else:
            container.insert(key, random_value(rng))
    elif kind == "perturb":
        container[key] = almost_valid(container[key], rng)
    elif kind == "replace":
        container[key] = random_value(rng)
    else:
        _exchange(container, key, *random_entry(tree, rng), both=kind == "swap")
        try:
            copy.deepcopy(tree)
        except RecursionError:  # one of the two contained the other
            container[key] = random_value(rng)
    return tree


def _exchange(container, key, other, other_key, both):
    """Copies `other[other_key]` to `container[key]`; exchanges the two if `both`."""
    value, other_value = container[key], other[other_key]
    container[key] = other_value if both else copy.deepcopy(other_value)
    if both and not isinstance(other, tuple):
        other[other_key] = value


def almost_valid(value, rng):
    """A value that is almost valid."""
    if isinstance(value, torch.Tensor):
        try:
            return tensor_like(value, rng)()
        except (RuntimeError, TypeError):
            return random_value(rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        as_float = float(value) if abs(value) < 2**1000 else math.inf
        candidates = [value + 1, -value, value * 2, as_float, str(value), value ^ (1 << rng.randrange(96))]
    elif isinstance(value, float):
        candidates = [value * 2, -value, value + 1, str(value), (value,)]
    elif isinstance(value, str):
        candidates = [value + "x", value[:-1], value.upper(), value.encode(), [value]]
    elif isinstance(value, list):
        candidates = [tuple(value), value[::-1], value[:-1], value + value, dict(enumerate(value))]
    elif isinstance(value, tuple):
        candidates = [list(value), value[::-1], value[:-1], (*value, *value)]
    elif isinstance(value, dict):
        candidates = [list(value.items()), list(value), dict(list(value.items())[:-1])]
    else:
        candidates = [random_value(rng)]
    return rng.choice(candidates)


def tensor_like(t, rng):
    """Makes a tensor that differs from `t`."""
    return rng.choice([
        lambda: t.double(), lambda: t.bfloat16(), lambda: t.to(torch.int8), lambda: t.to("meta"), lambda: t.to_sparse(),
        lambda: t.flatten(), lambda: t[None], lambda: t.new_zeros(0), lambda: t.new_zeros(3),
        lambda: t.new_full(t.shape, math.nan if t.is_floating_point() else 1), lambda: t.clone().requires_grad_(),
        lambda: t.new_ones(1).expand(t.shape), lambda: t.t() if t.ndim == 2 else t, lambda: t.tolist(),
        lambda: t.numpy(), lambda: torch.nn.Parameter(t, requires_grad=False), lambda: -t,
        lambda: t.to(torch.complex64),
    ])  # fmt: skip


def damaged_bytes(data, rng, parts=()):
    """A copy of the bytes of a file with one to three mutations.

    Args:
        parts: ranges (start, end), two of which may be exchanged, or one of which may be damaged."""
    data = bytearray(data)
    kinds = ["flip", "flip", "flip", "cut", "insert", "delete", "zeros", "copy", *["swap"] * bool(parts)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choice(kinds)
        if parts and kind != "swap" and rng.random() < 0.5:
            start, end = rng.choice(parts)
            position = min(rng.randrange(start, end), len(data))
        else:
            position = rng.randrange(len(data) + 1)
        count = rng.choice([1, 2, 8, 64])
        if kind == "flip" and position < len(data):
            data[position] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[position:]
        elif kind == "insert":
            data[position:position] = rng.randbytes(count)
        elif kind == "delete":
            del data[position : position + count]
        elif kind == "zeros":
            data[position : position + count] = bytes(len(data[position : position + count]))
        elif kind == "copy":
            other = rng.randrange(len(data) + 1)
            data[position : position + count] = data[other : other + count]
        elif kind == "swap":
            (a, b), (c, d) = sorted(rng.choices(parts, k=2))
            if b <= c:  # parts do not overlap: these are two different ones
                data[:] = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    return bytes(data)
