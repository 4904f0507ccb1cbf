"""The part of a sharded parameter on each rank, and placements that are rejected; one process simulates all ranks."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from collins import Collins
from collins.bucketing import bucketing_of, moment_shape, within_rows
from collins.sharding import local, slice_of


@contextlib.contextmanager
def rank_of(rank, *sizes):
    """The mesh of `sizes` on one of its ranks."""
    world = torch.Size(sizes).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])
    finally:
        dist.destroy_process_group()


def index_tensor(shape, mesh, placements):
    """A DTensor whose elements are their indices, created without communication."""
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


MESHES = [((world,), (Shard(0),)) for world in (1, 2, 3, 4, 7)] + [
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 3), (Shard(0), Replicate())),
    ((2, 2), (Shard(0), Shard(0))),
    ((2, 2), (Replicate(), Replicate())),
]


@pytest.mark.parametrize(("sizes", "placements"), MESHES, ids=str)
@pytest.mark.parametrize("shape", [(12, 4), (10, 3), (5, 2, 3), (7,), (1, 9)], ids=str)
def test_a_slice_is_contiguous_from_its_first_element(shape, sizes, placements):
    layout = bucketing_of(1, compress_ratio=32, min_K=1024, hash="block")
    for rank in range(torch.Size(sizes).numel()):
        with rank_of(rank, *sizes) as mesh:
            p = index_tensor(shape, mesh, placements)
            part, local_part = slice_of("p", p, layout, rounding=True), local(p)
            assert part.shape == local_part.shape
            assert torch.equal(
                local_part.reshape(-1), torch.arange(local_part.numel(), dtype=torch.float32) + part.start
            )


def strided(shape, mesh):
    """As FSDP2 over the outer dimension shards what tensor parallelism has sharded over the inner one."""
    inner = mesh.get_local_rank("inner")
    outer = mesh.get_local_rank("outer")
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    part = full.chunk(mesh["inner"].size())[inner].chunk(mesh["outer"].size())[outer]
    placements = (_StridedShard(0, split_factor=mesh["inner"].size()), Shard(0))
    return DTensor.from_local(part, mesh, placements, shape=full.shape, stride=full.stride())


def test_rows_that_are_sharded_twice_are_found():
    for rank in range(6):
        with rank_of(rank, 2, 3) as mesh:
            p = strided((12, 4), mesh)
            part = slice_of("p", p, bucketing_of(48, compress_ratio=4, min_K=1, hash="block"), rounding=True)
            assert torch.equal(local(p).reshape(-1), torch.arange(8.0) + part.start)


def error_of(value, **options):
    p = torch.nn.Parameter(value)
    opt = Collins([("first", torch.nn.Parameter(torch.ones(3)))], min_K=16)
    with pytest.raises(ValueError, match="DTensor") as error:
        opt.add_param_group({"params": [("w", p)], **options})
    assert len(opt.param_groups) == 1
    return str(error.value)


def test_placements_that_a_rank_cannot_step_alone_are_rejected_and_nothing_changes():
    with rank_of(0, 2) as mesh:
        columns = index_tensor((64, 64), mesh, (Shard(1),))
        error = error_of(columns)
        assert "parameter 'w' is a DTensor placed as (Shard(dim=1))" in error
        assert "Replicate() and Shard(0)" in error
        assert "compress_ratio=1" in error
        assert "Partial(sum)" in error_of(DTensor.from_local(torch.ones(64, 64), mesh, [Partial()]))
        assert "hash is 'universal'" in error_of(index_tensor((64, 64), mesh, (Shard(0),)), hash="universal")
        assert "stochastic_rounding=False" in error_of(columns.to(torch.bfloat16), compress_ratio=1)


def test_exact_moments_in_full_precision_may_be_sharded_along_any_dimension():
    with rank_of(0, 2) as mesh:
        p = torch.nn.Parameter(index_tensor((64, 64), mesh, (Shard(1),)))
        p.grad = index_tensor((64, 64), mesh, (Shard(1),))
        Collins([{"params": [p], "compress_ratio": 1}], lr=0.1, weight_decay=0).step()
        expected = torch.arange(64 * 64.0).view(64, 64)[:, :32]
        assert torch.equal(local(p.detach()), expected - 0.1 * expected.sign())


def test_uneven_rows_that_are_sharded_twice_are_rejected():
    with rank_of(0, 2, 2) as mesh:
        full = torch.ones(66, 64)
        placements = (_StridedShard(0, split_factor=2), Shard(0))
        p = DTensor.from_local(torch.ones(17, 64), mesh, placements, shape=full.shape, stride=full.stride())
        assert "_StridedShard" in error_of(p)


def test_gradients_must_have_the_placements_of_their_parameter():
    with rank_of(0, 2) as mesh:
        p = torch.nn.Parameter(index_tensor((64, 64), mesh, (Shard(0),)))
        opt = Collins([("w", p)], min_K=16)
        p.grad = index_tensor((64, 64), init_device_mesh("cpu", (1, 2)), (Replicate(), Shard(0)))
        with pytest.raises(ValueError, match="the gradient of parameter 'w' must be on"):
            opt.step()
        assert not opt.state


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([2, 3, 32, 100]), st.integers(1, 64))
def test_buckets_of_sharded_parameters_stay_within_rows(rows, width, ratio, min_K):
    full = bucketing_of(rows * width, compress_ratio=ratio, min_K=min_K, hash="block")
    layout = within_rows(full, (rows, width))
    assert layout.load <= full.load
    assert width % layout.load == 0
    assert layout.load == full.load or width % (2 * layout.load)  # not smaller than necessary
    shape = moment_shape(layout, (rows, width))
    assert shape == ((rows, width) if layout.hash is None else (rows, width // int(layout.load)))


def test_graphs_step_a_part_like_eager_code():
    results = []
    for compile in (False, True):
        with rank_of(1, 2) as mesh:
            p = torch.nn.Parameter(index_tensor((64, 64), mesh, (Shard(0),)) / 4096)
            opt = Collins([p], lr=1e-2, min_K=2, rehash_period=2, compile=compile)
            for _ in range(3):
                p.grad = index_tensor((64, 64), mesh, (Shard(0),)).cos()
                opt.step()
            assert opt._stepper.engine.graphs == compile
            results.append((local(p.detach()), local(opt.state[p]["m_table"])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
