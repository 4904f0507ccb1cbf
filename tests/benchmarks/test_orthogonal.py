"""Time of a step with decode="orthogonal" compared with torch.optim.Muon, on the matrices of real models.

    pytest tests/benchmarks/test_orthogonal.py --benchmark-json=orthogonal.json

It ends with a table of medians for each model and dtype. `extra_info` has, for each optimizer:

- `flops`, the floating-point operations of Newton-Schulz in one step, and `flops_per_second`;
- the number of tokens per step from which the optimizer takes at most 3 % of a training step. `tokens_by_flops` counts
  operations (6 per parameter and token, see `collins.orthogonal`). `tokens_by_time` uses the measured time, and assumes
  that forward and backward run at the speed of a product of 4096 x 4096 matrices in bfloat16. They are slower, so fewer
  tokens suffice.

On the CPU it runs at a small width, to test its code.
"""

import pytest
import torch
from helpers import DEVICE
from test_step import ON_CPU, PEAK_VALUES, measure, synchronize  # noqa: F401
from turns import Turns

from collins import Collins
from collins.offload.shapes import llama
from collins.orthogonal import step_flops, tokens_for_share

SHARE = 0.03
MODELS = {  # and how many layers there are
    "llama-60m": (lambda layers: llama(layers, 512, 1376, 512, 32000), 8),
    "llama-7b": (lambda layers: llama(layers, 4096, 11008, 4096, 32000), 32),
}
OPTIMIZERS = {
    "torch Muon": lambda ps: torch.optim.Muon(ps, nesterov=False, adjust_lr_fn="match_rms_adamw"),
    "Collins orthogonal": lambda ps: Collins(ps, role="matrix", decode="orthogonal", betas=(0.95, 0.999)),
    "Collins orthogonal eager": lambda ps: Collins(
        ps, role="matrix", decode="orthogonal", betas=(0.95, 0.999), compile=False
    ),
    "Collins orthogonal in backward": lambda ps: Collins(
        ps, role="matrix", decode="orthogonal", betas=(0.95, 0.999), in_backward=True
    ),
}


def matrices(model):
    """Shapes of the matrices of as many layers as fit with every optimizer; one layer on the CPU."""
    build, layers = MODELS[model]
    count = build(layers).count
    if ON_CPU:
        layers = 1
    else:
        room = torch.cuda.get_device_properties(DEVICE).total_memory * 0.9 / (PEAK_VALUES * 4)
        layers = min(layers, max(int(layers * room / count), 1))
    built = build(layers)
    names = [name for name, _ in built.parameters()]
    shapes = [
        s for n, s in zip(names, built.shapes, strict=True) if len(s) == 2 and "embed" not in n and "head" not in n
    ]
    return shapes, layers


def product_rate():
    """Floating-point operations per second of a product of two matrices in bfloat16."""
    size, times = (256, 2) if ON_CPU else (4096, 20)
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    turns = Turns(lambda: [a @ a for _ in range(times)], synchronize)
    for _ in range(5):
        turns()
    return 2 * size**3 * times / turns.median(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["llama-60m"] if ON_CPU else MODELS)
def test_step_of_matrices(measure, model, name, dtype):  # noqa: F811
    shapes, layers = matrices(model)
    ps = [torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype)) for shape in shapes]
    grads = [torch.randn_like(p) for p in ps]
    opt = OPTIMIZERS[name](ps)

    def step():
        if getattr(opt, "in_backward", False):
            for p, g in zip(ps, grads, strict=True):
                p.grad = g
                opt._update_one(p)
        else:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g
        opt.step()

    step()
    state = sum(t.nbytes for kept in opt.state.values() for t in kept.values() if isinstance(t, torch.Tensor))
    peak = None
    if not ON_CPU:
        synchronize()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        peak = torch.cuda.max_memory_allocated() - resident
    extra = {"bytes": 3 * sum(p.nbytes for p in ps) + 2 * state, "rounds": 5, "peak": peak}
    group = f"matrices of {model} {str(dtype).removeprefix('torch.')} {DEVICE}, {layers} layers"
    measure(step, group, name, None, flops=step_flops(shapes), **extra)


@pytest.fixture(autouse=True)
def costs(benchmark):
    """The cost of a step, from its time."""
    yield
    if benchmark.stats is None:
        return
    extra, seconds = benchmark.extra_info, benchmark.stats.stats.median
    shapes, _ = matrices(benchmark.params["model"])
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    extra["flops_per_second"] = extra["flops"] / seconds
    extra["tokens_by_flops"] = tokens_for_share(shapes, numel, SHARE)
    extra["tokens_by_time"] = seconds * product_rate() / (6 * numel * SHARE)
    print(
        f"\n{benchmark.group}, {extra['name']}: {1e3 * seconds:.1f} ms, {extra['flops_per_second'] / 1e12:.1f} TFLOP/s,"
        f" under {SHARE:.0%} from {extra['tokens_by_flops']:,.0f} tokens a step by operations,"
        f" {extra['tokens_by_time']:,.0f} by time"
    )
