"""The output of `python -m collins plan`: text and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from collins.offload.alternatives import alternatives
from collins.offload.budget import Training
from collins.offload.plan import PlacementPlan
from collins.offload.shapes import Transformer
from collins.offload.sizes import size_text
from collins.offload.trial import Largest, Outcome, Trial
from collins.table import as_table


def as_text(name: str, trial: Trial, outcomes: Sequence[Outcome], found: Largest | None = None) -> str:
    """The plan of `trial` as text: figures, formulas, notes, the placement or why there is none, and what would fit.

    Args:
        name: of the model.
        outcomes: the trial's.
        found: the largest that fits, if that was asked for.
    """
    model, training, machine = trial.model, trial.training, trial.machine
    parts = [
        f"{_header(name, model, training)}\n"
        f"device {size_text(machine.device_free)}, host {size_text(machine.host_free)} free",
        _table(trial, outcomes),
        "\n".join((*_formulas(model), *(f"note: {note}" for note in model.notes))),
        f"Tables take {size_text(_tables(trial))}. The same training with other optimizers, with moments in"
        f" {_dtype(training)} or 8 bits:",
        _alternatives(trial),
        *_placements(outcomes),
    ]
    if found is not None:
        parts.append(_largest(trial, found))
    return "\n\n".join(parts)


def as_json(name: str, trial: Trial, outcomes: Sequence[Outcome], found: Largest | None = None) -> dict[str, Any]:
    """The plan of `trial` as a mapping of what JSON can hold. Sizes are ints of bytes.

    Keys: `model` (name, parameters, layers, hidden, vocabulary, positions, notes), `training` (dtype, batch, seq_len,
    loss_chunks), `machine` (device_free, host_free), `tables` and `adamw` (bytes of moments), `alternatives` (other
    optimizers: name, device, host, fits), `fits`, `in_backward` (the way to step that was chosen), `modes` (one for
    each way tried: in_backward, fits, weights, gradients, checkpoints, recomputed_block, logits, left,
    tables_on_device, staging, tables_on_host, reason), and `largest` (seq_len, batch, model, parameters). What is not
    known, or was not asked for, is null.
    """
    model, training, machine = trial.model, trial.training, trial.machine
    chosen = next((outcome.in_backward for outcome in outcomes if outcome.plan is not None), None)
    return {
        "model": {
            "name": name,
            "parameters": model.count,
            "layers": None if model.counted else model.layers,
            "hidden": None if model.counted else model.hidden,
            "vocabulary": model.vocabulary,
            "positions": model.positions,
            "notes": list(model.notes),
        },
        "training": {
            "dtype": _dtype(training),
            "batch": training.batch_size,
            "seq_len": training.seq_len,
            "loss_chunks": training.loss_chunks,
        },
        "machine": {"device_free": machine.device_free, "host_free": machine.host_free},
        "tables": _tables(trial),
        "adamw": _adamw(trial),
        "alternatives": [alternative._asdict() for alternative in alternatives(trial)],
        "fits": chosen is not None,
        "in_backward": chosen,
        "modes": [_mode_json(trial, outcome) for outcome in outcomes],
        "largest": None if found is None else _largest_json(found),
    }


def _mode_json(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    budget, plan = trial.budget, outcome.plan
    return {
        "in_backward": outcome.in_backward,
        "fits": plan is not None,
        "weights": budget.weights,
        "gradients": budget.gradients_in_backward if outcome.in_backward else budget.gradients,
        "checkpoints": budget.checkpoints,
        "recomputed_block": budget.recomputed,
        "logits": budget.logits,
        "left": outcome.left,
        "tables_on_device": None if plan is None else plan.device_bytes,
        "staging": None if plan is None else plan.staging_bytes,
        "tables_on_host": None if plan is None else plan.host_bytes,
        "reason": outcome.reason or None,
    }


def _largest_json(found: Largest) -> dict[str, Any]:
    return {
        "seq_len": found.seq_len or None,
        "batch": found.batch_size or None,
        "model": found.model_name,
        "parameters": None if found.model is None else found.model.count,
    }


def _dtype(training: Training) -> str:
    return str(training.dtype).removeprefix("torch.")


def _tables(trial: Trial) -> int:
    return sum(request.bytes for request in trial.requests)


def _adamw(trial: Trial) -> int:
    return 2 * trial.model.count * trial.training.dtype.itemsize


def _header(name: str, model: Transformer, training: Training) -> str:
    shape = "" if model.counted else f"{model.layers} layers, hidden {model.hidden:,}, "
    return (
        f"{name}: {model.count:,} parameters ({shape}vocabulary {model.vocabulary:,})\n"
        f"{_dtype(training)}, batch of {training.batch_size} x {training.seq_len:,} tokens,"
        f" activation checkpointing, loss in {training.loss_chunks} chunks"
    )


def _mode(in_backward: bool) -> str:
    return "in_backward=True" if in_backward else "step after backward"


def _table(trial: Trial, outcomes: Sequence[Outcome]) -> str:
    """One column for each way to step: what is on the device, and what is left for tables."""
    budget = trial.budget

    def columns(figure: Callable[[Outcome], int | None]) -> list[str]:
        return ["-" if (value := figure(outcome)) is None else size_text(value) for outcome in outcomes]

    def planned(figure: Callable[[PlacementPlan], int]) -> list[str]:
        return columns(lambda outcome: None if outcome.plan is None else figure(outcome.plan))

    lines = [
        ["weights", *columns(lambda _: budget.weights)],
        ["gradients", *columns(lambda o: budget.gradients_in_backward if o.in_backward else budget.gradients)],
        ["activations: checkpoints", *columns(lambda _: budget.checkpoints)],
        ["activations: one block recomputed", *columns(lambda _: budget.recomputed)],
        ["activations: a chunk of logits", *columns(lambda _: budget.logits)],
        ["left of the device for tables", *columns(lambda o: o.left)],
        ["tables on the device", *planned(lambda plan: plan.device_bytes)],
        ["staging ring on the device", *planned(lambda plan: plan.staging_bytes)],
        ["tables on the host", *planned(lambda plan: plan.host_bytes)],
        ["fits", *("no" if outcome.plan is None else "yes" for outcome in outcomes)],
    ]
    return as_table(["", *(_mode(outcome.in_backward) for outcome in outcomes)], lines)


def _alternatives(trial: Trial) -> str:
    lines = [
        [found.name, size_text(found.device), size_text(found.host), "yes" if found.fits else "no"]
        for found in alternatives(trial)
    ]
    return as_table(["optimizer", "device", "host", "fits"], lines)


def _formulas(model: Transformer) -> tuple[str, ...]:
    inner = 7 if model.gated else 4
    return (
        "checkpoints = layers x tokens x hidden x bytes of the dtype",
        f"one block = tokens x (3 hidden + 2 query + 2 key-value + {inner} feed-forward widths) x bytes of the dtype",
        "logits = tokens / chunks x vocabulary x 8 bytes, with their gradients in float32",
    )


def _placements(outcomes: Sequence[Outcome]) -> list[str]:
    """The first plan there is, else one reason after the other."""
    for outcome in outcomes:
        if outcome.plan is not None:
            return [f"Placement, {_mode(outcome.in_backward)}:", outcome.plan.summary()]
    return ["\n".join(f"Does not fit, {_mode(outcome.in_backward)}: {outcome.reason}" for outcome in outcomes)]


def _largest(trial: Trial, found: Largest) -> str:
    training, positions = trial.training, trial.model.positions
    beyond = ""
    if positions is not None and found.seq_len > positions:
        beyond = f"; the model is configured for {positions:,}"
    lines = [
        ["sequence", f"{found.seq_len:,} tokens, batch of {training.batch_size}{beyond}" if found.seq_len else "none"],
        ["batch", f"{found.batch_size:,} x {training.seq_len:,} tokens" if found.batch_size else "none"],
        ["model", "none" if found.model is None else f"{found.model_name}: {found.model.count:,} parameters"],
    ]
    return as_table(["largest that fits", "all else as above"], lines, left=2)
