"""Helpers for several files of tests: models, gradients, comparisons, processes, and the kernel without a GPU."""

import contextlib
import copy
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import collins
from collins.offload.staging import MACHINE
from collins.offload.tiers import TieredStore

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"lr": 1e-2, "min_K": 16, "rehash_period": 3}  # small weights get tables; signs change within a short run
# The ways to perform a step. Tests that are parametrised over `STEP_WAYS` run for each of them.
STEP_SHAPES = [(64, 64), (33, 37), (40,), (), (130, 32)]
FEW_STEP_SHAPES = [(64, 64), (40,)]  # for ways that compile or interpret
STEP_WAYS = {
    "eager": {"compile": False},
    "compiled": {"compile": True},
    "kernel": {},
    "host": {"compile": False, "memory": "host"},
    "universal": {"compile": False, "hash": "universal"},
    "capturable": {"compile": False, "capturable": True},
}


class KernelWithoutLaunch:
    """Replaces the Triton kernel: a launch of it does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def with_kernel(opt):
    """Makes an optimizer step with the Triton kernel, which is interpreted if there is no GPU."""
    if DEVICE == "cpu":
        from collins.compile.multi_tensor import KernelLaunches

        opt._stepper.engine.launches = KernelLaunches("cpu")
    return opt


def on_machine(opt, **machine):
    """Replaces properties of the machine for an optimizer's policy; see `collins.offload.staging.Backend`."""
    opt._stepper.store = TieredStore(opt.memory, dataclasses.replace(MACHINE, **machine))
    return opt


def parameters(dtype, shapes, device=DEVICE):
    """Parameters whose values are the same in every call, and for every dtype and device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def give_gradients(step, *lists):
    """Sets the gradients of step `step`. They depend on the index of a parameter in its list only."""
    for ps in lists:
        for i, p in enumerate(ps):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p)


def moments(opt, p):
    """The first and the second moment of `p`, as tables or dense."""
    return [value for name, value in opt.state[p].items() if name not in ("step", "layout")]


def weights_and_moments(ps, opt):
    """Copies of the weights, and of the moments, of these parameters."""
    opt.state_dict()  # waits for moments on their way to the host
    return [t.detach().clone() for p in ps for t in (p, *moments(opt, p))]


def same(a, b):
    """Whether two nested values have the same structure and equal tensors, dtypes and numbers."""
    if isinstance(a, torch.Tensor):
        are_equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype
        return are_equal and torch.equal(a, b.to(a.device))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def bits(t):
    if isinstance(t, int):  # a fingerprint
        return torch.tensor(list(str(t).encode()))
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8)


def snapshot(ps, opt):
    """A copy of the weights and the state of each parameter."""
    states = opt.state_dict()["state"]
    return [[p.detach().clone(), copy.deepcopy(states.get(index, {}))] for index, p in enumerate(ps)]


def same_snapshots(first, second):
    """Whether weights and state of one parameter are bitwise equal in two snapshots."""
    (p, p_state), (q, q_state) = first, second
    return (
        torch.equal(bits(p), bits(q))
        and p_state.keys() == q_state.keys()
        and all(torch.equal(bits(p_state[name]), bits(q_state[name])) for name in p_state)
    )


def small_model(seed=0, dtype=torch.float32, device="cpu"):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)]
    return torch.nn.Sequential(*layers).to(device, dtype)


def train(model, opt, steps, first=0):
    """Trains a small model on data that depend on the step number only; returns copies of its parameters."""
    for step in range(first, first + steps):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(model[0].weight)
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


@contextlib.contextmanager
def examples():
    """Imports an example by name as `python examples/NAME.py` does: with its folder in `sys.path`."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXAMPLES)):
                del sys.modules[name]


class Allocations(TorchDispatchMode):
    """Records tensors that operations return: `shapes` of those that are not views of arguments, `peak`, the maximum of
    their total bytes, and `widest_index`, the number of elements of the largest int64 tensor."""

    def __init__(self):
        super().__init__()
        self.shapes, self.peak, self.widest_index = [], 0, 0
        self._allocated = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        argument_storages = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for t in tensors_in(result):
            storage = t.untyped_storage()
            if storage._cdata not in argument_storages:
                self.shapes.append(tuple(t.shape))
                self._allocated[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            if t.dtype == torch.int64:
                self.widest_index = max(self.widest_index, t.numel())
        self._allocated = {key: entry for key, entry in self._allocated.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._allocated.values()))
        return result


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def threads(count):
    """Sets the number of threads of PyTorch temporarily."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(**changes):
    """The environment of a process that imports the same Collins as this process; a variable set to None is removed."""
    variables = {**os.environ, "PYTHONPATH": str(Path(collins.__file__).parent.parent), **changes}
    return {name: value for name, value in variables.items() if value is not None}


def output_of(*command, cwd=None, env=None):
    """The standard output of a command. If the command fails, so does the test, with the output of the command."""
    process = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
