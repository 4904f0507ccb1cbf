"""Names for parameters of frameworks that make groups of tensors alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from collins.groups import named_parameters
from collins.optimizer import Collins


def named(params: Iterable[Tensor] | Iterable[dict[str, Any]], model: nn.Module) -> list[Any]:
    """The same parameters as groups of pairs, with the names that they have in a model and what its modules say.

    Hashes and roles then derive from names and modules, errors and reports have them, and a checkpoint's order is
    checked. If one parameter is not the model's, none gets a name: an optimizer has names for all or for none.
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
    """A class to be called in the place of `Collins`, which gives it parameters with the names of a model.

    What comes of the call is a `Collins`. Frameworks that make groups themselves ask for a class of optimizers and hand
    it tensors; what wraps the class instead of the call would be no class.
    """
    if model is None:
        return Collins
    owner = model

    class Named(Collins):
        def __new__(cls, params: Any, *args: Any, **options: Any) -> Collins:  # type: ignore[misc]
            return Collins(named(params, owner), *args, **options)

    Named.__name__ = Named.__qualname__ = Collins.__name__
    return Named
