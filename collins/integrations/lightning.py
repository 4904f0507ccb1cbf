"""What Lightning logs of a step. A module returns its optimizer as any other, and the command line names it so."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from collins.integrations._statistics import numbers_of


class StatisticsCallback(Callback):
    """Logs the statistics of the optimizer's last step through the module's own `log_dict`, under "collins/".

    The device is waited for at the steps that the `Trainer` logs (`log_every_n_steps`) and at no other. Asking whether
    this is one is private in Lightning (2.6.6), whose own `LearningRateMonitor` does it alike.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resumed run begins with the steps that it has taken."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after each batch, of which an optimizer that accumulates gradients steps after the last only."""
        stepped, self._steps = trainer.global_step != self._steps, trainer.global_step
        if stepped and trainer.loggers and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(numbers_of(trainer.optimizers), on_step=True, on_epoch=False)
