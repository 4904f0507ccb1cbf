"""The options of a parameter group: what each may be, and the error that says so."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from collins.bucketing import HASHES, NONFINITE
from collins.formats import FORMATS, FloatFormat
from collins.rule import DECODES

TABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_FLOAT = FORMATS["float32"]


def listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


def require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _number(value: object) -> float:
    """A real number as it is; anything else as NaN, which no range contains."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_options(group: dict[str, Any]) -> None:
    """Raises a ValueError that names the first option of a parameter group that is out of range."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, "lr", lr, "a number or a tensor of one element")
        lr = float(lr) if lr.is_cpu else 0.0  # reading it from an accelerator would stall the device
    require(0 <= _number(lr) < math.inf, "lr", group["lr"], "finite and at least 0")
    in_range = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= _number(beta) < 1 for beta in betas)
    require(in_range, "betas", betas, "two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        require(0 <= _number(group[name]) < math.inf, name, group[name], "finite and at least 0")
    require(1 <= _number(group["compress_ratio"]) < math.inf, "compress_ratio", group["compress_ratio"], "at least 1")
    v_ratio = group["v_compress_ratio"]
    accepted = "None, or a number of at least compress_ratio"
    require(
        v_ratio is None or group["compress_ratio"] <= _number(v_ratio) < math.inf, "v_compress_ratio", v_ratio, accepted
    )
    require(_whole(group["min_K"]) and group["min_K"] >= 1, "min_K", group["min_K"], "an int of at least 1")
    require(group["hash"] in HASHES, "hash", group["hash"], listed(HASHES))
    require(group["decode"] in DECODES, "decode", group["decode"], listed(tuple(DECODES)))
    rho, period = group["residual_weight"], group["rehash_period"]
    require(rho is None or 0 <= _number(rho) < math.inf, "residual_weight", rho, "None, or finite and at least 0")
    require(
        period is None or (_whole(period) and 1 <= period < 2**31),
        "rehash_period",
        period,
        "None or an int of at least 1",
    )
    table_dtype = group["table_dtype"]
    known = table_dtype in TABLE_DTYPES or not isinstance(FORMATS.get(table_dtype, _FLOAT), FloatFormat)
    require(known, "table_dtype", table_dtype, listed(TABLE_DTYPES))
    require(isinstance(group["maximize"], bool), "maximize", group["maximize"], "True or False")
    rounding = group["stochastic_rounding"]
    require(rounding is None or isinstance(rounding, bool), "stochastic_rounding", rounding, "True, False or None")
    capturable = group["capturable"]
    require(isinstance(capturable, bool), "capturable", capturable, "True or False")
    require(group["nonfinite"] in NONFINITE, "nonfinite", group["nonfinite"], listed(NONFINITE))
    waits = capturable and group["nonfinite"] == "error"
    require(not waits, "nonfinite", group["nonfinite"], "propagate or skip with capturable=True, which cannot wait")
