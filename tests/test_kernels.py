"""The Triton kernel: the same step as `update_`, one launch for all tensors of a kind, each gradient read once.

Without a GPU it runs under Triton's interpreter, on CPU tensors, and is compiled for one all the same.
"""

import gc
import re
import sys
import weakref

import pytest
import torch
from helpers import (
    DEVICE,
    OPTIONS,
    KernelWithoutLaunch,
    environment,
    give_gradients,
    moments,
    output_of,
    parameters,
    weights_and_moments,
    with_kernel,
)
from torch import Tensor

pytest.importorskip("triton")

from collins import Collins
from collins.compile import kernels
from collins.compile.multi_tensor import KernelExecutor, KernelLaunches, batched
from collins.compile.transfer import ArgUploader
from collins.hashing import hash_key
from collins.rounding import ROUNDED
from collins.rule import step_scalars
from collins.update import HashKeys, UpdateSpec, UpdateTask, update_

LARGE = (64, 1024) if DEVICE == "cuda" else (96, 192)  # more than one program's span in every dtype
SHAPES = [(96, 64), (33, 37), (5000,), LARGE, (40,), (), (130, 32), (2, 0)]
CASES = [
    (torch.float32, {}),
    (torch.float32, {"compress_ratio": 8, "rehash_period": None}),
    (torch.float32, {"compress_ratio": 128, "decode": "sketch"}),
    (torch.float32, {"compress_ratio": 1024, "maximize": True}),
    (torch.float32, {"residual_square": 0.0}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"table_dtype": torch.bfloat16, "compress_ratio": 16}),
    pytest.param(
        torch.bfloat16,
        {"stochastic_rounding": False},
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter truncates where a GPU rounds"),
    ),
    (torch.float32, {"table_dtype": torch.bfloat16, "compress_ratio": 64}),
    (torch.float64, {"table_dtype": torch.float64, "maximize": True}),
    (torch.float16, {}),
    (torch.float32, {"hash": "universal"}),
    (torch.float64, {}),
]


def record_launches(monkeypatch):
    """A list to which each launch appends the number of its tensors."""
    tensor_counts = []
    original = kernels.step_

    def recording_step(p, *rest):
        tensor_counts.append(len(p))
        original(p, *rest)

    monkeypatch.setattr(kernels, "step_", recording_step)
    return tensor_counts


def record_uploads(monkeypatch):
    """A list to which each upload of a table of addresses appends a weak reference to the table."""
    tables, to_device = [], ArgUploader.to_device

    def recording_upload(self, host):
        table = to_device(self, host)
        tables.append(weakref.ref(table))
        return table

    monkeypatch.setattr(ArgUploader, "to_device", recording_upload)
    return tables


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_the_kernel_equals_eager_code(dtype, options):
    results, options = [], {"table_dtype": torch.float32, **options}  # test_parity.py has those of integers
    for through_kernel in (False, True):
        ps = parameters(dtype, SHAPES)
        opt = Collins(ps, **{**OPTIONS, "compile": False, **options})
        if through_kernel:
            opt = with_kernel(Collins(ps, **{**OPTIONS, **options}))
        for step in range(3):  # in each step a third of the buckets draw new signs
            give_gradients(step, ps)
            opt.step()
        results.append(weights_and_moments(ps, opt))
    for eager, launched in zip(*results, strict=True):
        ulp = max(torch.finfo(each).eps for each in (eager.dtype, torch.promote_types(dtype, torch.float32)))
        torch.testing.assert_close(eager, launched, rtol=4 * ulp, atol=4 * ulp)
        if eager.dtype in ROUNDED and eager.numel():  # the same random bits
            assert (eager != launched).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"table_dtype": torch.float32}, {"compress_ratio": 1}], ids=str)
def test_whole_tiles_are_stepped_without_masks_to_the_same_bits(dtype, options, monkeypatch):
    tile = kernels.TILE
    flags, original = [], kernels.step_
    monkeypatch.setattr(kernels, "step_", lambda *args: (flags.append(args[-2:]), original(*args)))
    sides = []
    for norm, shapes in ((None, [(4, tile)] * 2), (1e9, [(4, tile), (4, tile), (9, tile // 2)])):
        ps = parameters(dtype, shapes)
        opt = with_kernel(Collins(ps, **{**OPTIONS, **options}, max_grad_norm=norm))
        for step in range(2):
            give_gradients(step, ps)
            opt.step()
        sides.append(weights_and_moments(ps[:2], opt))
    assert all(torch.equal(a, b) for a, b in zip(*sides, strict=True))
    filled, scaled = zip(*flags, strict=True)
    assert filled == (True, True, False, False)
    assert scaled == (False, False, True, True)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("options", [{}, {"compress_ratio": 128}, {"compress_ratio": 1}], ids=str)
def test_the_kernel_skips_buckets_with_nonfinite_gradients(options):
    results = []
    for through_kernel in (False, True):
        ps = parameters(torch.float32, SHAPES)
        opt = Collins(ps, **{"min_K": 16, "compile": None if through_kernel else False, "nonfinite": "skip", **options})
        opt = with_kernel(opt) if through_kernel else opt
        for step in range(3):
            give_gradients(step, ps)
            for p in ps:
                if p.numel() > 7:
                    p.grad.view(-1)[::1000] = (float("inf"), float("nan"), 1e30)[step]
            opt.step()
        results.append(weights_and_moments(ps, opt))
    for eager, launched in zip(*results, strict=True):
        assert eager.isfinite().all()
        torch.testing.assert_close(eager, launched, rtol=1e-6, atol=1e-6)


def test_tensors_of_one_kind_share_a_launch_whatever_their_shapes(monkeypatch):
    ps = parameters(torch.float32, [(96, 64), (64, 128), (4096,), (40,), (24,), (8,), (33, 37)])
    opt = with_kernel(Collins(ps, min_K=64, table_dtype=torch.float32, role="matrix"))
    give_gradients(0, ps)
    tensor_counts = record_launches(monkeypatch)
    opt.step()
    # Tables; dense moments; separate launches if sizes are not multiples of 32.
    assert sorted(tensor_counts) == [1, 3, 3]


def test_tensors_that_the_kernel_cannot_read_are_stepped_by_other_code(monkeypatch):
    transposed = torch.nn.Parameter(torch.randn(64, 96, device=DEVICE).t())
    shifted = torch.nn.Parameter(torch.randn(64 * 96 + 1, device=DEVICE)[1:].view(64, 96))
    even = torch.nn.Parameter(torch.randn(64, 96, device=DEVICE))
    ps = [transposed, shifted, even]
    copies = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ps]
    opt, other = with_kernel(Collins(ps, min_K=16)), Collins(copies, min_K=16, compile=False)
    tensor_counts = record_launches(monkeypatch)
    for step in range(3):
        give_gradients(step, ps, copies)
        opt.step()
        other.step()
    assert tensor_counts == [1, 1, 1]
    for p, q in zip(ps, copies, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


def test_the_table_of_addresses_is_rebuilt_only_if_an_address_changes(monkeypatch):
    ps = parameters(torch.float32, [(96, 64), (64, 96)])
    opt = with_kernel(Collins(ps, min_K=16))
    copies = parameters(torch.float32, [(96, 64), (64, 96)])
    other = Collins(copies, min_K=16, compile=False)
    uploads = record_uploads(monkeypatch)
    for step in range(8):
        if step == 3:
            for p in (*ps, *copies):
                p.data = p.data.clone()
        if step == 5:
            opt.load_state_dict(opt.state_dict())
        for group in (*opt.param_groups, *other.param_groups):
            group["lr"] = 1e-3 * (step + 1)
        give_gradients(step, ps, copies)
        if step == 6:
            ps[0].grad = copies[0].grad = None
        opt.step()
        other.step()
    # At first, with moved parameters, with one alone, with two whose step counts differ; not for loading in place.
    assert len(uploads) == 2 * 4
    for p, q in zip(ps, copies, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


def test_tables_of_addresses_of_changing_sets_are_freed(monkeypatch):
    """As in a mixture of experts, where every batch uses a different set."""
    monkeypatch.setattr("collins.compile.multi_tensor._KEPT_SETS", 2)
    ps, copies = parameters(torch.float32, [(64, 32)] * 4), parameters(torch.float32, [(64, 32)] * 4)
    opt, other = with_kernel(Collins(ps, min_K=16)), Collins(copies, min_K=16, compile=False)
    for step, chosen in enumerate(((0, 1), (1, 2), (0, 1), (0, 3), (2, 3), (0, 1))):
        give_gradients(step, ps, copies)
        for i in {0, 1, 2, 3} - {*chosen}:
            ps[i].grad = copies[i].grad = None
        opt.step()
        other.step()
        (launch,) = opt._stepper.engine.launches._launches.values()
        assert len(launch._tables_of_sets) <= 2
    for p, q in zip(ps, copies, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("memory", [None, "host"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_tables_of_replaced_parameters_are_freed(in_backward, memory, monkeypatch):
    """In a set, in a launch of its own, and alone: as an embedding is resized, or an expert exchanged."""
    uploads = record_uploads(monkeypatch)
    monkeypatch.setattr(kernels, "_step", KernelWithoutLaunch())  # which takes most of the time on a CPU
    monkeypatch.setattr(kernels, "_COMPILED", {})
    kept = [torch.nn.Parameter(torch.ones(64, 64, device=DEVICE)) for _ in range(2)]
    opt = with_kernel(Collins(kept, min_K=16, memory=memory, in_backward=in_backward))
    alive = []
    for dtype in [torch.float32, torch.bfloat16] * 3:
        p = torch.nn.Parameter(torch.ones(64, 64, device=DEVICE, dtype=dtype))
        opt.param_groups[0]["params"][:] = [*kept, p]
        for _ in range(2):
            sum(q.float().square().sum() for q in (*kept, p)).backward()
            opt.step()
            opt.zero_grad()
        opt.state.pop(p)
        gc.collect()
        alive.append(sum(table() is not None for table in uploads))
    assert alive[-2:] == alive[2:4]  # for either dtype


@pytest.mark.parametrize("alone", [False, True])
def test_a_smaller_parameter_in_the_same_memory_has_a_table_of_its_own(alone):
    spec = UpdateSpec("block", 32, "least_squares", True, False, False)
    keys = HashKeys(hash_key(0, 0, "sign"), hash_key(0, 0, "round"), (0, 0, 0, 0), 3)
    hp = step_scalars(
        1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, residual_weight=0.3, residual_square=1.0
    )
    launches, results = KernelLaunches(DEVICE), []
    for through_kernel in (True, False):
        p, g = torch.ones(2, 64 * 96, device=DEVICE).cumsum(1)
        m, v = torch.zeros(2, 64 * 3, device=DEVICE)
        for size in (64 * 96, 32 * 96):
            elements, buckets = slice(size), slice(size // 32)
            task = UpdateTask(p[elements], (m[buckets],), (v[buckets],), spec, keys, size)
            if not through_kernel:
                update_(task, g[elements], hp)
                continue
            task = task._replace(launch=launches.of(spec, task.p, 0))
            if alone:
                assert task.launch.run_one(task, g[elements], hp)
                continue
            batches, rest = batched([task], [g[elements]])
            assert not rest
            executor, done = KernelExecutor(launches, batches, lambda launch: launch() is not False), []
            assert executor.run(executor.bind([g[elements]]), [hp], [0], done) == []
            assert done == [0]
        results.append((p, m, v))
    for launched, eager in zip(*results, strict=True):
        torch.testing.assert_close(launched, eager)


@pytest.mark.parametrize("on_device", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("load", [1, 32])
def test_a_scale_is_applied_where_gradients_are_read(load, on_device):
    """The result equals that of scaled gradients, which are not written to; a scale of 1 changes no bit."""
    keys = HashKeys(hash_key(0, 0, "sign"), hash_key(0, 0, "round"), (0, 0, 0, 0), 3)
    spec, launches = (
        UpdateSpec("block" if load > 1 else None, load, "least_squares", load > 1, False, True),
        KernelLaunches(DEVICE),
    )

    def step_results(scale, gradient_factor=1.0, kernel=False):
        p, g = torch.linspace(-1, 2, 64 * 96, device=DEVICE), torch.linspace(3, -2, 64 * 96, device=DEVICE)
        m, v = torch.zeros(2, 64 * 96 // load, device=DEVICE)
        scale = torch.tensor(scale, device=DEVICE) if on_device else scale
        hp = step_scalars(
            1,
            lr=0.1,
            betas=(0.9, 0.99),
            eps=1e-3,
            weight_decay=0.1,
            residual_weight=0.3,
            residual_square=1.0,
            grad_scale=scale,
        )
        task, g = UpdateTask(p, (m,), (v,), spec, keys, p.numel()), g * gradient_factor
        g_before = g.clone()
        if kernel:
            assert launches.of(spec, p, 0).run_one(task, g, hp)
        else:
            update_(task, g, hp)
        assert torch.equal(g, g_before)
        return p, m, v

    for kernel in (False, True):
        assert all(map(torch.equal, step_results(0.25, kernel=kernel), step_results(1.0, 0.25, kernel=kernel)))
        assert all(map(torch.equal, step_results(1.0, kernel=kernel), step_results(0.25, 4.0, kernel=kernel)))
    for eager, launched in zip(step_results(0.3), step_results(0.3, kernel=True), strict=True):
        torch.testing.assert_close(eager, launched)


def test_a_parameter_stepped_alone_keeps_its_table_of_addresses(monkeypatch):
    """As in steps in backward: no table is built twice."""
    ps = parameters(torch.float32, [(96, 64), (64, 96), (32, 64)])
    opt = with_kernel(Collins(ps, min_K=16, in_backward=True))
    uploads = record_uploads(monkeypatch)
    for step in range(3):
        for p in ps:
            (p * (step + 1)).sum().backward()
        opt.step()
    assert len(uploads) == 2 * len(ps)


@pytest.mark.parametrize("memory", [None, {"tier": "host", "transfer_size": 2000}], ids=["device", "host"])
def test_gradients_that_are_stepped_one_by_one_give_bitwise_the_same_result(memory, monkeypatch):
    """Each has its own launch, if the kernel can read it, with the options of its group."""
    results = []
    for in_backward in (False, True):
        generator = torch.Generator().manual_seed(0)
        shifted = torch.randn(64 * 96 + 1, generator=generator).to(DEVICE)[1:].view(64, 96)
        ps = [*parameters(torch.float32, [(96, 64), (40,), (33, 37), (64, 96)]), torch.nn.Parameter(shifted)]
        groups = [{"params": ps[::2]}, {"params": ps[1::2], "lr": 3e-2, "weight_decay": 0.1}]
        opt = with_kernel(Collins(groups, min_K=16, rehash_period=3, memory=memory, in_backward=in_backward))
        with monkeypatch.context() as patched:
            tensor_counts = record_launches(patched)
            for step in range(4):
                give_gradients(step, ps)
                gradients = [p.grad for p in ps]
                opt.zero_grad()
                used_pairs = [(p, g) for p, g in zip(ps, gradients, strict=True) if (p is not ps[3] or step != 1)]
                sum((p * g).sum() for p, g in used_pairs).backward()
                opt.step()
        opt.state_dict()  # waits for copies of tables to the host
        results.append([t for p in ps for t in (p.detach(), opt.state[p]["step"], *moments(opt, p))])
    assert tensor_counts == [1] * (4 + 3 + 4 + 4)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_stepped_parameter_cannot_be_used_by_an_older_backward():
    """Writing through addresses is reported to autograd as a change in place."""
    ps = parameters(torch.float32, [(96, 64)])
    opt = with_kernel(Collins(ps, min_K=16))
    loss = ps[0].square().sum()
    give_gradients(0, ps)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_kernel_that_does_not_compile_is_warned_of_once_and_replaced(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def raise_out_of_resources(*_):
        raise OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(kernels, "step_", raise_out_of_resources)
    ps, copies = parameters(torch.float32, [(96, 64)] * 2), parameters(torch.float32, [(96, 64)] * 2)
    opt, other = with_kernel(Collins(ps, min_K=16)), Collins(copies, min_K=16, compile=False)
    give_gradients(0, ps, copies)
    with pytest.warns(UserWarning, match="because its Triton kernel failed: out of resource: shared memory"):
        opt.step()
    opt.step()  # a second warning would be an error
    other.step()
    other.step()
    for p, q in zip(ps, copies, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


COMPILATION = """
import gc
import re
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from collins.compile import kernels

def ptx(param, moment, bits, load, v_load, rounding, one, filled, size, tiling):
    fixed = dict(
        P=param, T=moment, BITS=bits, BLOCK=64, DENSE=load == 1, LOAD=load, V_LOAD=v_load, M_SCALE=0.5, V_SCALE=0.0,
        RESIDUAL=True, REHASH=load > 1, ROUND_P=rounding, ROUND_T=False, MAXIMIZE=False, SKIP=True, EVEN=True,
        FILLED=filled, SCALED=True, ONE=one, FAST=True,
        TILE=kernels.TILE, SPAN=kernels.SPAN // size, STAGES=tiling.stages,
    )
    names = kernels._step.arg_names
    addresses = {"owners": "*i32", "table": "*i64", "grads": f"*{param}" if one else "*i64", "scalars": "*fp64"}
    addresses["skipped"] = "*i64"
    signature = {**addresses, **dict.fromkeys(fixed, "constexpr")}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernels._step, signature=signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=tiling.options).asm["ptx"]

for param, moment, bits, load, v_load, rounding, one in (
    (tl.float32, tl.float32, 0, 32, 32, False, False), (tl.bfloat16, tl.float32, 0, 32, 32, True, False),
    (tl.float32, tl.float32, 0, 128, 128, False, True), (tl.bfloat16, tl.bfloat16, 0, 16, 16, True, True),
    (tl.float32, tl.float32, 4, 4, 128, False, False), (tl.bfloat16, tl.float32, 4, 4, 128, True, False),
    (tl.float32, tl.float32, 0, 1, 1, False, True),
):
    wide, size = 16, param.primitive_bitwidth // 8
    tiling = kernels.tiling(size, True)
    for filled in (False, True):
        code = ptx(param, moment, bits, load, v_load, rounding, one, filled, size, tiling)
        copies = len(re.findall(r"cp\\.async\\.cg\\.shared\\.global .*, 0x10,", code))
        reads, writes = (len(re.findall(way + r"\\.global\\.v4\\.b32", code)) for way in ("ld", "st"))
        accesses = kernels.TILE * size // (32 * tiling.options["num_warps"]) // wide
        print(accesses, tiling.stages, copies, reads, writes, load)
"""


def test_compiled_for_a_gpu_each_tensor_is_read_and_written_once_in_wide_words():
    """No GPU is needed to compile for one. A wide access is 16 bytes a thread; p and g are read, p is written.

    Tiles are copied to shared memory: the first ones before the loop, and one later tile in each iteration.
    """
    lines = output_of(sys.executable, "-c", COMPILATION, env=environment(TRITON_INTERPRET=None)).splitlines()
    for line in lines:
        accesses, stages, copies, reads, writes, load = map(int, re.findall(r"\d+", line))
        tensors_read, tensors_written = (4, 3) if load == 1 else (2, 1)  # dense moments are as large as the parameter
        assert (copies, reads, writes) == (stages * tensors_read * accesses, 0, tensors_written * accesses)
    assert len(lines) == 14


def test_the_operator_is_the_kernel_that_a_step_calls(monkeypatch):
    """Steps call its implementation without the dispatcher, which would inspect every tensor."""
    results, original = [], kernels.step_
    for function in (original, torch.ops.collins.step_):
        monkeypatch.setattr(kernels, "step_", function)
        ps = parameters(torch.float32, [(96, 64), (40,)])
        opt = with_kernel(Collins(ps, min_K=16))
        give_gradients(0, ps)
        opt.step()
        results.append(weights_and_moments(ps, opt))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_operator_declares_the_arguments_that_it_changes(monkeypatch):
    calls, original = [], kernels.step_
    monkeypatch.setattr(kernels, "step_", lambda *args: (calls.append(args), original(*args)))
    ps = parameters(torch.float32, [(96, 64), (64, 64)])
    opt = with_kernel(Collins(ps, min_K=16))
    give_gradients(0, ps)
    opt.step()
    ((p, m, v, *rest),) = calls
    args = [p.detach() for p in p], list(m), list(v), *rest
    torch.library.opcheck(torch.ops.collins.step_, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [None, True], ids=["kernel", "graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_needs_no_memory_of_the_parameters_size(dtype, compile):
    p = torch.nn.Parameter(torch.randn(8192, 8192, device="cuda").to(dtype))
    p.grad = torch.randn_like(p)
    opt = Collins([p], compile=compile)
    opt.step()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    tables = sum(t.nbytes for t in moments(opt, p))
    temporaries = tables if compile else 0  # a graph computes integers and scales before it writes either
    assert torch.cuda.max_memory_allocated() <= 1.001 * resident + temporaries


def train(run, steps, **options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64)).to(DEVICE)
    opt = Collins(net.parameters(), lr=torch.tensor(1e-2, device=DEVICE), min_K=100, rehash_period=3, **options)
    inputs = torch.randn(steps, 8, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    run(net, opt, inputs)
    return [p.detach() for p in net.parameters()], [opt.state[p]["step"].item() for p in net.parameters()]


def take_steps(net, opt, inputs):
    for x in inputs:
        opt.zero_grad(set_to_none=False)
        net(x).square().mean().backward()
        opt.step()


def test_a_capturable_step_keeps_its_counters_on_the_device_and_changes_nothing_else():
    plain, steps = train(take_steps, 6)
    capturable, capturable_steps = train(lambda net, opt, x: take_steps(net, with_kernel(opt), x), 6, capturable=True)
    assert steps == capturable_steps == [6.0] * 4
    for p, q in zip(plain, capturable, strict=True):
        torch.testing.assert_close(p, q)


def test_groups_with_numbers_on_the_device_and_on_the_host_share_a_launch(monkeypatch):
    ps, copies = parameters(torch.float32, [(96, 64)] * 3), parameters(torch.float32, [(96, 64)] * 3)
    rates = [1e-2, torch.tensor(3e-2, device=DEVICE), 2e-2]
    groups = [{"params": [p], "lr": rate, "capturable": True} for p, rate in zip(ps, rates, strict=True)]
    opt = with_kernel(Collins(groups, min_K=16))
    monkeypatch.setattr(Tensor, "is_cpu", False)  # reading this rate on the host would synchronize
    other = Collins([{"params": [p], "lr": float(rate)} for p, rate in zip(copies, rates, strict=True)], min_K=16)
    for step in range(3):
        give_gradients(step, ps, copies)
        opt.step()
        other.step()
    for p, q in zip(ps, copies, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("busy_link", [False, True])
def test_memory_for_a_capture_is_ready_after_a_step_outside_of_it(busy_link, monkeypatch):
    class PinnedBufferPool:
        def take(self, size):
            return torch.empty(size, dtype=torch.int64), Event()

    class Event:
        def record(self, stream):
            pass

    monkeypatch.setattr("collins.compile.transfer.PinnedBufferPool", PinnedBufferPool)
    monkeypatch.setattr("collins.compile.transfer.fetch", lambda source, target: target.copy_(source))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    uploader = ArgUploader(torch.device("cpu"), busy_link=busy_link)
    hp = step_scalars(1, lr=0.1, betas=(0.9, 0.99), eps=0, weight_decay=0, residual_weight=0.3, residual_square=1.0)
    args = [([16, 32], [hp])]
    for step in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(ArgUploader, "capturing", lambda self: True)
            with pytest.raises(RuntimeError, match="without a step before the capture"):
                uploader.upload(args)
        ((outside, _),) = uploader.upload(args)
        with monkeypatch.context() as patched:
            patched.setattr(ArgUploader, "capturing", lambda self: True)
            ((captured, _),) = uploader.upload(args)
        assert captured.tolist() == outside.tolist() == [16, 32]
        assert captured.data_ptr() != outside.data_ptr(), step


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("compile", "memory"),
    [(None, None), (True, None), (False, None), (None, "device")],
    ids=["kernel", "graphs", "eager", "policy"],
)
def test_a_cuda_graph_of_a_training_step_replays_it(compile, memory):
    def capture_and_replay(net, opt, inputs):
        static_input = inputs[0].clone()

        def step():
            opt.zero_grad(set_to_none=False)
            net(static_input).square().mean().backward()
            opt.step()

        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for x in inputs[:3]:
                static_input.copy_(x)
                step()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for x in inputs[3:]:
            static_input.copy_(x)
            graph.replay()

    plain, _ = train(take_steps, 9, capturable=True, compile=compile, memory=memory)
    replayed, steps = train(capture_and_replay, 9, capturable=True, compile=compile, memory=memory)
    assert steps == [9.0] * 4
    for p, q in zip(plain, replayed, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_is_rejected_unless_capturable():
    ps = parameters(torch.float32, [(96, 64)])
    opt = Collins(ps, min_K=16)
    give_gradients(0, ps)
    opt.step()
    before = ps[0].detach().clone()
    with pytest.raises(RuntimeError, match="capturable must be True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    assert torch.equal(ps[0].detach(), before)


@pytest.mark.cuda
def test_reduce_overhead_around_the_step():
    results = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, mode="reduce-overhead")):
        ps = parameters(torch.float32, [(96, 64), (40,)])
        opt = Collins(ps, min_K=16, capturable=True)
        step = wrap(opt.step)
        for i in range(6):
            give_gradients(i, ps)
            step()
        results.append(ps)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("busy_link", [False, True])
def test_buffers_of_changing_sizes_are_freed(busy_link, monkeypatch):
    """Except for those that a kernel still reads."""

    class Event:
        def __init__(self):
            self.done = len(events) != 1
            events.append(self)

        def query(self):
            return self.done

        def record(self, stream):
            pass

    events, empty = [], torch.empty
    monkeypatch.setattr("torch.empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    monkeypatch.setattr("collins.compile.transfer.fetch", lambda source, target: target.copy_(source))
    monkeypatch.setattr("collins.compile.transfer._SIZES", 4)
    uploader = ArgUploader(torch.device("cpu"), busy_link=busy_link)
    hp = step_scalars(1, lr=0.1, betas=(0.9, 0.99), eps=0, weight_decay=0, residual_weight=0.3, residual_square=1.0)
    for count in (*range(1, 20), 3, 2, 19):
        ((addresses, scalars),) = uploader.upload([(range(count), [hp])])
        assert addresses.tolist() == list(range(count))
        assert scalars.tolist() == [[float(x) for x in hp]]
    assert len(uploader._buffers) == len(uploader._spares) == 4
    if busy_link:
        sizes = [size - len(hp) for size in uploader._pool._pieces]
        assert len(sizes) == 4
        assert 2 in sizes  # the read of this one never ends
