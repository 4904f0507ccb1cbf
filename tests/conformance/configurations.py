"""Configurations of Collins for the cases of PyTorch's optimizer tests, and a regression to train.

The cases have the names of PyTorch's (test/test_optim.py, test/optim and test/inductor/test_compiled_optimizers.py) and
are rewritten. Cases of PyTorch's that have no counterpart here:

| case | why |
|---|---|
| test_second_order_optims_return_consistent_types | of LBFGS, which evaluates its closure itself |
| test_defaults_changed_to_foreach | there is one path of steps; tests/test_engine.py has tests of its executors |
| test_adamw_serialization | of Adam's flag decoupled_weight_decay; Collins has decoupled decay only |
| TestDifferentiableOptimizer | of differentiable=True: here no step is differentiated, as none is there by default |
| test_averaged_model_mixed_device | of AveragedModel over two devices; no optimizer is involved |
| test_bn_update_eval_momentum | of update_bn in eval mode; no optimizer is involved |
| test_error_when_getlr_has_epoch, test_old_pattern_warning_with_arg, other cases of arguments that are refused \
and of the argument epoch | of a scheduler's own arguments; no optimizer is involved |
| test_adam_recompile and other optimizers' | of one class each; test_adamw_recompile is here |
| test_basic_shampoo, test_foreach_map_adam, test_S429861, test_get_value_on_static_address, \
test_compile_time_smoketest | of functions of torch, not of an optimizer |
| kernel counts of test_adamw_*_cuda | counted in tests/test_engine.py and tests/test_kernels.py |

Options of `torch.optim.AdamW` that Collins does not have (amsgrad, foreach, fused, differentiable) and betas as tensors
are refused: `test_errors` and `test_optim_infos_do_not_specify_global_cliquey_kwargs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import DEVICE

from collins import Collins


@dataclass(frozen=True)
class Configuration:
    """One way to build Collins.

    Args:
        options: all except the learning rate.
        dtype: of the parameters.
        lr: returns the learning rate; tensors are created for each optimizer.
        named: whether parameters have names.
    """

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    lr: Callable[[], float | torch.Tensor] = lambda: 1e-3
    named: bool = False

    def build(self, params: Iterable[Any], **overrides: Any) -> Collins:
        param_list = list(params)
        if self.named and all(isinstance(p, torch.Tensor) for p in param_list):
            param_list = [(f"name{number}", p) for number, p in enumerate(param_list)]
        return Collins(param_list, **{"lr": self.lr(), **self.options, **overrides})

    @property
    def increases(self) -> bool:
        """Whether training increases the loss."""
        return bool(self.options.get("maximize", False))

    @property
    def in_backward(self) -> bool:
        return bool(self.options.get("in_backward", False))


SMALL = {"min_K": 16}  # most tensors of a test then have tables with more than one element per bucket
CONFIGURATIONS = {
    "default": Configuration(),
    "tensor lr": Configuration(SMALL, lr=lambda: torch.tensor(1e-3)),
    "weight decay": Configuration({**SMALL, "weight_decay": 0.1}),
    "maximize": Configuration({**SMALL, "weight_decay": 0.1, "maximize": True}),
    "capturable": Configuration({**SMALL, "capturable": True}),
    "capturable, tensor lr": Configuration({**SMALL, "capturable": True}, lr=lambda: torch.tensor(1e-3, device=DEVICE)),
    "ratio 1": Configuration({"compress_ratio": 1}),
    "ratio 8": Configuration({**SMALL, "compress_ratio": 8}),
    "v ratio": Configuration({**SMALL, "compress_ratio": 4, "v_compress_ratio": 16, "table_dtype": torch.float32}),
    "universal": Configuration({**SMALL, "hash": "universal"}),
    "sketch": Configuration({**SMALL, "decode": "sketch", "rehash_period": None}),
    "universal sketch": Configuration({**SMALL, "hash": "universal", "decode": "sketch"}),
    "nonfinite skip": Configuration({**SMALL, "nonfinite": "skip"}),
    "nonfinite error": Configuration({**SMALL, "nonfinite": "error"}),
    "fp32 tables": Configuration({**SMALL, "table_dtype": torch.float32}),
    "bf16 tables": Configuration({**SMALL, "table_dtype": torch.bfloat16}),
    "int8 tables": Configuration({**SMALL, "compress_ratio": 4, "v_compress_ratio": 32, "table_dtype": "int8"}),
    "int4 tables": Configuration({**SMALL, "compress_ratio": 4, "v_compress_ratio": 32, "table_dtype": "int4"}),
    "fp64 tables": Configuration({**SMALL, "table_dtype": torch.float64}, torch.float64),
    "bf16 parameters": Configuration(SMALL, torch.bfloat16, lr=lambda: 1e-2),
    "rehash 1": Configuration({**SMALL, "rehash_period": 1}),
    "named": Configuration(SMALL, named=True),
    "compiled": Configuration({**SMALL, "compile": True}),
    "memory device": Configuration({**SMALL, "memory": "device"}),
    "memory host": Configuration({**SMALL, "memory": "host"}),
    "memory auto": Configuration({**SMALL, "memory": "auto"}),
    "in backward": Configuration({**SMALL, "in_backward": True}),
    "in backward, host": Configuration({**SMALL, "in_backward": True, "memory": "host"}),
}


def over(*names: str) -> pytest.MarkDecorator:
    """Parametrises a test over some configurations."""
    return pytest.mark.parametrize("config", [CONFIGURATIONS[name] for name in names], ids=names)


everywhere = over(*CONFIGURATIONS)
uncompiled = over(*(name for name in CONFIGURATIONS if name != "compiled"))  # each compiled case takes a second


class Regression:
    """A weight of 3,200 elements, which has tables in every configuration except "ratio 1", and a bias.

    Args:
        config: determines the dtype of the parameters.
        contiguous: whether parameters are laid out without gaps.
        devices: of the weight and of the bias.
    """

    def __init__(self, config: Configuration, contiguous: bool = True, devices: tuple[Any, Any] = (DEVICE, DEVICE)):
        generator = torch.Generator().manual_seed(0)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        gap = () if contiguous else (2,)
        tensors = [values(80, 40, *gap), values(80, *gap)]
        on_devices = [t.to(device, config.dtype) for t, device in zip(tensors, devices, strict=True)]
        self.params = [torch.nn.Parameter(t if contiguous else t[..., 0]) for t in on_devices]
        self.input = values(40).to(on_devices[0])

    def loss(self) -> torch.Tensor:
        weight, bias = self.params
        return (weight.mv(self.input).to(bias.device) + bias).pow(2).sum()

    def value(self) -> float:
        with torch.no_grad():
            return self.loss().item()

    def step(self, opt: torch.optim.Optimizer, *, with_closure: bool = False) -> torch.Tensor:
        """One step of training, with a closure if the optimizer accepts one."""

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        if with_closure and not getattr(opt, "in_backward", False):
            return opt.step(closure).detach()
        loss = closure()
        opt.step()
        return loss.detach()

    def has_moved_as_expected(self, previous: float, config: Configuration) -> bool:
        return self.value() > previous if config.increases else self.value() < previous

    def copy(self) -> Regression:
        """A second regression with the same values."""
        other = object.__new__(Regression)
        other.params = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        other.input = self.input
        return other
