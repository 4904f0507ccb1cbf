"""What every test shares: the devices to run on."""

import importlib.util
import os

import pytest
import torch

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts: products are then the same in every run
os.environ["HF_HUB_OFFLINE"] = "1"  # before anyone imports the Hugging Face libraries: no test may need the network

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anyone imports Triton: kernels then run on CPU tensors


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(absent)


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
