"""The update rule, one formula for dense moments and for both elementwise decodes of tables.

    p <- (1 - lr wd) p - lr (m_hat + rho r) / (sqrt(v_hat + kappa r^2) + eps)

| state | m_hat | v_hat | r |
|---|---|---|---|
| dense moments (AdamW, Loshchilov & Hutter 2019) | m / (1 - beta1^t) | v / (1 - beta2^t) | none |
| sketch, decode="least_squares" | s M / (1 - beta1^t) | V / (1 - beta2^t) | g - s mu |
| sketch, decode="residual" (Collins v0.2) | s sqrt(c) M / (1 - beta1^t) | V / (1 - beta2^t) | g - s mu |
| sketch, decode="sketch" (Collins v0.1) | s c M / (1 - beta1^t) | c V / (1 - beta2^t) | none |

Changing the sign of m_hat and r changes the sign of the quotient and nothing else, bit for bit. So tables are decoded
from s g, without signs in m_hat and r, and the quotient is multiplied by s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor

PART_STRIDE = 1 << 24  # in steps, between the random bits of two partial steps: no counter gets that far


@dataclass(frozen=True)
class Decode:
    """The decode of bucket means to the two moments of an element: the rows of the table above, as data.

    Args:
        m_scale, v_scale: the power of the load c that multiplies s M / (1 - beta1^t), and V / (1 - beta2^t).
        residual: whether r = g - s mu enters the update.
        rho: the default weight of r; None for sqrt((1 - beta1) / (1 + beta1)), with which sketched moment and weighted
            residual have equal noise, since an EMA reduces independent noise by that factor.
    """

    m_scale: float
    v_scale: float
    residual: bool
    rho: float | None = None

    @staticmethod
    def scaled(table: Tensor, power: float, load: float | Tensor) -> Tensor:
        """table * load^power, without a root for the powers 0 and 1."""
        return table if power == 0 else table * load if power == 1 else table * load**power


DECODES = {
    "least_squares": Decode(m_scale=0, v_scale=0, residual=True, rho=0.3),
    "residual": Decode(m_scale=0.5, v_scale=0, residual=True),
    "sketch": Decode(m_scale=1, v_scale=1, residual=False),
}


ORTHOGONAL = "orthogonal"  # the decode of whole matrices: see `collins.orthogonal`
ORTHOGONAL_RHO = 0.6  # its default weight of r
ELEMENTWISE = "least_squares"  # the default decode; under "orthogonal", that of parameters that are not matrices


def default_rho(decode: str, beta1: float) -> float:
    """The weight of the residual under a decode, unless it is set."""
    rho = ORTHOGONAL_RHO if decode == ORTHOGONAL else DECODES[decode].rho
    return math.sqrt((1 - beta1) / (1 + beta1)) if rho is None else rho


class StepScalars(NamedTuple):
    """The scalars in the formulas of a step: Python numbers, or 0-d tensors, which compiled code uses."""

    step: int | Tensor
    lr: Scalar
    decay_factor: Scalar  # 1 - lr wd
    beta1: Scalar
    one_minus_beta1: Scalar  # 1 - beta1
    beta2: Scalar
    one_minus_beta2: Scalar
    inv_bias_correction1: Scalar  # 1 / (1 - beta1^t)
    inv_bias_correction2: Scalar  # 1 / (1 - beta2^t)
    eps: Scalar
    rho: Scalar
    kappa: Scalar
    mu_weight: Scalar = 0.0  # the factor of mu in m_hat, in addition to M; positive in all partial steps but the first
    part: Scalar = 0  # the number of the partial step within step t, from 0
    grad_scale: Scalar = 1.0  # the factor by which every gradient is multiplied before it is used


def step_scalars(
    step: int | Tensor,
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    residual_weight: float,
    residual_square: float,
    grad_scale: Scalar = 1.0,
) -> StepScalars:
    """The `StepScalars` of step t = `step`, counted from 1; a float tensor of steps stays on its device."""
    beta1, beta2 = betas
    averages = beta1, 1 - beta1, beta2, 1 - beta2
    others = eps, residual_weight, residual_square, 0.0, 0, grad_scale
    if isinstance(step, Tensor):
        exact = step.to(torch.float64)
        on_device = 1 / (1 - beta1**exact), 1 / (1 - beta2**exact)
        return StepScalars(step.to(torch.int64), lr, 1 - lr * weight_decay, *averages, *on_device, *others)
    inverses = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
    return StepScalars(step, lr, 1 - lr * weight_decay, *averages, *inverses, *others)


def partial_scalars(hp: StepScalars, part: int, parts: int) -> StepScalars:
    """The scalars of partial step j = `part` + 1 of k = `parts`, given the scalars `hp` of the whole step.

    With g_j the gradient of micro-batch j, the partial steps together approximate one step with sum_j g_j, which is
    never stored. Tables and weights decay only in the first partial step, and every partial step adds its own terms:

        M <- beta1 M + (1 - beta1) mu_1               and then M + (1 - beta1) mu_j
        V <- beta2 V + (1 - beta2) q_1                and then V + (1 - beta2) q_j
        m_hat = s M / (1 - beta1^t)                   and then s (1 - beta1) mu_j / (1 - beta1^t)
        v_hat = V / (1 - beta2^t - (1 - beta2) (k - j) / k)
        p <- (1 - lr wd) p - lr (m_hat + rho r_j) / (sqrt(v_hat + kappa k r_j^2) + eps)
        p <- p - lr (the same)

    M and the sum of all numerators equal those of one step with sum_j g_j exactly. V does not: it contains sum_j g_j^2
    instead of (sum_j g_j)^2. The two are equal on average if gradients consist mostly of noise that is independent
    between micro-batches; sum_j g_j^2 is k times too small if all g_j are equal. In the same way k r_j^2, of one
    partial step, replaces r^2. The bias correction of v_hat accounts for the terms of V that later partial steps add.
    """
    if parts == 1:
        return hp
    later = (1 / hp.inv_bias_correction2) - hp.one_minus_beta2 * ((parts - 1 - part) / parts)
    hp = hp._replace(part=part, inv_bias_correction2=1 / later, kappa=hp.kappa * parts)
    if part == 0:
        return hp
    own = hp.one_minus_beta1 * hp.inv_bias_correction1
    return hp._replace(decay_factor=1.0, beta1=1.0, beta2=1.0, inv_bias_correction1=0.0, mu_weight=own)


def direction(m_hat: Tensor, v_hat: Tensor, r: Tensor | None, hp: StepScalars) -> Tensor:
    """(m_hat + rho r) / (sqrt(v_hat + kappa r^2) + eps); all tensors broadcast."""
    if r is None:
        return m_hat / (v_hat.sqrt() + hp.eps)
    return (m_hat + hp.rho * r) / (torch.sqrt(v_hat + hp.kappa * (r * r)) + hp.eps)


def updated(p: Tensor, direction: Tensor, hp: StepScalars) -> Tensor:
    """The new parameter, in the dtype of the moments."""
    return p * hp.decay_factor - hp.lr * direction
