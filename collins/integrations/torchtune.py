"""One optimizer per parameter with distinct hashes, for torchtune's `optimizer_in_bwd: True`.

Contract, read in torchtune 0.6.1 (recipes/full_finetune_single_device.py, training/memory.py) and in its repository at
commit bd2a0fc (modules/optim.py): for each parameter of the model, in order, the recipe calls the component that
`_component_` names with `[parameter]` and the options, and steps that optimizer when the parameter's gradient has
arrived. With `optimizer_in_bwd: False` it calls `_component_` once with all parameters, and `collins.Collins` suffices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from collins.optimizer import Collins


class CollinsInBackward(Collins):
    """Replaces `Collins` and returns a `Collins` whose parameters are named by their order.

    Hashes derive from names. Without names, the only parameter of each optimizer would be number 0, and all parameters
    would have the same hash. Here parameters are numbered over all calls in a process, so a process that builds the
    same model, on another rank or to resume, uses the same names. The role of a parameter is found from its shape
    alone; if wide matrices are taken for token tables, set `role`.
    """

    def __new__(cls, params: Iterable[Tensor], *args: Any, **options: Any) -> Collins:  # type: ignore[misc]
        """Builds the optimizer of some parameters, given as tensors."""
        return Collins([(f"parameter {next(_numbers)}", p) for p in params], *args, **options)


_numbers = itertools.count()
