"""A LLaMA decoder: RMSNorm, rotary positions, grouped queries, SwiGLU, and a loss in chunks of tokens.

Parameters are in the order of `collins.offload.shapes.llama`, so a plan from those shapes is the plan of this model.
"""

from __future__ import annotations

import math

import torch
from chunked_loss import chunked_loss
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_EPS = 1e-5


class Block(nn.Module):
    """Pre-norm attention with `heads` queries to `kv_heads` keys and values, and a gated feed-forward.

    Args:
        checkpointed: whether it keeps its input alone for backward and is computed anew there. Compiled, all but its
            last product is computed anew, which backward does not need.
    """

    def __init__(self, hidden: int, ffn: int, heads: int, kv_heads: int, *, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.width = hidden // heads
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=_EPS), nn.RMSNorm(hidden, eps=_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.checkpointed:
            return self._output(x, cos, sin)
        # Nothing is random in a block.
        output: Tensor = checkpoint(self._output, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return output

    def _output(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (self._heads(projection(normed)) for projection in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(
            rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        fed: Tensor = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return x + fed

    def _heads(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, -1, self.width).transpose(1, 2)


class Llama(nn.Module):
    """The decoder.

    Args:
        layers, hidden, ffn, heads, kv_heads, vocab: its shape; `hidden` is a multiple of twice `heads`, and `heads` of
            `kv_heads`.
        checkpointed: as for `Block`.
        rotary_base: the slowest channels turn once in about 2 pi `rotary_base` positions.
    """

    def __init__(
        self,
        layers: int,
        hidden: int,
        ffn: int,
        heads: int,
        kv_heads: int,
        vocab: int,
        *,
        checkpointed: bool = True,
        rotary_base: float = 500_000.0,
    ) -> None:
        super().__init__()
        self.width = hidden // heads
        self.rotary_base = rotary_base
        self.token = nn.Embedding(vocab, hidden)
        blocks = (Block(hidden, ffn, heads, kv_heads, checkpointed=checkpointed) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(hidden, eps=_EPS)
        self.head = nn.Linear(hidden, vocab, bias=False)

    @torch.no_grad()
    def fill(self) -> None:
        """Draws random initial weights in place, on the device of the parameters, without further memory."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1)
            else:
                depth = 2 * len(self.blocks) if name.endswith(("out.weight", "down.weight")) else 1
                p.normal_(std=0.02 / math.sqrt(depth))

    def compile_blocks(self) -> None:
        """Compiles each block: they share one graph, and each returns its gradients before the next one begins."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def features(self, tokens: Tensor) -> Tensor:
        """The input of the head, (batch, length, hidden), for `tokens` (batch, length), int64."""
        x = self.token(tokens)
        cos, sin = rotations(x.shape[1], self.width, x, self.rotary_base)
        for block in self.blocks:
            x = block(x, cos, sin)
        normed: Tensor = self.norm(x)
        return normed

    def loss(self, tokens: Tensor, chunks: int) -> Tensor:
        """Mean cross-entropy in nats of each token given those before it; `tokens` (batch, length + 1), int64."""
        x, targets = self.features(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        return chunked_loss(x, self.head.weight, targets, chunks)


def rotations(length: int, width: int, like: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, each (length, width / 2), in the dtype and on the device of `like`."""
    frequency = base ** -(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels (i, i + width / 2) turned by its position's angle, in the dtype of `x`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
