"""What Lightning logs of a step. A module returns its optimizer as any other, and the command line names it so."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from collins.integrations._statistics import measure_next, numbers_of


class StatisticsCallback(Callback):
    """Logs the statistics of the optimizer's last step through the module's own `log_dict`, under "collins/".

    The device is waited for at the steps that the `Trainer` logs (`log_every_n_steps`) and at no other; updates are
    measured in these. Whether a step is one of them is private to Lightning (2.6.6): this asks it as Lightning's own
    `LearningRateMonitor` does.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resumed run begins with the steps that it has taken."""
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Called before each batch, those included whose gradients are accumulated."""
        if self._logs(trainer):
            measure_next(trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after each batch, of which an optimizer that accumulates gradients steps after the last only."""
        stepped, self._steps = trainer.global_step != self._steps, trainer.global_step
        if stepped and self._logs(trainer):
            pl_module.log_dict(numbers_of(trainer.optimizers), on_step=True, on_epoch=False)

    @staticmethod
    def _logs(trainer: Any) -> bool:
        """Whether the step of now is one that is logged."""
        return bool(trainer.loggers) and trainer._logger_connector.should_update_logs
