"""How the moments of a parameter are stored: loads and formats, from its role and the bytes it may take.

`compress_ratio` is a ratio of bytes: the 8 bytes that AdamW keeps of an fp32 parameter, over ours. Where a group names
no `table_dtype`, the widest scheme of a role that fits takes the moments; where it names one, `compress_ratio` is the
load, the number of elements a bucket, as in version 0.2: for fp32 tables that is the same number.

- Matrices: at equal bytes, many coarse buckets of M beat few exact ones, and V may be much coarser than M. M in int4 at
  load 4 and V at load 128 end where swept AdamW does (examples/results).
- Token tables: a row is hit once in many steps, so that the noise of a signed sketch never averages out. M keeps an
  entry for each element, as integers; V shares one between neighbours in a row, which loses as little as factors for
  rows and columns do and needs no second pass. Such tables are a twentieth of a large model, and may take
  `TOKEN_SHARE` times the bytes of a matrix.
- Matrices under decode="orthogonal" have no second moment: all bytes go to M. With the scales of its integers it may
  take `ORTHOGONAL_SHARE` times the bytes that `compress_ratio` says, so that 32 is int4 at load 2 and 64 is int4 at
  load 4. A LLaMA of 7B parameters takes 0.30 byte a parameter at 32, token tables included, and 0.15 at 64.
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

ADAMW_BYTES = 8  # that AdamW keeps of a parameter in fp32
TOKEN_SHARE = 5
ORTHOGONAL_SHARE = 9 / 8


class Scheme(NamedTuple):
    """How the moments of one parameter are stored: the buckets and the formats of both, keys of `FORMATS`."""

    m: Bucketing
    v: Bucketing
    m_format: str
    v_format: str

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of both moments."""
        return self.m_format, self.v_format


class Recipe(NamedTuple):
    """Loads of both moments' buckets, 0 for no second moment at all, and the format of the first."""

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
        """The format of the second moment, where there is one."""
        return second_format(self.m_format)


# Of each role, and of matrices under decode="orthogonal", the widest first. Where none fits, the last is taken.
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
    """The widest recipe of a role that takes at most 8 / compress_ratio bytes a parameter, or its share of them."""
    allowed = SHARES[role] * ADAMW_BYTES / compress_ratio
    return next((recipe for recipe in RECIPES[role] if recipe.bytes <= allowed), RECIPES[role][-1])


def decode_of(group: Mapping[str, Any], role: str) -> str:
    """By which decode a parameter of this role is stepped: whole matrices are orthogonalised, and nothing else."""
    decode: str = group["decode"]
    return ELEMENTWISE if decode == ORTHOGONAL and role != "matrix" else decode


def by_bytes(group: Mapping[str, Any]) -> bool:
    """Whether `compress_ratio` is a ratio of bytes in this group, under which roles have recipes."""
    return group["table_dtype"] is None and group["hash"] == "block" and group["decode"] != "sketch"


def scheme_under(
    shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any], role: str, *, sharded: bool
) -> Scheme:
    """The scheme of a parameter.

    Args:
        shape, dtype: of the whole parameter.
        group: its group's options.
        role: "matrix", "tokens" or "exact".
        sharded: whether it may be cut along its first dimension anywhere, so that no bucket, and no block of integers,
            may cross from one row into the next.
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
    """A first moment, and no second. Where buckets would be too few, it has an entry for each element."""
    ratio, stored = group["compress_ratio"], group["table_dtype"]
    recipe = recipe_of(ORTHOGONAL, ratio) if stored is None else None
    load = ratio if recipe is None else recipe.m_load
    first = bucketing_of(torch.Size(shape).numel(), compress_ratio=load, min_K=group["min_K"], hash="block")
    if recipe is not None and first.load == recipe.m_load and recipe.m_format != "float32":
        m_format = recipe.m_format
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
    if sharded or aligned:  # rows stay whole: results are the same for any number of ranks, one among them
        first, second = within_rows(first, shape), within_rows(second, shape)
    if first.load != recipe.m_load or recipe.v_load == 1 or second.load < first.load:
        return _exact(numel, dtype, group)  # too small, or of odd rows
    m_format = recipe.m_format
    if aligned:
        m_format = whole_blocks(m_format, row // recipe.m_load)
    elif sharded and isinstance(FORMATS[m_format], IntFormat):
        m_format = "bfloat16" if first.hash else dense_format(dtype, torch.float32)
    return Scheme(first, second, m_format, second_format(m_format))
