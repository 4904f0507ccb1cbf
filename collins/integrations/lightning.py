"""A callback for Lightning that logs statistics. The optimizer itself needs no support: modules and `LightningCLI` use
`collins.Collins` as they use any other optimizer.
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from collins.integrations._statistics import measure_next, numbers_of


class StatisticsCallback(Callback):
    """Logs the statistics of the optimizer's last step by the module's own `log_dict`, under "collins/".

    It waits for the device, and updates are measured, only at the steps that the `Trainer` logs (`log_every_n_steps`).
    Whether a step is logged is private to Lightning (2.6.6); this reads it as Lightning's own `LearningRateMonitor`
    does.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Initializes the step count, which is not 0 in a resumed run."""
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Called before each batch, including those whose gradients are accumulated."""
        if self._logs(trainer):
            measure_next(trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after each batch; when gradients are accumulated, the optimizer steps only after the last one."""
        stepped, self._steps = trainer.global_step != self._steps, trainer.global_step
        if stepped and self._logs(trainer):
            pl_module.log_dict(numbers_of(trainer.optimizers), on_step=True, on_epoch=False)

    @staticmethod
    def _logs(trainer: Any) -> bool:
        """Whether the current step is logged."""
        return bool(trainer.loggers) and trainer._logger_connector.should_update_logs
