"""Lists of hundreds of tensors: comparison by identity, and selection, in C.

`==` of two lists compares their items by identity first, in a fraction of the time that calls of `operator.is_` take,
but it calls `Tensor.__eq__` for two tensors that are not the same object. That would launch a kernel and wait for its
result, and would take two tensors of one equal element for the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

T = TypeVar("T")


class _DifferentError(Exception):
    """Raised at the first two tensors that are compared by their values."""


class _NoComparisons(TorchFunctionMode):
    def __torch_function__(self, *_: object) -> Any:
        raise _DifferentError


_NO_COMPARISONS = _NoComparisons()


def identical(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two lists have the same items in the same order: tensors are compared by identity, other values by `==`.

    Items may be dicts and tuples, whose items are compared in the same way.
    """
    try:
        with _NO_COMPARISONS:
            return bool(first == second)
    except Exception:  # of tensors, and of values whose comparison is not a truth value, such as arrays
        return False


def picker(places: Sequence[int]) -> Callable[[Sequence[T]], Sequence[T]]:
    """A function that returns the items of a list at these places, of which there is at least one."""
    if len(places) == 1:
        return lambda items: (items[places[0]],)
    return itemgetter(*places)
