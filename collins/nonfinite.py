"""Gradients that are infinite or NaN, for whoever wants to be told before they do harm.

`nonfinite="skip"` needs nothing of this: it is part of the update, where a bucket's mean of squares, which is there
anyway, says whether all of its gradients are finite. The device is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def require_finite(gradients: Sequence[tuple[str, Tensor]]) -> None:
    """Raises a FloatingPointError that names the parameters, given by name, whose gradients are not finite.

    Reads each gradient once, and waits once for each device.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, g in gradients:
        if g.numel():
            by_device.setdefault(g.device, []).append((name, g))
    bad: list[str] = []
    for pairs in by_device.values():
        largest = torch._foreach_norm([g for _, g in pairs], math.inf)
        fine = torch.stack([norm.to(torch.float64) for norm in largest]).isfinite().tolist()
        bad += [name for (name, _), is_fine in zip(pairs, fine, strict=True) if not is_fine]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise FloatingPointError(
            f"the gradient of {shown} is not finite, and nonfinite is 'error': this step has changed nothing; leave it"
            " out, lower lr, or use nonfinite='skip'"
        )
