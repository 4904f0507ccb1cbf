"""Configuration of all tests: processes, devices and fixtures."""

import gc
import importlib.util
import os
import sys
import types

import pytest
import torch
from hypothesis import settings

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # set before CUDA starts: makes matrix products deterministic
os.environ["HF_HUB_OFFLINE"] = "1"  # set before the Hugging Face libraries are imported: no test may need the network

settings.register_profile("thorough")  # checked by `tests/test_stateful.py`

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if IS_WORKER:  # workers share the cores, also with the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported: kernels then run on CPU tensors


@pytest.hookimpl(tryfirst=True)  # before the hook of xdist, which starts the workers
def pytest_cmdline_main(config):
    """Distributes the whole suite over the cores of a machine without a GPU; `-n 0` runs it in one process.

    Each file runs in one worker: what several of its tests share is compiled or started only once."""
    runs_all = config.args == config.getini("testpaths")
    processes = getattr(config.option, "numprocesses", 0)  # None if xdist is installed and `-n` is not given
    if runs_all and processes is None and not (IS_WORKER or config.option.usepdb or torch.cuda.is_available()):
        config.option.numprocesses = min(os.cpu_count() or 1, 8)
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # a file with few tests can take longest, so keep the order


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    """Excludes imported modules from garbage collection, which otherwise takes a quarter of the time of tests of
    graphs."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # before the interpreter clears modules


@pytest.fixture(scope="session", autouse=True)
def _short_programs():
    """Shortens the span of a Triton program to a few tiles: the interpreter executes the whole span, also beyond the
    end of a tensor."""
    if "TRITON_INTERPRET" not in os.environ or importlib.util.find_spec("triton") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kernels", "multi_tensor"):
            patch.setattr(f"collins.compile.{name}.SPAN", 8192)
        yield


@pytest.fixture
def fresh_accelerate():
    """Resets the singletons and environment variables of Accelerate before and after a test."""
    if importlib.util.find_spec("accelerate") is None:
        yield
        return
    state = importlib.import_module("accelerate.state")
    resets = (state.AcceleratorState._reset_state, state.PartialState._reset_state, state.GradientState._reset_state)
    before = dict(os.environ)
    for reset in resets:
        reset()
    yield
    for reset in resets:
        reset()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def load():
    """Imports an example, or one of its modules, by name."""
    from helpers import examples  # imports Triton, so after `TRITON_INTERPRET` has been set

    with examples() as import_example:
        yield import_example


@pytest.fixture
def reproducible():
    """Requires deterministic algorithms on a GPU, where hash="universal" otherwise adds atomically in any order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces a framework's module by one with the given contents, and reimports the integration that uses it."""

    def install(name, **contents):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:end]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(contents)
        integration = f"collins.integrations.{parts[0]}"
        monkeypatch.setitem(sys.modules, integration, None)  # so that monkeypatch restores the original entry
        del sys.modules[integration]
        return module

    return install
