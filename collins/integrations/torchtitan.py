"""A container of torchtitan in which "Collins" is an optimizer name, and its default configuration.

Contract, read in torchtitan 0.3.0 (components/optimizer/optimizer.py): a subclass of `OptimizersContainer` overrides
`_resolve_optimizer_factory`, and `Config.build(model_parts=...)` builds the class in which `Config` is defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from collins.optimizer import Collins
from collins.options import OF_THE_WHOLE


class CollinsOptimizers(OptimizersContainer):
    """torchtitan's container of optimizers, in which `optimizer_name="Collins"` is Collins."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The configuration of torchtitan's container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return Collins if name == "Collins" else OptimizersContainer._resolve_optimizer_factory(name)


def default_collins(lr: float = 3e-3, **options: Any) -> CollinsOptimizers.Config:
    """Collins for all parameters: replaces torchtitan's `default_adamw` in a configuration.

    Args:
        lr: the learning rate.
        options: further options of `Collins`, including those of the whole optimizer.
    """
    whole = {name: options.pop(name) for name in OF_THE_WHOLE & options.keys()}
    everything = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1, **options}
    return CollinsOptimizers.Config(
        param_groups=[ParamGroupConfig(pattern=r".*", optimizer_name="Collins", optimizer_kwargs=everything)],
        implementation="for-loop",
        optimizer_factory_kwargs_by_name={"Collins": whole},
    )
