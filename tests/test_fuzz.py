"""Loading anything either raises a clean error and changes nothing, or is correct.

State dicts, checkpoints, sharded folders, memory policies and their files are made wrong in thousands of ways, the same
ones in every run. Each case depends on its seed alone, which a failing one names. Some 200 are tried in the suite; by
name, with the figures printed:

    FUZZ_CASES=10000 pytest -n 0 -rP tests/test_fuzz.py
    FUZZ_CASE="state dict/host/17" pytest -n 0 tests/test_fuzz.py
"""

import contextlib
import copy
import dataclasses
import io
import os
import random
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import bits, give_gradients, parameters, same
from mutations import MOST_VALID, Cases, almost_valid, damaged_bytes, mutated, random_value

import collins
from collins import CheckpointError, Collins, checkpoint, convert, files, whole_folder
from collins.offload import MemoryPolicy

CASES = int(os.environ.get("FUZZ_CASES", 200))
CLEAN_ERRORS = (ValueError, TypeError)
SHAPES = [(64, 64), (40,), (33, 37), (), (64, 40)]
HOST = {"tier": "host", "transfer_size": 3000, "staging_slots": 2}
WAYS = {
    "default": {},
    "universal": {"hash": "universal"},
    "host": {"memory": HOST},
    "in backward": {"in_backward": True, "memory": HOST},
    "orthogonal": {"decode": "orthogonal"},
    "bf16 tables": {"table_dtype": torch.bfloat16},
    "fp32 tables": {"table_dtype": torch.float32},
    "int4 tables": {"table_dtype": "int4"},
    "capturable": {"capturable": True, "max_grad_norm": 1.0},
    "named": {},
}
in_every_configuration = pytest.mark.parametrize("way", WAYS)
# Warnings of PyTorch about malformed tensors, and of numpy about numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse|.*sparse|Casting complex|overflow encountered|invalid value")


def case_count(of_all, ways=1):
    """The number of cases of a kind, from its share of all cases and the number of ways it is run in."""
    return max(round(CASES * of_all / ways), 1)


class Subject:
    """Parameters, some of them in 16 bits, and their optimizer after `steps` steps."""

    def __init__(self, way, steps):
        self.ps = parameters(torch.float32, SHAPES, "cpu")
        self.ps[1].data, self.ps[4].data = self.ps[1].data.bfloat16(), self.ps[4].data.bfloat16()
        params = [(f"p{i}", p) for i, p in enumerate(self.ps)] if way == "named" else self.ps
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": torch.tensor(3e-2), "weight_decay": 0.1}]
        self.opt = Collins(groups, lr=1e-2, min_K=16, rehash_period=3, **WAYS[way])
        for number in range(steps):
            self.step(number)

    def step(self, number):
        give_gradients(number, self.ps)
        if self.opt.in_backward:
            grads = [p.grad for p in self.ps]
            self.opt.zero_grad()
            sum((p * g).sum() for p, g in zip(self.ps, grads, strict=True)).backward()
        self.opt.step()
        self.opt.zero_grad()

    def values(self):
        """Everything that a load may change: weights, tables, counters, options, keys of hashes, hooks."""
        state_dict = self.opt.state_dict()
        keys = [getattr(self.opt.hash_of(p), "key", None) for p in self.ps]
        rates = [id(group["lr"]) for group in self.opt.param_groups if isinstance(group["lr"], torch.Tensor)]
        options = {name: value for name, value in vars(self.opt).items() if isinstance(value, int | str | None)}
        hooks = {name: len(value) for name, value in vars(self.opt).items() if isinstance(value, OrderedDict)}
        weights = [p.detach() for p in self.ps]
        return [copy.deepcopy([weights, state_dict, keys, options, self.opt.defaults]), rates, hooks]


def alike(a, b):
    """Equality in which NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.is_meta or a.layout != torch.strided:  # in what was given alone
            return (a.device, a.layout) == (b.device, b.layout)
        return torch.equal(bits(a), bits(b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return same(a, b) or a is b


def equals_saved(state, saved):
    """Whether a parameter's state equals that of a state dict; counters are tensors here."""
    if not saved:
        return not state
    return (
        all(
            float(state[name]) == torch.as_tensor(value).detach().item()
            if name == "step"
            else alike(state[name], value)
            for name, value in saved.items()
            if name in state
        )
        and {name for name in state if name not in ("step", "layout")} <= saved.keys()
    )


@contextlib.contextmanager
def unchanged_random_state():
    """Checks that the body does not use the global random generators."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    yield
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def load_and_check(subject, state_dict):
    """Loads a state dict, and checks that the result equals it."""
    opt, original = subject.opt, copy.deepcopy(state_dict)
    try:
        opt.check_state_dict(state_dict)
    except CLEAN_ERRORS:
        with pytest.raises(CLEAN_ERRORS):
            opt.load_state_dict(state_dict)
        raise
    opt.load_state_dict(state_dict)
    opt.state_dict()  # waits for moments on the host
    indices = [index for group in original["param_groups"] for index in group["params"]]
    for p, index in zip([p for group in opt.param_groups for p in group["params"]], indices, strict=True):
        assert equals_saved(opt.state.get(p, {}), original["state"].get(index, {}))


@pytest.fixture(scope="module")
def saved():
    """For each way, the state dict of an optimizer that has stepped."""
    return {way: Subject(way, 3).opt.state_dict() for way in WAYS}


def try_state_dicts(way, saved, count):
    cases = Cases("state dict", way, count=count)
    for seed in cases:
        with cases.case(seed) as rng:
            state_dict = mutated(saved[way if rng.random() < 0.8 else rng.choice(list(WAYS))], rng)
            steps = rng.choice([0, 2])
            subject = Subject(way, steps)
            before = subject.values()
            try:
                with unchanged_random_state():
                    load_and_check(subject, state_dict)
            except CLEAN_ERRORS:
                cases.ended["refused"] += 1
                assert alike(subject.values(), before)
                if rng.random() < 0.2:
                    reference = Subject(way, steps)
                    for s in (subject, reference):
                        s.step(9)
                    assert alike(subject.values()[0][:3], reference.values()[0][:3])  # options hold a number of its own
            else:
                cases.ended["accepted"] += 1
                subject.step(9)
    cases.end()


@in_every_configuration
def test_state_dicts(way, saved):
    try_state_dicts(way, saved, case_count(0.4, len(WAYS)))


@pytest.mark.skipif("FUZZ_CASE" in os.environ, reason="another case is asked for")
def test_removing_a_check_is_detected(saved, monkeypatch):
    """Without the check an error is not clean, or a rejected state dict has changed something."""
    monkeypatch.setattr(checkpoint, "_check_group", lambda *_: None)
    with pytest.raises((AssertionError, LookupError, AttributeError)) as caught:
        try_state_dicts("default", saved, 200)
    assert "this case alone: FUZZ_CASE='state dict/default/" in caught.value.__notes__[0]


@pytest.mark.skipif("FUZZ_CASE" in os.environ, reason="another case is asked for")
@pytest.mark.parametrize(("first_refused", "count_of_cases"), [(0, 2), (1, 2), (5, 6), (MOST_VALID, MOST_VALID)])
def test_a_kind_fails_if_no_case_is_rejected_and_not_if_the_first_ones_are_valid(first_refused, count_of_cases):
    cases = Cases("none", count=2)
    for number, _ in enumerate(cases):
        cases.ended["refused" if number == first_refused else "accepted"] += 1
    assert sum(cases.ended.values()) == count_of_cases
    with contextlib.nullcontext() if first_refused < MOST_VALID else pytest.raises(AssertionError):
        cases.end()


@in_every_configuration
def test_state_dicts_that_are_converted(way, saved):
    subject = Subject(way, 2)
    adamw = torch.optim.AdamW([{"params": subject.ps[:3]}, {"params": subject.ps[3:]}], lr=0.0, weight_decay=0.0)
    give_gradients(0, subject.ps)
    adamw.step()
    adamw.zero_grad()
    before = subject.values()
    cases = Cases("convert", way, count=case_count(0.15, len(WAYS)))
    for seed in cases:
        with cases.case(seed) as rng:
            source = adamw.state_dict() if rng.random() < 0.5 else saved[rng.choice(list(WAYS))]
            state_dict = mutated(source, rng)
            try:
                with unchanged_random_state():
                    converted = convert(state_dict, subject.opt)
            except CLEAN_ERRORS:
                cases.ended["refused"] += 1
            else:
                cases.ended["accepted"] += 1
                load_and_check(Subject(way, 0), converted)
            assert alike(subject.values(), before)
    cases.end()


NAMES = [field.name for field in dataclasses.fields(MemoryPolicy)] + ["bucket_size"]
POLICY = {"tier": "host", "device_reserve": "2GiB", "host_reserve": "10%", "staging_slots": 3, "pin_limit": 1000000}
TOML = b'[collins.memory]\ntier = "host"\ndevice_reserve = "2GiB"\nhost_reserve = "10%"\nstaging_slots = 3\n'
TOML += b'pin_limit = 1000000\ntransfer_size = "64MiB"\n[other]\nx = [1, 2.5, "y"]\n'


@pytest.mark.filterwarnings("ignore:bucket_size is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["mapping", "string", "toml"])
def test_policies(kind, tmp_path):
    path = tmp_path / "policy.toml"
    cases = Cases("policy", kind, count=case_count(0.2, 3))
    for seed in cases:
        with cases.case(seed) as rng:
            if kind == "toml":
                path.write_bytes(damaged_bytes(TOML, rng))
                value = path
            elif kind == "string":
                value = rng.choice(["auto", "device", "host", "HOST", ".tom", "2GiB"])
                value = almost_valid(value, rng) if rng.random() < 0.9 else value
            else:
                value = {rng.choice(NAMES): random_value(rng) for _ in range(rng.randrange(4))}
                value = mutated(rng.choice([POLICY, value]), rng)
            p = torch.nn.Parameter(torch.zeros(3))
            original = None if kind == "toml" else copy.deepcopy(value)
            try:
                policy = MemoryPolicy.of(value)
            except CLEAN_ERRORS:
                cases.ended["refused"] += 1
                if value is not None:
                    with pytest.raises(CLEAN_ERRORS):
                        Collins([p], memory=value, in_backward=True)
                    assert not p._post_accumulate_grad_hooks
            else:
                cases.ended["accepted"] += 1
                for bytes_of in (policy.device_reserve_of, policy.host_reserve_of):
                    assert bytes_of(1000) >= 0
                for bytes_of in (policy.device_budget_of, policy.pin_limit_of):
                    assert bytes_of(1000) is None or bytes_of(1000) >= 0
                assert policy.transfer_bytes >= 1
                assert MemoryPolicy.of(dataclasses.asdict(policy)) == policy
                Collins([p], memory=value)
            assert kind == "toml" or alike(value, original)
    cases.end()


class Counting(torch.nn.Linear):
    """A model with extra state that is not a tensor."""

    calls = 3

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = int(state["calls"])


class Program(Subject):
    """The contents of a checkpoint file of a training program."""

    def __init__(self, steps):
        super().__init__("default", steps)
        generator = torch.Generator().manual_seed(steps)
        self.model, self.other = torch.nn.Linear(3, 3), Counting(2, 2)
        for model in (self.model, self.other):
            for p in model.parameters():
                p.data = torch.randn(p.shape, generator=generator)
        self.adam = torch.optim.Adam(self.model.parameters(), amsgrad=True)
        self.model.weight.grad = torch.ones(3, 3)
        self.adam.step()
        self.schedule = torch.optim.lr_scheduler.StepLR(self.opt, 3)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)

    @property
    def parts(self):
        names = ("opt", "model", "other", "adam", "schedule", "average")
        return {name: getattr(self, name) for name in names}

    def values(self):
        return [super().values(), copy.deepcopy({name: part.state_dict() for name, part in self.parts.items()})]


def sealed(data):
    """The bytes of a file with a valid seal and the given content."""
    file = io.BytesIO()
    seal = files._DigestingFile(file)
    seal.write(data)
    return file.getvalue() + seal.trailer()


def parts_of(content):
    """The records of a file, the table of contents at its end, and its seal, as (start, end)."""
    end = len(content) - files._TRAILER
    with zipfile.ZipFile(io.BytesIO(content[:end])) as archive:
        starts = [info.header_offset for info in archive.infolist()]
        ends = [*starts[1:], archive.start_dir, end, len(content)]
    headers = [(start, start + struct.unpack_from("<H", content, start + 26)[0] + 30) for start in starts]
    return [*headers, *zip([*starts, archive.start_dir, end], ends, strict=True)]


@pytest.mark.parametrize("kind", ["file", "sealed", "content"])
def test_checkpoint_files(kind, tmp_path):
    """Damaged bytes; damaged bytes with a valid seal; and content that was invalid when it was saved."""
    path = tmp_path / "checkpoint.pt"
    collins.save(path, **Program(3).parts, epoch=3)
    valid, content = path.read_bytes(), torch.load(path, weights_only=True)
    seal, parts = len(valid) - files._TRAILER, parts_of(valid)
    cases = Cases("file", kind, count=case_count(0.2, 3))
    for seed in cases:
        with cases.case(seed) as rng:
            if kind == "file":
                damaged = damaged_bytes(valid, rng, parts)
            elif kind == "sealed":
                damaged = sealed(damaged_bytes(valid[:seal], rng, [part for part in parts if part[1] <= seal]))
            else:
                file = io.BytesIO()
                name, edited = rng.choice(list(content)), dict(content)
                edited[name] = mutated(content[name], rng)
                try:
                    torch.save(mutated(content, rng) if rng.random() < 0.1 else edited, file)
                except Exception:  # values that a file cannot contain
                    continue
                damaged = sealed(file.getvalue())
            path.write_bytes(damaged)
            program = Program(2)
            before = program.values()
            try:
                with warnings.catch_warnings(), unchanged_random_state():
                    warnings.simplefilter("ignore")  # of torch.load, about what is in the file
                    collins.load(path, **program.parts)
            except CheckpointError:
                cases.ended["refused"] += 1
                assert alike(program.values(), before)
            else:
                cases.ended["accepted"] += 1
                assert kind != "file" or damaged == valid
                program.step(9)
    cases.end()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is: one process saves
def test_sharded_folders(tmp_path):
    """Damaged behind the back of `whole_folder`, whose promise it is that a folder was written to its end.

    `torch.distributed.checkpoint` reads them, in place, into what it is given: copies. It has no digests, and errors of
    its own. What it has read is then loaded or refused.
    """
    folders = [tmp_path / "step-3", tmp_path / "step-4"]
    for steps, path in zip((3, 4), folders, strict=True):
        with whole_folder(path) as folder:
            dcp.save({"optimizer": Subject("default", steps).opt.state_dict()}, checkpoint_id=folder, no_dist=True)
    folder = tmp_path / "damaged"
    cases = Cases("folder", count=case_count(0.05))
    for seed in cases:
        with cases.case(seed) as rng:
            shutil.copytree(folders[0], folder)
            file = rng.choice(sorted(folder.iterdir()))
            kind = rng.choice(["flip", "cut", "missing", "swap"])
            if kind == "flip" and file.name != ".metadata":  # a pickle, which might run anything
                file.write_bytes(damaged_bytes(file.read_bytes(), rng))
            elif kind == "missing":
                file.unlink()
            elif kind == "swap":
                file.write_bytes((folders[1] / file.name).read_bytes())
            else:
                file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
            subject = Subject("default", 2)
            before, state = subject.values(), {"optimizer": copy.deepcopy(subject.opt.state_dict())}
            try:
                dcp.load(state, checkpoint_id=folder, no_dist=True)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                cases.ended["refused"] += 1
                assert alike(subject.values(), before)
            else:
                try:
                    load_and_check(subject, state["optimizer"])
                except CLEAN_ERRORS:
                    cases.ended["refused"] += 1
                    assert alike(subject.values(), before)
                else:
                    cases.ended["accepted"] += 1
                    subject.step(9)
            shutil.rmtree(folder)
    cases.end()
