"""Collins in a configuration of axolotl: `plugins: [collins.integrations.axolotl.CollinsPlugin]`, `optimizer: collins`.

Contract, read in axolotl 0.19.0 (integrations/base.py, cli/config.py, core/builders/base.py): the plugin manager calls
the class without arguments, and then `register(cfg)`, before the training arguments are made. The name of an optimizer
that axolotl does not know is passed to transformers as `TrainingArguments.optim`, and `optim_args` as "key=value,...".
A plugin may have a `create_optimizer(cfg, trainer)`, which that release never calls: the trainer builds the optimizer
by its name.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from collins.integrations import NAME, register
from collins.integrations.transformers import log_statistics


class CollinsPlugin(BasePlugin):
    """Registers the name `collins`, and logs the statistics of the optimizer."""

    def register(self, cfg: Any) -> None:
        """Called before the training arguments are made."""
        register("transformers")

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called when the trainer has been built."""
        if cfg.get("optimizer") == NAME:
            log_statistics(trainer)
