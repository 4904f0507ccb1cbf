"""Optimizers that no package provides, implemented from the formulas of their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class Scale(Optimizer):
    r"""SCALE: gradients normalised per output, momentum only in the last layer, no second moment.

    For a matrix W that maps inputs to outputs, with gradient g, each column j of one output:

        m <- beta m + (1 - beta) g   in the last layer; m = g elsewhere
        w_j <- (1 - lr wd) w_j - lr m_j / RMS(m_j)

    Columns are divided by their RMS instead of their norm, so that the learning rate has the unit of Adam's for every
    width.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: beta, or 0 for no momentum.
        inputs: the dimension of W over which inputs are indexed: 1 for `nn.Linear`, whose weight is (outputs, inputs),
            0 for `nn.Embedding`.
        weight_decay: decoupled weight decay.
        eps: the smallest RMS that columns are divided by.

    References:
        Glentis, Li, Han & Hong, "A minimalist optimizer design for LLM pretraining", arXiv 2506.16659.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        inputs: int = 1,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "inputs": inputs, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(g))
            g = m.lerp_(g, 1 - group["momentum"])
        scale = g.square().mean(group["inputs"], keepdim=True).sqrt_().clamp_min_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(g, scale, value=-group["lr"])
