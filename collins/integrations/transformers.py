"""`optim="collins"` in `TrainingArguments`, and a callback that logs statistics.

Contract, read in transformers 5.23.0: `TrainingArguments.__post_init__` turns `optim` into a member of
`training_args.OptimizerNames`, an `ExplicitEnum`; `Trainer.get_optimizer_cls_and_kwargs` looks the member up in
`trainer_optimizer._OPTIMIZER_HANDLERS`, and calls the handler with an `OptimizerContext`. `HfArgumentParser` offers the
members as choices on the command line. `tests/test_trainer.py` runs all of that.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import transformers
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from collins.integrations import NAME
from collins.integrations._naming import naming
from collins.integrations._statistics import measure_next, numbers_of
from collins.optimizer import Collins

# Options that TrainingArguments has fields for, which Trainer uses for every optimizer.
_FIELDS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


def register() -> None:
    """Adds "collins" to the names that `TrainingArguments` accepts; see `collins.register`.

    Raises:
        RuntimeError: if this version of transformers has no table of optimizers.
    """
    try:
        handlers = import_module("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
        members, numbers, values = (
            OptimizerNames._member_map_,
            OptimizerNames._member_names_,
            OptimizerNames._value2member_map_,
        )
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no table of optimizers that a name could be added to"
            " (trainer_optimizer._OPTIMIZER_HANDLERS): use Trainer(optimizer_cls_and_kwargs=(Collins, {'lr': 3e-3}))"
            " instead"
        ) from error
    if NAME not in values:
        member = str.__new__(OptimizerNames, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        members[member._name_] = values[NAME] = member
        numbers.append(member._name_)
    handlers[NAME] = optimizer_of


def optimizer_of(context: Any) -> tuple[type[Collins], dict[str, Any]]:
    """The class and the options with which `Trainer` builds its optimizer.

    Learning rate, betas, eps and weight decay are those of the training arguments; `optim_args` has all other options,
    as strings.

    Raises:
        ValueError: if `optim_args` contains one of the first four.
    """
    for name in _FIELDS.keys() & context.optim_args.keys():
        raise ValueError(
            f"optim_args must not contain {name}, which the field {_FIELDS[name]} of TrainingArguments sets, got"
            f" {name}={context.optim_args[name]}"
        )
    return naming(context.model), {**context.optimizer_kwargs, **context.adam_kwargs, **context.optim_args}


class StatisticsCallback(TrainerCallback):
    """Adds the statistics of the optimizer's last step to the training logs of `Trainer`, under "collins/".

    It waits for the device only at the steps that `Trainer` logs, where `Trainer` itself waits to read the loss.
    Updates are measured in these steps; where `Trainer` logs each epoch, in the first step after a log. It must be the
    first callback, so that the callbacks after it, such as TensorBoard's, receive the statistics: use `log_statistics`.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called before the first batch of each step."""
        step = state.global_step + 1
        if args.logging_strategy == "steps":
            logs = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        else:
            logs = self._fresh
        if logs:
            measure_next([others["optimizer"]])
        self._fresh = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Called by `Trainer.log`, which has already stored a copy of `logs` in `state.log_history`."""
        if logs is not None and "loss" in logs:
            numbers = numbers_of([others["optimizer"]])
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)
            self._fresh = True

    _fresh = True  # whether nothing has been measured since the last log


def log_statistics(trainer: Any) -> StatisticsCallback:
    """Makes a `Trainer` log the optimizer's statistics; call it once, after the trainer has been built."""
    callback = StatisticsCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
