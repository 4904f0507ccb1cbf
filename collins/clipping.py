"""Clipping by the global norm of all gradients, inside the step: gradients are read once more and never written.

A step after backward equals `torch.nn.utils.clip_grad_norm_` followed by `step`. With C = max_grad_norm and n_t the
norm of all gradients of step t, over all groups, devices and ranks, each gradient is multiplied by

    min(1, C / (n_t + 1e-6))

when the step reads it. In backward n_t is unknown until the last gradient has arrived. So gradient i is multiplied,
when it arrives, by

    min(1, C / (max(n', s_i) + 1e-6))         s_i^2 = ||g_1||^2 + ... + ||g_i||^2

where n' is the norm of the last step with a finite norm (0 before the first one), and s_i is the norm of the gradients
of this step that have arrived on the device and stream of g_i, including g_i. If a step takes several backward passes,
the gradients of each are counted separately, in n' and below too: this is the norm of their sum if they are orthogonal,
as independent noise is. If norms change little between steps, this is exact clipping with the norm of the step before.
For any gradients, the norm of the scaled gradients of a step is at most C sqrt(1 + 2 ln(n_t / ||g_1||)) on one device,
since sum_i ||g_i||^2 / s_i^2 <= 1 + ln(s_n^2 / s_1^2). n' is kept in the parameter groups, so that it is saved and
loaded with them.

An infinite norm multiplies gradients by 0 and a NaN norm by NaN, as `clip_grad_norm_` does. Under nonfinite="skip" a
norm that is not finite skips the whole step (in backward: the parameter whose gradient is not finite), and in backward
it enters neither n' nor a later s_i. With C = inf the norm is measured and gradients are not scaled.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from collins._torch_internals import foreach_norm
from collins.devices import Place, place_on
from collins.sharding import is_sharded, norm_over, sharded_over

LAST_NORM = "last_grad_norm"  # the key of n' in every group of an optimizer that has clipped in backward

_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds this to the norm


class Scale:
    """The factor that multiplies gradients, which depends on the options of their group.

    Args:
        factor: the factor for groups without nonfinite="skip".
        norm: the norm from which the factor was computed; None for a constant factor.
    """

    def __init__(self, factor: float | Tensor = 1.0, norm: Tensor | None = None) -> None:
        self._factor, self._norm = factor, norm
        self._skipping: float | Tensor | None = factor if norm is None else None

    def of(self, group: Mapping[str, Any]) -> float | Tensor:
        """The factor for a group; NaN under nonfinite="skip" if the norm is not finite, which skips the whole group."""
        if group["nonfinite"] != "skip":
            return self._factor
        if self._skipping is None:
            assert self._norm is not None
            self._skipping = torch.where(self._norm.isfinite(), self._factor, math.nan)
        return self._skipping


UNSCALED = Scale()


class Clipping:
    """The gradient norms of one optimizer, and the factors computed from them.

    All values stay on the device; nothing synchronizes with the host.

    Args:
        max_norm: C; None to compute no norms.
        in_backward: whether gradients are used as they arrive.
    """

    def __init__(self, max_norm: float | None = None, in_backward: bool = False) -> None:
        self.max_norm, self.in_backward = max_norm, in_backward
        self._norm: Tensor | None = None  # the norm of the last step
        self._last: Tensor | None = None  # n': the tensor in the groups, which a captured graph may read and write
        self._begin()

    def _begin(self) -> None:
        self._arrived: dict[int, Tensor] = {}  # norms of this step's gradients, by their parameters' identity
        self._together: dict[Place, Tensor] = {}  # s_i
        self._limits: dict[Place, tuple[Tensor, Tensor]] = {}  # C, and the lower bound of its divisor
        self._rest: Tensor | None = None  # the norm of the gradients that are stepped together, after backward

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("max_norm", "in_backward", "_norm")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=None)
        self._begin()

    @property
    def norm(self) -> Tensor | None:
        """The norm of the last step, a copy; None before the first, or without `max_norm`."""
        return None if self._norm is None else self._norm.clone()

    def scale(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Scale:
        """The scale of gradients that are stepped together, after backward.

        Args:
            params: their parameters.
            grads: the gradients; for a sharded parameter, this rank's part.
        """
        if self.max_norm is None or not grads:
            return UNSCALED
        self._rest = norm = global_norm(params, grads)
        if self.max_norm == math.inf:
            return UNSCALED
        if self.in_backward or self._together:
            return self._bounded(_norm_of([*self._together.values(), norm]))
        return Scale((self.max_norm / (norm + _EPS)).clamp(max=1.0), norm)

    def scale_of_one(self, p: Tensor, g: Tensor) -> Scale:
        """The scale of a gradient that has arrived in backward."""
        if self.max_norm is None:
            return UNSCALED
        (own,) = _norms([g])
        before = self._arrived.get(id(p))
        self._arrived[id(p)] = own if before is None else torch.hypot(before, own)
        if self.max_norm == math.inf:
            return UNSCALED
        place = place_on(g.device)
        together = self._together.get(place)
        norm = own if together is None else torch.hypot(together, own)
        self._together[place] = torch.where(norm.isfinite(), norm, 0.0 if together is None else together)
        return self._bounded(norm)

    def _bounded(self, norm: Tensor) -> Scale:
        """The scale in backward, given the norm s_i of the gradients that have arrived."""
        place = place_on(norm.device)
        if place not in self._limits:
            last: Tensor | float = 0.0 if self._last is None else self._last
            last = torch.full_like(norm, float(last)) if not isinstance(last, Tensor) or last.is_cpu else last.to(norm)
            limit = torch.full_like(norm, self.max_norm)  # type: ignore[arg-type]
            self._limits[place] = limit, torch.maximum(last + _EPS, limit)
        limit, floor = self._limits[place]
        return Scale(limit / torch.maximum(norm + _EPS, floor), norm)

    def end(self, params: Iterable[Tensor], groups: Sequence[dict[str, Any]]) -> None:
        """Ends a step: computes its norm, and n' for the next step.

        Args:
            params: all parameters of the optimizer, in the order in which norms are added up.
            groups: the groups of the optimizer.
        """
        found = [self._arrived[id(p)] for p in params if id(p) in self._arrived] if self._arrived else []
        found += [] if self._rest is None else [self._rest]
        if found:
            norm = _norm_of(found)
            self._norm = _over(self._norm, norm)
            if (self.in_backward or self._arrived) and self.max_norm != math.inf:
                before = 0.0 if self._last is None else self._last.to(norm)
                self._last = _over(self._last, torch.where(norm.isfinite(), norm, before))
                self._publish(groups)
        self._begin()

    def adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Takes n' from the groups, after a state dict was loaded or the optimizer was copied."""
        found = groups[0].get(LAST_NORM) if groups else None
        if self.max_norm is None or found is self._last:
            return
        value = 0.0 if found is None else found
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
        self._last = value.clone() if self._last is None else self._last.copy_(value)
        self._publish(groups)

    def _publish(self, groups: Sequence[dict[str, Any]]) -> None:
        for group in groups:
            group[LAST_NORM] = self._last


def global_norm(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, over all ranks that share a parameter: 0-d, in float32 or wider.

    It takes one collective operation for each distinct sharding, and none without sharded parameters.

    Args:
        params: the parameters.
        grads: this rank's parts of their gradients.
    """
    own = _norms(grads)
    found: list[Tensor] = []
    by_ranks: dict[Any, list[int]] = {}
    for place, p in enumerate(params):
        ranks = sharded_over(p) if is_sharded(p) else None
        if ranks:
            by_ranks.setdefault(ranks, []).append(place)
        else:
            found.append(own[place])
    found += (norm_over(_norm_of([own[place] for place in places]), *ranks) for ranks, places in by_ranks.items())
    return _norm_of(found)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, in float32 or wider; 0 for tensors on meta."""
    found: list[Tensor] = [torch.zeros((), device="cpu")] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, t in enumerate(tensors):
        if not t.is_meta:
            alike.setdefault((t.device, t.dtype), []).append(place)
    for (_, dtype), places in alike.items():
        norms = foreach_norm([tensors[place] for place in places], 2, torch.promote_types(dtype, torch.float32))
        for place, norm in zip(places, norms, strict=True):
            found[place] = norm
    return found


def _norm_of(norms: Sequence[Tensor]) -> Tensor:
    """The norm of vectors that have these norms, on the first device among them that is not the CPU."""
    device = next((norm.device for norm in norms if not norm.is_cpu), norms[0].device)
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    result: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device, dtype) for norm in norms]))
    return result


def _over(old: Tensor | None, new: Tensor) -> Tensor:
    """`new`, in the memory of `old` if device and dtype agree, so that captured graphs keep their address."""
    same = old is not None and (old.device, old.dtype) == (new.device, new.dtype)
    return old.copy_(new) if same and old is not None else new.clone()


# Trainers that clip before they call `step`: by package, the attribute that holds their largest norm.
_TRAINERS = {"transformers": attrgetter("args.max_grad_norm"), "torchtitan": attrgetter("config.training.max_norm")}


def warn_of_lost_clipping() -> None:
    """Warns if a trainer is configured to clip gradients before it calls `step`, when backward has already used and
    freed them.

    The trainer is found in the call stack. A loop that calls `clip_grad_norm_` itself, as with Accelerate, cannot be
    detected; the norm that it gets is 0.
    """
    frame, callers = inspect.currentframe(), []
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in _TRAINERS:
            callers.append((frame, _TRAINERS[package]))
        frame = frame.f_back
    # Up to Python 3.12, reading the variables of a frame keeps them alive until it returns. The outermost frame is
    # read first, because its variables live as long as the training anyway.
    for caller, norm_of in reversed(callers):
        trainer = caller.f_locals.get("self")
        try:
            norm = norm_of(trainer)
        except AttributeError:
            continue
        if isinstance(norm, int | float) and 0 < norm < math.inf:
            warnings.warn(
                f"{type(trainer).__name__} clips gradients to the norm {norm}, which does nothing with"
                f" in_backward=True: by then backward has used and freed them. Pass max_grad_norm={norm} to Collins,"
                " which clips in backward",
                stacklevel=2,
            )
        return
