"""One optimizer for each parameter, as under torchtune's `optimizer_in_bwd: True`, each with hashes of its own.

Contract, read in torchtune 0.6.1 (recipes/full_finetune_single_device.py, training/memory.py) and in its repository at
commit bd2a0fc (modules/optim.py): for each parameter of the model, in order, the recipe calls what `_component_` names
with `[parameter]` and the options, and steps it when that parameter's gradient has arrived. With `optimizer_in_bwd:
False` it calls `_component_` once with all of them: `collins.Collins` then needs nothing of this.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from collins.optimizer import Collins


class CollinsInBackward(Collins):
    """To be called in the place of `Collins`, which comes of the call: it names parameters by their order.

    Hashes derive from names. The one parameter of an optimizer that is given none is number 0 in each of them, so that
    all would be hashed alike. Here parameters are numbered over all calls in a process: one that builds the same model,
    on another rank or to resume, comes to the same names. What a parameter is to its model can be told from its shape
    alone; where that takes wide matrices for token tables, set `role`.
    """

    def __new__(cls, params: Iterable[Tensor], *args: Any, **options: Any) -> Collins:  # type: ignore[misc]
        """Builds the optimizer of some parameters, given as tensors."""
        return Collins([(f"parameter {next(_numbers)}", p) for p in params], *args, **options)


_numbers = itertools.count()
