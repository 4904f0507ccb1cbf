"""`optim="collins"` in `TrainingArguments`, and what `Trainer` logs of a step.

Contract, read in transformers 5.23.0: `TrainingArguments.__post_init__` turns `optim` into a member of
`training_args.OptimizerNames`, an `ExplicitEnum`; `Trainer.get_optimizer_cls_and_kwargs` looks the member up in
`trainer_optimizer._OPTIMIZER_HANDLERS`, and calls what it finds with an `OptimizerContext`. `HfArgumentParser` offers
the members as choices on the command line. `tests/test_trainer.py` runs all of that.
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

# Options that Trainer takes from fields of their own, for this optimizer as for every other.
_FIELDS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


def register() -> None:
    """Adds "collins" to the names that `TrainingArguments` accepts; see `collins.register`.

    Raises:
        RuntimeError: where this version of transformers has no table of optimizers.
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
            " (trainer_optimizer._OPTIMIZER_HANDLERS): give Trainer(optimizer_cls_and_kwargs=(Collins, {'lr': 3e-3}))"
            " instead"
        ) from error
    if NAME not in values:
        member = str.__new__(OptimizerNames, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        members[member._name_] = values[NAME] = member
        numbers.append(member._name_)
    handlers[NAME] = optimizer_of


def optimizer_of(context: Any) -> tuple[type[Collins], dict[str, Any]]:
    """The class and the options that `Trainer` is to build its optimizer of.

    Learning rate, betas, eps and weight decay are those of the training arguments; `optim_args` has all other options,
    as strings.

    Raises:
        ValueError: for one of the former in `optim_args`.
    """
    for name in _FIELDS.keys() & context.optim_args.keys():
        raise ValueError(
            f"optim_args must leave {name} to TrainingArguments, which has {_FIELDS[name]} for it, got"
            f" {name}={context.optim_args[name]}"
        )
    return naming(context.model), {**context.optimizer_kwargs, **context.adam_kwargs, **context.optim_args}


class StatisticsCallback(TrainerCallback):
    """Adds the statistics of the optimizer's last step to what `Trainer` logs of training, under "collins/".

    The device is waited for at the steps that `Trainer` logs, where it reads the loss, and at no other. Updates are
    measured in these steps; where it logs each epoch, in the first step after a log. It must be the first callback,
    since every other one, TensorBoard's say, is told what is logged in turn: use `log_statistics`.
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
        """Called by `Trainer.log`, which keeps a copy of `logs` in `state.log_history` before."""
        if logs is not None and "loss" in logs:
            numbers = numbers_of([others["optimizer"]])
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)
            self._fresh = True

    _fresh = True  # whether nothing has been measured since the last log


def log_statistics(trainer: Any) -> StatisticsCallback:
    """Has a `Trainer` log the optimizer's statistics; to be called once, after it has been built."""
    callback = StatisticsCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
