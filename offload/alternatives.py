"""Memory of the same training with other optimizers of full-parameter training, computed from the plan's figures.

n is the number of parameters and b the bytes of the dtype of weights, gradients and moments. None of these numbers
includes fragmentation, workspaces or the CUDA context.

- AdamW (`torch.optim.AdamW`, fused or foreach without its temporaries): two moments, 2 n b, on the device.
- 8-bit AdamW (bitsandbytes `AdamW8bit`; Dettmers et al., "8-bit optimizers via block-wise quantization", 2022): two
  moments of one byte, and a float32 scale for each 256 of their elements, on the device.
- paged 8-bit AdamW (bitsandbytes `PagedAdamW8bit`): the same moments in unified memory, all of it on the host.
- AdamW on the host (torchao `CPUOffloadOptimizer` with `offload_gradients=True`): copies of weights and gradients, and
  two moments, 4 n b, on the host, where it steps. A gradient leaves the device when it has arrived, as in backward.
"""

from __future__ import annotations

from typing import NamedTuple

from collins.offload.trial import Trial

_QUANTIZED_BLOCK = 256  # elements that share a scale
_SCALE = 4  # bytes


class Alternative(NamedTuple):
    """The memory of a training with another optimizer, in bytes, and whether the machine has as much."""

    name: str
    device: int
    host: int
    fits: bool


def alternatives(trial: Trial) -> tuple[Alternative, ...]:
    """The same model and batch as in `trial`, with other optimizers."""
    count, width = trial.model.count, trial.training.dtype.itemsize
    after, within = trial.budget.held(in_backward=False), trial.budget.held(in_backward=True)
    quantized = 2 * (count + _SCALE * -(-count // _QUANTIZED_BLOCK))
    found = (
        ("AdamW", after + 2 * count * width, 0),
        ("8-bit AdamW (bitsandbytes)", after + quantized, 0),
        ("paged 8-bit AdamW (bitsandbytes)", after, quantized),
        ("AdamW on the host (torchao)", within, 4 * count * width),
    )
    machine = trial.machine
    return tuple(
        Alternative(name, device, host, device <= machine.device_free and host <= machine.host_free)
        for name, device, host in found
    )
