"""Gradients that are infinite or NaN, for whoever wants to be told before they do harm.

`nonfinite="skip"` needs nothing of this: it is part of the update, where a bucket's mean of squares, which is there
anyway, says whether all of its gradients are finite. The device is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from collins._torch_internals import foreach_norm


def require_finite(gradients: Sequence[tuple[str, Tensor]], agreed: Callable[[list[bool]], list[bool]]) -> None:
    """Raises a FloatingPointError that names the parameters, given by name, whose gradients are not finite.

    Reads each gradient once, and waits once for each device.

    Args:
        gradients: with the names of their parameters.
        agreed: makes of what was found here, one flag for each gradient, what all ranks that share them have found.
    """
    fine = [True] * len(gradients)
    by_device: dict[torch.device, list[int]] = {}
    for place, (_, g) in enumerate(gradients):
        if g.numel() and not g.is_meta:  # what is on meta has no values
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
            f"the gradient of {shown} is not finite, and nonfinite is 'error': this step has changed nothing; leave it"
            " out, lower lr, or use nonfinite='skip'"
        )
