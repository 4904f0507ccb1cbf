"""Optimizers that no package provides, implemented from the formulas of their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT


class _Groupwise(Optimizer):
    """An optimizer whose groups are stepped one after another."""

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
            params = [p for p in group["params"] if p.grad is not None]
            self._step_group(group, params, [p.grad for p in params])
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Steps the parameters of a group that have gradients."""
        raise NotImplementedError


class Scale(_Groupwise):
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

    def _step_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            self._update(p, g, group)

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(g))
            g = m.lerp_(g, 1 - group["momentum"])
        rms = g.square().mean(group["inputs"], keepdim=True).sqrt_().clamp_min_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(g, rms, value=-group["lr"])


class MasterWeights(_Groupwise):
    """AdamW on fp32 copies of the weights, which are rounded to nearest after each step: mixed-precision training.

    `state[p]` has the copy, `master`, and the moments, all in fp32 and of the shape of p.

    Args:
        params: parameters of any floating-point dtype, or groups of them.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.

    References:
        Micikevicius et al., "Mixed precision training", arXiv 1710.03740. Loshchilov & Hutter, "Decoupled weight decay
        regularization", arXiv 1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _step_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = [self.state[p] or self._init_state(p) for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            [state["master"] for state in states],
            [g.float() for g in grads],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for p, state in zip(params, states, strict=True):
            p.copy_(state["master"])

    def _init_state(self, p: Tensor) -> dict[str, Tensor]:
        master = p.detach().to(torch.float32, copy=True)
        state: dict[str, Tensor] = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["master"] = master
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state
