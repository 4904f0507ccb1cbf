"""Storage schemes of moments: loads and formats, chosen from a parameter's role and the bytes that it may take.

`compress_ratio` is a ratio of bytes: AdamW's 8 bytes of state per fp32 parameter, divided by ours. Without a
`table_dtype`, the widest scheme of the role that fits stores the moments. With a `table_dtype`, `compress_ratio` is the
load, the number of elements per bucket, as in version 0.2; for fp32 tables that is the same number.

- Matrices: at equal bytes, many coarse buckets of M beat few exact ones, and V may be much coarser than M. M in int4 at
  load 4 and V at load 128 reach the loss of AdamW at its best rate (examples/results).
- Token tables: a row gets a gradient only once in many steps, so the noise of a signed sketch does not average out. M
  keeps an entry for each element, as integers. V shares an entry between neighbours in a row, which trains as well as
  factors for rows and columns and needs no second pass. Such tables are a twentieth of a large model, and may take
  `TOKEN_SHARE` times the bytes of a matrix.
- Matrices under decode="orthogonal" have no second moment, so M may use all bytes. It may take `ORTHOGONAL_SHARE`
  times the bytes that follow from `compress_ratio`, for the scales of its integers: 32 is int4 at load 2, and 64 is
  int4 at load 4. A LLaMA of 7B parameters takes 0.30 byte per parameter at 32, with its token tables, and 0.15 at 64.

Where a recipe stores M as integers, an M of at most `SMALL_TABLE` times `min_K` entries is stored in float32, at the
same load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from collins.bucketing import Bucketing, bucketing_of, within_rows
from collins.formats import (
    FORMATS,
    NONE,
    SMALLEST_BLOCK,
    IntFormat,
    dense_format,
    format_name,
    second_format,
    whole_blocks,
)
from collins.rule import ELEMENTWISE, ORTHOGONAL

ADAMW_BYTES = 8  # AdamW's state per fp32 parameter
TOKEN_SHARE = 5
ORTHOGONAL_SHARE = 9 / 8
# A table of M is small up to this many times `min_K` entries, and is then stored in float32: at most 8 KiB by default.
# `min_K` is what a user calls small. Below it, integers would save two pages of memory for a parameter, and PyTorch
# cannot compute with two of them in a byte, as programs do that edit `opt.state[p]["m_table"]`.
SMALL_TABLE = 2


class Scheme(NamedTuple):
    """The buckets of both moments of one parameter, and their formats, which are keys of `FORMATS`."""

    m: Bucketing
    v: Bucketing
    m_format: str
    v_format: str

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of both moments."""
        return self.m_format, self.v_format


class Recipe(NamedTuple):
    """The format of the first moment, and the loads of both moments' buckets; `v_load` is 0 without a second moment."""

    m_format: str
    m_load: int
    v_load: int

    @property
    def bytes(self) -> float:
        """Bytes of state for each element of a large parameter."""
        first, second = FORMATS[self.m_format], FORMATS[self.v_format]
        m = sum(part.nbytes for part in first.parts((first.unit,)).values()) / first.unit / self.m_load
        v = sum(part.nbytes for part in second.parts((1,)).values())
        return m + (v / self.v_load if self.v_load else 0)

    @property
    def v_format(self) -> str:
        """The format of the second moment, if there is one."""
        return second_format(self.m_format)


# For each role, and for matrices under decode="orthogonal", the widest recipe first. If none fits, the last is used.
RECIPES = {
    "matrix": (
        Recipe("float32", 4, 128),
        Recipe("bfloat16", 4, 128),
        Recipe("int8", 4, 128),
        Recipe("int4", 4, 128),
        Recipe("int4", 8, 256),
        Recipe("int4", 16, 512),
    ),
    "tokens": (Recipe("float32", 1, 1), Recipe("int8", 1, 64), Recipe("int4", 1, 128)),
    ORTHOGONAL: (
        Recipe("float32", 1, 0),
        Recipe("bfloat16", 1, 0),
        Recipe("int8", 1, 0),
        Recipe("int8", 2, 0),
        Recipe("int4_128", 2, 0),
        Recipe("int4_128", 4, 0),
        Recipe("int4_128", 8, 0),
        Recipe("int4_128", 16, 0),
    ),
}
SHARES = {"matrix": 1, "tokens": TOKEN_SHARE, ORTHOGONAL: ORTHOGONAL_SHARE}


def recipe_of(role: str, compress_ratio: float) -> Recipe:
    """The widest recipe of a role that takes at most `SHARES[role]` times 8 / compress_ratio bytes per parameter."""
    allowed = SHARES[role] * ADAMW_BYTES / compress_ratio
    return next((recipe for recipe in RECIPES[role] if recipe.bytes <= allowed), RECIPES[role][-1])


def decode_of(group: Mapping[str, Any], role: str) -> str:
    """The decode of a parameter of this role: only matrices are orthogonalised."""
    decode: str = group["decode"]
    return ELEMENTWISE if decode == ORTHOGONAL and role != "matrix" else decode


def by_bytes(group: Mapping[str, Any]) -> bool:
    """Whether `compress_ratio` is a ratio of bytes in this group, so that the recipes of roles apply."""
    return group["table_dtype"] is None and group["hash"] == "block" and group["decode"] != "sketch"


def scheme_under(
    shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any], role: str, *, sharded: bool
) -> Scheme:
    """The scheme of a parameter.

    Args:
        shape, dtype: shape and dtype of the whole parameter.
        group: the options of its group.
        role: "matrix", "tokens" or "exact".
        sharded: whether it may be sharded between any two rows, so that no bucket, and no block of integers, may cross
            from one row into the next.
    """
    numel = torch.Size(shape).numel()
    if role == "exact":
        return _exact(numel, dtype, group)
    if decode_of(group, role) == ORTHOGONAL:
        return _orthogonal(shape, dtype, group)
    if by_bytes(group):
        return _by_bytes(shape, dtype, group, role, sharded)
    first = bucketing_of(numel, compress_ratio=group["compress_ratio"], min_K=group["min_K"], hash=group["hash"])
    first = within_rows(first, shape) if sharded else first
    if first.hash is None:
        return _exact(numel, dtype, group)
    stored = "float32" if group["table_dtype"] is None else format_name(group["table_dtype"])
    v_format = second_format(stored)
    if group["v_compress_ratio"] is None or first.hash != "block":
        return Scheme(first, first, stored, v_format)
    second = bucketing_of(numel, compress_ratio=group["v_compress_ratio"], min_K=1, hash="block")
    second = within_rows(second, shape) if sharded else second
    return Scheme(first, second if second.hash and second.load >= first.load else first, stored, v_format)


def _exact(numel: int, dtype: torch.dtype, group: Mapping[str, Any]) -> Scheme:
    dense = Bucketing(None, numel, numel, 1)
    return Scheme(dense, dense, *[dense_format(dtype, group["table_dtype"] or torch.float32)] * 2)


def _orthogonal(shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any]) -> Scheme:
    """A scheme with a first moment only. If there would be too few buckets, it has an entry for each element."""
    ratio, stored = group["compress_ratio"], group["table_dtype"]
    recipe = recipe_of(ORTHOGONAL, ratio) if stored is None else None
    load = ratio if recipe is None else recipe.m_load
    first = bucketing_of(torch.Size(shape).numel(), compress_ratio=load, min_K=group["min_K"], hash="block")
    if recipe is not None and first.load == recipe.m_load and recipe.m_format != "float32":
        m_format = _stored(recipe.m_format, first, dtype, group)
    elif stored is not None and first.hash is not None:
        m_format = format_name(stored)
    else:
        m_format = dense_format(dtype, stored or torch.float32)
    return Scheme(first, first, m_format, NONE)


def _by_bytes(shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any], role: str, sharded: bool) -> Scheme:
    numel = torch.Size(shape).numel()
    if group["compress_ratio"] < 2:
        return _exact(numel, dtype, group)
    recipe = recipe_of(role, group["compress_ratio"])
    first = bucketing_of(numel, compress_ratio=recipe.m_load, min_K=group["min_K"], hash="block")
    second = bucketing_of(numel, compress_ratio=recipe.v_load, min_K=1, hash="block")
    row = numel // shape[0]
    aligned = len(shape) > 1 and row % (recipe.m_load * SMALLEST_BLOCK) == 0
    if sharded or aligned:  # no bucket crosses rows, so results do not depend on the number of ranks
        first, second = within_rows(first, shape), within_rows(second, shape)
    if first.load != recipe.m_load or recipe.v_load == 1 or second.load < first.load:
        return _exact(numel, dtype, group)  # too small, or of odd rows
    m_format = _stored(recipe.m_format, first, dtype, group)
    if aligned:
        m_format = whole_blocks(m_format, row // recipe.m_load)
    elif sharded and isinstance(FORMATS[m_format], IntFormat):
        m_format = "bfloat16" if first.hash else dense_format(dtype, torch.float32)
    return Scheme(first, second, m_format, second_format(m_format))


def _stored(m_format: str, first: Bucketing, dtype: torch.dtype, group: Mapping[str, Any]) -> str:
    """The format of the first moment of a parameter of `dtype` under a recipe with `m_format`: float32 if small."""
    if first.buckets > SMALL_TABLE * group["min_K"] or not isinstance(FORMATS[m_format], IntFormat):
        return m_format
    return "float32" if first.hash else dense_format(dtype, torch.float32)
