"""Sharded parameters: each rank steps its part, with the same result as a single process."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import moments
from ranks import run
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from collins import Collins

# Even, uneven and empty parts; rows of whole buckets, of half buckets, of odd sizes; vectors.
SHAPES = [(64, 96), (10, 48), (5, 64), (6, 4, 16), (5, 7), (100,), (3,)]
LOADS = [32, 16, 32, 32, 1, 1, 1]
EXACT = {"lr": 1e-2, "weight_decay": 0.1, "rehash_period": 3, "min_K": 2, "table_dtype": torch.float32}
ROWS = [(64, 128), (10, 64), (6, 4, 32), (9, 512)]  # whole blocks of integers under every recipe
RECIPES = [{"role": role, "compress_ratio": ratio} for role, ratio in (("matrix", 16), ("matrix", 32), ("tokens", 32))]


def values(shape, number):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def full_tensor(t):
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t.clone()


def run_steps(mesh, placements, dtype, options, steps=5):
    """Whole parameters and moments after steps with the same gradients in every process, and the collectives used."""
    shard = (lambda t: t) if mesh is None else (lambda t: distribute_tensor(t, mesh, placements))
    params = [nn.Parameter(shard(values(shape, i).to(dtype))) for i, shape in enumerate(SHAPES)]
    groups = [{"params": [p]} for p in params]
    if mesh is None:  # the loads of sharded parameters by their rule
        groups = [{**group, "compress_ratio": load} for group, load in zip(groups, LOADS, strict=True)]
    opt = Collins(groups, **{**EXACT, **options})
    collectives = 0
    for step in range(steps):
        for i, p in enumerate(params):
            if (i + step) % 4:  # not every parameter has a gradient in every step
                p.grad = shard(values(p.shape, 100 * step + i + 7).to(dtype))
        with CommDebugMode() as communication:
            opt.step()
        collectives += communication.get_total_counts()
        opt.zero_grad()
    tensors = [[full_tensor(p.detach()), *(full_tensor(m) for m in moments(opt, p))] for p in params]
    return tensors, collectives, [opt.state[p] for p in params], opt


def step_by_role(rank, sizes, dtype, options):
    mesh = init_device_mesh("cpu", sizes)
    results = []
    for shard_network in (True, False):
        shard = partial(distribute_tensor, device_mesh=mesh, placements=(Shard(0),)) if shard_network else lambda t: t
        params = [nn.Parameter(shard(values(shape, i).to(dtype))) for i, shape in enumerate(ROWS)]
        opt = Collins(params, **{**EXACT, "table_dtype": None, **options})
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = shard(values(p.shape, 100 * step + i + 7).to(dtype))
            opt.step()
        results.append([full_tensor(t) for p in params for t in (p.detach(), *moments(opt, p))])
    assert {t.dtype for t in results[0]} & {torch.int8, torch.uint8}
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [2, 4])
@pytest.mark.parametrize("options", RECIPES, ids=str)
def test_integer_tables_are_bitwise_those_of_one_process_for_any_number_of_ranks(options, sizes, dtype, tmp_path):
    run(sizes, step_by_role, (sizes,), dtype, options, folder=tmp_path)


def step_sharded(rank, sizes, placements, dtype, options):
    mesh = init_device_mesh("cpu", sizes)
    actual, collectives, states, opt = run_steps(mesh, placements, dtype, options)
    expected, *_ = run_steps(None, None, dtype, options)
    for actual_tensors, expected_tensors in zip(actual, expected, strict=True):
        for a, b in zip(actual_tensors, expected_tensors, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b.view(a.shape))
    for load, state in zip(LOADS, states, strict=True):
        assert ("m_table" in state) == (load > 1)
        for name, t in state.items():
            if name == "step":
                assert not isinstance(t, DTensor)
                assert t.shape == ()
            elif name != "layout":
                assert isinstance(t, DTensor)
                assert t.placements == placements
    assert collectives == 0
    return opt.memory_report().state_bytes


OPTIONS = [
    {},
    {"decode": "sketch", "rehash_period": None, "maximize": True},
    {"table_dtype": torch.bfloat16, "nonfinite": "skip"},
    {"memory": "host"},
    {"capturable": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_ranks_bitwise_equal_one_process(options, dtype, tmp_path):
    run(2, step_sharded, (2,), (Shard(0),), dtype, options, folder=tmp_path)


@pytest.mark.parametrize(
    ("sizes", "placements"),
    [((4,), (Shard(0),)), ((2, 2), (Replicate(), Shard(0))), ((2, 2), (Shard(0), Shard(0)))],
    ids=["shards of 4", "replicas of shards", "shards of shards"],
)
def test_four_ranks_bitwise_equal_one_process(sizes, placements, tmp_path):
    sizes_of_state = run(4, step_sharded, sizes, placements, torch.bfloat16, {}, folder=tmp_path)
    assert len(set(sizes_of_state)) == 1  # all of a parameter's state is reported, the same everywhere


def network(device="cpu"):
    torch.manual_seed(0)  # weights are drawn on the CPU, whose generator differs from that of a GPU
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 90), nn.Tanh(), nn.Linear(90, 64)).to(device)


def shard_network(mesh, device="cpu", **policy):
    model = network(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def make_optimizer(model, **options):
    """Groups that give parameters the loads of sharded ones, so that one process has the same tables."""
    groups = [
        {"params": [p], "compress_ratio": 1 if p.ndim == 1 else math.gcd(32, p.shape[1])} for p in model.parameters()
    ]
    return Collins(groups, **{**EXACT, "lr": 1e-3, **options})


def batch(step):
    return values((8, 64), 1000 + step)


def train(model, opt, part, *, clip=None, steps=6):
    for step in range(steps):
        x = batch(step)[part].to(next(model.parameters()).device)
        model(x).square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return [full_tensor(p.detach()) for p in model.parameters()]


def rows_of(rank):
    count = 8 // dist.get_world_size()
    return slice(rank * count, (rank + 1) * count)


def train_sharded(rank, sizes):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes) :])
    model = shard_network(mesh)
    opt = make_optimizer(model)
    actual = train(model, opt, rows_of(rank), clip=0.05)
    for p in model.parameters():
        for moment in moments(opt, p):
            assert moment.placements == p.placements
    single = network()
    expected = train(single, make_optimizer(single), slice(None), clip=0.05)
    model = shard_network(mesh)
    opt = make_optimizer(model, max_grad_norm=0.05)
    clipped_in_step = train(model, opt, rows_of(rank))
    before = list(network().parameters())
    for a, b, c, start in zip(actual, expected, clipped_in_step, before, strict=True):
        assert (b - start).abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(c, b, rtol=1e-4, atol=2e-5)
    return opt.grad_norm


def clip_gradients_of_all_placements(rank):
    """The norm is that of whole gradients, each counted once, with one collective per kind of sharding."""
    mesh = init_device_mesh("cpu", (2, 2))
    shards, replicas = Shard(0), Replicate()
    placements = [None, (shards, shards), (replicas, shards), (shards, replicas), (replicas, replicas)]
    grads = [values(shape, number) for number, shape in enumerate([(64, 32), (8, 32), (5, 32), (96,), (3,)])]
    params = []
    for g, placement in zip(grads, placements, strict=True):
        shard = (
            (lambda t: t) if placement is None else partial(distribute_tensor, device_mesh=mesh, placements=placement)
        )
        params.append(nn.Parameter(shard(torch.ones_like(g))))
        params[-1].grad = shard(g)
    opt = Collins(params, **EXACT, max_grad_norm=1.0)
    with CommDebugMode() as communication:
        opt.step()
    expected = torch.stack([g.norm() for g in grads]).norm()
    torch.testing.assert_close(opt.grad_norm, expected, rtol=1e-6, atol=0)
    assert communication.get_total_counts() == 4  # two dimensions, and one, and one
    return opt.grad_norm


def test_the_norm_counts_each_element_once_for_every_placement(tmp_path):
    norms = run(4, clip_gradients_of_all_placements, folder=tmp_path)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


def refuse_to_clip_in_backward(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard_network(mesh)
    opt = make_optimizer(model, max_grad_norm=0.05, in_backward=True)
    before = [full_tensor(p.detach()) for p in model.parameters()]
    message = "does not say"
    try:
        model(batch(0)[rows_of(rank)]).square().mean().backward()
        opt.step()
    except RuntimeError as error:
        message = str(error)
    assert all(torch.equal(full_tensor(p.detach()), old) for p, old in zip(model.parameters(), before, strict=True))
    return message


def test_clipping_in_backward_is_rejected_for_sharded_gradients(tmp_path):
    for message in run(2, refuse_to_clip_in_backward, folder=tmp_path / "2"):
        assert message.startswith("max_grad_norm must be None with in_backward=True for parameter")
    assert run(1, clip_alone, folder=tmp_path / "1") == [True]


def clip_alone(rank):
    """A single rank has whole gradients."""
    model = shard_network(init_device_mesh("cpu", (1,)))
    opt = make_optimizer(model, max_grad_norm=0.05, in_backward=True)
    model(batch(0)).square().mean().backward()
    opt.step()
    return bool(opt.grad_norm > 0.05)


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)], ids=str)
def test_fully_shard_equals_one_process(sizes, tmp_path):
    norms = run(math.prod(sizes), train_sharded, sizes, folder=tmp_path)
    assert 0 < norms[0] < math.inf
    assert all(torch.equal(norm, norms[0]) for norm in norms)


def train_in_mixed_precision(rank):
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard_network(mesh, mp_policy=policy)
    opt = make_optimizer(model)
    actual = train(model, opt, rows_of(rank))
    assert all(p.dtype == torch.float32 for p in actual)
    assert all(m.dtype == torch.float32 for p in model.parameters() for m in moments(opt, p))
    single = network()
    expected = train(single, make_optimizer(single), slice(None))
    start = [p.detach() for p in network().parameters()]
    movement, difference = (
        torch.cat([(b - a).flatten() for a, b in zip(tensors, expected, strict=True)]).norm()
        for tensors in (start, actual)
    )
    assert 0 < difference < 0.2 * movement


def test_mixed_precision_keeps_weights_and_tables_exact(tmp_path):
    run(2, train_in_mixed_precision, folder=tmp_path)


def train_in_backward(rank, options):
    mesh = init_device_mesh("cpu", (2,))
    after_model = shard_network(mesh)
    expected = train(after_model, make_optimizer(after_model), rows_of(rank))
    model = shard_network(mesh)
    opt = make_optimizer(model, in_backward=True, **options)
    for step in range(6):
        model(batch(step)[rows_of(rank)]).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        opt.step()
    for p, b in zip(model.parameters(), expected, strict=True):
        assert torch.equal(full_tensor(p.detach()), b)


@pytest.mark.parametrize("options", [{}, {"memory": "host"}, {"nonfinite": "error"}], ids=str)
def test_steps_in_backward_are_bitwise_the_same(options, tmp_path):
    run(2, train_in_backward, options, folder=tmp_path)


def train_in_bf16(rank, options):
    """Weights in bf16, stochastically rounded, without a master copy."""
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for extra_options in ({}, options):
        model = network().to(torch.bfloat16)
        fully_shard(model, mesh=mesh)
        opt = make_optimizer(model, **extra_options)
        for step in range(4):
            model(batch(step)[rows_of(rank)].to(torch.bfloat16)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        results.append(
            [full_tensor(p.detach()) for p in model.parameters()]
            + [full_tensor(m) for p in model.parameters() for m in moments(opt, p)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tables_on_the_host_change_no_bit_of_sharded_training(tmp_path):
    run(2, train_in_bf16, {"memory": "host"}, folder=tmp_path)


def step_with_one_nonfinite_shard(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = shard_network(mesh)
    opt = make_optimizer(model, nonfinite="error")
    model(batch(0)[rows_of(rank)]).square().mean().backward()
    before = [full_tensor(p.detach()) for p in model.parameters()]
    if rank == 1:
        model[2].weight.grad.to_local()[3, 5] = math.nan
    with pytest.raises(FloatingPointError, match="is not finite") as error:
        opt.step()
    assert all(torch.equal(a, full_tensor(p.detach())) for a, p in zip(before, model.parameters(), strict=True))
    assert not opt.state
    return str(error.value)


def test_a_nonfinite_gradient_on_one_rank_raises_on_all_ranks(tmp_path):
    first, second = run(2, step_with_one_nonfinite_shard, folder=tmp_path)
    assert first == second


def step_with_partial_gradients(rank):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(values((64, 64), 0), mesh, [Replicate()]))
    p.grad = DTensor.from_local(values((64, 64), 5 + rank), mesh, [Partial()])
    single = nn.Parameter(values((64, 64), 0))
    single.grad = values((64, 64), 5) + values((64, 64), 6)
    for q in (p, single):
        Collins([q], lr=1e-2, min_K=2).step()
    assert torch.equal(p.to_local().detach(), single.detach())


def test_partial_gradients_are_summed(tmp_path):
    run(2, step_with_partial_gradients, folder=tmp_path)


def parallel(mesh):
    model = network()
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def train_in_tensor_parallel(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = parallel(mesh)
    with pytest.raises(ValueError, match=r"parameter '2.weight' is a DTensor placed as \(Shard\(dim=1\)\)"):
        Collins(model.named_parameters(), **EXACT)
    single = network()

    def optimizer(m):
        groups = [
            {"params": [p], "compress_ratio": 1 if name == "2.weight" or p.ndim == 1 else math.gcd(32, p.shape[1])}
            for name, p in m.named_parameters()
        ]
        return Collins(groups, **{**EXACT, "lr": 1e-3})

    actual = train(model, optimizer(model), slice(None))
    expected = train(single, optimizer(single), slice(None))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_tensor_parallel_rows_are_stepped_and_columns_with_exact_moments(tmp_path):
    run(2, train_in_tensor_parallel, folder=tmp_path)


def train_in_two_dimensions(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU())
    single = copy.deepcopy(model)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert "_StridedShard" in str(model[0].weight.placements)
    opt, expected = Collins(model.parameters(), **EXACT), Collins(single.parameters(), **EXACT)
    for step in range(4):
        x = batch(step)
        model(x[4 * mesh.get_local_rank("data") :][:4]).square().mean().backward()
        single(x).square().mean().backward()
        # Bitwise the same gradients: the test compares the positions of each row's signs and tables.
        p, q = model[0].weight, single[0].weight
        torch.testing.assert_close(p.grad.full_tensor() * 0.5, q.grad, rtol=1e-4, atol=1e-6)
        q.grad.copy_(p.grad.full_tensor())
        opt.step()
        expected.step()
        assert torch.equal(p.full_tensor(), q)
        opt.zero_grad()
        expected.zero_grad()
    for a, b in zip(moments(opt, p), moments(expected, q), strict=True):
        rows = 96 // 4
        first = 48 * mesh.get_local_rank("tensor") + rows * mesh.get_local_rank("data")
        assert torch.equal(a.to_local(), b[first : first + rows])


def test_fully_sharded_tensor_parallel_rows_are_found(tmp_path):
    run(4, train_in_two_dimensions, folder=tmp_path)


def train_on_devices(rank):
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    model = shard_network(mesh, "cuda")
    actual = train(model, make_optimizer(model), rows_of(rank))
    single = network("cuda")
    expected = train(single, make_optimizer(single), slice(None))
    for a, b, start in zip(actual, expected, network("cuda").parameters(), strict=True):
        assert (b - start).abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_fully_shard_over_nccl(tmp_path):
    world = 2 if torch.cuda.device_count() > 1 else 1
    run(world, train_on_devices, folder=tmp_path, backend="nccl", device="cuda")
