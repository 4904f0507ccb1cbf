"""The part of `Collins` that reports on steps: the gradient norm, and statistics for logging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from collins.clipping import Clipping
from collins.options import max_norm_of

if TYPE_CHECKING:
    from collins.stepper import Stepper


class Measured:
    """`max_grad_norm`, `grad_norm` and `statistics`, as a base class of the optimizer."""

    _clipping: Clipping
    _stepper: Stepper

    @property
    def max_grad_norm(self) -> float | None:
        """The option `max_grad_norm`, the largest norm of all gradients together; it may be set between two steps."""
        return self._clipping.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._clipping.max_norm = max_norm_of(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, before clipping: 0-d, on the device, without synchronization.
        None before the first step, and without `max_grad_norm`. With `accumulation_steps` it is the root of the sum of
        squares over the backward passes of the step.
        """
        return self._clipping.norm

    def statistics(self, updates: bool = False) -> dict[str, Tensor | int]:
        """Statistics of the last steps, as 0-d tensors on the device. This does not synchronize; reading a value does.

        | key | steps | value |
        |---|---|---|
        | `grad_norm` | the last step | as the property of that name; NaN where that is None |
        | `skipped_buckets` | all steps | the number of buckets of second moments that nonfinite="skip" has skipped; |
        | | | of elements where these are dense, or hash="universal"; int64 |
        | `skipped_steps` | all steps | the number of steps in which everything was skipped; int64 |
        | `link_bytes` | all steps | bytes of moments copied between host and device under a memory policy, an int |
        | `update_rms/g` | the last measured | root mean square of the change of the weights of group number g, |
        | | | including weight decay and rounding |
        | `weight_rms/g` | the last measured | root mean square of the weights of group number g, after the step |
        | `moved_share/g` | the last measured | the fraction of the 16-bit weights of group number g that changed |

        Counts are of this process. The last three exist once a step has been measured, for groups with parameters that
        were stepped in it (the last one: 16-bit parameters). They are computed on a sample of at most 16,384 elements
        of each parameter, spread over its memory; with `accumulation_steps`, for one partial step. For sharded
        parameters, all values but `grad_norm` are of this rank's parts.

        Args:
            updates: whether to measure the next step (with in_backward=True, the next one whose first gradient has not
                arrived yet). Measuring takes about twenty launches for each group and dtype, in backward for each
                parameter, and memory for the samples only. A step that a CUDA graph captures is not measured.
        """
        if updates:
            self._stepper.statistics.updates.ask()
        return self._stepper.statistics.values(self.grad_norm, self._stepper.store.link_bytes)
