"""`optim="collins"` in `TrainingArguments`, and what `Trainer` logs of a step.

Contract, read in transformers 5.24.0: `TrainingArguments.__post_init__` turns `optim` into a member of
`training_args.OptimizerNames`, an `ExplicitEnum`; `Trainer.get_optimizer_cls_and_kwargs` looks the member up in
`trainer_optimizer._OPTIMIZER_HANDLERS`, and calls what it finds with an `OptimizerContext`. `HfArgumentParser` offers
the members as choices on the command line. `tests/test_trainer.py` runs all of that.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import transformers
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from collins.integrations import NAME
from collins.integrations._naming import naming
from collins.integrations._statistics import numbers_of
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
            ' (trainer_optimizer._OPTIMIZER_HANDLERS, since 5.0): give Trainer(optimizer_cls_and_kwargs=(Collins, {"lr":'
            " 1e-3})) instead"
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
