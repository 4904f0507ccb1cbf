"""Adds parameter names for frameworks that build groups from tensors without names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from collins.groups import named_parameters
from collins.optimizer import Collins


def named(params: Iterable[Tensor] | Iterable[dict[str, Any]], model: nn.Module) -> list[Any]:
    """The same parameters as groups of pairs, with their names in a model and the roles that follow from its modules.

    Then hashes and roles derive from names and modules, errors and reports show the names, and the order of a
    checkpoint is checked. If one parameter does not belong to the model, none gets a name, because an optimizer must
    have names for all parameters or for none.
    """
    given: list[Any] = list(params)
    pairs = {id(pair[1]): pair for pair in named_parameters(model)}
    if all(isinstance(group, dict) for group in given):
        groups = [{**group, "params": list(group["params"])} for group in given]
    else:
        groups = [{"params": given}]
    if all(id(p) in pairs for group in groups for p in group["params"]):
        for group in groups:
            group["params"] = [pairs[id(p)] for p in group["params"]]
    return groups


def naming(model: nn.Module | None) -> type[Collins]:
    """A class that replaces `Collins` and passes it the parameters with their names in a model.

    Calling it returns a `Collins`. Frameworks that build groups themselves need a class of optimizers, which they call
    with tensors; a wrapping function would not be a class.
    """
    if model is None:
        return Collins
    owner = model

    class Named(Collins):
        def __new__(cls, params: Any, *args: Any, **options: Any) -> Collins:  # type: ignore[misc]
            return Collins(named(params, owner), *args, **options)

    Named.__name__ = Named.__qualname__ = Collins.__name__
    return Named
