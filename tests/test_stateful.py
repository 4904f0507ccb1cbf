"""After any sequence of operations between steps, every tier and every way to step is bitwise equal to a reference.

The reference (moments beside the parameters, eager, after backward) and several other optimizers perform the same
random operations; the others are also saved and loaded, copied, pickled and moved to other tiers. After each operation
all weights and all state are compared.

By default a few short sequences are tried, always the same. With this profile there are more, and others in each run:

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


class Subject:
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
        named_groups = [
            {**options, "params": [(name, self.params[name]) for name in names]} for names, options in groups
        ]
        self.opt = Collins(
            named_groups, lr=1e-2, min_K=16, compress_ratio=8, rehash_period=3, hash=self.hash, **self.way
        )

    def groups(self):
        excluded = ("params", "param_names")
        return [
            (list(group["param_names"]), {k: copy.deepcopy(v) for k, v in group.items() if k not in excluded})
            for group in self.opt.param_groups
        ]

    def step(self, grads):
        """One step with the given gradients, by names of parameters."""
        cast_grads = {name: g.to(self.params[name].dtype) for name, g in grads.items()}
        try:
            if self.opt.in_backward and cast_grads:
                sum((self.params[name] * g).sum() for name, g in cast_grads.items()).backward()
            elif not self.opt.in_backward:
                for name, g in cast_grads.items():
                    self.params[name].grad = g
            self.opt.step()
        finally:
            for p in self.params.values():
                p.grad = None

    def new_subject(self, way):
        """New tensors and a new optimizer, as another process would create them."""
        params = {
            name: torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            for name, p in self.params.items()
        }
        return Subject(params, self.groups(), way, self.hash)

    def drained_state(self):
        self.opt._stepper.store.drain()
        return self.opt.state


def random_tensor(*shape, seed):
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

        def make_subject(way):
            params = {
                name: torch.nn.Parameter(random_tensor(*shape, seed=i).to(dtype))
                for i, (name, shape) in enumerate(zip(names, SHAPES, strict=True))
            }
            return Subject(params, groups, way, hash)

        self.reference = make_subject({})
        self.subjects = [make_subject(way) for way in ways[:3]]

    @property
    def all_subjects(self):
        return [self.reference, *self.subjects]

    def seed(self):
        self.number += 1
        return 1000 + self.number

    def names_in_groups(self):
        return [name for group in self.reference.opt.param_groups for name in group["param_names"]]

    def draw_name(self, data, names=None):
        return data.draw(st.sampled_from(sorted(self.names_in_groups() if names is None else names)))

    # Steps.

    @rule(data=st.data(), count=st.integers(1, 4))
    def step(self, data, count):
        for _ in range(count):
            stepped_names = [name for name in self.names_in_groups() if self.reference.params[name].requires_grad]
            names_without_gradient = (
                data.draw(st.sets(st.sampled_from(stepped_names), max_size=2)) if stepped_names else set()
            )
            seed = self.seed()
            grads = {
                name: random_tensor(*self.reference.params[name].shape, seed=100 * seed + i)
                for i, name in enumerate(stepped_names)
                if name not in names_without_gradient
            }
            for subject in self.all_subjects:
                subject.step(grads)

    @rule(data=st.data())
    def step_with_a_gradient_that_is_not_finite(self, data):
        name = self.draw_name(data)
        if not self.reference.params[name].requires_grad:
            return
        before = [group["nonfinite"] for group in self.reference.opt.param_groups]
        g = random_tensor(*self.reference.params[name].shape, seed=self.seed())
        g.view(-1)[g.numel() // 2] = data.draw(st.sampled_from([float("nan"), float("inf")]))
        for subject in self.all_subjects:
            for group in subject.opt.param_groups:
                group["nonfinite"] = "skip"
            subject.step({name: g})
            for group, value in zip(subject.opt.param_groups, before, strict=True):
                group["nonfinite"] = value

    @rule(data=st.data())
    def step_that_is_refused(self, data):
        """Existing tables are invalid under another period."""
        tables = [
            name
            for name in self.names_in_groups()
            if "m_table" in self.reference.opt.state.get(self.reference.params[name], {})
        ]
        tables = [name for name in tables if self.reference.params[name].requires_grad]
        if not tables or self.reference.hash != "block":
            return
        name = self.draw_name(data, tables)
        g = random_tensor(*self.reference.params[name].shape, seed=self.seed())
        for subject in self.all_subjects:
            for group in subject.opt.param_groups:
                group["rehash_period"] = 5
            with pytest.raises(ValueError, match="has tables that the current options cannot decode"):
                subject.step({name: g})
            for group in subject.opt.param_groups:
                group["rehash_period"] = 3
            subject.step({})

    # Options, groups and parameters.

    @rule(data=st.data(), name=st.sampled_from(sorted(OPTIONS)), tensor=st.booleans())
    def set_option(self, data, name, tensor):
        value = data.draw(st.sampled_from(OPTIONS[name]))
        index = data.draw(st.integers(0, len(self.reference.opt.param_groups) - 1))
        for subject in self.all_subjects:
            new_value = torch.tensor(value) if name == "lr" and tensor else value
            subject.opt.param_groups[index][name] = new_value

    @rule(data=st.data())
    def freeze_or_unfreeze(self, data):
        name = self.draw_name(data, self.reference.params)
        for subject in self.all_subjects:
            p = subject.params[name]
            p.requires_grad_(not p.requires_grad)

    @rule(data=st.data())
    def reorder(self, data):
        index = data.draw(st.integers(0, len(self.reference.opt.param_groups) - 1))
        order = data.draw(st.permutations(range(len(self.reference.opt.param_groups[index]["params"]))))
        reverse = data.draw(st.booleans())
        for subject in self.all_subjects:
            group = subject.opt.param_groups[index]
            for key in ("params", "param_names"):
                group[key][:] = [group[key][i] for i in order]
            if reverse:
                subject.opt.param_groups.reverse()

    @precondition(lambda self: len(self.names_in_groups()) > 2)
    @rule(data=st.data(), with_state=st.booleans())
    def remove(self, data, with_state):
        name = self.draw_name(data)
        for subject in self.all_subjects:
            for group in subject.opt.param_groups:
                if name in group["param_names"]:
                    index = group["param_names"].index(name)
                    del group["param_names"][index], group["params"][index]
            if with_state:
                subject.opt.state.pop(subject.params[name], None)
            subject.opt.param_groups[:] = [group for group in subject.opt.param_groups if group["params"]]
        self.absent.add(name)

    @precondition(lambda self: self.absent)
    @rule(data=st.data(), first=st.booleans())
    def put_back(self, data, first):
        name = self.draw_name(data, self.absent)
        group_index = data.draw(st.integers(0, len(self.reference.opt.param_groups) - 1))
        for subject in self.all_subjects:
            group = subject.opt.param_groups[group_index]
            index = 0 if first else len(group["params"])
            group["params"].insert(index, subject.params[name])
            group["param_names"].insert(index, name)
        self.absent.remove(name)

    @precondition(lambda self: self.absent)
    @rule(data=st.data())
    def put_back_in_a_group_of_its_own(self, data):
        name = self.draw_name(data, self.absent)
        for subject in self.all_subjects:
            subject.opt.add_param_group({"params": [(name, subject.params[name])], "lr": 3e-3, "maximize": True})
        self.absent.remove(name)

    @precondition(lambda self: len(self.reference.params) < 8)
    @rule(data=st.data())
    def add_param_group(self, data):
        name, seed = f"p{len(self.reference.params)}", self.seed()
        shape = data.draw(st.sampled_from(SHAPES))
        dtype = self.reference.params["p0"].dtype
        for subject in self.all_subjects:
            subject.params[name] = torch.nn.Parameter(random_tensor(*shape, seed=seed).to(dtype))
            subject.opt.add_param_group({"params": [(name, subject.params[name])], "weight_decay": 0.1})

    @rule(data=st.data())
    def resize(self, data):
        name = self.draw_name(data)
        for subject in self.all_subjects:
            p = subject.params[name]
            if p.shape[0] >= 70:
                return
            p.data = torch.cat([p.data, p.data[:5]])
            subject.opt.state.pop(p, None)

    @rule(data=st.data())
    def replace_parameter(self, data):
        """As `resize_token_embeddings` does, with the optimizer updated as trainers do."""
        name = self.draw_name(data)
        for subject in self.all_subjects:
            old = subject.params[name]
            new = subject.params[name] = torch.nn.Parameter(old.detach() * 2, requires_grad=old.requires_grad)
            subject.opt.state.pop(old, None)
            for group in subject.opt.param_groups:
                group["params"][:] = [new if p is old else p for p in group["params"]]

    # State.

    @rule(data=st.data(), how=st.sampled_from(["clear", "delete", "empty", "edit", "replace", "set", "fill"]))
    def edit_state(self, data, how):
        names = [name for name in self.names_in_groups() if self.reference.opt.state.get(self.reference.params[name])]
        if not names:
            return
        name = self.draw_name(data, names)
        for subject in self.all_subjects:
            subject.drained_state()  # moments on the host are valid after state_dict(), which calls this
            opt, p = subject.opt, subject.params[name]
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
        ids_in_groups = {id(self.reference.params[name]) for name in self.names_in_groups()}
        return all(id(p) in ids_in_groups for p in self.reference.opt.state)

    @precondition(can_save)
    @rule(data=st.data(), file=st.booleans())
    def save_and_load_into_the_same(self, data, file):
        for subject in data.draw(st.permutations(self.subjects))[:2]:
            subject.opt.load_state_dict(saved_state(subject.opt, file))

    @precondition(can_save)
    @rule(data=st.data(), file=st.booleans())
    def save_and_load_into_a_new_one(self, data, file):
        """On any tier, with any way to step."""
        for index in range(len(self.subjects)):
            if data.draw(st.booleans()):
                subject = self.subjects[index]
                other = subject.new_subject(data.draw(st.sampled_from(WAYS)))
                other.opt.load_state_dict(saved_state(subject.opt, file))
                self.subjects[index] = other

    @rule(data=st.data(), pickled=st.booleans())
    def copy(self, data, pickled):
        for index in range(len(self.subjects)):
            if data.draw(st.booleans()):
                subject = self.subjects[index]
                self.subjects[index] = pickle.loads(pickle.dumps(subject)) if pickled else copy.deepcopy(subject)

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), way=st.permutations(WAYS))
    def cast(self, dtype, way):
        """The model is cast to another dtype, with a new optimizer."""
        for index, subject in enumerate(self.all_subjects):
            for p in subject.params.values():
                p.data = p.data.to(dtype)
            new_subject = subject.new_subject(subject.way if index == 0 else way[index])
            if index == 0:
                self.reference = new_subject
            else:
                self.subjects[index - 1] = new_subject

    # Invariants.

    @invariant()
    def all_are_alike(self):
        if not hasattr(self, "reference"):
            return
        state = self.reference.drained_state()
        for subject in self.subjects:
            subject_state = subject.drained_state()
            assert set(map(id, subject_state)) <= set(map(id, subject.params.values()))
            for name, p in self.reference.params.items():
                q = subject.params[name]
                assert p.dtype == q.dtype
                assert torch.equal(bits(p), bits(q)), (name, subject.way)
                expected, actual = state.get(p) or {}, subject_state.get(q) or {}  # an emptied state need not be saved
                assert expected.keys() == actual.keys(), (name, subject.way)
                for key in expected:
                    assert torch.equal(bits(expected[key]), bits(actual[key])), (name, key, subject.way)


def saved_state(opt, file):
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
