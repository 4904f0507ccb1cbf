"""What every test shares: the processes and the devices to run on."""

import gc
import importlib.util
import os
import sys
import types

import pytest
import torch
from hypothesis import settings

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts: products are then the same in every run
os.environ["HF_HUB_OFFLINE"] = "1"  # before anyone imports the Hugging Face libraries: no test may need the network

settings.register_profile("thorough")  # which `tests/test_stateful.py` looks for

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if IS_WORKER:  # workers share the cores, and so do the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anyone imports Triton: kernels then run on CPU tensors


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which starts the workers
def pytest_cmdline_main(config):
    """The whole suite is spread over the cores of a machine without a GPU; `-n 0` keeps it in one process.

    Files stay whole: what a file compiles or starts for several of its tests is made once.
    """
    whole = config.args == config.getini("testpaths")
    asked = getattr(config.option, "numprocesses", 0)  # None where xdist is there and `-n` is not given
    if whole and asked is None and not (IS_WORKER or config.option.usepdb or torch.cuda.is_available()):
        config.option.numprocesses = min(os.cpu_count() or 1, 8)
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # files of few tests take longest: they are not to be left for last


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(absent)


def pytest_collection_finish():
    """What has been imported stays: to look through it for garbage is a quarter of the time that graphs take."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # before the interpreter takes modules apart


@pytest.fixture(scope="session", autouse=True)
def _short_programs():
    """Triton's interpreter goes through all of a program's span, also past the end of a tensor: two tiles here."""
    if "TRITON_INTERPRET" not in os.environ or importlib.util.find_spec("triton") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        for name in ("kernels", "multi_tensor"):
            patched.setattr(f"collins.compile.{name}.SPAN", 8192)
        yield


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its settings in singletons and environment variables: each test begins and ends without them."""
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


@pytest.fixture
def reproducible():
    """On a GPU hash="universal" adds atomically, in any order, unless PyTorch is told to be deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts modules with some contents in the place of a framework's, for the module of Collins that imports it."""

    def put(name, **contents):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:end]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(contents)
        ours = f"collins.integrations.{parts[0]}"
        monkeypatch.setitem(sys.modules, ours, None)  # which puts back what was there, if anything
        del sys.modules[ours]
        return module

    return put
