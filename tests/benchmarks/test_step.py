"""Time of one step of several optimizers on the shapes of real models.

    pytest tests/benchmarks --benchmark-json=step.json

runs on the GPU where there is one, in fp32 and bf16, and on the CPU in fp32 with fewer layers; it ends with a table of
medians, each as a ratio to fused AdamW's in the same run and as a share of a copy's speed on the bytes that must move.
On a GPU four steps in a row are timed together, so that the host overhead of a step counts only if it exceeds the time
of the step on the device. On the CPU, whose speed changes with the load of the machine, each step of an optimizer is
timed right after a step of fused AdamW, to which its ratio refers. "Collins" is the default on a GPU, one launch of a
kernel for all tensors of a kind; "Collins compiled" is the portable path through torch.compile. `-k host` measures the
host overhead of a step, `-k process` the time that compilation takes in a new process.
"""

import gc
import importlib.util
import itertools
import shutil
import sys

import pytest
import torch
from helpers import DEVICE, KernelWithoutLaunch, environment, output_of, with_kernel
from turns import Turns

from collins import Collins
from collins.offload.shapes import gpt2, llama

ON_CPU = DEVICE == "cpu"
MODELS = {  # and how many layers there are
    "gpt2-124m": (lambda layers: gpt2(), 12),
    "llama-1b": (lambda layers: llama(layers, 2048, 8192, 512, 32000), 16),
    "llama-7b": (lambda layers: llama(layers, 4096, 11008, 4096, 32000), 32),
}
IN_A_ROW = 1 if ON_CPU else 4  # calls that are timed together: in training the host runs ahead of the device
PEAK_VALUES = 6  # the peak memory of foreach AdamW, in values of the parameter's dtype for each element
OPTIMIZERS = {
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, fused=True),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, foreach=True),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps),
    **({} if ON_CPU else {"Collins": lambda ps: Collins(ps)}),
    "Collins compiled": lambda ps: Collins(ps, compile=True),
    "Collins eager": lambda ps: Collins(ps, compile=False),
    "Collins universal": lambda ps: Collins(ps, hash="universal", compile=True),
}
if importlib.util.find_spec("bitsandbytes") and not ON_CPU:
    OPTIMIZERS["bitsandbytes 8-bit"] = lambda ps: importlib.import_module("bitsandbytes").optim.AdamW8bit(ps)
if importlib.util.find_spec("torchao"):
    OPTIMIZERS["torchao 8-bit"] = lambda ps: importlib.import_module("torchao.optim").AdamW8bit(ps)


def synchronize():
    """Waits until the device has completed all work."""
    if not ON_CPU:
        torch.cuda.synchronize()


def rounds(parameters):
    """Fewer repetitions for larger models: a run over all of them stays within ten minutes on two CPU cores."""
    return 7 if ON_CPU and parameters > 2e8 else 15


@pytest.fixture
def measure(benchmark):
    def timed(function, group, name, beside=None, in_a_row=1, **extra):
        turns, calls = Turns(beside, synchronize) if beside else None, itertools.count(1)

        def once():
            function()
            if next(calls) % in_a_row == 0:
                synchronize()

        benchmark.group = group
        benchmark.pedantic(once, setup=turns, rounds=extra["rounds"], iterations=in_a_row, warmup_rounds=3)
        benchmark.extra_info.update(name=name, fused=turns and turns.median(extra["rounds"]), **extra)

    yield timed
    gc.collect()


@pytest.fixture(params=[torch.float32] if ON_CPU else [torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def model_of(name, dtype):
    """A model with as many layers as fit with every optimizer; a few on the CPU."""
    build, layers = MODELS[name]
    if ON_CPU:
        return build(1)
    room = torch.cuda.get_device_properties(DEVICE).total_memory * 0.95 / (PEAK_VALUES * dtype.itemsize)
    return build(next((n for n in range(layers, 1, -1) if build(n).count <= room), 1))


def group_of(model, dtype, built):
    return f"{model} {str(dtype).removeprefix('torch.')} {DEVICE}, {built.layers} layers"


@pytest.mark.parametrize("model", MODELS)
def test_copy(measure, model, dtype):
    """The copy rate of the device: all parameters of the model in one piece of at most 4 GiB."""
    built = model_of(model, dtype)
    count = built.count
    source = torch.randn(min(count, 2**32 // dtype.itemsize), device=DEVICE, dtype=dtype)
    target = torch.empty_like(source)
    extra = {"bytes": 2 * source.nbytes, "rounds": rounds(count), "peak": None}
    measure(lambda: target.copy_(source), group_of(model, dtype, built), "copy", in_a_row=IN_A_ROW, **extra)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_step(measure, model, name, dtype):
    built = model_of(model, dtype)
    ps = [torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype)) for shape in built.shapes]
    for p in ps:
        p.grad = torch.randn_like(p)
    opt = OPTIMIZERS[name](ps)
    opt.step()
    state = sum(t.nbytes for kept in opt.state.values() for t in kept.values() if isinstance(t, torch.Tensor))
    parameter_bytes = sum(p.nbytes for p in ps)
    peak = None
    if not ON_CPU:
        synchronize()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        opt.step()
        synchronize()
        peak = torch.cuda.max_memory_allocated() - resident
    # Each gradient is read; each parameter and each moment is read and written.
    extra = {"bytes": 3 * parameter_bytes + 2 * state, "rounds": rounds(sum(p.numel() for p in ps)), "peak": peak}
    beside = torch.optim.AdamW(ps, fused=True).step if ON_CPU and name != "AdamW fused" else None
    measure(opt.step, group_of(model, dtype, built), name, beside, in_a_row=IN_A_ROW, **extra)


@pytest.mark.parametrize("name", ["AdamW fused", "Collins"])
def test_host(benchmark, name, monkeypatch):
    """The host overhead of a step of 300 tensors. On a GPU the host does not wait for the device. On the CPU the kernel
    is not launched, while fused AdamW performs its step, on tiny tensors.
    """
    ps = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in llama(33, 64, 192, 16, 512).shapes][:300]
    for p in ps:
        p.grad = torch.randn_like(p)
    opt = torch.optim.AdamW(ps, fused=True) if name == "AdamW fused" else Collins(ps, min_K=128)
    if ON_CPU and name == "Collins":
        pytest.importorskip("triton")
        from collins.compile import kernels

        monkeypatch.setattr(kernels, "_step", KernelWithoutLaunch())
        with_kernel(opt)
    benchmark.group = f"host, {len(ps)} tensors, {DEVICE}"
    benchmark.extra_info.update(name=name, bytes=0, peak=None)
    benchmark.pedantic(opt.step, setup=synchronize, rounds=200, warmup_rounds=10)


FIRST_STEP = """
import sys, torch
from collins import Collins
from collins.offload.shapes import llama
ps = [torch.nn.Parameter(torch.randn(shape, device=sys.argv[1])) for shape in llama(32, 64, 192, 16, 512).shapes]
for p in ps:
    p.grad = torch.randn_like(p)
Collins(ps, min_K=128, compile=True).step()
"""


@pytest.mark.parametrize("cache", ["empty", "filled"])
def test_process_of_a_first_step(benchmark, cache, tmp_path):
    """A process that imports torch, builds 32 layers of tiny width and takes one compiled step: less than 90 s, also
    without anything in PyTorch's compile cache.
    """

    def process():
        cached = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        output_of(sys.executable, "-c", FIRST_STEP, DEVICE, env=cached)

    def emptied():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    if cache == "filled":
        process()
    benchmark.group = f"process with a first compiled step, 32 layers, {DEVICE}"
    benchmark.extra_info.update(name=f"compile cache {cache}", bytes=0, peak=None)
    benchmark.pedantic(process, setup=emptied if cache == "empty" else None, rounds=2)
    assert benchmark.stats.stats.max < 90
