"""The engine: compiled steps equal eager ones and are compiled once; without a compiler, steps are eager."""

import math
import re
import sys

import pytest
import torch
from helpers import OPTIONS, environment, output_of, threads
from torch._inductor.utils import run_and_get_code

from collins import Collins
from collins.offload.shapes import llama

CASES = [
    (torch.float32, {}),
    (torch.bfloat16, {"compress_ratio": 8}),
    (torch.float16, {"rehash_period": None}),
    (torch.bfloat16, {"hash": "universal", "decode": "sketch"}),
    (torch.float32, {"table_dtype": torch.bfloat16, "compress_ratio": 64, "maximize": True}),
]


@pytest.fixture
def two_threads():
    """Uses several threads although tests run in one: the code that is compiled for several threads differs."""
    with threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_compiled_equals_eager(dtype, options, device):
    generator = torch.Generator().manual_seed(0)
    # Both have the same signature, except for a remainder of the second one, which is stepped eagerly.
    shapes = ((96, 64), (43, 143), (40,), (), (96, 64))
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    sides = []
    for compile in (False, True):
        ps = [torch.nn.Parameter(value.clone()) for value in values]
        opt = Collins(ps, **{**OPTIONS, "compile": compile, **options})
        for step in range(6):
            for i, p in enumerate(ps):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                p.grad = g.to(device, dtype)
            opt.step()
        sides.append(ps)
    # After sums in another order, stochastic rounding may choose the other of the two nearest values.
    ulp = torch.finfo(dtype).eps
    eager, compiled = (torch.cat([p.detach().view(-1) for p in ps]) for ps in sides)
    torch.testing.assert_close(eager, compiled, rtol=4 * ulp, atol=4 * ulp)
    assert (eager != compiled).float().mean() < (0.9 if dtype == torch.float32 else 0.02)


def test_without_a_working_compiler_a_step_warns_once_and_is_eager():
    code = """
import warnings, torch
from collins import Collins
ps = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
for p in ps:
    p.grad = torch.ones_like(p)
opt = Collins(ps, min_K=16, compile=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    opt.step()
    opt.step()
texts = [str(w.message) for w in caught if "Collins" in str(w.message)]
assert len(texts) == 1, texts
print(texts[0])
eager = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
for p in eager:
    p.grad = torch.ones_like(p)
other = Collins(eager, min_K=16, compile=False)
other.step()
other.step()
assert all(torch.equal(p, q) for p, q in zip(ps, eager))
assert all(state["step"] == 2 for state in opt.state.values())
"""
    without_compiler = environment(CXX="/no/such/compiler", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    output = output_of(sys.executable, "-c", code, env=without_compiler)
    assert "Collins steps eagerly, because torch.compile failed" in output
    assert "compiler" in output


def parameters(*shapes, device=None):
    ps = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


def test_graphs_are_compiled_per_signature_and_not_per_parameter(device):
    ps = parameters(*llama(32, 64, 192, 16, 512).shapes, device=device)
    assert len(ps) == 291
    opt = Collins(ps, min_K=128, compile=True)
    opt.step()
    # Dense norms; 64x64; 16x64; 192x64 and 64x192 as the same rows; 512x64.
    assert opt._stepper.engine.graphs == 5


def test_a_second_optimizer_of_the_same_kind_compiles_nothing(device):
    """PyTorch keeps all compiled graphs, so graphs of each optimizer would accumulate."""

    def made():
        ps = parameters((96, 64), (40,), device=device)
        opt = Collins(ps, min_K=16, rehash_period=3, compile=True)
        opt.step()
        return opt._stepper.engine.graphs

    assert made() == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        assert made() == 2


def test_dense_moments_of_different_dtypes_are_not_stacked_together():
    sides = []
    for compile in (False, True):
        ps = [torch.nn.Parameter(torch.linspace(-1, 1, 64).bfloat16()) for _ in range(2)]
        groups = [{"params": [ps[0]]}, {"params": [ps[1]], "table_dtype": torch.bfloat16}]
        opt = Collins(groups, lr=1e-2, compile=compile)
        for step in range(3):
            for p in ps:
                p.grad = torch.sin(torch.arange(64.0) + step).bfloat16()
            opt.step()
        assert [opt.state[p]["exp_avg"].dtype for p in ps] == [torch.float32, torch.bfloat16]
        sides.append([t for p in ps for t in (p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"])])
    for eager, compiled in zip(*sides, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-8)  # bf16 bitwise


def test_nothing_recompiles_after_the_first_step(device):
    """Also with changed lr (tensor or float), betas, weight decay, absent gradients, new epochs and loaded state."""
    body = parameters((96, 64), (64, 96), (96, 64), device=device)
    norms = parameters((40,), (40,), (40,), device=device)
    opt = Collins([{"params": body}, {"params": norms, "weight_decay": 0.0}], min_K=16, rehash_period=3, compile=True)
    opt.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=20)  # cycles the betas too
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(12):
            opt.step()
            schedule.step()
            opt.param_groups[0]["weight_decay"] = 0.01 * step
            norms[step % 3].grad = body[step % 3].grad = None
            norms[(step + 1) % 3].grad, body[(step + 1) % 3].grad = (
                torch.randn(40, device=device),
                torch.randn_like(body[step % 3 - 2]),
            )
        opt.load_state_dict(opt.state_dict())
        opt.step()
        for group in opt.param_groups:
            group["lr"] = torch.tensor(1e-3)
        opt.step()
        before = opt._stepper.engine.graphs
        opt.add_param_group({"params": parameters((64, 96), (40,), device=device), "lr": 1e-3})
        opt.step()
        assert opt._stepper.engine.graphs == before
    late = parameters((48, 64), device=device)
    opt.add_param_group({"params": late})
    opt.step()
    assert opt._stepper.engine.graphs == before + 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own, of loss
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # and of the model
@pytest.mark.parametrize("compile", [None, False, True], ids=["default", "eager", "compiled"])
def test_inside_a_compiled_training_step(compile, device):
    def build(inner):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64)).to(device)
        opt = Collins(net.parameters(), lr=torch.tensor(1e-2), min_K=16, rehash_period=3, compile=inner)
        return net, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)

    def trained(wrap, inner):
        net, opt, schedule = build(inner)

        def train_step(x):
            loss = net(x).square().mean()
            loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
            return loss

        step = wrap(train_step)
        inputs = [torch.randn(8, 64, generator=torch.Generator().manual_seed(i)).to(device) for i in range(9)]
        for x in inputs[:4]:
            step(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for x in inputs[4:]:
                step(x)
        return [p.detach() for p in net.parameters()]

    expected = trained(lambda function: function, False)
    for p, q in zip(trained(torch.compile, compile), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [None, False, True], ids=["default", "eager", "compiled"])
def test_compiling_the_bound_step(compile, device):
    sides = []
    for wrap, inner in ((lambda function: function, False), (torch.compile, compile)):
        torch.manual_seed(0)
        ps = parameters((96, 64), (40,), device=device)
        opt = Collins(ps, lr=1e-2, min_K=16, rehash_period=3, compile=inner)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=20)  # cycles the betas too
        step = wrap(opt.step)
        traced = 1 if device.type == "cpu" else 2  # on CUDA devices Dynamo traces a step again once there is state
        for i in range(8):
            with torch.compiler.set_stance("default" if i < traced else "fail_on_recompile"):
                step()
            schedule.step()
        sides.append(ps)
    for p, q in zip(*sides, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode": "sketch"},
        {"rehash_period": None},
        {"nonfinite": "skip"},
        {"compress_ratio": 8, "maximize": True},
        {"compress_ratio": 64},
    ],
    ids=str,
)
def test_one_kernel_reads_each_gradient_once(options, dtype, device):
    """In its code for the CPU there is one loop over buckets that goes over their elements: one bucket's are summed up
    and decoded before the next one's are touched. Nothing that it keeps is larger than the tables.
    """
    p = torch.nn.Parameter(torch.randn(512, 256, device=device).to(dtype))
    p.grad = torch.randn_like(p)
    opt = Collins([p], compile=True, table_dtype=torch.float32, **options)
    _, codes = run_and_get_code(opt.step)
    assert len(codes) == 1
    made = {"cpu": r"async_compile\.cpp_pybinding\(", "cuda": r"async_compile\.triton\("}[device.type]
    counting = int("nonfinite" in options)  # skipped buckets have their own loop, on a GPU a kernel
    assert len(re.findall(made, codes[0])) == 1 + (counting if device.type == "cuda" else 0)
    if device.type == "cpu":
        load = options.get("compress_ratio", 32)
        buckets = p.numel() // load
        loops = re.split(r"for\(int64_t x0=", codes[0])[1:]
        assert sum(f"x1<static_cast<int64_t>({load}L)" in loop for loop in loops) == 1 + counting
        assert all(f"x0<static_cast<int64_t>({p.numel()}L)" not in loop for loop in loops)
        kept = re.findall(r"empty_strided_cpu\(\((.*?)\)", codes[0])
        sizes = [math.prod(map(int, re.findall(r"\d+", shape))) for shape in kept]
        assert 0 < max(sizes) <= (buckets + 1) * max(load // 32, 1)
