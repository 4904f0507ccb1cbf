"""Parameter shapes of transformers, for plans without the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from collins.roles import Role

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
LARGE_VOCABULARY = 262_144  # the largest that is in wide use: Gemma 3's


@dataclass(frozen=True)
class Transformer:
    """A decoder: parameters before, within and after its blocks, and the widths of its activations.

    Widths are numbers of values per token. `budget_of` multiplies them by tokens and by the bytes of a value.
    """

    hidden: int
    vocabulary: int
    gated: bool  # whether the feed-forward network multiplies two projections
    checkpointed: int  # width of all activation checkpoints: layers times hidden
    recomputed: int  # width of one recomputed block: `block_width`
    before: Shapes
    blocks: tuple[Shapes, ...]  # one for each layer, named as within it
    after: Shapes
    block_name: str = "model.layers"
    counted: bool = False  # whether it was made from a number of parameters alone, with assumed shapes
    positions: int | None = field(default=None, compare=False)  # the longest sequence it is configured for
    notes: tuple[str, ...] = field(default=(), compare=False)  # notes for the reader of the plan, one line each
    by_module: Mapping[str, Role] = field(default_factory=dict, compare=False)  # roles from modules, by name

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every parameter, in the order in which the model has them."""
        yield from self.before
        for layer, block in enumerate(self.blocks):
            for name, shape in block:
                yield f"{self.block_name}.{layer}.{name}", shape
        yield from self.after

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of `parameters`."""
        return [shape for _, shape in self.parameters()]

    @property
    def count(self) -> int:
        """The number of parameters, N."""
        return sum(numel(shapes) for shapes in (self.before, *self.blocks, self.after))

    @property
    def largest_block(self) -> Shapes:
        """The block with the most elements; empty if there is none."""
        return max(self.blocks, key=numel, default=())

    def with_layers(self, layers: int) -> Transformer:
        """The same model with another number of blocks: its first ones, or all of them and copies of the largest."""
        more = (self.largest_block,) * (layers - self.layers)
        return replace(self, blocks=self.blocks[:layers] + more, checkpointed=layers * self.hidden)


def block_width(hidden: int, attention: int, feed_forward: int, gated: bool) -> int:
    """The values per token that a block's backward holds after its forward has been recomputed.

    The results of two norms and the residual in between; queries, keys, values and the attention's result; and of the
    feed-forward network four inner values and the gradients of three, or with no gate two and two.

    Args:
        attention: 2 q + 2 k, with q and k the widths of all query and of all key-value heads.
        feed_forward: of the experts of one token together, in a mixture.
    """
    return 3 * hidden + attention + (7 if gated else 4) * feed_forward


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
        hidden=hidden,
        vocabulary=vocabulary,
        gated=True,
        checkpointed=layers * hidden,
        recomputed=block_width(hidden, 2 * query + 2 * key_value, feed_forward, gated=True),
        before=(("model.embed_tokens.weight", (vocabulary, hidden)),),
        blocks=(tuple(block),) * layers,
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
    block = (
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
    )
    return Transformer(
        hidden=hidden,
        vocabulary=vocabulary,
        gated=False,
        checkpointed=layers * hidden,
        recomputed=block_width(hidden, 4 * hidden, feed_forward, gated=False),
        before=(("transformer.wte.weight", (vocabulary, hidden)), ("transformer.wpe.weight", (context, hidden))),
        blocks=(block,) * layers,
        after=(("transformer.ln_f.weight", (hidden,)), ("transformer.ln_f.bias", (hidden,)), *head),
        block_name="transformer.h",
        positions=context,
    )


def of_count(count: int, vocabulary: int = LARGE_VOCABULARY) -> Transformer:
    """A model of exactly `count` parameters of unknown architecture, and possibly a known vocabulary.

    Each figure that affects memory is at least that of the published decoders of this size, so a count never fits where
    the actual configuration does not. With N parameters in layers of 12 h^2 each, an aspect a = h / layers gives
    h = (a N / 12)^(1/3) and N / (12 h^2) layers. Published models have aspects from 16 (thin models of a few hundred
    million parameters; 64 from 3 billion on) to 256.

    - checkpoints: those of the thinnest model, whose layers times h is largest
    - one recomputed block: a gated feed-forward network of 6 h (Gemma's has 5.3 h) at a = 128
    - vectors: in each layer of the thinnest model 13 of h, as in GPT-2, 8 of 1,024 and 8 of 128, for biases of
      key-value heads and norms within heads, since small parameters take more bytes per element
    - embedding and an untied head: the vocabulary times h at a = 256, if N allows it, since token tables take more
      bytes per element than matrices
    - the rest: 15 equal blocks of two matrices, so that a block has the share of N that it has in sparse mixtures
    """
    thin = _hidden(count, 16 if count < 3 * 10**9 else 64)
    middle, wide = _hidden(count, 128), _hidden(count, 256)
    layers = -(-count // (12 * thin * thin))
    left, vectors = count, []
    for number, length in ((13 * layers, thin), (8 * layers, 1024), (8 * layers, 128)):
        number = min(number, left // length)
        vectors += number * [length]
        left -= number * length
    rows = min(vocabulary, left // (2 * wide))
    left -= 2 * rows * wide
    inner = left // (15 * 3 * thin)
    left -= inner * 15 * 3 * thin
    before: list[tuple[str, tuple[int, ...]]] = [("embedding", (rows, wide))] if rows else []
    before += [(f"vectors.{index}", (length,)) for index, length in enumerate(vectors)]
    before += [("rest", (left,))] if left else []
    return Transformer(
        hidden=middle,
        vocabulary=vocabulary,
        gated=True,
        checkpointed=layers * thin,
        recomputed=block_width(middle, 4 * middle, 6 * middle, gated=True),
        before=tuple(before),
        blocks=((("up", (2 * inner, thin)), ("down", (thin, inner))),) * 15 if inner else (),
        after=(("head", (rows, wide)),) if rows else (),
        block_name="blocks",
        counted=True,
    )


def _hidden(count: int, aspect: int) -> int:
    """h of a model of `count` parameters with h / layers = `aspect`, in multiples of 64 that are not below it."""
    return 64 * math.ceil(math.cbrt(count * aspect / 12) / 64)
