"""Frameworks that build their optimizer from a configuration, and that are too large to install for the tests.

Each test does what the framework does with the optimizer, as read in the source that it names.
"""

import itertools
import sys
from collections import namedtuple

import pytest
import torch
from clients import component
from helpers import OPTIONS, same

from collins import Collins, register


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))


def inputs(step):
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step))


# torchtune 0.6.1: recipes/full_finetune_single_device.py, lines 468 to 480; training/memory.py, lines 273 to 300; its
# `config.instantiate` calls what `_component_` names. In its repository at commit bd2a0fc modules/optim.py does alike.


def in_backward(model, path, **options):
    optimizers = {p: component(path)([p], **options) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    return {name: optimizers[p] for name, p in model.named_parameters()}


TUNE = "collins.integrations.torchtune.CollinsInBackward"


def test_torchtune_builds_an_optimizer_for_each_parameter_and_hashes_differ():
    model = network()
    optimizers = in_backward(model, TUNE, **{**OPTIONS, "lr": "1e-2", "table_dtype": "bfloat16"})
    assert all(type(opt) is Collins for opt in optimizers.values())
    index = torch.arange(64 * 64)
    first, second = (optimizers[name].hash_of(model.get_parameter(name)) for name in ("0.weight", "2.weight"))
    assert not torch.equal(first.sign(index), second.sign(index))
    for step in range(3):
        model(inputs(step)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert {int(opt.state[p]["step"]) for opt, p in zip(optimizers.values(), model.parameters(), strict=True)} == {3}


def test_torchtune_in_backward_equals_one_optimizer_and_resumes_bitwise(monkeypatch):
    def make_run():
        """A new model and its optimizers, as another process would create them."""
        monkeypatch.setattr("collins.integrations.torchtune._numbers", itertools.count())
        model = network()
        return model, in_backward(model, TUNE, **OPTIONS)

    results = []
    for resumed in (False, True):
        model, optimizers = make_run()
        for step in range(6):
            if resumed and step == 3:
                saved, weights = {name: opt.state_dict() for name, opt in optimizers.items()}, model.state_dict()
                model, optimizers = make_run()
                model.load_state_dict(weights)
                for name, opt in optimizers.items():
                    opt.load_state_dict(saved[name])
            model(inputs(step)).square().mean().backward()
        results.append((model.state_dict(), {name: opt.state_dict()["state"] for name, opt in optimizers.items()}))
    assert same(*results)
    model = network()
    single_opt = Collins([(f"parameter {i}", p) for i, p in enumerate(model.parameters())], **OPTIONS)
    for step in range(6):
        model(inputs(step)).square().mean().backward()
        single_opt.step()
        single_opt.zero_grad()
    assert same(model.state_dict(), results[0][0])


# NeMo Automodel 0.7.0: components/optim/optimizer.py, `OptimizerFromFactoryConfig.build` calls what `_target_` names
# with `params=`, a list of tensors or, under `param_group_overrides`, of groups that have `lr_mult` and `wd_mult`.


def test_nemo_automodel_calls_the_target_with_parameters_by_keyword():
    model = network()
    target = component("collins.Collins")
    opt = target(params=list(model.parameters()), lr=1e-2, betas=[0.9, 0.95], compress_ratio=16, min_K=16)
    assert opt.param_groups[0]["betas"] == (0.9, 0.95)
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": weights}, {"params": biases, "lr_mult": 0.1, "wd_mult": 0.0}]
    opt = target(params=groups, lr=1e-2)
    model(inputs(0)).square().mean().backward()
    opt.step()
    assert [group.get("lr_mult") for group in opt.param_groups] == [None, 0.1]
    assert len(opt.state) == 4


# llm-foundry 0.22.0: utils/builders.py, `build_optimizer` calls what the registry has under a name, which must be a
# class of optimizers, with `params`, a generator or groups whose parameters are a view of a dict.
# `tests/test_packaging.py` finds the name among the entry points of the wheel.


def test_llm_foundry_calls_the_class_with_views_of_parameters():
    model = network()
    assert isinstance(Collins, type)
    assert issubclass(Collins, torch.optim.Optimizer)
    assert len(Collins(params=model.parameters(), lr=1e-2).param_groups[0]["params"]) == 4
    params_by_name = dict(model.named_parameters())
    biases = [params_by_name.pop(name) for name in list(params_by_name) if "bias" in name]
    opt = Collins(params=[{"params": params_by_name.values()}, {"params": biases, "weight_decay": 0.0}], lr=1e-2)
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2]


# timm 1.0.31: optim/_optim_factory.py, `OptimInfo`, `OptimizerRegistry` and its `create_optimizer`. timm imports
# torchvision, whose releases each require one release of torch.

OptimInfo = namedtuple(
    "OptimInfo",
    "name opt_class description has_eps has_momentum has_betas num_betas second_order defaults",
    defaults=("", True, False, False, 2, False, None),
)


class Registry:
    def __init__(self):
        self.infos = {}
        self.registered = 0

    def register(self, info):
        self.registered += 1
        self.infos[info.name.lower()] = info

    def list_optimizers(self):
        return sorted(self.infos)

    def create_optimizer(self, params, opt, lr=None, weight_decay=0.0, momentum=0.9, **options):
        info = self.infos[opt.lower().split("_")[-1]]
        options = {"weight_decay": weight_decay, **options, **({} if lr is None else {"lr": lr})}
        for name, has in (("momentum", info.has_momentum), ("eps", info.has_eps), ("betas", info.has_betas)):
            if not has:
                options.pop(name, None)
        if info.has_momentum:
            options["momentum"] = momentum
        return info.opt_class(params, **options)


def test_timm_registers_collins(stand_in):
    registry = Registry()
    stand_in("timm.optim._optim_factory", default_registry=registry)
    sys.modules["timm.optim"].OptimInfo = OptimInfo
    for _ in range(2):
        register("timm")
    assert registry.registered == 1
    opt = registry.create_optimizer(
        [{"params": list(network().parameters()), "weight_decay": 0.0}],
        "collins",
        lr=1e-2,
        betas=[0.9, 0.95],
        eps=1e-6,
        compress_ratio=16,
    )
    assert type(opt) is Collins
    (group,) = opt.param_groups
    options = [group[name] for name in ("lr", "betas", "eps", "compress_ratio", "weight_decay")]
    assert options == [1e-2, (0.9, 0.95), 1e-6, 16, 0.0]


def test_timm_without_a_registry_raises_an_error_that_names_an_alternative(stand_in):
    stand_in("timm.optim._optim_factory")
    sys.modules["timm"].__version__ = "1.0.9"
    sys.modules["timm.optim"].OptimInfo = OptimInfo
    with pytest.raises(RuntimeError, match=r"timm 1\.0\.9 has no registry .* build collins\.Collins\(model\) instead"):
        register("timm")
