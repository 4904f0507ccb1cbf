"""Cross-entropy of a language model's head in chunks of tokens, so that the logits never exist all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Finish = Callable[[Tensor], Tensor]


def chunked_loss(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    chunks: int,
    *,
    bias: Tensor | None = None,
    finish: Finish | None = None,
) -> Tensor:
    """Mean cross-entropy of a linear head, with the logits of one chunk of tokens at a time.

    With autograd alone, each chunk would have a gradient of the size of the head. Here they are added up to one
    gradient, which arrives once in a backward pass.

    Args:
        x: the input of the head, (tokens, hidden).
        head: the weight of the head, (vocabulary, hidden).
        targets: the token to predict at each position, (tokens,), int64.
        chunks: the number of pieces into which the tokens are cut.
        bias: the bias of the head, (vocabulary,).
        finish: a function of the logits after the head, if any: differentiable, without parameters, and keeping the
            shape.

    Returns:
        A scalar in nats, float32.
    """
    loss: Tensor = _ChunkedLoss.apply(x, head, bias, targets, chunks, finish)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, chunks: int, finish: Finish | None
    ) -> Tensor:
        ctx.save_for_backward(x, head, bias, targets)
        ctx.chunks, ctx.finish = chunks, finish
        losses = []
        for part, target in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            logits = functional.linear(part, head, bias)
            logits = logits if finish is None else finish(logits)
            losses.append(functional.cross_entropy(logits.float(), target, reduction="sum"))
        return torch.stack(losses).sum() / len(x)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        x, head, bias, targets = ctx.saved_tensors
        grad_x, grad_head = torch.empty_like(x), torch.zeros_like(head)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        parts = zip(x.chunk(ctx.chunks), grad_x.chunk(ctx.chunks), targets.chunk(ctx.chunks), strict=True)
        for part, grad_part, target in parts:
            grad = _grad_logits(part, head, bias, target, scale / len(x), ctx.finish)
            torch.mm(grad, head, out=grad_part)
            grad_head.addmm_(grad.T, part)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_x, grad_head, grad_bias, None, None, None


def _grad_logits(
    part: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, finish: Finish | None
) -> Tensor:
    """The gradient of `scale` times the summed cross-entropy with respect to the head's logits, in their dtype."""
    logits = functional.linear(part, head, bias)
    if finish is None:
        logits = logits.float()  # what was in 16 bits is freed: the two together would be the peak
        return _softmax_less_target(logits, target, scale).to(part.dtype)
    with torch.enable_grad():
        logits.requires_grad_()
        finished = finish(logits)
    # A copy: what `finish` has saved for its own backward must not be overwritten.
    grad = _softmax_less_target(finished.detach().to(torch.float32, copy=True), target, scale)
    (result,) = torch.autograd.grad(finished, logits, grad.to(finished.dtype))
    return result


def _softmax_less_target(logits: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Overwrites logits by `scale` times (probabilities - one-hot targets)."""
    logits.sub_(logits.logsumexp(1, keepdim=True)).exp_()
    logits[torch.arange(len(logits), device=logits.device), target] -= 1
    return logits.mul_(scale)
