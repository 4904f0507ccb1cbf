"""Steps in backward bitwise equal steps after it and free gradients at once; unsupported uses are rejected."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import OPTIONS, bits
from torch import nn
from training import TIERS, backward, make_model, same_bits, take_steps, train_model

from collins import Collins
from collins.compile import Engine
from collins.statistics import UpdateSamples
from collins.stepper import Stepper

tiers = pytest.mark.parametrize("memory", TIERS.values(), ids=TIERS)


def groups(model):
    blocks = [p for block in model.blocks for p in block.parameters()]
    return [
        {"params": blocks, "weight_decay": 0.2, "decode": "sketch"},
        {"params": model.tokens.parameters(), "compress_ratio": 4, "lr": 3e-3},
        {"params": [*model.optional.parameters(), *model.head.parameters()], "betas": (0.8, 0.95), "maximize": True},
    ]


SCHEDULES = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.03, total_steps=20),  # changes betas, too
}


@tiers
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_groups_and_schedules(memory, schedule, device):
    options = {"params": groups, "schedule": schedule, "memory": memory, "model": {"device": device}}
    actual = train_model(**options, in_backward=True)
    assert same_bits(train_model(**options), actual)
    tiers = {row.tier for plan in actual[1].placement for row in plan.rows}
    assert len(tiers) == {"resident": 0, "device": 1, "host": 1, "mixed": 2}[_name(memory)]


def _name(memory):
    return next(name for name, policy in TIERS.items() if policy == memory)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile's own look at its inputs
@tiers
@pytest.mark.parametrize(
    "model",
    [
        {"tied": True},
        {"checkpointed": False},
        {"checkpointed": False, "tied": True},
        {"checkpointed": True},
        {"compiled": "aot_eager"},
        {"compiled": "aot_eager", "checkpointed": False, "tied": True},
    ],
    ids=lambda model: " ".join(f"{key}={value}" for key, value in model.items()),
)
def test_shapes_of_graphs(memory, model, device):
    model = {**model, "device": device}
    assert same_bits(train_model(model=model, memory=memory), train_model(model=model, memory=memory, in_backward=True))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("checkpointed", [None, False])
def test_blocks_compiled_by_inductor(checkpointed):
    model = {"compiled": "inductor", "checkpointed": checkpointed, "device": "cuda"}
    assert same_bits(train_model(model=model), train_model(model=model, in_backward=True, memory=TIERS["host"]))


@tiers
def test_gradients_are_freed_when_they_have_been_used(memory):
    model = make_model()
    opt = Collins(model.parameters(), **OPTIONS, memory=memory, in_backward=True)
    counts = []

    def count(_):
        counts.append(sum(p.grad is not None for p in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)  # called after the optimizer's
    backward(model, 0)
    assert counts == [0] * len(list(model.parameters()))
    opt.step()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "memory",
    [None, "device", {"tier": "host", "transfer_size": 900}, {"device_budget": "3MiB", "transfer_size": 900}],
    ids=str,
)
def test_gradients_never_accumulate(memory):
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))).cuda()
    peaks = []
    for in_backward in (False, True):
        model = copy.deepcopy(layers)
        opt = Collins(model.parameters(), memory=memory, in_backward=in_backward)
        for _ in range(2):
            model(torch.ones(1, 1024, device="cuda")).square().sum().backward()
            opt.step()
            opt.zero_grad()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(torch.ones(1, 1024, device="cuda")).square().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - resident)
        opt.step()
        del model, opt
    gradient_bytes = 4 * 1024**2
    assert peaks[0] >= 16 * gradient_bytes
    assert peaks[1] <= 3 * gradient_bytes


@tiers
def test_a_group_that_is_added_later(memory):
    results = []
    for in_backward in (False, True):
        model = make_model()
        opt = Collins(model.blocks.parameters(), **OPTIONS, memory=memory, in_backward=in_backward)
        for extra in (None, model.tokens, model.head):
            if extra is not None:
                opt.add_param_group({"params": extra.parameters()})
            for step in range(3):
                backward(model, step)
                opt.step()
                model.zero_grad()
        results.append((model, opt))
    assert same_bits(*results)


@tiers
def test_parameters_that_are_frozen_and_unfrozen(memory):
    results = []
    for in_backward in (False, True):
        model = make_model()
        model.head.weight.requires_grad_(False)
        opt = Collins(model.parameters(), **OPTIONS, memory=memory, in_backward=in_backward)
        for phase in range(3):
            model.head.weight.requires_grad_(phase % 2 == 1)
            model.tokens.weight.requires_grad_(phase % 2 == 0)
            take_steps(model, opt, range(3))
        model.head.weight.requires_grad_(True)
        backward(model, 0)
        assert (model.head.weight.grad is None) == in_backward  # frozen when the optimizer was built
        results.append((model, opt))
        opt.step()
    assert same_bits(*results)


def test_a_layer_that_is_moved_and_cast():
    results = []
    for in_backward in (False, True):
        model = make_model()
        opt = Collins(model.parameters(), **OPTIONS, in_backward=in_backward)
        model.bfloat16()
        take_steps(model, opt, range(3))
        results.append((model, opt))
    assert same_bits(*results)


@tiers
def test_clipping_tensor_by_tensor(memory):
    def clip(g):
        return g * (0.01 / (g.norm() + 1e-6)).clamp(max=1)

    results = []
    for in_backward in (False, True):
        model = make_model()
        for p in model.parameters():
            p.register_hook(clip)
        opt = Collins(model.parameters(), **OPTIONS, memory=memory, in_backward=in_backward)
        take_steps(model, opt, range(4))
        results.append((model, opt))
    assert same_bits(*results)


def test_clipping_by_the_global_norm_finds_no_gradients():
    """The documentation warns of this."""
    model, opt = train_model(steps=1, in_backward=True)
    backward(model, 1)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) == 0
    opt.step()


def test_a_backward_in_two_parts_is_one_step():
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        opt = Collins(model.parameters(), **OPTIONS, in_backward=in_backward)
        for _ in range(3):
            for half in model:
                half(torch.ones(1, 32)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        results.append((model, opt))
    assert same_bits(*results)


def test_an_optimizer_looks_up_its_parameters_once_per_backward(monkeypatch):
    calls = []
    for name in ("begin", "place"):
        method = getattr(Stepper, name)
        monkeypatch.setattr(Stepper, name, lambda *args, m=method, **kw: (calls.append(m.__name__), m(*args, **kw))[1])
    for count in (2, 40):
        layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))
        opt = Collins(layers.parameters(), in_backward=True, memory="host")
        layers(torch.ones(1, 8)).sum().backward()
        opt.step()
        calls.clear()
        layers(torch.ones(1, 8)).sum().backward()
        assert calls == ["begin"]  # and all of them have been placed already
        opt.step()


# Errors, and the state after them.


def snapshot(model, opt):
    return copy.deepcopy((model.state_dict(), opt.state_dict()))


def assert_unchanged(model, opt, before):
    weights, state = before
    now = opt.state_dict()["state"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert now.keys() == state["state"].keys()
    assert all(torch.equal(bits(v), bits(state["state"][key][name])) for key in now for name, v in now[key].items())


@tiers
def test_accumulation_without_accumulation_steps_is_rejected(memory):
    model, opt = train_model(memory=memory, in_backward=True)
    backward(model, 8)
    before = snapshot(model, opt)
    with pytest.raises(
        RuntimeError,
        match=r"parameter \d+ arrived twice before step\(\).*accumulation_steps is 1.*in_backward=False",
    ):
        backward(model, 9)
    assert_unchanged(model, opt, before)
    assert all(p.grad is None for p in model.parameters())
    opt.step()
    other, other_opt = train_model(memory=memory)
    take_steps(other, other_opt, [8, 10])
    take_steps(model, opt, [10])
    assert same_bits((model, opt), (other, other_opt))


def test_a_gradient_is_counted_once_if_statistics_fail_after_its_step(monkeypatch):
    p = nn.Parameter(torch.ones(64, 64))
    opt = Collins([p], **OPTIONS, in_backward=True)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(UpdateSamples, "after", fail)
        with pytest.raises(torch.OutOfMemoryError):
            p.square().sum().backward()
    before = p.detach().clone()
    assert not torch.equal(before, torch.ones(64, 64))
    with pytest.raises(RuntimeError, match="arrived twice"):
        p.square().sum().backward()
    assert torch.equal(p, before)
    opt.step()
    assert opt.state[p]["step"] == 1


def test_a_parameter_in_two_reentrant_checkpoints_is_rejected():
    model = make_model(checkpointed=True)
    model.blocks[2] = model.blocks[1]
    opt = Collins(model.parameters(), **OPTIONS, in_backward=True)
    with pytest.raises(RuntimeError, match=r"arrived twice.*use_reentrant=False"):
        backward(model, 0)
    opt.step()
    assert all(state["step"] == 1 for state in opt.state.values())


def test_a_gradient_that_is_set_after_the_step_is_rejected():
    model, opt = train_model(in_backward=True)
    backward(model, 8)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match="arrived twice"):
        opt.step()
    assert_unchanged(model, opt, before)
    model.zero_grad()
    opt.step()


def test_a_closure_is_rejected():
    model, opt = train_model(in_backward=True)
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match=r"closure must be None with in_backward=True.*in_backward=False"):
        opt.step(lambda: backward(model, 0))
    assert_unchanged(model, opt, before)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_is_rejected(unscaled):
    model, opt = train_model(steps=1, in_backward=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    backward(model, 1)
    if unscaled:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"GradScaler cannot be used with in_backward=True.*bfloat16"):
        scaler.step(opt)
    opt.step()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(torch.zeros(()))
    backward(model, 2)
    off.step(opt)


def test_in_backward_must_be_a_bool():
    with pytest.raises(ValueError, match="in_backward must be True or False, got 1"):
        Collins([nn.Parameter(torch.ones(3))], in_backward=1)


def test_two_optimizers_of_one_parameter_are_rejected():
    model, opt = train_model(in_backward=True)
    with pytest.raises(ValueError, match="parameter 0 is stepped in backward by another optimizer already"):
        Collins(model.parameters(), in_backward=True)
    with pytest.raises(ValueError, match="by another optimizer already"):
        copy.copy(opt)
    take_steps(model, opt, [7])
    other, other_opt = train_model(steps=8)
    assert same_bits((model, opt), (other, other_opt))
    del opt
    assert Collins(model.parameters(), in_backward=True)


@tiers
def test_an_option_out_of_range_changes_nothing(memory):
    model, opt = train_model(memory=memory, in_backward=True)
    before = snapshot(model, opt)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr must be finite and at least 0, got -1\.0"):
        backward(model, 7)
    assert_unchanged(model, opt, before)
    model.zero_grad()
    opt.param_groups[0]["lr"] = OPTIONS["lr"]
    other, other_opt = train_model(memory=memory)
    for pair in ((model, opt), (other, other_opt)):
        take_steps(*pair, [7])
    assert same_bits((model, opt), (other, other_opt))


def test_a_sparse_gradient_changes_nothing():
    embedding = nn.Embedding(50, 8, sparse=True)
    opt = Collins(embedding.parameters(), in_backward=True)
    before = snapshot(embedding, opt)
    with pytest.raises(TypeError, match=r"the gradient of parameter 0 has layout torch\.sparse_coo"):
        embedding(torch.tensor([1])).sum().backward()
    assert_unchanged(embedding, opt, before)


@tiers
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_fails_is_not_counted(memory, first, monkeypatch):
    model, opt = train_model(steps=0 if first else 3, memory=memory, in_backward=True)
    before = snapshot(model, opt)

    def fail(self, tasks, *_):
        for task in tasks.values():
            task.m[0].fill_(3) if memory == TIERS["host"] else None
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run_rest", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            backward(model, 3)
    assert_unchanged(model, opt, before)
    model.zero_grad()
    opt.step()
    take_steps(model, opt, [4])
    other, other_opt = train_model(steps=0 if first else 3, memory=memory)
    take_steps(other, other_opt, [4])
    assert same_bits((model, opt), (other, other_opt))


# Hooks: one per optimizer, removed with it.


def hooks(model):
    return [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]


@tiers
def test_hooks_are_removed_with_their_optimizer(memory):
    model, opt = train_model(memory=memory, in_backward=True)
    assert set(hooks(model)) == {1}
    reference = weakref.ref(opt)
    del opt
    assert reference() is None
    assert set(hooks(model)) == {0}
    backward(model, 7)
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_hooks_are_removed_with_an_optimizer_in_a_reference_cycle():
    model = make_model()
    opt = Collins(model.parameters(), **OPTIONS, in_backward=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(opt)
    reference = weakref.ref(opt)
    del opt, schedule
    gc.collect()
    assert reference() is None
    assert set(hooks(model)) == {0}


def test_a_rejected_optimizer_leaves_no_hooks():
    model = make_model()
    with pytest.raises(ValueError, match="eps"):
        Collins(
            [{"params": model.head.parameters()}, {"params": model.tokens.parameters(), "eps": -1}], in_backward=True
        )
    assert set(hooks(model)) == {0}


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: torch.load(_saved(pair), weights_only=False),
}


def _saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return file


@tiers
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_are_stepped_independently(memory, duplicate, steps):
    model, opt = pair = train_model(steps=steps, memory=memory, in_backward=True)
    copied, copied_opt = duplicate(pair)
    assert same_bits(pair, (copied, copied_opt))
    assert hooks(copied) == hooks(model)
    assert set(hooks(copied)) == {1}
    before = snapshot(model, opt)
    take_steps(copied, copied_opt, range(steps, 5))
    assert_unchanged(model, opt, before)
    take_steps(model, opt, range(steps, 5))
    reference = train_model(steps=5)
    assert same_bits((copied, copied_opt), reference)
    assert same_bits(pair, reference)


def test_a_copy_of_the_model_alone_has_no_hooks():
    model, _opt = train_model(in_backward=True)
    assert set(hooks(copy.deepcopy(model))) == {0}


@tiers
def test_resumes_between_backward_and_step(memory):
    model, opt = train_model(memory=memory, in_backward=True)
    backward(model, 7)
    weights, state = snapshot(model, opt)
    opt.step()
    resumed = make_model()
    resumed.load_state_dict(weights)
    resumed_opt = Collins(resumed.parameters(), **OPTIONS, memory=memory, in_backward=True)
    resumed_opt.load_state_dict(state)
    opt.load_state_dict(opt.state_dict())
    for pair in ((model, opt), (resumed, resumed_opt)):
        take_steps(*pair, range(8, 11))
    assert same_bits((model, opt), (resumed, resumed_opt))
    assert same_bits((model, opt), train_model(steps=11))


def test_options_loaded_within_a_step_apply_to_the_rest_of_it():
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
    opt = Collins(model.parameters(), **OPTIONS, in_backward=True)
    for rate in (OPTIONS["lr"], 0.0):
        opt.load_state_dict(opt.state_dict())
        opt.param_groups[0]["lr"] = rate
        half = model[int(rate == 0)]
        before = half.weight.clone()
        half(torch.ones(1, 32)).square().sum().backward()
        assert torch.equal(half.weight, before) == (rate == 0)
    opt.step()


def test_parameters_without_a_shape_are_stepped_in_backward_once_they_have_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LazyLinear(4))
    opt = Collins(model.named_parameters(), in_backward=True)
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()] if step else []
        model(torch.ones(2, 8)).square().sum().backward()
        assert all(p.grad is None for p in model.parameters()) == bool(step)
        opt.step()
        opt.zero_grad()
        assert not any(map(torch.equal, model.parameters(), before))
    assert len(opt.state) == 4
