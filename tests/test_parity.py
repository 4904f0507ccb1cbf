"""Every decode and table format gives the same steps in eager code, graphs, the kernel, both tiers and in backward.

The cases are read off the registries. What a test registers is stepped like the library's own.
"""

from dataclasses import astuple, dataclass

import pytest
import torch
from helpers import give_gradients, moments, parameters, same, weights_and_moments, with_kernel
from reference import Block, Reference, quantised

from collins import Collins, convert
from collins.compile import kernels
from collins.formats import FORMATS, IntFormat, TensorSpec
from collins.rule import DECODES, Decode
from collins.schemes import RECIPES, recipe_of

SHAPES = [(32, 64), (33, 37), (12,)]
TABLED = [(64, 64), (3, 1367)]  # a graph takes 4,096 elements of each, in every format: the same graph
LOADS = {"one load": {"compress_ratio": 8}, "V coarser": {"compress_ratio": 4, "v_compress_ratio": 128}}
TOY_DECODE, TOY_FORMAT = Decode(m_scale=0.25, v_scale=0.5, residual=True), "split"


@dataclass(frozen=True)
class SplitFormat:
    """Each entry as the sum of two bf16 numbers, in two tensors: not one tensor, and not one dtype, per moment."""

    dtype, second, unit, rounds = torch.float32, None, 1, False

    def parts(self, shape):
        return {"": TensorSpec(shape, torch.bfloat16), "_low": TensorSpec(shape, torch.bfloat16)}

    def cut(self, parts, first, count):
        return tuple(part[first : first + count] for part in parts)

    def load(self, parts, count, dtype):
        return parts[0].to(dtype) + parts[1].to(dtype)

    def written(self, parts, values, bits):
        high = values.to(torch.bfloat16)
        low = (values - high.to(values.dtype)).to(torch.bfloat16)
        return high.view(parts[0].shape), low.view(parts[1].shape)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(DECODES, "toy", TOY_DECODE)
    monkeypatch.setitem(FORMATS, TOY_FORMAT, SplitFormat())


# float64 tables are for float64 parameters, and float16 is no format of tables.
TABLES = [torch.float32, torch.bfloat16, "int8", "int4", TOY_FORMAT]
CASES = [
    pytest.param(decode, table_dtype, loads, id=f"{decode}-{table_dtype}-{name}")
    for decode in (*DECODES, "toy")
    for table_dtype in TABLES
    for name, loads in LOADS.items()
]

# All recipes of roles and compression ratios, those of token tables with a first moment for each element.
RATIOS = {"matrix": (4, 8, 16, 32, 64, 128), "tokens": (32, 64)}
CASES += [
    pytest.param("least_squares", None, {"role": role, "compress_ratio": ratio}, id=f"{role}-{ratio}")
    for role, ratios in RATIOS.items()
    for ratio in ratios
]

# Compiling takes seconds a case: the toy decode is compiled over one of the library's formats, and over the toy.
COMPILED = [case for case in CASES if case.values[0] != "toy" or case.values[1] in (torch.float32, TOY_FORMAT)]


def stepped(decode, table_dtype, loads, steps=3, kernel=False, shapes=SHAPES, **options):
    """Parameters after some steps, and their moments."""
    ps = parameters(torch.float32, shapes)
    options = {
        "decode": decode,
        "table_dtype": table_dtype,
        "min_K": 16,
        "rehash_period": 3,
        "lr": 1e-2,
        **loads,
        **options,
    }
    opt = Collins(ps, **options)
    opt = with_kernel(opt) if kernel else opt
    for step in range(steps):
        give_gradients(step, ps)
        if options.get("in_backward"):
            grads = [p.grad for p in ps]
            opt.zero_grad()
            sum((p * g).sum() for p, g in zip(ps, grads, strict=True)).backward()
        opt.step()
    return weights_and_moments(ps, opt), opt


def test_every_recipe_has_a_case():
    made = {recipe_of(role, ratio) for role in RATIOS for ratio in RATIOS[role]} | {RECIPES["tokens"][0]}
    assert made == {recipe for role in RATIOS for recipe in RECIPES[role]}


def close(some, others, table_dtype):
    """Equal within a few ulp; in tables of fewer bits, some entries are rounded to the other of the nearest values."""
    ulp = 2.0**-7 if table_dtype != torch.float32 else 2e-6
    for a, b in zip(some, others, strict=True):
        if a.dtype in (torch.int8, torch.uint8):
            if (a != b).float().mean() > 0.02:
                return False
        elif not torch.allclose(a, b, rtol=2 * ulp, atol=2 * ulp):
            return False
    return True


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("decode", "table_dtype", "loads"), CASES)
def test_eager_steps_equal_the_float64_reference(decode, table_dtype, loads):
    ps = parameters(torch.float32, SHAPES, "cpu")
    options = {"decode": decode, "table_dtype": table_dtype, "min_K": 16, "rehash_period": 3, "lr": 1e-2, **loads}
    opt = Collins(ps, **options, compile=False)
    twins = []
    for key, p in enumerate(ps):
        row = opt.memory_report().rows[key]
        exact = row.v_load == 1
        twin = None if exact else Block(p.numel(), int(row.load), 0, key, 3)
        v_twin = None if exact else Block(p.numel(), int(row.v_load))
        rule = astuple(DECODES[decode])
        stored = FORMATS[row.m_format]
        kept = quantised(stored.bits, stored.block) if isinstance(stored, IntFormat) else None
        twins.append(Reference(p.detach().numpy(), twin, rule, lr=1e-2, v_hash=v_twin, kept=kept))
    assert sum(twin.hash is not None for twin in twins) == 2
    for step in range(4):
        give_gradients(step, ps)
        opt.step()
        for p, twin in zip(ps, twins, strict=True):
            twin.step(p.grad.numpy())
    sixteen = torch.bfloat16 in (table_dtype, *(t.dtype for p in ps for t in moments(opt, p)))
    rough = 2e-2 if sixteen else 1e-4 if table_dtype == TOY_FORMAT else 2e-5
    for p, twin in zip(ps, twins, strict=True):
        difference = torch.from_numpy(twin.p).float().view_as(p) - p.detach()
        assert difference.norm() <= rough * 0.05 * p.numel() ** 0.5


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("decode", "table_dtype", "loads"), COMPILED)
def test_compiled_steps_equal_eager_ones(decode, table_dtype, loads):
    eager, _ = stepped(decode, table_dtype, loads, shapes=TABLED, compile=False)
    compiled, opt = stepped(decode, table_dtype, loads, shapes=TABLED, compile=True)
    # One, or one for each tensor where their loads differ; an end of the second tensor is stepped eagerly.
    assert opt._stepper.engine.graphs in ((1, 2) if table_dtype is None else (1,))
    assert close(eager, compiled, table_dtype)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("decode", [*DECODES, "toy"])
def test_compiled_steps_of_dense_moments_equal_eager_ones(decode):
    """Dense moments have the same format for all formats of tables."""
    eager, _ = stepped(decode, torch.float32, {}, shapes=[(12,)], compile=False)
    compiled, opt = stepped(decode, torch.float32, {}, shapes=[(12,)], compile=True)
    assert opt._stepper.engine.graphs == 1
    assert close(eager, compiled, torch.float32)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("decode", "table_dtype", "loads"), [case for case in CASES if TOY_FORMAT not in case.values])
def test_steps_of_the_kernel_equal_eager_ones(decode, table_dtype, loads, monkeypatch):
    pytest.importorskip("triton")
    launched, original = [], kernels.step_
    monkeypatch.setattr(kernels, "step_", lambda p, *rest: (launched.extend(p), original(p, *rest)))
    eager, _ = stepped(decode, table_dtype, loads, compile=False)
    through_kernel, _ = stepped(decode, table_dtype, loads, kernel=True)
    assert len(launched) == 3 * len(SHAPES)
    assert close(eager, through_kernel, table_dtype)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@pytest.mark.parametrize(("decode", "table_dtype", "loads"), CASES)
def test_steps_of_the_host_tier_bitwise_equal_those_of_the_device(decode, table_dtype, loads, in_backward):
    # The default executor: the kernel on a GPU, eager code on the CPU and for formats without a kernel.
    compile = False if table_dtype == TOY_FORMAT else None
    resident, opt = stepped(decode, table_dtype, loads, compile=compile)
    on_host, other = stepped(decode, table_dtype, loads, compile=compile, memory="host", in_backward=in_backward)
    assert same(resident, on_host)
    assert sum(plan.host_bytes for plan in other.placement) == opt.memory_report().state_bytes - 4 * len(SHAPES)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("memory", [None, "host"])
@pytest.mark.parametrize(("decode", "table_dtype", "loads"), CASES)
def test_a_state_dict_is_loaded_bitwise(decode, table_dtype, loads, memory):
    options = {"decode": decode, "table_dtype": table_dtype, "min_K": 16, **loads}
    _, source = stepped(decode, table_dtype, loads, compile=False)
    opt = Collins(parameters(torch.float32, SHAPES), **options, rehash_period=3, memory=memory)
    opt.load_state_dict(source.state_dict())
    assert same(source.state_dict()["state"], opt.state_dict()["state"])
    names = {name for state in opt.state.values() for name in state}
    assert ("m_table_low" in names) == (table_dtype == TOY_FORMAT)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("decode", "table_dtype", "loads"), CASES)
def test_moments_of_adamw_are_converted(decode, table_dtype, loads):
    ps = parameters(torch.float32, SHAPES)
    adamw = torch.optim.AdamW(ps)
    for step in range(2):
        give_gradients(step, ps)
        adamw.step()
    opt = Collins(ps, decode=decode, table_dtype=table_dtype, min_K=16, **loads)
    opt.load_state_dict(convert(adamw.state_dict(), opt))
    for p in ps:
        dense, spec = adamw.state[p], opt._stepper.spec(next(e for e in opt._members() if e.p is p))
        load, count = int(spec.update.loads[1]), spec.first_count
        kept = [opt.state[p][name] for name in list(spec.tensors)[count:]]
        V = spec.update.formats[1].load([t.view(-1) for t in kept], -(-p.numel() // load), torch.float32)
        padded = torch.nn.functional.pad(dense["exp_avg_sq"].view(-1), (0, -p.numel() % load)).view(-1, load)
        counts = torch.full((len(padded),), float(load), device=p.device)
        counts[-1] -= -p.numel() % load
        torch.testing.assert_close(V, padded.sum(1) / counts, rtol=1e-2, atol=1e-9)


def test_the_kernel_implements_registered_formats_only():
    assert set(kernels.MOMENTS) <= set(FORMATS)
