"""`create_optimizer_v2(model, "collins")` in timm, and `--opt collins` in its training script.

Contract, read in timm 1.0.31 (timm/optim/_optim_factory.py): `default_registry.register` takes an `OptimInfo`, and
`create_optimizer` calls its `opt_class` with the groups, with `lr`, `weight_decay`, `eps` and `betas` if they are set,
and with all other arguments of its caller.
"""

from __future__ import annotations

from importlib import import_module

import timm
from timm.optim import OptimInfo

from collins.integrations import NAME
from collins.optimizer import Collins


def register() -> None:
    """Adds "collins" to timm's optimizers; see `collins.register`.

    Raises:
        RuntimeError: if this version of timm has no registry.
    """
    try:
        registry = import_module("timm.optim._optim_factory").default_registry
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"timm {timm.__version__} has no registry of optimizers that a name could be added to"
            " (timm.optim._optim_factory.default_registry, since 1.0.12): build collins.Collins(model) instead"
        ) from error
    if NAME not in registry.list_optimizers():
        description = "AdamW with its moments in Count-Sketch tables, 0.2 byte of state per parameter"
        registry.register(OptimInfo(name=NAME, opt_class=Collins, description=description, has_betas=True))
