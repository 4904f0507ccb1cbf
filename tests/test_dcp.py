"""torch.distributed.checkpoint: state is bitwise the same when it is loaded on a different number of ranks."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import OPTIONS, moments, same
from ranks import run
from test_fsdp import batch, full_tensor, network, rows_of, values
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from collins import Collins, convert

FLAT = {"flatten_optimizer_state_dict": True}
DECAYING = {**OPTIONS, "weight_decay": 0.1}


def make_network(dtype):
    """A model whose shards on four ranks are even, uneven and, for the last layer, empty."""
    return network().append(nn.Linear(64, 3)).to(dtype)


def build(dtype=torch.float32, *, sizes=None, **options):
    sizes = sizes or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    model = make_network(dtype)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, Collins(model.named_parameters(), **{**DECAYING, **options})


def steps(model, opt, first, last):
    """Steps with gradients that depend on the step and the parameter only, not on the number of ranks."""
    for step in range(first, last):
        for i, p in enumerate(model.parameters()):
            g = values(p.shape, 50 * step + i).to(p.dtype)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        opt.step()
        opt.zero_grad()


def full_state(model, opt):
    states = [
        {
            "p": full_tensor(p.detach()),
            **{name: full_tensor(t) if torch.is_tensor(t) else t for name, t in opt.state[p].items()},
        }
        for p in model.parameters()
    ]
    assert len(states) == 8
    return states


def content(model, opt, **options):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt, options=StateDictOptions(**options)),
    }


def restore(model, opt, folder, **options):
    state = content(model, opt, **options)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["optimizer"], options=StateDictOptions(**options))


CASES = [  # dtype, form of the state dict, whether training continues during the save, options
    (torch.float32, {}, False, {}),
    (torch.bfloat16, FLAT, False, {}),
    (torch.bfloat16, {}, True, {"table_dtype": torch.bfloat16}),
    (torch.float32, FLAT, True, {"memory": "host"}),
]


def save(rank, folder):
    """Five steps, a checkpoint, and five more steps; returns the state when it was saved and at the end."""
    return [save_one(f"{folder}/{i}", *case) for i, case in enumerate(CASES)]


def save_one(folder, dtype, form, asynchronous, options):
    model, opt = build(dtype, **options)
    steps(model, opt, 0, 5)
    saved = full_state(model, opt)
    if asynchronous:
        group = dist.new_group(backend="gloo")  # training uses the other one meanwhile
        future = dcp.async_save(content(model, opt, **form), checkpoint_id=folder, process_group=group)
        steps(model, opt, 5, 7)
        future.result()
        steps(model, opt, 7, 10)
    else:
        dcp.save(content(model, opt, **form), checkpoint_id=folder)
        steps(model, opt, 5, 10)
    return saved, full_state(model, opt)


def load(rank, folder, sizes):
    """The state after loading, and after five more steps."""
    return [load_one(f"{folder}/{i}", sizes, *case) for i, case in enumerate(CASES)]


def load_one(folder, sizes, dtype, form, _, options):
    model, opt = build(dtype, sizes=sizes, **options)
    restore(model, opt, folder, **form)
    for p in model.parameters():
        for moment in moments(opt, p):
            assert isinstance(moment, DTensor)
            assert moment.placements == p.placements
    loaded = full_state(model, opt)
    steps(model, opt, 5, 10)
    return loaded, full_state(model, opt)


def test_a_checkpoint_of_two_ranks_is_loaded_bitwise_on_other_numbers_of_ranks(tmp_path):
    rank_0, rank_1 = run(2, save, str(tmp_path), folder=tmp_path / "2")
    for actual_states, expected_states, (dtype, _, _, options) in zip(rank_0, rank_1, CASES, strict=True):
        for a, b in zip(actual_states, expected_states, strict=True):
            assert same(a, b)
        (first, *_), _ = actual_states
        assert first["m_table"].dtype == options.get("table_dtype", torch.uint8)  # int4, where none is named
        assert first["p"].dtype == dtype
        assert {"m_table" in state for state in actual_states[0]} == {True, False}
        assert all(state["step"] == 5 for state in actual_states[0])
    for sizes in ((1,), (4,), (2, 2)):
        for results in run(torch.Size(sizes).numel(), load, str(tmp_path), sizes, folder=tmp_path / str(sizes)):
            for actual_states, expected_states in zip(results, rank_0, strict=True):
                for a, b in zip(actual_states, expected_states, strict=True):
                    assert same(a, b)


def save_and_load_shards(rank, folder):
    model, opt = build()
    steps(model, opt, 0, 2)
    tables = {
        f"{i}.{name}": t
        for i, p in enumerate(model.parameters())
        for name, t in opt.state[p].items()
        if name not in ("step", "layout")
    }
    assert all(isinstance(t, DTensor) for t in tables.values())
    local_tables = {name: t.to_local().clone() for name, t in tables.items()}
    dcp.save(content(model, opt), checkpoint_id=f"{folder}/sharded")
    for t in tables.values():
        t.to_local().fill_(-1)
    restore(model, opt, f"{folder}/sharded")
    assert all(torch.equal(t.to_local(), local_tables[name]) for name, t in tables.items())
    # As ordinary tensors they would be treated as replicas, and all ranks would get those of one rank.
    replicated = {"0.m_table": local_tables["0.m_table"].clone()}
    dcp.save(replicated, checkpoint_id=f"{folder}/replicated")
    dcp.load(replicated, checkpoint_id=f"{folder}/replicated")
    return local_tables["0.m_table"], replicated["0.m_table"]


def test_rows_of_a_table_are_not_treated_as_replicas(tmp_path):
    local_tables, replicated = zip(*run(4, save_and_load_shards, str(tmp_path), folder=tmp_path / "ranks"), strict=True)
    assert not any(torch.equal(local_tables[0], other_rows) for other_rows in local_tables[1:])
    assert all(torch.equal(t, replicated[0]) for t in replicated)
    metadata = dcp.FileSystemReader(tmp_path / "sharded").read_metadata().state_dict_metadata
    entries = {name: entry for name, entry in metadata.items() if name.endswith(("_table", "exp_avg", "exp_avg_sq"))}
    assert len(entries) == 2 * 8
    for entry in entries.values():
        chunks = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in entry.chunks if chunk.sizes[0])
        assert len(chunks) == min(4, entry.size[0])
        assert [first for first, _ in chunks] == [sum(size for _, size in chunks[:i]) for i in range(len(chunks))]
        assert sum(size for _, size in chunks) == entry.size[0]


def save_replicas(rank, folder):
    replica = nn.parallel.DistributedDataParallel(make_network(torch.bfloat16))
    opt = Collins(replica.named_parameters(), **DECAYING)
    for step in range(4):
        replica(batch(step)[rows_of(rank)].bfloat16()).square().mean().backward()
        opt.step()
        opt.zero_grad()
    dcp.save(content(replica, opt), checkpoint_id=folder)
    return full_state(replica, opt)


def load_single(rank, folder):
    model = make_network(torch.bfloat16)
    opt = Collins(model.named_parameters(), **DECAYING)
    restore(model, opt, folder)
    return full_state(model, opt)


def test_replicas_are_saved_once_and_loaded_in_one_process(tmp_path):
    first, second = run(2, save_replicas, str(tmp_path / "checkpoint"), folder=tmp_path / "2")
    (loaded,) = run(1, load_single, str(tmp_path / "checkpoint"), folder=tmp_path / "1")
    assert same(first, second)
    assert same(loaded, first)


def initialise(rank):
    """The step by which torch.distributed.checkpoint creates an optimizer's state before it loads."""
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"in_backward": True})):
        model, opt = build(dtype, **options)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3.7)  # values that use all their bits
        before = [full_tensor(p.detach()) for p in model.parameters()]
        state_dict = get_optimizer_state_dict(model, opt)
        assert set(state_dict["state"]) == {name for name, _ in model.named_parameters()}
        for p, b in zip(model.parameters(), before, strict=True):
            assert torch.equal(full_tensor(p.detach()), b)
            assert all(bool((full_tensor(m) == 0).all()) for m in moments(opt, p))
            scales = sum(name.endswith("_scale") for name in opt.state[p])
            assert len(moments(opt, p)) == 2 + scales
            assert p.grad is None


def test_the_step_that_creates_all_state_changes_no_bit(tmp_path):
    run(2, initialise, folder=tmp_path)


def gather_and_scatter(rank):
    model, opt = build(torch.bfloat16)
    steps(model, opt, 0, 3)
    saved = full_state(model, opt)
    full = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, opt, options=full)
    weights = get_model_state_dict(model, options=full)
    assert not any(isinstance(t, DTensor) for entry in state["state"].values() for t in entry.values())
    for options in (full, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)):
        has_state = options is full or rank == 0
        other, new_opt = build(torch.bfloat16)
        set_model_state_dict(other, dict(weights) if has_state else {}, options=options)
        set_optimizer_state_dict(other, new_opt, state if has_state else {}, options=options)
        assert same(full_state(other, new_opt), saved)
    # Whole tensors are accepted, too: each rank takes its rows.
    other, new_opt = build(torch.bfloat16)
    set_model_state_dict(other, dict(weights), options=full)
    new_opt.load_state_dict(state_by_index(opt))
    assert same(full_state(other, new_opt), saved)
    # On the host, when gathered for a single file: they are on the first rank only.
    gathered = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(gathered) == (rank == 0)
    # Moments of AdamW, converted from whole tensors.
    adamw = torch.optim.AdamW(model.parameters())
    steps(model, adamw, 0, 3)
    converted = convert(get_optimizer_state_dict(model, adamw, options=full), opt)
    opt.load_state_dict(converted)
    for i, p in enumerate(model.parameters()):
        for moment, name in zip(
            moments(opt, p), [n for n in converted["state"][i] if n not in ("step", "layout")], strict=True
        ):
            assert torch.equal(full_tensor(moment), converted["state"][i][name])


def state_by_index(opt):
    state = opt.state_dict()
    state["state"] = {
        i: {name: full_tensor(t) if isinstance(t, DTensor) else t for name, t in entry.items()}
        for i, entry in state["state"].items()
    }
    return state


def test_whole_tensors_are_gathered_and_loaded(tmp_path):
    run(2, gather_and_scatter, folder=tmp_path)


def assert_refused(target, state, match):
    before = state_by_index(target)["state"]
    with pytest.raises(ValueError, match=match):
        target.load_state_dict(state)
    assert same(state_by_index(target)["state"], before)


def load_mismatched_states(rank, folder):
    model, opt = build()
    steps(model, opt, 0, 2)
    dcp.save(content(model, opt), checkpoint_id=folder)
    # The rows of one rank, passed as a whole table.
    local_rows = opt.state_dict()
    local_rows["state"] = {
        i: {name: t.to_local() if isinstance(t, DTensor) else t for name, t in entry.items()}
        for i, entry in local_rows["state"].items()
    }
    assert_refused(opt, local_rows, r"parameter '0.weight' has moments .* state_dict holds")
    # Sharded tables for unsharded parameters, and vice versa.
    unsharded = make_network(torch.float32)
    unsharded_opt = Collins(unsharded.named_parameters(), **DECAYING)
    assert_refused(
        unsharded_opt, {**unsharded_opt.state_dict(), "state": opt.state_dict()["state"]}, "is not a DTensor here"
    )
    # Placed on another mesh than the parameter.
    _, target = build(sizes=(1, 2))
    assert_refused(target, opt.state_dict(), "load it with torch.distributed.checkpoint, which reshards")
    with pytest.raises(ValueError, match=r"parameter '0.weight' cannot be converted: m_table is sharded in state_dict"):
        convert(opt.state_dict(), opt)
    # With other options. Tables of another size are rejected by torch, before anything is read.
    with pytest.raises(ValueError, match="seed 0 where this optimizer has 1"):
        restore(*build(seed=1), folder)
    with pytest.raises(dcp.CheckpointException, match="m_table"):
        restore(*build(table_dtype=torch.bfloat16), folder)
    model, opt = build(compress_ratio=16)
    with pytest.raises(dcp.CheckpointException, match=r"m_table"):
        restore(model, opt, folder)
    # FSDP1 returns ordinary tensors that are parts of parameters.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for use_orig_params in (False, True):
            flat = FullyShardedDataParallel(
                make_network(torch.float32), use_orig_params=use_orig_params, device_id=torch.device("cpu")
            )
            with pytest.raises(TypeError, match="was flattened and sharded by FullyShardedDataParallel"):
                Collins(flat.parameters())


def test_state_that_does_not_match_a_sharded_optimizer_is_rejected(tmp_path):
    run(2, load_mismatched_states, str(tmp_path / "checkpoint"), folder=tmp_path / "ranks")


def train_with_a_checkpoint_between(rank, folder):
    """Uses real gradients, which are the same for the same number of ranks."""

    def train_steps(model, opt, first, last):
        for step in range(first, last):
            model(batch(step)[rows_of(rank)]).square().mean().backward()
            opt.step()
            opt.zero_grad()

    model, opt = build(in_backward=True)
    train_steps(model, opt, 0, 3)
    dcp.save(content(model, opt), checkpoint_id=folder)
    train_steps(model, opt, 3, 6)
    expected = full_state(model, opt)
    model, opt = build(in_backward=True)
    restore(model, opt, folder)
    train_steps(model, opt, 3, 6)
    assert same(full_state(model, opt), expected)


def test_training_resumes_bitwise_on_the_same_number_of_ranks(tmp_path):
    run(2, train_with_a_checkpoint_between, str(tmp_path / "checkpoint"), folder=tmp_path / "ranks")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process needs none
def test_loading_into_the_state_dict_of_a_new_optimizer_is_rejected(tmp_path):
    """Its state dict has no tensors, so no saved moments would be read; that raises an error."""

    def make_optimizer():
        p = torch.nn.Parameter(torch.ones(64, 64))
        return p, Collins([p], min_K=16)

    p, opt = make_optimizer()
    p.grad = torch.ones_like(p)
    opt.step()
    dcp.save({"optimizer": opt.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    _, new_opt = make_optimizer()
    state_dict = {"optimizer": new_opt.state_dict()}
    dcp.load(state_dict, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"saved with the moments of 1 parameters, and state_dict holds none"):
        new_opt.load_state_dict(state_dict["optimizer"])
    assert not new_opt.state
    p, other = make_optimizer()
    p.grad = torch.zeros_like(p)
    other.step()  # as torch.distributed.checkpoint.state_dict does, with lr = 0
    state_dict = {"optimizer": other.state_dict()}
    dcp.load(state_dict, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state_dict["optimizer"])
    assert same(other.state_dict()["state"][0], opt.state_dict()["state"][0])
