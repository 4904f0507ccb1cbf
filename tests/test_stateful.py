"""Whatever is done to an optimizer between its steps, every tier and every way to step stays with one that is never
interrupted, to the bit.

A twin (moments beside the parameters, eager, after backward) and several subjects go through the same random
operations; subjects are also saved and loaded, copied, pickled and moved to other tiers on the way. After each
operation all weights and all state are compared.

Normally a few short sequences are tried, always the same. More of them, by name and drawn anew each time:

    pytest -n 0 tests/test_stateful.py --hypothesis-profile=thorough
"""

import copy
import io
import pickle

import pytest
import torch
from helpers import bits
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from collins import Collins

SHAPES = [(64, 64), (40,), (33, 37), (64, 33), (7, 64)]  # in tables and dense, with whole and with partial last buckets
HOST = {"tier": "host", "transfer_size": 1500, "staging_slots": 2}  # some transfers hold several parameters
MIXED = {"device_budget": "10KiB", "transfer_size": 1500, "staging_slots": 2}
WAYS = [
    {},
    {"compile": False, "memory": "device"},
    {"memory": HOST},
    {"memory": MIXED},
    {"in_backward": True},
    {"in_backward": True, "memory": HOST},
]
OPTIONS = {
    "lr": [1e-2, 3e-3, 0.0],
    "betas": [(0.9, 0.999), (0.0, 0.5), (0.95, 0.99)],
    "eps": [1e-8, 1e-3],
    "weight_decay": [0.0, 0.1],
    "decode": ["least_squares", "residual", "sketch"],
    "residual_weight": [None, 0.5],
    "maximize": [False, True],
    "nonfinite": ["propagate", "skip"],
    "capturable": [False, True],
    "stochastic_rounding": [None, False],
}


class Side:
    """Parameters by name, and the optimizer that steps them.

    Attributes:
        params: every parameter that there is, also those that are in no group.
        opt: the optimizer; all its groups are named.
        way: how it steps: `compile`, `memory` and `in_backward`.
    """

    def __init__(self, params, groups, way, hash):
        self.params, self.way, self.hash = params, way, hash
        self.build(groups)

    def build(self, groups):
        """Creates an optimizer from the names of the parameters and the options of each group."""
        named = [{**options, "params": [(name, self.params[name]) for name in names]} for names, options in groups]
        self.opt = Collins(named, lr=1e-2, min_K=16, compress_ratio=8, rehash_period=3, hash=self.hash, **self.way)

    def groups(self):
        kept = ("params", "param_names")
        return [
            (list(group["param_names"]), {k: copy.deepcopy(v) for k, v in group.items() if k not in kept})
            for group in self.opt.param_groups
        ]

    def step(self, grads):
        """One step with the given gradients, by names of parameters."""
        given = {name: g.to(self.params[name].dtype) for name, g in grads.items()}
        try:
            if self.opt.in_backward and given:
                sum((self.params[name] * g).sum() for name, g in given.items()).backward()
            elif not self.opt.in_backward:
                for name, g in given.items():
                    self.params[name].grad = g
            self.opt.step()
        finally:
            for p in self.params.values():
                p.grad = None

    def fresh(self, way):
        """New tensors and a new optimizer, as another process would create them."""
        params = {
            name: torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            for name, p in self.params.items()
        }
        return Side(params, self.groups(), way, self.hash)

    def drained(self):
        self.opt._stepper.store.drain()
        return self.opt.state


def seeded(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Interruptions(RuleBasedStateMachine):
    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        hash=st.sampled_from(["block", "block", "universal"]),
        split=st.integers(1, len(SHAPES)),
        ways=st.permutations(WAYS),
    )
    def begin(self, dtype, hash, split, ways):
        self.number = 0  # of the next draw of random values
        self.absent = set()  # names of parameters that are in no group
        names = [f"p{i}" for i in range(len(SHAPES))]
        groups = [group for group in ((names[:split], {}), (names[split:], {})) if group[0]]

        def made(way):
            params = {
                name: torch.nn.Parameter(seeded(*shape, seed=i).to(dtype))
                for i, (name, shape) in enumerate(zip(names, SHAPES, strict=True))
            }
            return Side(params, groups, way, hash)

        self.twin = made({})
        self.subjects = [made(way) for way in ways[:3]]

    @property
    def sides(self):
        return [self.twin, *self.subjects]

    def seed(self):
        self.number += 1
        return 1000 + self.number

    def members(self):
        return [name for group in self.twin.opt.param_groups for name in group["param_names"]]

    def pick(self, data, among=None):
        return data.draw(st.sampled_from(sorted(self.members() if among is None else among)))

    # Steps.

    @rule(data=st.data(), count=st.integers(1, 4))
    def step(self, data, count):
        for _ in range(count):
            taking = [name for name in self.members() if self.twin.params[name].requires_grad]
            without = data.draw(st.sets(st.sampled_from(taking), max_size=2)) if taking else set()
            seed = self.seed()
            grads = {
                name: seeded(*self.twin.params[name].shape, seed=100 * seed + i)
                for i, name in enumerate(taking)
                if name not in without
            }
            for side in self.sides:
                side.step(grads)

    @rule(data=st.data())
    def step_with_a_gradient_that_is_not_finite(self, data):
        name = self.pick(data)
        if not self.twin.params[name].requires_grad:
            return
        before = [group["nonfinite"] for group in self.twin.opt.param_groups]
        g = seeded(*self.twin.params[name].shape, seed=self.seed())
        g.view(-1)[g.numel() // 2] = data.draw(st.sampled_from([float("nan"), float("inf")]))
        for side in self.sides:
            for group in side.opt.param_groups:
                group["nonfinite"] = "skip"
            side.step({name: g})
            for group, value in zip(side.opt.param_groups, before, strict=True):
                group["nonfinite"] = value

    @rule(data=st.data())
    def step_that_is_refused(self, data):
        """Existing tables are invalid under another period."""
        tables = [name for name in self.members() if "m_table" in self.twin.opt.state.get(self.twin.params[name], {})]
        tables = [name for name in tables if self.twin.params[name].requires_grad]
        if not tables or self.twin.hash != "block":
            return
        name = self.pick(data, tables)
        g = seeded(*self.twin.params[name].shape, seed=self.seed())
        for side in self.sides:
            for group in side.opt.param_groups:
                group["rehash_period"] = 5
            with pytest.raises(ValueError, match="has tables that the current options cannot decode"):
                side.step({name: g})
            for group in side.opt.param_groups:
                group["rehash_period"] = 3
            side.step({})

    # Options, groups and parameters.

    @rule(data=st.data(), name=st.sampled_from(sorted(OPTIONS)), tensor=st.booleans())
    def set_option(self, data, name, tensor):
        value = data.draw(st.sampled_from(OPTIONS[name]))
        place = data.draw(st.integers(0, len(self.twin.opt.param_groups) - 1))
        for side in self.sides:
            own = torch.tensor(value) if name == "lr" and tensor else value
            side.opt.param_groups[place][name] = own

    @rule(data=st.data())
    def freeze_or_unfreeze(self, data):
        name = self.pick(data, self.twin.params)
        for side in self.sides:
            p = side.params[name]
            p.requires_grad_(not p.requires_grad)

    @rule(data=st.data())
    def reorder(self, data):
        place = data.draw(st.integers(0, len(self.twin.opt.param_groups) - 1))
        order = data.draw(st.permutations(range(len(self.twin.opt.param_groups[place]["params"]))))
        reverse = data.draw(st.booleans())
        for side in self.sides:
            group = side.opt.param_groups[place]
            for key in ("params", "param_names"):
                group[key][:] = [group[key][i] for i in order]
            if reverse:
                side.opt.param_groups.reverse()

    @precondition(lambda self: len(self.members()) > 2)
    @rule(data=st.data(), with_state=st.booleans())
    def remove(self, data, with_state):
        name = self.pick(data)
        for side in self.sides:
            for group in side.opt.param_groups:
                if name in group["param_names"]:
                    at = group["param_names"].index(name)
                    del group["param_names"][at], group["params"][at]
            if with_state:
                side.opt.state.pop(side.params[name], None)
            side.opt.param_groups[:] = [group for group in side.opt.param_groups if group["params"]]
        self.absent.add(name)

    @precondition(lambda self: self.absent)
    @rule(data=st.data(), first=st.booleans())
    def put_back(self, data, first):
        name = self.pick(data, self.absent)
        place = data.draw(st.integers(0, len(self.twin.opt.param_groups) - 1))
        for side in self.sides:
            group = side.opt.param_groups[place]
            at = 0 if first else len(group["params"])
            group["params"].insert(at, side.params[name])
            group["param_names"].insert(at, name)
        self.absent.remove(name)

    @precondition(lambda self: self.absent)
    @rule(data=st.data())
    def put_back_in_a_group_of_its_own(self, data):
        name = self.pick(data, self.absent)
        for side in self.sides:
            side.opt.add_param_group({"params": [(name, side.params[name])], "lr": 3e-3, "maximize": True})
        self.absent.remove(name)

    @precondition(lambda self: len(self.twin.params) < 8)
    @rule(data=st.data())
    def add_param_group(self, data):
        name, seed = f"p{len(self.twin.params)}", self.seed()
        shape = data.draw(st.sampled_from(SHAPES))
        dtype = self.twin.params["p0"].dtype
        for side in self.sides:
            side.params[name] = torch.nn.Parameter(seeded(*shape, seed=seed).to(dtype))
            side.opt.add_param_group({"params": [(name, side.params[name])], "weight_decay": 0.1})

    @rule(data=st.data())
    def resize(self, data):
        name = self.pick(data)
        for side in self.sides:
            p = side.params[name]
            if p.shape[0] >= 70:
                return
            p.data = torch.cat([p.data, p.data[:5]])
            side.opt.state.pop(p, None)

    @rule(data=st.data())
    def replace_parameter(self, data):
        """As `resize_token_embeddings` does, with the optimizer updated as trainers do."""
        name = self.pick(data)
        for side in self.sides:
            old = side.params[name]
            new = side.params[name] = torch.nn.Parameter(old.detach() * 2, requires_grad=old.requires_grad)
            side.opt.state.pop(old, None)
            for group in side.opt.param_groups:
                group["params"][:] = [new if p is old else p for p in group["params"]]

    # State.

    @rule(data=st.data(), how=st.sampled_from(["clear", "delete", "empty", "edit", "replace", "set", "fill"]))
    def surgery(self, data, how):
        stepped = [name for name in self.members() if self.twin.opt.state.get(self.twin.params[name])]
        if not stepped:
            return
        name = self.pick(data, stepped)
        for side in self.sides:
            side.drained()  # moments on the host are valid after state_dict(), which calls this
            opt, p = side.opt, side.params[name]
            first = next(key for key in opt.state[p] if key not in ("step", "layout"))
            if how == "clear":
                opt.state.clear()
            elif how == "delete":
                del opt.state[p]
            elif how == "empty":
                opt.state[p].clear()
            elif how == "edit":
                opt.state[p][first].mul_(0.5)
            elif how == "replace":
                opt.state[p][first] = torch.full_like(opt.state[p][first], 0.25)
            elif how == "set":
                opt.state[p]["step"] = torch.tensor(20.0)
            else:
                opt.state[p]["step"].fill_(7)

    # Operations that the reference optimizer does not perform.

    def can_save(self):
        """torch's own `state_dict` rejects the state of parameters that are in no group."""
        members = {id(self.twin.params[name]) for name in self.members()}
        return all(id(p) in members for p in self.twin.opt.state)

    @precondition(can_save)
    @rule(data=st.data(), file=st.booleans())
    def save_and_load_into_the_same(self, data, file):
        for side in data.draw(st.permutations(self.subjects))[:2]:
            side.opt.load_state_dict(saved(side.opt, file))

    @precondition(can_save)
    @rule(data=st.data(), file=st.booleans())
    def save_and_load_into_a_fresh_one(self, data, file):
        """On any tier, with any way to step."""
        for place in range(len(self.subjects)):
            if data.draw(st.booleans()):
                side = self.subjects[place]
                other = side.fresh(data.draw(st.sampled_from(WAYS)))
                other.opt.load_state_dict(saved(side.opt, file))
                self.subjects[place] = other

    @rule(data=st.data(), pickled=st.booleans())
    def copy(self, data, pickled):
        for place in range(len(self.subjects)):
            if data.draw(st.booleans()):
                side = self.subjects[place]
                self.subjects[place] = pickle.loads(pickle.dumps(side)) if pickled else copy.deepcopy(side)

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), way=st.permutations(WAYS))
    def cast(self, dtype, way):
        """The model is cast to another dtype, with a new optimizer."""
        for place, side in enumerate(self.sides):
            for p in side.params.values():
                p.data = p.data.to(dtype)
            fresh = side.fresh(side.way if place == 0 else way[place])
            if place == 0:
                self.twin = fresh
            else:
                self.subjects[place - 1] = fresh

    # Invariants.

    @invariant()
    def all_are_alike(self):
        if not hasattr(self, "twin"):
            return
        state = self.twin.drained()
        for side in self.subjects:
            own = side.drained()
            assert set(map(id, own)) <= set(map(id, side.params.values()))
            for name, p in self.twin.params.items():
                q = side.params[name]
                assert p.dtype == q.dtype
                assert torch.equal(bits(p), bits(q)), (name, side.way)
                due, found = state.get(p) or {}, own.get(q) or {}  # an emptied state need not be saved
                assert due.keys() == found.keys(), (name, side.way)
                for key in due:
                    assert torch.equal(bits(due[key]), bits(found[key])), (name, key, side.way)


def saved(opt, file):
    if not file:
        return copy.deepcopy(opt.state_dict())
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


TestInterruptions = Interruptions.TestCase
LENGTH = {"thorough": {"max_examples": 1000, "stateful_step_count": 50}}
ALWAYS_THE_SAME = {"max_examples": 40, "stateful_step_count": 30, "derandomize": True, "phases": [Phase.generate]}
TestInterruptions.settings = settings(
    **LENGTH.get(settings.get_current_profile_name(), ALWAYS_THE_SAME),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
