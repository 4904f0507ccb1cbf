"""The role of a parameter in its model, which determines how its moments are stored.

- "tokens": a table with one row per token, such as an input embedding or an output head. Its gradients are sparse in
  time: a row changes when its token occurs.
- "matrix": every other weight that is large enough for tables, including expert stacks and convolutions.
- "exact": dense moments, as AdamW's.

The options of the group, and the size of parameters that are too small for tables, have precedence (`role_under`).
Otherwise the role is found from the module (`roles_of_modules`), from names, and from shapes, in this order. A matrix
that is classified as a token table takes more bytes, but a token table that is classified as a matrix trains worse, so
in doubt a parameter is a token table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

ROLES = ("auto", "matrix", "tokens", "exact")

# Bounds for a token table of which only the shape is known.
TABLE_ROWS = 4096  # the smallest number of rows
TABLE_ASPECT = 2  # the smallest ratio of rows to columns
TABLE_SHARED = 2  # the most parameters with this number of rows: embedding and head. More are matrices of blocks
LONGEST_VECTOR = 2**20  # the most elements of a bias or a norm's weight; a longer vector is a flattened model


class Role(NamedTuple):
    """The role of a parameter, "matrix", "tokens" or "exact", and a short text on how it was found."""

    kind: str
    reason: str


def role_under(found: Role, numel: int, group: Mapping[str, Any]) -> Role:
    """The role of a parameter of `numel` elements under its group's options.

    Args:
        found: the role from `found_roles`.
        group: the group, of which the options `role`, `compress_ratio`, `min_K` and `hash` are used. Tables of
            hash="universal" are the same for every role.
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
        params: name (None if it has none) and shape of all parameters of an optimizer. Their numbers of rows are
            compared with each other.
        by_module: the roles that follow from modules, by name: `roles_of_modules`.
    """
    by_module = by_module or {}
    tables = [_by_module_or_name(name, shape, by_module) for name, shape in params]
    named = {
        shape[0]: _module_name(name)
        for (name, shape), table in zip(params, tables, strict=True)
        if name is not None and table is not None
    }
    rows = Counter(shape[0] for _, shape in params if len(shape) == 2)
    return [table or _by_rows(name, shape, named, rows) for (name, shape), table in zip(params, tables, strict=True)]


def _by_module_or_name(name: str | None, shape: tuple[int, ...], by_module: Mapping[str, Role]) -> Role | None:
    """The role that follows from the module or the name of a parameter alone, or None."""
    if name is None or len(shape) != 2:
        return None
    return by_module.get(name) or (Role("tokens", f"name: {_module_name(name)}") if _names_a_table(name) else None)


def _by_rows(name: str | None, shape: tuple[int, ...], named: Mapping[int, str], rows: Mapping[int, int]) -> Role:
    """The role of a parameter that its module and its name do not determine."""
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
    """The token tables in a model, found from its modules: their roles by parameter name.

    These are the weights of embeddings, and of output heads, tied or not: linear layers outside the model's blocks with
    as many outputs as one of the embeddings has rows. Embeddings of positions and of token types are excluded.
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

    Libraries for model parallelism and quantisation have embeddings that are not subclasses of torch's.
    """
    for kind in (nn.Embedding, nn.EmbeddingBag):
        if isinstance(module, kind):
            return "" if "Position" in type(module).__name__ else f"nn.{kind.__name__}"
    name = type(module).__name__
    return name if name.endswith("Embedding") and "Position" not in name else ""


# The name of a module's own weight.
_OWN = re.compile(r"(^|\.)(parametrizations\.weight\.original|weight)$")
# A module's name is the last part of its path that is not a number. torch.nn.utils.parametrize and PEFT keep weights in
# child modules.
_LEAF = re.compile(r"(^|\.)(parametrizations\.weight\.original\d?|modules_to_save\.[^.]+\.weight|weight)$")
_NUMBERS = re.compile(r"(\.\d+)+$")
_TABLE = re.compile(
    r"""wte | shared | embed_in | embed_out | input_embeds_layer
    | (.+_)? (embed_(\w+_)?tokens | lm_heads?) (_.+)?  # embed_tokens_per_layer, text_lm_head
    | .* emb(ed(ding)?s?)? (_[a-z])?  # tok_embeddings, word_embedding, codec_embed, emb_l""",
    re.VERBOSE,
)
_HEAD = re.compile(r"(^|\.)((lm_head|predictions)\.decoder|lm_loss|vocab_projector)$")
# Embeddings of other things than tokens: positions, token types, steps of a diffusion, patches of an image.
_OTHER = re.compile(
    r"(^|_)(wpe|pos|posit\w*|rel|relative|rotary|rope|segments?|token_types?|time|timesteps?|patch(es)?)(_|$)|posit"
)
# In a repeated block: a number followed by a module's path, or the number of a layer followed by anything.
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
