"""The device memory that training takes beside the tables, computed from shapes, for plans without a device.

All in bytes, with w the bytes of a value in the model's dtype, T = batch size times sequence length, and the widths h
hidden, q of all query heads, k of all key-value heads, f of the feed-forward network (of a token's experts, together):

    weights              N w
    gradients            N w for steps after backward. In backward each gradient is freed when it has been used, so it
                         is the gradients that exist together: those of one block (a compiled block returns all of its
                         gradients at once) or, outside the blocks, that of the largest parameter
    checkpoints          layers T h w: the input of each block (activation checkpointing)
    recomputed block     T (3 h + 2 q + 2 k + 7 f) w, with 4 f instead of 7 f without a gate: the values that one block
                         saves for its backward (the outputs of two norms, the residual in between, q, k, v, the output
                         of attention, the inner values of the feed-forward network), and the gradients of the inner
                         values. Attention is assumed to be fused, without a T x T matrix
    logits               T / chunks * vocabulary * 8: a chunk of logits and their gradients, in float32

The plan uses their sum, although they do not all peak at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from collins.offload.plan import Request
from collins.offload.shapes import Transformer, numel
from collins.offload.slabs import offsets
from collins.parameter import state_tensors
from collins.roles import found_roles, role_under
from collins.rule import ELEMENTWISE
from collins.schemes import scheme_under


@dataclass(frozen=True)
class Training:
    """The settings of a training run that affect memory.

    Args:
        dtype: of weights, gradients and activations.
        batch_size, seq_len: sequences on the device at once, and tokens in each.
        loss_chunks: the number of pieces of a batch's logits, which are computed one at a time.
    """

    dtype: torch.dtype = torch.bfloat16
    batch_size: int = 1
    seq_len: int = 2048
    loss_chunks: int = 8


@dataclass(frozen=True)
class Budget:
    """Bytes on the device beside tables and staging; the formulas are at the top of this file."""

    weights: int
    gradients: int  # stepping after backward
    gradients_in_backward: int
    checkpoints: int
    recomputed: int
    logits: int

    @property
    def activations(self) -> int:
        """Checkpoints, one recomputed block and a chunk of logits."""
        return self.checkpoints + self.recomputed + self.logits

    def held(self, in_backward: bool) -> int:
        """The total, for steps in backward or after it."""
        return self.weights + (self.gradients_in_backward if in_backward else self.gradients) + self.activations


def budget_of(model: Transformer, training: Training) -> Budget:
    """The budget of `model` under `training`."""
    width, tokens = training.dtype.itemsize, training.batch_size * training.seq_len
    alone = [math.prod(shape) for _, shape in (*model.before, *model.after)]
    return Budget(
        weights=model.count * width,
        gradients=model.count * width,
        gradients_in_backward=max(*alone, numel(model.largest_block), 0) * width,
        checkpoints=tokens * model.checkpointed * width,
        recomputed=tokens * model.recomputed * width if model.checkpointed else 0,
        logits=-(-tokens // training.loss_chunks) * model.vocabulary * 8,
    )


def requests_of(
    model: Transformer,
    dtype: torch.dtype,
    *,
    compress_ratio: float,
    min_K: int,
    hash: str,
    table_dtype: torch.dtype | None,
) -> Iterator[Request]:
    """The requests for `place` when `Collins` optimizes `model` in `dtype` with these options."""
    options = {
        "role": "auto",
        "compress_ratio": compress_ratio,
        "v_compress_ratio": None,
        "min_K": min_K,
        "hash": hash,
        "table_dtype": table_dtype,
        "decode": ELEMENTWISE,
    }
    params = list(model.parameters())
    for (name, shape), found in zip(params, found_roles(params, model.by_module), strict=True):
        role = role_under(found, math.prod(shape), options)
        tensors, _ = state_tensors(shape, scheme_under(shape, dtype, options, role.kind, sharded=False))
        nbytes, slab_bytes = sum(spec.nbytes for spec in tensors.values()), offsets(tensors.values())[1]
        yield Request(name, shape, nbytes, role, slab_bytes)
