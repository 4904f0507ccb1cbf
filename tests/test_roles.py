"""Roles in the optimizer: set by groups or found, and kept after the first step; groups of a model."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers import give_gradients, moments, same, small_model, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from collins import Collins, param_groups
from collins.groups import NamedParameter

TABLE = (4096, 16)  # a token table by its shape if at most two parameters have as many rows


def weights(*shapes):
    return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in shapes]


def roles(opt):
    return [row.role for row in opt.memory_report().rows]


def reasons(opt):
    return [row.reason for row in opt.memory_report().rows]


def step(opt, ps, number=0):
    give_gradients(number, ps)
    opt.step()


class LanguageModel(nn.Module):
    """Embedding and head of a vocabulary of 300, with names that do not identify them."""

    def __init__(self, tied=False, blocks=2):
        super().__init__()
        self.first = nn.Embedding(300, 32)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 300), nn.Linear(300, 32)) for _ in range(blocks)])
        self.norm = nn.LayerNorm(32)
        self.last = nn.Linear(32, 300)
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.norm(x))


@pytest.mark.parametrize("role", ["matrix", "tokens", "exact"])
@pytest.mark.parametrize("where", ["argument", "group", "later"])
def test_a_group_sets_the_role_of_its_parameters(role, where):
    ps = weights((64, 64), (2048,), (4,))
    opt = Collins([{"params": ps, **({"role": role} if where == "group" else {})}], min_K=16,
                  **({"role": role} if where == "argument" else {}))  # fmt: skip
    if where == "later":
        opt.param_groups[0]["role"] = role
    step(opt, ps)
    assert opt.param_groups[0]["role"] == opt.state_dict()["param_groups"][0]["role"] == role
    assert roles(opt) == [role, role, "exact"]
    assert reasons(opt) == ["group", "group", "group" if role == "exact" else "min_K"]
    assert [opt.hash_of(p) is not None for p in ps] == [role == "matrix", role == "matrix", False]


def test_exact_moments_are_those_of_adamw():
    ps, qs = weights((64, 64), TABLE), weights((64, 64), TABLE)
    opt, adamw = Collins(ps, lr=1e-2, role="exact"), torch.optim.AdamW(qs, lr=1e-2)
    for number in range(5):
        give_gradients(number, ps, qs)
        opt.step()
        adamw.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
        assert opt.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_small_parameters_and_ratio_one_are_exact_with_every_role():
    for role in ("auto", "matrix", "tokens"):
        ps = weights((32, 32), TABLE)
        opt = Collins([{"params": ps[:1]}, {"params": ps[1:], "compress_ratio": 1}], role=role)
        assert list(zip(roles(opt), reasons(opt), strict=True)) == [("exact", "min_K"), ("exact", "compress_ratio=1")]


@pytest.mark.parametrize(
    ("role", "options", "load", "stored"),
    [
        ("matrix", {}, 4, torch.uint8),
        ("matrix", {"compress_ratio": 16}, 4, torch.int8),
        ("matrix", {"compress_ratio": 64}, 8, torch.uint8),
        ("tokens", {}, 1, torch.int8),
        ("tokens", {"compress_ratio": 64}, 1, torch.uint8),
        ("auto", {"decode": "orthogonal"}, 2, torch.uint8),
        ("auto", {"decode": "orthogonal", "compress_ratio": 8}, 1, torch.int8),
    ],
    ids=str,
)
@pytest.mark.parametrize("min_K", [16, 1024])
def test_small_tables_have_floats_where_large_ones_have_integers(role, options, load, stored, min_K):
    """The last ones with floats have 2 min_K entries of M, which are those of a parameter with `load` times as many."""
    ps = weights((load * min_K // 8, 16), (load * min_K // 8 + load, 16))
    opt = Collins(ps, role=role, min_K=min_K, **options)
    report = opt.memory_report().rows
    assert [row.load for row in report] == [load, load]
    step(opt, ps)
    small, large = (moments(opt, p) for p in ps)
    assert [small[0].dtype, large[0].dtype] == [torch.float32, stored]
    assert small[0].numel() == 2 * min_K
    assert all(m.dtype == torch.float32 for m in (*small[1:], *large[1:]))
    tensors = [[t for t in opt.state[p].values() if isinstance(t, torch.Tensor)] for p in ps]
    assert [row.state_bytes for row in report] == [sum(t.nbytes for t in state) for state in tensors]


def test_tables_of_a_named_format_have_it_in_every_size():
    ps = weights((64, 64), (64, 128))
    opt = Collins(ps, table_dtype="int4", compress_ratio=4)
    step(opt, ps)
    assert [opt.state[p]["m_table"].dtype for p in ps] == [torch.uint8] * 2


def test_vectors_are_exact_except_flattened_models():
    ps = weights((5000,), (5000, 1), (1, 1, 5000), (2**20,), (2**20 + 1,), (50, 2, 50), ())
    assert roles(Collins(ps)) == ["exact"] * 4 + ["matrix"] * 2 + ["exact"]


def test_tables_of_the_universal_hash_are_the_same_for_every_role():
    ps = weights(TABLE, (5000,), (10,))
    opt = Collins([("embed_tokens.weight", ps[0]), ("a", ps[1]), ("b", ps[2])], hash="universal")
    assert roles(opt) == ["matrix", "matrix", "exact"]
    assert reasons(opt) == ["hash='universal'", "hash='universal'", "min_K"]


def test_frozen_parameters_have_no_role_but_count_for_the_number_of_rows():
    ps = weights(TABLE, TABLE, TABLE)
    for p in ps[1:]:
        p.requires_grad_(False)
    opt = Collins(ps)
    assert roles(opt) == ["matrix", None, None]
    ps[1].requires_grad_(True)
    assert roles(opt) == ["matrix", "matrix", None]
    assert "frozen" in str(opt.memory_report()).splitlines()[4]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("memory", [None, "host"])
def test_a_role_is_fixed_by_the_first_step(named, memory):
    ps = weights(TABLE, TABLE, TABLE)
    given = [(f"p{i}", p) for i, p in enumerate(ps)] if named else ps
    opt = Collins(given[:1], memory=memory)
    assert roles(opt) == ["tokens"]
    step(opt, ps[:1])
    moment = moments(opt, ps[0])[0]
    opt.add_param_group({"params": given[1:]})
    assert roles(opt) == ["tokens", "matrix", "matrix"]
    step(opt, ps, 1)
    assert moments(opt, ps[0])[0] is moment
    del opt.param_groups[1]
    assert roles(opt) == ["tokens"]
    opt.add_param_group({"params": given[2:]})
    assert roles(opt) == ["tokens", "matrix"]  # its state has been kept


def test_before_the_first_step_all_parameters_count():
    ps = weights(TABLE, TABLE, TABLE)
    opt = Collins(ps[:1])
    assert roles(opt) == ["tokens"]
    opt.hash_of(ps[0])  # this creates its spec
    opt.add_param_group({"params": ps[1:]})
    assert roles(opt) == ["matrix"] * 3
    one_by_one = Collins([{"params": [p]} for p in ps])
    assert roles(one_by_one) == ["matrix"] * 3
    step(opt, ps)
    step(one_by_one, ps)
    assert same(opt.state_dict()["state"], one_by_one.state_dict()["state"])


def test_a_role_is_fixed_by_loading():
    ps = weights(TABLE, TABLE, TABLE)
    source, opt = Collins(ps[:1]), Collins(ps[:1])
    step(source, ps[:1])
    opt.load_state_dict(source.state_dict())
    opt.add_param_group({"params": ps[1:]})
    assert roles(opt) == ["tokens", "matrix", "matrix"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_copy_has_the_roles_of_the_original(how, stepped):
    model, more = LanguageModel(), weights((300, 32))
    opt = Collins(model, min_K=16)
    opt.add_param_group({"params": [("more", more[0])], "role": "exact"})
    if stepped:
        model(torch.arange(8)).logsumexp(-1).sum().backward()
        opt.step()
    before = opt.memory_report()
    copied = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
    assert copied.memory_report() == before
    copied.param_groups[0]["params"][0] = nn.Parameter(torch.randn(300, 32))  # which has no entry yet
    assert copied.memory_report() == before


def test_a_copy_keeps_roles_that_would_be_found_differently_now():
    ps = weights(TABLE, TABLE, TABLE)
    opt = Collins(ps[:1])
    step(opt, ps[:1])
    opt.add_param_group({"params": ps[1:]})
    copied = copy.deepcopy(opt)
    assert roles(copied) == ["tokens", "matrix", "matrix"]
    step(copied, copied.param_groups[0]["params"] + copied.param_groups[1]["params"])


def test_a_state_dict_without_roles_is_loaded():
    """As version 0.2 saved them, which had no roles and kept vectors in tables too."""
    net, other = small_model(), small_model(1)
    old, new = (Collins(n.parameters(), min_K=16, role="matrix") for n in (net, other))
    train(net, old, 3)
    saved = old.state_dict()
    for group in saved["param_groups"]:
        del group["role"]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))
    assert new.param_groups[0]["role"] == "matrix"
    other.load_state_dict(net.state_dict())
    assert same(train(net, old, 3, first=3), train(other, new, 3, first=3))


def test_moments_of_another_role_are_rejected_and_nothing_changes():
    net = small_model()
    old, new = (Collins(net.parameters(), min_K=16, role=role) for role in ("matrix", "auto"))
    train(net, old, 2)
    refusal = r"parameter 1 has moments .*exp_avg.* by its group's role, .* Version 0.2 kept vectors in tables too"
    with pytest.raises(ValueError, match=refusal):
        new.load_state_dict(old.state_dict())
    assert not new.state
    old.param_groups[0]["role"] = "exact"
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="by its group's role"):
        old.step()
    assert same(before, [p.detach() for p in net.parameters()])


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_provides_names_and_roles(tied):
    model = LanguageModel(tied)
    opt = Collins(model, min_K=16)
    named = dict(model.named_parameters())
    assert opt.param_groups[0]["param_names"] == list(named)
    found = dict(zip(named, opt.memory_report().rows, strict=True))
    tokens = {name: row.reason for name, row in found.items() if row.role == "tokens"}
    head = {} if tied else {"last.weight": "module: head as wide as first"}
    assert tokens == {"first.weight": "module: nn.Embedding" + (", tied to last" if tied else ""), **head}
    others = [row for name, row in found.items() if name not in tokens]
    assert [row.role for row in others] == ["matrix" if len(row.shape) == 2 else "exact" for row in others]
    assert set(roles(Collins(model.named_parameters(), min_K=16))) == {"matrix", "exact"}
    by_module, by_name = (Collins(given, min_K=16, role="matrix") for given in (model, model.named_parameters()))
    for p in named.values():
        assert by_module.hash_of(p) == by_name.hash_of(p)  # keys derive from names


def test_a_model_gives_the_same_steps_as_its_named_parameters():
    def trained(params_of):
        torch.manual_seed(0)
        model = LanguageModel(tied=True)
        opt = Collins(params_of(model), lr=1e-2, min_K=16, role="matrix")
        for _ in range(3):
            opt.zero_grad()
            model(torch.arange(16)).logsumexp(-1).sum().backward()
            opt.step()
        return opt.state_dict()["state"], model.state_dict()

    assert same(trained(lambda model: model), trained(lambda model: model.named_parameters()))


def test_roles_follow_names_when_parameters_are_replaced():
    """Accelerate does this: it shards a model after its optimizer has been built."""
    model = LanguageModel()
    opt = Collins(model, min_K=16)
    before = opt.memory_report()
    opt.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    assert opt.memory_report() == before


def test_modules_with_conflicting_names():
    one, other = nn.ModuleDict({"a": nn.Embedding(300, 32)}), nn.ModuleDict({"a": nn.Linear(32, 300)})
    pairs = [NamedParameter("a.weight", one["a"].weight, None), *Collins(other).param_groups[0]["params"]]
    assert len(pairs) == 3
    opt = Collins([{"params": [pairs[0]]}])
    assert roles(opt) == ["matrix"]


def test_invalid_and_empty_models():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        Collins(nn.ReLU())
    with pytest.raises(TypeError, match=r"params of a group must be tensors or pairs .*, got a Linear, "):
        Collins([{"params": nn.Linear(4, 4)}])
    with pytest.raises(TypeError, match="got a Sequential"):
        Collins(nn.Linear(4, 4)).add_param_group({"params": nn.Sequential(nn.Linear(4, 4))})
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        Collins([nn.Linear(4, 4)])


def test_generators_and_lists_of_parameters_are_accepted_like_in_adamw():
    ps = nn.ParameterList(weights((64, 64), (8,)))
    for given in (ps, [{"params": ps}], (p for p in ps)):
        opt = Collins(given)
        assert opt.param_groups[0]["params"] == list(ps)
        assert "param_names" not in opt.param_groups[0]
        opt.add_param_group({"params": weights((3,))})
    opt = Collins(LanguageModel().named_parameters())
    assert len(opt.param_groups[0]["param_names"]) == 13


def test_modules_without_shapes_yet_are_accepted():
    model = nn.Sequential(nn.Embedding(300, 32), nn.LazyLinear(300))
    opt = Collins(model, min_K=16)
    model(torch.arange(4)).sum().backward()
    opt.step()
    assert roles(opt) == ["tokens", "tokens", "exact"]


@pytest.fixture
def mesh():
    """A group of four ranks; this process is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield init_device_mesh("cpu", (4,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("params_of", [lambda model: model, lambda model: model.parameters()], ids=["module", "shapes"])
def test_sharded_parameters_have_the_roles_of_whole_ones(params_of, mesh):
    """Roles depend on global shapes: of 8,192 rows each rank has 2,048, too few for a token table."""

    def model():
        blocks = [nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)) for _ in range(2)]
        return nn.Sequential(nn.Embedding(8192, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 8192))

    whole, sharded = model(), fully_shard(model(), mesh=mesh)
    reports = [Collins(params_of(each), min_K=16).memory_report().rows for each in (whole, sharded)]
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    found = [[(row.role, row.reason, row.shape) for row in rows] for rows in reports]
    assert found[0] == found[1]
    assert [row.role for row in reports[1]].count("tokens") == 2


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (8, 128)),
        ({}, (8, 72)),  # rows of no whole blocks of integers
        ({"compress_ratio": 64}, (16, 128)),
        ({"role": "tokens"}, (8, 32)),
        ({"role": "tokens"}, (8, 31)),
    ],
    ids=str,
)
def test_sharded_small_tables_have_the_format_of_whole_ones(options, shape, mesh):
    """The entries of the whole parameter count: a rank has a quarter of them."""
    placed = functools.partial(torch.distributed.tensor.distribute_tensor, device_mesh=mesh, src_data_rank=None)

    def row_of(p):
        return Collins([nn.Parameter(p)], min_K=128, **options).memory_report().rows[0]

    small, large = torch.zeros(shape), torch.zeros(2 * shape[0], *shape[1:])
    rows = [row_of(p) for p in (small, placed(small, placements=[torch.distributed.tensor.Shard(0)]), large)]
    assert len({row.load for row in rows}) == 1
    assert [row.m_format for row in rows[:2]] == ["float32", "float32"]
    assert rows[2].m_format.startswith("int")


def test_exact_parameters_may_be_sharded_along_any_dimension(mesh):
    placed = functools.partial(torch.distributed.tensor.distribute_tensor, device_mesh=mesh, src_data_rank=None)
    p = nn.Parameter(placed(torch.zeros(64, 64), placements=[torch.distributed.tensor.Shard(1)]))
    with pytest.raises(ValueError, match="Collins accepts Replicate"):
        Collins([p], min_K=16)
    opt = Collins([p], min_K=16, role="exact")
    p.grad = placed(torch.ones(64, 64), placements=[torch.distributed.tensor.Shard(1)])
    opt.step()
    assert opt.state[p]["exp_avg"].placements == p.placements


def names(groups):
    return {group["weight_decay"]: [name for name, _ in group["params"]] for group in groups}


def test_groups_of_a_model_have_vectors_norms_and_biases_without_decay():
    model = nn.ModuleDict({
        "table": nn.Embedding(300, 32),
        "conv": nn.Conv2d(3, 8, 3),
        "norm": nn.LayerNorm((8, 4, 4)),
        "relative_attention_bias": nn.Embedding(32, 8),
        "out": nn.Linear(32, 300),
        "frozen": nn.Linear(4, 4).requires_grad_(False),
    })  # fmt: skip
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.register_parameter("experts_bias", nn.Parameter(torch.ones(4, 8)))
    assert names(param_groups(model, 0.1)) == {
        0.1: ["table.weight", "conv.weight", "out.weight"],
        0.0: ["scale", "experts_bias", "conv.bias", "norm.weight", "norm.bias", "relative_attention_bias.weight",
              "out.bias"],
    }  # fmt: skip
    assert names(param_groups(nn.Linear(4, 4, bias=False))) == {0.01: ["weight"]}
    assert names(param_groups(nn.LayerNorm(4))) == {0.0: ["weight", "bias"]}
    assert names(param_groups(nn.Linear(4, 4), 0)) == {0: ["weight", "bias"]}


@pytest.mark.parametrize(
    ("no_decay", "without"),
    [
        ([nn.Embedding], ["emb.weight"]),
        ([nn.Linear], ["layers.0.fc.weight", "layers.1.fc.weight", "head.weight"]),
        ((nn.Embedding, "head"), ["emb.weight", "head.weight"]),
        ({"head.weight"}, ["head.weight"]),
        (["fc.weight"], ["layers.0.fc.weight", "layers.1.fc.weight"]),
        (["layers.1"], ["layers.1.fc.weight"]),
        (["layers.*.fc*"], ["layers.0.fc.weight", "layers.1.fc.weight"]),
        (["*ea*"], ["head.weight"]),
        (["ead", "c.weight", "layers.1.f", "eights"], []),
        pytest.param(iter(["emb"]), ["emb.weight"], id="an iterator"),
    ],
    ids=str,
)
def test_listed_parameters_are_not_decayed(no_decay, without):
    blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False)}) for _ in range(2)])
    model = nn.ModuleDict({"emb": nn.Embedding(10, 8), "layers": blocks, "head": nn.Linear(8, 10, bias=False)})
    assert names(param_groups(model, 0.1, no_decay)).get(0.0, []) == without


def test_a_model_of_timm_lists_parameters_without_decay():
    class VisionTransformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.cls_token = nn.Parameter(torch.ones(1, 9, 8)), nn.Parameter(torch.ones(1, 1, 8))
            self.head = nn.Linear(8, 4)

        def no_weight_decay(self):
            return {"pos_embed", "cls_token"}

    assert names(param_groups(VisionTransformer(), 0.1)) == {
        0.1: ["head.weight"],
        0.0: ["pos_embed", "cls_token", "head.bias"],
    }


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bert", "gpt2", "opt", "t5"])
def test_groups_equal_those_of_the_trainer_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    keys = {"num_local_experts": 2} if kind == "mixtral" else {}
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[kind](**keys))
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    assert set(names(param_groups(model))[0.01]) == {name for name, _ in model.named_parameters() if name in decayed}


@pytest.mark.parametrize("tied", [False, True])
def test_groups_are_accepted_by_adamw_and_provide_roles_to_collins(tied):
    model, other = LanguageModel(tied), LanguageModel(tied)
    other.load_state_dict(model.state_dict())
    opt = Collins(param_groups(model, 0.1, [nn.Embedding]), lr=1e-2, compress_ratio=1)
    adamw = torch.optim.AdamW(param_groups(other, 0.1, [nn.Embedding]), lr=1e-2)
    assert [group["param_names"] for group in opt.param_groups] == [
        group["param_names"] for group in adamw.param_groups
    ]
    for _ in range(3):
        for each, optimizer in ((model, opt), (other, adamw)):
            optimizer.zero_grad()
            each(torch.arange(16)).logsumexp(-1).sum().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    found = {row.name: row.reason for row in Collins(param_groups(model), min_K=16).memory_report().rows}
    assert found["parameter 'first.weight'"] == "module: nn.Embedding" + (", tied to last" if tied else "")
    regrouped = [{"params": [pair]} for group in param_groups(model) for pair in group["params"]]
    rows = Collins(regrouped, min_K=16).memory_report().rows  # users may modify the groups
    assert {row.name: row.reason for row in rows} == found


@pytest.mark.parametrize("no_decay", ["bias", nn.Embedding, 3, None, [3], [nn.Linear(2, 2)], [int], [None]], ids=str)
def test_an_invalid_list_is_rejected(no_decay):
    with pytest.raises(TypeError, match=r"no_decay must .* names, patterns or classes of modules, got "):
        param_groups(nn.Linear(2, 2), 0.1, no_decay)


def test_groups_require_a_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        param_groups(list(nn.Linear(2, 2).parameters()))
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        Collins(param_groups(nn.ReLU()))
