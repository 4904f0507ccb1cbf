"""The check for infinite and NaN gradients of `nonfinite="error"`.

`nonfinite="skip"` does not use it. That is part of the update, where a bucket's mean of squares, which is computed
anyway, shows whether all of its gradients are finite, without synchronizing with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from collins._torch_internals import foreach_norm


def require_finite(gradients: Sequence[tuple[str, Tensor]], agreed: Callable[[list[bool]], list[bool]]) -> None:
    """Raises a FloatingPointError that names the parameters whose gradients are not finite.

    Reads each gradient once, and synchronizes once with each device.

    Args:
        gradients: pairs of a parameter's name and its gradient.
        agreed: combines this rank's flags, one for each gradient, with those of all ranks that share the parameter.
    """
    fine = [True] * len(gradients)
    by_device: dict[torch.device, list[int]] = {}
    for place, (_, g) in enumerate(gradients):
        if g.numel() and not g.is_meta:  # tensors on meta have no values
            by_device.setdefault(g.device, []).append(place)
    for places in by_device.values():
        largest = foreach_norm([gradients[place][1] for place in places], math.inf)
        finite = torch.stack([norm.to(torch.float64) for norm in largest]).isfinite().tolist()
        for place, is_fine in zip(places, finite, strict=True):
            fine[place] = is_fine
    bad = [name for (name, _), is_fine in zip(gradients, agreed(fine), strict=True) if not is_fine]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise FloatingPointError(
            f"the gradient of {shown} is not finite, and nonfinite is 'error': this step has changed nothing; skip this"
            " batch, lower lr, or use nonfinite='skip'"
        )
