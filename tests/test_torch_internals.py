"""Private names of PyTorch that Collins uses: all are in one file, and work in this version."""

import contextlib
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from collins import _torch_internals as internals
from collins.compile.graphs import _OPTIONS
from collins.hashing import HashKey
from collins.update import HashKeys

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(internals.__file__).resolve()
# Files that still use private names themselves.
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._\w+"  # torch._dynamo, torch.utils._pytree, from torch.distributed.tensor._utils
    r"|from torch[\w.]* import (\([^)]*|.*)\b_\w+"
    r"|\._(post_accumulate_grad_hooks|local_tensor)\b"
    r"|_fsdp_flattened\"|trigger_wait|\.split_factor\b"
)


def test_private_names_of_torch_are_in_one_file():
    assert PRIVATE.search(FILE.read_text())
    private_names = {}
    for package in ("collins", "compile", "offload"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            private = [match[0] for match in PRIVATE.finditer(path.read_text())]
            if private and path != FILE:
                private_names[name] = private
    assert not private_names


def test_each_name_in_that_file_has_a_test_here():
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    assert not [name for name in internals.__all__ if name.strip("_").lower() not in tests]


def test_the_file_imports_no_compiler_and_no_dtensor():
    code = """
import importlib.util, sys, torch
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("internals", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(*sorted(set(sys.modules) - before))
"""
    process = subprocess.run([sys.executable, "-c", code, FILE], capture_output=True, text=True, check=True)
    assert process.stdout.split() in ([], ["torch._C._dynamo.guards"])


@contextlib.contextmanager
def rank_of(rank, world):
    """A process group of which this process is one rank, without communication."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


KEYS = HashKeys(HashKey(1, 2), HashKey(3, 4), (5, 6, 7, 8), 9)


def test_tree_flatten_and_tree_unflatten_go_through_named_tuples():
    leaves, structure = internals.tree_flatten(KEYS)
    assert leaves == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert internals.tree_unflatten(leaves, structure) == KEYS
    assert type(internals.tree_unflatten(leaves, structure)) is HashKeys
    assert internals.tree_flatten({"a": [None, "b"], "c": ()})[0] == [None, "b"]


def test_tree_map_keeps_the_containers():
    double = internals.tree_map(lambda leaf: 2 * leaf, KEYS)
    assert double == HashKeys(HashKey(2, 4), HashKey(6, 8), (10, 12, 14, 16), 18)
    assert type(double.sign) is HashKey


def test_tree_map_only_leaves_other_types_as_they_are():
    t, other = torch.ones(2), object()
    mapped = internals.tree_map_only(torch.Tensor, torch.Tensor.clone, {"t": [t, other, None]})
    assert torch.equal(mapped["t"][0], t)
    assert mapped["t"][0] is not t
    assert mapped["t"][1:] == [other, None]


def test_foreach_add_and_foreach_copy_change_their_first_list(device):
    counts = [torch.tensor(1.0, device=device), torch.tensor(2.0, device=device)]
    internals.foreach_add_(counts, 1)
    assert [count.item() for count in counts] == [2, 3]
    internals.foreach_copy_(counts, [torch.tensor(7.0, device=device), torch.tensor(8.0, device=device)])
    assert [count.item() for count in counts] == [7, 8]


def test_foreach_norm_of_order_infinity_finds_what_is_not_finite(device):
    tensors = [torch.tensor(values, device=device) for values in ([1.0, -3.0], [1.0, torch.inf], [torch.nan, 1.0])]
    largest = [norm.item() for norm in internals.foreach_norm(tensors, torch.inf)]
    assert largest[:2] == [3, torch.inf]
    assert largest[2] != largest[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_foreach_norm_sums_and_returns_in_the_given_dtype(dtype, device):
    tensors = [torch.full((size,), 3.0, dtype=dtype, device=device) for size in (1000, 1, 0)]
    norms = internals.foreach_norm(tensors, 2, torch.float32)
    assert all(norm.shape == () and norm.dtype == torch.float32 for norm in norms)
    assert [norm.item() for norm in norms] == pytest.approx([3 * 1000**0.5, 3, 0])  # 94.868, which bfloat16 rounds


@pytest.mark.cuda
def test_current_raw_stream_is_the_address_of_the_stream_in_use():
    stream = torch.cuda.Stream()
    index = torch.cuda.current_device()
    for function in (torch._C._cuda_getCurrentRawStream, internals.current_raw_stream, internals._current_raw_stream):
        assert function(index) == torch.cuda.current_stream().cuda_stream
        with torch.cuda.stream(stream):
            assert function(index) == stream.cuda_stream != 0


def test_dispatching_to_autograd_keeps_what_guards_compare_within_a_dispatch_mode():
    p, matches = nn.Parameter(torch.ones(2)), []
    guards = internals.tensor_guards([p])

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            matches.append(guards.check(p))
            with internals.dispatching_to_autograd():
                matches.append(guards.check(p))
            matches.append(guards.check(p))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(1)
    assert matches == [False, True, False]


guarded = pytest.mark.skipif(not internals.GUARDS_AVAILABLE, reason="this torch has no such guards")


@guarded
def test_tensor_guards_accept_equivalent_tensors_and_keep_none(device):
    g, p = torch.ones(4, 3, device=device), nn.Parameter(torch.ones(2, device=device))
    guards = internals.tensor_guards([g, p])
    assert guards.check(g, p)
    assert guards.check(torch.zeros(4, 3, device=device), nn.Parameter(torch.zeros(2, device=device)))
    reference = weakref.ref(g)
    del g
    assert reference() is None


@guarded
@pytest.mark.parametrize(
    "other",
    [
        None,
        torch.ones(4, 3, dtype=torch.float64),
        torch.ones(4, 4),
        torch.ones(12),
        torch.ones(3, 4).t(),
        torch.ones(4, 6)[:, ::2],
        torch.ones(4, 3, device="meta"),
        torch.ones(4, 3).to_sparse(),
        torch.ones(4, 3, requires_grad=True),
        nn.Parameter(torch.ones(4, 3)),
    ],
    ids=["none", "dtype", "size", "rank", "strides", "view", "device", "layout", "requires_grad", "type"],
)
def test_tensor_guards_reject_a_difference_in(other):
    assert not internals.tensor_guards([torch.ones(4, 3)]).check(other)


def test_guards_available_is_whether_this_torch_has_them(monkeypatch):
    assert internals.GUARDS_AVAILABLE
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    assert not internals._guards_available()


def test_is_compile_error_of_what_cannot_be_traced_or_compiled(monkeypatch):
    def refuse(graph, inputs):
        raise ValueError("no")

    failures = [
        torch.compile(lambda x: torch._dynamo.graph_break() or x, fullgraph=True, backend="eager"),
        torch.compile(lambda x: x + 1, fullgraph=True, backend=refuse),
    ]
    for function in failures:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            function(torch.ones(2))
        assert internals.is_compile_error(caught.value)
    with pytest.raises(RuntimeError) as error:
        torch.compile(lambda x: x, fullgraph=True, backend="eager")(torch.ones(2)) @ torch.ones(3)
    assert not internals.is_compile_error(error.value)
    monkeypatch.delitem(sys.modules, "torch._dynamo.exc")
    assert not internals.is_compile_error(caught.value)


def test_mark_dynamic_makes_a_size_variable_in_the_first_graph():
    double = torch.compile(lambda x: 2 * x, fullgraph=True, backend="eager")
    for count in (2, 3, 7):
        x = torch.ones(count, 4)
        internals.mark_dynamic(x, 0)
        with torch.compiler.set_stance("default" if count == 2 else "fail_on_recompile"):
            assert torch.equal(double(x), torch.full((count, 4), 2.0))


def test_known_options_are_those_that_torch_compile_takes():
    options = internals.known_options(_OPTIONS)
    assert {"deterministic": True, **options} == {**_OPTIONS, "deterministic": True}  # torch 2.9 has no such option
    assert internals.known_options({"no_such_option": 1, "max_autotune": False}) == {"max_autotune": False}
    torch.compile(lambda x: x, options=options)
    with pytest.raises(RuntimeError, match="no_such_option"):
        torch.compile(lambda x: x, options={"no_such_option": 1})


def test_post_accumulate_grad_hooks_are_those_registered_and_not_removed():
    p = nn.Parameter(torch.ones(2))
    assert internals.post_accumulate_grad_hooks(p) == ()

    def first(p):
        pass

    def second(p):
        pass

    handles = [p.register_post_accumulate_grad_hook(hook) for hook in (first, second)]
    assert internals.post_accumulate_grad_hooks(p) == (first, second)
    handles[0].remove()
    assert internals.post_accumulate_grad_hooks(p) == (second,)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of FSDP, that it is on the CPU
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_is_fsdp_flattened_of_what_fsdp_makes_of_parameters(use_orig_params):
    net = nn.Linear(4, 4)
    assert not any(map(internals.is_fsdp_flattened, net.parameters()))
    with rank_of(0, 2):
        sharded = FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        assert list(sharded.parameters())
        assert all(map(internals.is_fsdp_flattened, sharded.parameters()))


def test_waited_is_an_ordinary_tensor():
    with rank_of(0, 2):
        async_tensor = all_reduce(torch.ones(2, 3), "sum", init_device_mesh("cpu", (2,)))
        assert type(async_tensor) is AsyncCollectiveTensor
        for _ in range(2):
            assert type(internals.waited(async_tensor)) is torch.Tensor
            assert torch.equal(internals.waited(async_tensor), torch.ones(2, 3))
    ordinary = torch.ones(2)
    assert internals.waited(ordinary) is ordinary


def test_split_factor_is_that_of_strided_shards_alone():
    assert internals.split_factor(_StridedShard(0, split_factor=2)) == 2
    assert internals.split_factor(Shard(0)) is None
    assert internals.split_factor(Replicate()) is None


def test_dtensor_lies_over_the_local_tensor():
    with rank_of(1, 3):
        mesh = init_device_mesh("cpu", (3,))
        local = torch.arange(8.0).view(2, 4)
        dtensor = internals.dtensor(local, mesh, (Shard(0),), (5, 4), (4, 1))
        assert isinstance(dtensor, DTensor)
        assert (dtensor.shape, dtensor.stride(), dtensor.dtype) == ((5, 4), (4, 1), torch.float32)
        assert (dtensor.device_mesh, dtensor.placements, dtensor.requires_grad) == (mesh, (Shard(0),), False)
        assert dtensor.to_local().data_ptr() == local.data_ptr()
        on_meta = internals.dtensor(local.to("meta"), mesh, (Shard(0),), (5, 4), (4, 1))
        assert on_meta.to_local().device.type == "meta"


def test_local_extent_is_that_of_each_rank():
    extents = []
    for rank in range(4):
        with rank_of(rank, 4):
            extents.append(internals.local_extent((5, 4), DeviceMesh("cpu", [0, 1, 2]), (Shard(0),)))
            assert internals.local_extent((), init_device_mesh("cpu", (4,)), (Replicate(),)) == ((), ())
    assert extents == [((2, 4), (0, 0)), ((2, 4), (2, 0)), ((1, 4), (4, 0)), ((0, 4), (0, 0))]  # the last is outside


def test_tree_leaves_with_path_and_keystr_name_each_of_the_tree_leaves():
    tree = {"a": [1, (2, None)], "b": torch.ones(1)}
    leaves = {internals.keystr(path): leaf for path, leaf in internals.tree_leaves_with_path(tree)}
    assert list(leaves) == ["['a'][0]", "['a'][1][0]", "['a'][1][1]", "['b']"]
    assert all(one is other for one, other in zip(leaves.values(), internals.tree_leaves(tree), strict=True))


def test_version_of_counts_writes_in_place():
    t, view = torch.zeros(4), torch.zeros(4).numpy()
    before = internals.version_of(t)
    t.add_(1)
    t.numpy()[0] = 5  # behind autograd's back
    assert internals.version_of(t) == before + 1
    other_tensor = torch.from_numpy(view)
    torch.from_numpy(view).add_(1)  # the same memory, another counter
    assert internals.version_of(other_tensor) == 0
