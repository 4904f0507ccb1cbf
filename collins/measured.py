"""What `Collins` tells of its steps: the norm of gradients, and numbers for whoever logs a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from collins.clipping import Clipping
from collins.options import max_norm_of

if TYPE_CHECKING:
    from collins.stepper import Stepper


class Measured:
    """That part of the optimizer."""

    _clipping: Clipping
    _stepper: Stepper

    @property
    def max_grad_norm(self) -> float | None:
        """The largest norm of all gradients together, as it was given; it may be set between two steps."""
        return self._clipping.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._clipping.max_norm = max_norm_of(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, before it was clipped: 0-d, on the device, which is not waited
        for. None before the first step, and without `max_grad_norm`. With `accumulation_steps` it is the root of the
        sum of squares over the step's backward passes.
        """
        return self._clipping.norm

    def statistics(self, updates: bool = False) -> dict[str, Tensor | int]:
        """What the last steps did, in 0-d tensors on the device, which is not waited for: reading one waits.

        | key | of | |
        |---|---|---|
        | `grad_norm` | the last step | as the property of that name; NaN where that is None |
        | `skipped_buckets` | all steps | what nonfinite="skip" has left out: buckets of second moments, or elements |
        | | | where these are dense, or hash="universal"; int64 |
        | `skipped_steps` | all steps | those in which that was everything; int64 |
        | `link_bytes` | all steps | moments copied between host and device under a memory policy, an int |
        | `update_rms/g` | the last measured | root mean square of what was added to the weights of group number g, |
        | | | weight decay and rounding included |
        | `weight_rms/g` | the last measured | root mean square of the weights of group number g, after the step |
        | `moved_share/g` | the last measured | of the 16-bit weights of group number g, the share that changed |

        Counts are of this process. The last three are there once a step has been measured, for groups of which
        parameters were stepped in it (the last one: in 16 bits). They are taken on a sample, at most 16,384 elements of
        each parameter spread over its memory; with `accumulation_steps`, of one partial step. Of sharded parameters,
        all but `grad_norm` is of this rank's parts.

        Args:
            updates: whether the next step - with in_backward=True the next whose first gradient is still to come - is
                to be measured. That takes about twenty launches for each group and dtype, in backward for each
                parameter, and no memory but the samples'. A step that a CUDA graph captures is not measured.
        """
        if updates:
            self._stepper.statistics.updates.ask()
        return self._stepper.statistics.values(self.grad_norm, self._stepper.store.link_bytes)
