"""Parameter shapes of transformers: what a plan needs to know of a model that need not exist yet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Transformer:
    """A decoder: parameters before, within and after its `layers` equal blocks, and the widths of its activations."""

    layers: int
    hidden: int
    feed_forward: int
    query: int  # heads times their width
    key_value: int  # key-value heads times their width
    gated: bool  # whether the feed-forward network multiplies two projections
    vocabulary: int | None  # None: not known
    before: Shapes
    block: Shapes  # of each layer, named as within it
    after: Shapes
    block_name: str = "model.layers"

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every parameter, in the order in which the model has them."""
        yield from self.before
        for layer in range(self.layers):
            for name, shape in self.block:
                yield f"{self.block_name}.{layer}.{name}", shape
        yield from self.after

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of `parameters`."""
        return [shape for _, shape in self.parameters()]

    @property
    def count(self) -> int:
        """The number of parameters, N."""
        return numel(self.before) + self.layers * numel(self.block) + numel(self.after)


def numel(shapes: Shapes) -> int:
    """The number of elements of all the tensors."""
    return sum(math.prod(shape) for _, shape in shapes)


def llama(
    layers: int,
    hidden: int,
    feed_forward: int,
    key_value: int,
    vocabulary: int,
    *,
    query: int | None = None,
    tied: bool = False,
    biased: tuple[str, ...] = (),
) -> Transformer:
    """A LLaMA: embedding; in each layer q, k, v, o, gate, up, down and two norms; norm and head.

    Args:
        key_value: width of all key-value heads together; that of the query heads is `query`, `hidden` unless given.
        tied: whether the head is the embedding.
        biased: which of the seven projections have a bias: "q", "k", "v", "o", "gate", "up", "down".
    """
    query = hidden if query is None else query
    projections = {
        "q": ("self_attn.q_proj", query, hidden),
        "k": ("self_attn.k_proj", key_value, hidden),
        "v": ("self_attn.v_proj", key_value, hidden),
        "o": ("self_attn.o_proj", hidden, query),
        "gate": ("mlp.gate_proj", feed_forward, hidden),
        "up": ("mlp.up_proj", feed_forward, hidden),
        "down": ("mlp.down_proj", hidden, feed_forward),
    }
    block: list[tuple[str, tuple[int, ...]]] = []
    for key, (name, rows, columns) in projections.items():
        block.append((f"{name}.weight", (rows, columns)))
        if key in biased:
            block.append((f"{name}.bias", (rows,)))
    block += [("input_layernorm.weight", (hidden,)), ("post_attention_layernorm.weight", (hidden,))]
    head = () if tied else (("lm_head.weight", (vocabulary, hidden)),)
    return Transformer(
        layers=layers,
        hidden=hidden,
        feed_forward=feed_forward,
        query=query,
        key_value=key_value,
        gated=True,
        vocabulary=vocabulary,
        before=(("model.embed_tokens.weight", (vocabulary, hidden)),),
        block=tuple(block),
        after=(("model.norm.weight", (hidden,)), *head),
    )


def gpt2(
    layers: int = 12,
    hidden: int = 768,
    vocabulary: int = 50257,
    *,
    feed_forward: int | None = None,
    context: int = 1024,
    tied: bool = True,
) -> Transformer:
    """GPT-2: 124M parameters by default. Its head is the embedding, its feed-forward width 4 `hidden` unless given."""
    feed_forward = 4 * hidden if feed_forward is None else feed_forward
    head = () if tied else (("lm_head.weight", (vocabulary, hidden)),)
    return Transformer(
        layers=layers,
        hidden=hidden,
        feed_forward=feed_forward,
        query=hidden,
        key_value=hidden,
        gated=False,
        vocabulary=vocabulary,
        before=(("transformer.wte.weight", (vocabulary, hidden)), ("transformer.wpe.weight", (context, hidden))),
        block=(
            ("ln_1.weight", (hidden,)),
            ("ln_1.bias", (hidden,)),
            ("attn.c_attn.weight", (hidden, 3 * hidden)),
            ("attn.c_attn.bias", (3 * hidden,)),
            ("attn.c_proj.weight", (hidden, hidden)),
            ("attn.c_proj.bias", (hidden,)),
            ("ln_2.weight", (hidden,)),
            ("ln_2.bias", (hidden,)),
            ("mlp.c_fc.weight", (hidden, feed_forward)),
            ("mlp.c_fc.bias", (feed_forward,)),
            ("mlp.c_proj.weight", (feed_forward, hidden)),
            ("mlp.c_proj.bias", (hidden,)),
        ),
        after=(("transformer.ln_f.weight", (hidden,)), ("transformer.ln_f.bias", (hidden,)), *head),
        block_name="transformer.h",
    )


def of_count(count: int) -> Transformer:
    """A model of exactly `count` parameters of which nothing else is known: matrices as a transformer has them.

    Blocks of 12 h^2 in four (h, h) and two (h, 4 h) matrices, where h is about 128 times the number of layers, so that
    N is about 12 h^3 / 128 (the shape of GPT-3, Brown et al. 2020, and of LLaMA). What remains is a matrix of h columns
    and a vector. The vocabulary is unknown, and so are logits.
    """
    hidden = 64 * max(round((count * 128 / 12) ** (1 / 3) / 64), 1)
    layers, remainder = divmod(count, 12 * hidden * hidden)
    rows, tail = divmod(remainder, hidden)
    before = ((("embedding", (rows, hidden)),) if rows else ()) + ((("rest", (tail,)),) if tail else ())
    square = tuple((f"attention.{letter}", (hidden, hidden)) for letter in "qkvo")
    return Transformer(
        layers=layers,
        hidden=hidden,
        feed_forward=4 * hidden,
        query=hidden,
        key_value=hidden,
        gated=False,
        vocabulary=None,
        before=before,
        block=(*square, ("mlp.up", (4 * hidden, hidden)), ("mlp.down", (hidden, 4 * hidden))),
        after=(),
        block_name="layers",
    )
