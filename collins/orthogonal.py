"""Orthogonalised momentum: the update of whole matrices from a sketched first moment, without a second moment.

With h, s the position and sign hashes, c the load of a bucket and g the gradient of a matrix of `rows` x `cols`:

    mu_b = (1/c) sum_{h(i)=b} s(i) g_i           M_b <- beta1 M_b + (1 - beta1) mu_b
    X_i = s(i) M_{h(i)} + rho (g_i - s(i) mu_{h(i)})
    Q = NS(X)                                    p <- (1 - lr wd) p - lr 0.2 sqrt(max(rows, cols)) Q

NS is five steps of a Newton-Schulz iteration. It moves all singular values of X / |X| towards 1, to between about 0.7
and 1.2, and does not change the singular vectors:

    A = X X^T        X <- a X + (b A + c A^2) X        (a, b, c) = (3.4445, -4.7750, 2.0315)

The iteration, its coefficients and its precision, bfloat16, are those of Jordan et al., "Muon: an optimizer for hidden
layers in neural networks" (2024). The scale of the update is that of Liu et al., "Muon is scalable for LLM training"
(2025): with it the update has the RMS of AdamW's update, so that AdamW's learning rate and weight decay fit. This
differs from both in three ways: (1) the first moment is sketched; (2) the residual, the part of the gradient that this
step's sketch cannot represent, is added with the weight rho; (3) there is no Nesterov term. At c = 1 it is Muon without
that term. float64 parameters are orthogonalised in float64.

A parameter of two dimensions is one matrix; one of three dimensions is a stack of matrices (experts), one for each
index of the first dimension. A parameter of more dimensions is a convolution and is reshaped to (out, rest), as in
Muon's reference. The rows of each matrix may be cut into several matrices (`row_parts`), such as Q, K and V in one
weight.

With m the shorter and n the longer side of a matrix, the five iterations cost 20 m^2 n + 10 m^3 floating-point
operations. Matrices with n > 1.5 m need fewer, 12 m^2 n + 22 m^3: X <- P X with P = a I + b A + c A^2 means A <- P A P
for the next iteration, a product of small matrices. Rounding errors of such an A grow by a^2 per iteration and may make
it indefinite, so A is computed from X again after two iterations (`STRETCHES`), which is the remedy of Zhang, Amsel,
Chen & Dao, "Gram Newton-Schulz" (2026).

Forward and backward take 6 m n operations for each token, so a step costs less than a fraction f of them if it has at
least `tokens_for_share` tokens. For f = 3 % these are 683,000 tokens for a matrix of 4096 x 4096, and 513,000 for a
LLaMA of 7B parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from collins.formats import FloatFormat
from collins.hashing import signed
from collins.rounding import FIRST, PARAM
from collins.rule import StepScalars, updated
from collins.sketch import decay
from collins.task import UpdateTask, Write, bucket_signs, flat, used_gradient, writes_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
SINGLE = (1,) * STEPS
STRETCHES = (2, 2, 1)  # the iterations from each product X X^T on
SMALLEST_NORM = 1e-7  # matrices are divided by at least this norm, so that zeros stay zeros
RMS = 0.2  # the approximate RMS of an update; AdamW's is 0.2 to 0.4 (Liu et al.)


class Matrices(NamedTuple):
    """The matrices that a parameter consists of."""

    stacked: int  # the number of matrices in the stack
    rows: int
    cols: int
    row_parts: tuple[int, ...]  # the rows of each part into which a matrix is cut; one number if it is not cut

    @property
    def numel(self) -> int:
        """Elements of one matrix in the stack."""
        return self.rows * self.cols

    @property
    def is_even(self) -> bool:
        """Whether all parts have the same shape."""
        return len(set(self.row_parts)) == 1


def matrices_of(shape: Sequence[int], row_parts: Sequence[int] = ()) -> Matrices:
    """The matrices in a parameter of this shape, which must have at least two dimensions.

    Args:
        shape: the shape of the parameter.
        row_parts: the rows of each part into which a matrix is cut; () if it is not cut.
    """
    stacked, rows = (1, shape[0]) if len(shape) != 3 else (shape[0], shape[1])
    cols = math.prod(shape[1:]) if len(shape) != 3 else shape[2]
    return Matrices(stacked, rows, cols, tuple(row_parts) or (rows,))


def parts_of_rows(name: str, shape: tuple[int, ...], row_parts: int | Sequence[int]) -> tuple[int, ...]:
    """The rows of each part into which the matrices of a parameter are cut.

    Args:
        name: the name of the parameter, for errors.
        shape: the shape of the parameter.
        row_parts: the option of its group.

    Raises:
        ValueError: for a parameter of fewer than two dimensions, or if `row_parts` does not match the number of rows.
    """
    if len(shape) < 2:
        raise ValueError(
            f"{name} has the shape {shape}, and decode is 'orthogonal', which needs parameters of at least two"
            " dimensions: put it into a group of its own with role='exact', or decode='residual'"
        )
    rows = matrices_of(shape).rows
    if not isinstance(row_parts, int):
        if sum(row_parts) != rows:
            raise ValueError(f"row_parts must add up to the {rows} rows of {name}, got {tuple(row_parts)}")
        return tuple(row_parts)
    if rows % row_parts:
        raise ValueError(f"row_parts must divide the {rows} rows of {name}, got {row_parts}")
    return (rows // row_parts,) * row_parts


def update_scale(rows: int, cols: int) -> float:
    """The factor of Q beside the learning rate: 0.2 sqrt(max(rows, cols))."""
    return RMS * math.sqrt(max(rows, cols))


def newton_schulz(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q for each of n matrices X, and the Frobenius norms of X.

    The square products have the shorter side: X X^T for wide matrices, X^T X (multiplied from the right) for tall ones.

    Args:
        X: (n, rows, cols), in the dtype of the computation; it is overwritten.

    Returns:
        Q, (n, rows, cols), and the norms, (n,), in at least float32.
    """
    wide = X.shape[1] <= X.shape[2]
    exact = torch.promote_types(X.dtype, torch.float32)
    norms = torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True, dtype=exact)
    # Autocast would compute the products in another dtype than that of X.
    with nullcontext() if X.is_meta else torch.autocast(X.device.type, enabled=False):
        X = X.mul_((1 / norms.clamp(min=SMALLEST_NORM)).to(X.dtype))
        for steps in _stretches(*X.shape[1:]):
            X = _iterated(X, steps, wide)
    return X, norms.view(-1)


def _stretches(rows: int, cols: int) -> tuple[int, ...]:
    """The iterations of each stretch: of one for nearly square matrices, otherwise `STRETCHES`, which cost less."""
    m, n = sorted((rows, cols))
    return STRETCHES if _stretches_flops(m, n, STRETCHES) < _stretches_flops(m, n, SINGLE) else SINGLE


def _stretches_flops(m: int, n: int, stretches: Sequence[int]) -> int:
    """The floating-point operations of `_iterated`, for a matrix of sides m <= n."""
    return sum(4 * m * m * n + (4 * steps - 3) * 2 * m**3 for steps in stretches)


def _iterated(X: Tensor, steps: int, wide: bool) -> Tensor:
    """X after some iterations, X = P_steps ... P_1 X with P = a I + b A + c A^2.

    The P are polynomials of the first A, so that A <- P A P needs no product with X.
    """
    a, b, c = COEFFICIENTS
    A = torch.bmm(X, X.mT) if wide else torch.bmm(X.mT, X)
    B = torch.baddbmm(A, A, A, beta=b, alpha=c)
    if steps == 1:
        return torch.baddbmm(X, B, X, beta=a) if wide else torch.baddbmm(X, X, B, beta=a)
    Q = B + a * torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
    for _ in range(steps - 1):
        half = torch.baddbmm(A, B, A, beta=a)
        A = torch.baddbmm(half, half, B, beta=a)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Q = torch.baddbmm(Q, B, Q, beta=a)
    return torch.bmm(Q, X) if wide else torch.bmm(X, Q)


def orthogonalised(X: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor]:
    """Q for n matrices of one shape, and whether each X is finite.

    Args:
        X: (n, rows, cols); it is overwritten.
        matrices: the form of the matrices, including the parts into which each of them is cut.

    Returns:
        Q, (n, rows, cols), in which all parts are scaled so that `update_scale` of the first part applies to them; and
        the flags, (n,).
    """
    n, parts = len(X), matrices.row_parts
    if matrices.is_even:
        Q, norms = newton_schulz(X.view(n * len(parts), parts[0], matrices.cols))
        return Q.view(X.shape), torch.isfinite(norms).view(n, -1).all(1)
    flags = []
    for part in X.split(list(parts), 1):
        Q, norms = newton_schulz(part.contiguous())
        flags.append(torch.isfinite(norms))
        rows = part.shape[1]
        part.copy_(Q * (update_scale(rows, matrices.cols) / update_scale(parts[0], matrices.cols)))
    return X, torch.stack(flags).all(0)


def encoded(
    g: Tensor, m: tuple[Tensor, ...], task: UpdateTask, hp: StepScalars, stacked: int | None = None
) -> tuple[Tensor, list[Write]]:
    """X, flat and in the dtype of the computation, and the writes to the first moment.

    Args:
        g: the gradient of elements from `task.start` on.
        m: the flat tensors that store the entries of their buckets.
        task: the task of the parameter; only its `spec`, `keys`, `numel` and `start` are used.
        hp: the step's scalars.
        stacked: the number of parameters whose `g` and `m` are concatenated, each of them in whole buckets; the keys
            and `start` of the task are then columns, (stacked, 1). None for one parameter, or a part of it.
    """
    spec, (m_format, _) = task.spec, task.spec.formats
    shape = (-1,) if stacked is None else (stacked, -1)
    grad = used_gradient(g, spec, hp).view(shape)
    count = grad.shape[-1]
    if spec.hash is None:
        M = decay(m_format.load(m, grad.numel(), grad.dtype).view(shape), grad, hp.beta1, hp.one_minus_beta1)
        return M.view(-1), writes_of(m_format, m, M, task.start, FIRST, task, hp)
    load = int(spec.load)
    rows, first, missing = -(-count // load), task.start // load, -count % load
    if missing:  # pad with zeros, which do not change the sum of the last bucket
        grad = torch.nn.functional.pad(grad, (0, missing))
    _, masks, resets, loads = bucket_signs(task, hp, first, rows, grad, tail=missing > 0)
    bitwise = spec.hints.bitwise(grad, load)
    grad = signed(grad.view(*shape, load), masks, bitwise=bitwise)
    mu = grad.sum(-1) / loads
    M = decay(m_format.load(m, mu.numel(), mu.dtype).view(shape), mu, hp.beta1, hp.one_minus_beta1, resets)
    X = signed(M[..., None] + hp.rho * (grad - mu[..., None]), masks, bitwise=bitwise)
    return X.view(-1)[: X.numel() - missing], writes_of(m_format, m, M, first, FIRST, task, hp)


def moved(
    p: Tensor,
    Q: Tensor,
    scale: float | Tensor,
    finite: Tensor | None,
    task: UpdateTask,
    hp: StepScalars,
    stacked: int | None = None,
) -> Tensor:
    """The new values of p, flat and in the dtype of p.

    Args:
        p: the elements from `task.start` on.
        Q: the update of these elements.
        scale: the value of `update_scale`.
        finite: a flag for each of len(finite) equal stretches of p; stretches whose flag is not set keep their values.
            None to update all.
        task, hp, stacked: as for `encoded`.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    old = flat(p, dtype)
    new = updated(old, flat(Q, dtype) * scale, hp)
    if finite is not None:
        new = kept(finite, new, old)
    new = new if stacked is None else new.view(stacked, -1)
    ((_, stored),) = writes_of(FloatFormat(p.dtype), (p.reshape(-1),), new, task.start, PARAM, task, hp)
    return stored.to(p.dtype)


def kept(finite: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new`, flat, or `old` in those of the len(finite) stretches of equal length whose flag is not set."""
    stretches = len(finite), -1
    return torch.where(finite[:, None], new.view(stretches), old.view(stretches)).view(-1)


def step_flops(shapes: Iterable[Sequence[int]]) -> int:
    """The floating-point operations of Newton-Schulz per step, for matrices or stacks of matrices of these shapes."""
    total = 0
    for shape in shapes:
        stacked, rows, cols, _ = matrices_of(shape)
        m, n = sorted((rows, cols))
        total += stacked * _stretches_flops(m, n, _stretches(m, n))
    return total


def tokens_for_share(shapes: Sequence[Sequence[int]], numel: int, share: float = 0.03) -> float:
    """The minimum tokens per step at which `step_flops` is at most `share` of forward and backward, 6 numel per token.

    Args:
        shapes: the shapes of the matrices that are orthogonalised.
        numel: the number of parameters that each token is multiplied by, in these matrices and all others.
        share: the fraction of the operations of forward and backward.
    """
    return step_flops(shapes) / (6 * numel * share)
