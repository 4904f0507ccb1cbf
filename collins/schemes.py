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
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from collins.bucketing import Bucketing, bucketing_of, within_rows
from collins.formats import BLOCK, FORMATS, IntFormat, dense_format, format_name

ADAMW_BYTES = 8  # that AdamW keeps of a parameter in fp32
TOKEN_SHARE = 5


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
    """Loads of both moments' buckets, and the format of the first. The second is stored in fp32."""

    m_format: str
    m_load: int
    v_load: int

    @property
    def bytes(self) -> float:
        """Bytes of state for each element of a large parameter."""
        whole = self.m_load * self.v_load * BLOCK
        parts = FORMATS[self.m_format].parts((whole // self.m_load,)).values()
        return sum(part.nbytes for part in parts) / whole + torch.float32.itemsize / self.v_load


# Of each role, the widest first. Where none fits, the last is taken.
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
}
SHARES = {"matrix": 1, "tokens": TOKEN_SHARE}


def recipe_of(role: str, compress_ratio: float) -> Recipe:
    """The widest recipe of a role that takes at most 8 / compress_ratio bytes a parameter, or its share of them."""
    allowed = SHARES[role] * ADAMW_BYTES / compress_ratio
    return next((recipe for recipe in RECIPES[role] if recipe.bytes <= allowed), RECIPES[role][-1])


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
    if by_bytes(group):
        return _by_bytes(shape, dtype, group, role, sharded)
    first = bucketing_of(numel, compress_ratio=group["compress_ratio"], min_K=group["min_K"], hash=group["hash"])
    first = within_rows(first, shape) if sharded else first
    if first.hash is None:
        return _exact(numel, dtype, group)
    stored = "float32" if group["table_dtype"] is None else format_name(group["table_dtype"])
    v_format = FORMATS[stored].second or stored
    if group["v_compress_ratio"] is None or first.hash != "block":
        return Scheme(first, first, stored, v_format)
    second = bucketing_of(numel, compress_ratio=group["v_compress_ratio"], min_K=1, hash="block")
    second = within_rows(second, shape) if sharded else second
    return Scheme(first, second if second.hash and second.load >= first.load else first, stored, v_format)


def _exact(numel: int, dtype: torch.dtype, group: Mapping[str, Any]) -> Scheme:
    dense = Bucketing(None, numel, numel, 1)
    return Scheme(dense, dense, *[dense_format(dtype, group["table_dtype"] or torch.float32)] * 2)


def _by_bytes(shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any], role: str, sharded: bool) -> Scheme:
    numel = torch.Size(shape).numel()
    if group["compress_ratio"] < 2:
        return _exact(numel, dtype, group)
    recipe = recipe_of(role, group["compress_ratio"])
    first = bucketing_of(numel, compress_ratio=recipe.m_load, min_K=group["min_K"], hash="block")
    second = bucketing_of(numel, compress_ratio=recipe.v_load, min_K=1, hash="block")
    if sharded:
        first, second = within_rows(first, shape), within_rows(second, shape)
    if first.load != recipe.m_load or recipe.v_load == 1 or second.load < first.load:
        return _exact(numel, dtype, group)  # too small, or of odd rows
    m_format = recipe.m_format
    if sharded and isinstance(FORMATS[m_format], IntFormat) and numel // shape[0] // recipe.m_load % BLOCK:
        m_format = "bfloat16" if first.hash else dense_format(dtype, torch.float32)  # rows of no whole blocks
    return Scheme(first, second, m_format, FORMATS[recipe.m_format].second or "float32")
