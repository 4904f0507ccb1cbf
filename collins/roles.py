"""What a parameter is to its model, which decides how its moments are stored.

- "tokens": a table with one row for each token, such as an input embedding or an output head. Its gradients are sparse
  in time: a row changes when its token occurs.
- "matrix": every other weight that is large enough for tables, expert stacks and convolutions included.
- "exact": dense moments, as AdamW's.

A role is found from the module (`roles_of_modules`), from names, and from shapes, in this order; what a group says, and
parameters too small for tables, come first (`role_under`). A matrix that is taken for a token table takes more bytes. A
token table that is taken for a matrix trains worse, so that in doubt it is a token table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

ROLES = ("auto", "matrix", "tokens", "exact")

TABLE_ROWS = 4096  # rows of a token table, at least, where nothing but its shape is known
TABLE_ASPECT = 2  # rows for each column, at least
TABLE_SHARED = 2  # parameters with as many rows, at most: embedding and head. A block's matrices share theirs
LONGEST_VECTOR = 2**20  # elements of a bias or a norm's weight, at most; what is longer is a model made flat


class Role(NamedTuple):
    """What a parameter is to its model: "matrix", "tokens" or "exact", and a few words on how that was found."""

    kind: str
    reason: str


def role_under(found: Role, numel: int, group: Mapping[str, Any]) -> Role:
    """The role of a parameter of `numel` elements under its group's options.

    Args:
        found: by `found_roles`.
        group: its options `role`, `compress_ratio`, `min_K` and `hash`. Tables of hash="universal" are the same for
            every role.
    """
    if group["role"] == "exact":
        return Role("exact", "group")
    if group["compress_ratio"] == 1:
        return Role("exact", "compress_ratio=1")
    if numel <= group["min_K"]:
        return Role("exact", "min_K")
    if group["role"] != "auto":
        return Role(group["role"], "group")
    return Role("matrix", "hash='universal'") if group["hash"] == "universal" else found


def found_roles(
    params: Sequence[tuple[str | None, tuple[int, ...]]], by_module: Mapping[str, Role] | None = None
) -> list[Role]:
    """The role of each parameter, by its module, its name, or its shape.

    Args:
        params: name, None where it has none, and shape of all parameters of an optimizer. Their numbers of rows are
            compared with each other.
        by_module: what modules say of parameters, by name: `roles_of_modules`.
    """
    by_module = by_module or {}
    tables = [_said(name, shape, by_module) for name, shape in params]
    named = {
        shape[0]: _module_name(name)
        for (name, shape), table in zip(params, tables, strict=True)
        if name is not None and table is not None
    }
    rows = Counter(shape[0] for _, shape in params if len(shape) == 2)
    return [table or _by_rows(name, shape, named, rows) for (name, shape), table in zip(params, tables, strict=True)]


def _said(name: str | None, shape: tuple[int, ...], by_module: Mapping[str, Role]) -> Role | None:
    """What the module or the name of a parameter says by itself."""
    if name is None or len(shape) != 2:
        return None
    return by_module.get(name) or (Role("tokens", f"name: {_module_name(name)}") if _names_a_table(name) else None)


def _by_rows(name: str | None, shape: tuple[int, ...], named: Mapping[int, str], rows: Mapping[int, int]) -> Role:
    """The role of a parameter of which module and name say nothing by themselves."""
    if sum(size > 1 for size in shape) < 2 and max(shape, default=1) <= LONGEST_VECTOR:
        return Role("exact", "vector")
    matrix = Role("matrix", "shape")
    if len(shape) != 2:
        return matrix
    table = shape[0] >= max(TABLE_ROWS, TABLE_ASPECT * shape[1]) and rows[shape[0]] <= TABLE_SHARED
    if not (table or shape[0] in named) or (name is not None and _in_block(name)):
        return matrix
    if name is not None and shape[0] in named and not _OTHER.search(_module_name(name).lower()):
        return Role("tokens", f"name: as many rows as {named[shape[0]]}")
    return Role("tokens", "shape") if table else matrix


def roles_of_modules(model: nn.Module) -> dict[str, Role]:
    """What the modules of a model say of its parameters, by name: which are token tables.

    These are the weights of embeddings, and those of linear layers outside the model's blocks that are as wide as one
    of them has rows: output heads, tied or not. Embeddings of positions and of kinds of tokens are none.
    """
    tables, heads = _by_class(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Role] = {}
    widths: dict[int, str] = {}
    for path, kind, weight in tables:
        widths[weight.shape[0]] = path.rpartition(".")[2]
        tied = [head.rpartition(".")[2] for head, other in heads if other is weight]
        reason = f"module: {kind}" + (f", tied to {' and '.join(tied)}" if tied else "")
        found.setdefault(names[id(weight)], Role("tokens", reason))
    for path, weight in heads:
        if weight.shape[0] in widths and not _in_block(f"{path}.weight"):
            reason = f"module: head as wide as {widths[weight.shape[0]]}"
            found.setdefault(names[id(weight)], Role("tokens", reason))
    return found


def _by_class(model: nn.Module) -> tuple[list[tuple[str, str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """The embeddings of tokens in a model, by path, class and weight, and its linear layers, by path and weight."""
    tables, heads = [], []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, weight in model.named_parameters(remove_duplicate=False):
        path = _OWN.sub("", name)
        module = modules.get(path)
        if path == name or module is None or is_lazy(weight) or weight.dim() != 2:
            continue
        kind, width = _embedding_class(module), getattr(module, "out_features", None)
        if kind and not _OTHER.search(path.rpartition(".")[2].lower()):
            tables.append((path, kind, weight))
        elif not kind and width == weight.shape[0]:
            heads.append((path, weight))
    return tables, heads


def _embedding_class(module: nn.Module) -> str:
    """The name of the class of an embedding of tokens; "" for another module.

    Libraries for model parallelism and quantisation have embeddings that are no subclasses of torch's.
    """
    for kind in (nn.Embedding, nn.EmbeddingBag):
        if isinstance(module, kind):
            return "" if "Position" in type(module).__name__ else f"nn.{kind.__name__}"
    name = type(module).__name__
    return name if name.endswith("Embedding") and "Position" not in name else ""


# What a module's own weight is called in it.
_OWN = re.compile(r"(^|\.)(parametrizations\.weight\.original|weight)$")
# A module is known by the last part of its path that is no number. torch.nn.utils.parametrize and PEFT keep weights in
# modules of their own beneath it.
_LEAF = re.compile(r"(^|\.)(parametrizations\.weight\.original\d?|modules_to_save\.[^.]+\.weight|weight)$")
_NUMBERS = re.compile(r"(\.\d+)+$")
_TABLE = re.compile(
    r"""wte | shared | embed_in | embed_out | input_embeds_layer
    | (.+_)? (embed_(\w+_)?tokens | lm_heads?) (_.+)?  # embed_tokens_per_layer, text_lm_head
    | .* emb(ed(ding)?s?)? (_[a-z])?  # tok_embeddings, word_embedding, codec_embed, emb_l""",
    re.VERBOSE,
)
_HEAD = re.compile(r"(^|\.)((lm_head|predictions)\.decoder|lm_loss|vocab_projector)$")
# Embeddings of what is not a token: positions, kinds of tokens, steps of a diffusion, patches of an image.
_OTHER = re.compile(
    r"(^|_)(wpe|pos|posit\w*|rel|relative|rotary|rope|segments?|token_types?|time|timesteps?|patch(es)?)(_|$)|posit"
)
# Within one of several blocks of a kind: a number, and the path of a module after it; after the number of a layer, any.
_BLOCK = re.compile(r"(^|\.)(\d+\.[^.]*[a-z_][^.]*\.|(layers?|blocks?|stages?|h)\d*\.\d+\.\d)", re.IGNORECASE)


def _module_name(name: str) -> str:
    """The last part of the path of a parameter's module: "embed_tokens" of "model.embed_tokens.weight"."""
    return _path(name).rpartition(".")[2]


def _path(name: str) -> str:
    return _NUMBERS.sub("", _LEAF.sub("", name))


def _names_a_table(name: str) -> bool:
    path = _path(name).lower()
    module = path.rpartition(".")[2]
    return _HEAD.search(path) is not None or (_TABLE.fullmatch(module) is not None and not _OTHER.search(module))


def _in_block(name: str) -> bool:
    return _BLOCK.search(name) is not None
