"""Loads a state dict into an optimizer: completely or not at all, into existing tensors where there are any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from collins.checkpoint import CheckedStateDict
from collins.devices import ordinary_tensors
from collins.entries import ParamEntry
from collins.interrupts import HeldInterrupts
from collins.sharding import local
from collins.stepper import Stepper


def load_into(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    entries: Sequence[ParamEntry],
    stepper: Stepper,
    check: Callable[[Mapping[str, Any]], CheckedStateDict],
) -> None:
    """Loads a state dict bit for bit, by `torch.optim.Optimizer.load_state_dict` with hooks.

    Args:
        optimizer: the optimizer to load into.
        state_dict: the state dict, which `check` must accept.
        entries: the entries of the optimizer's parameters.
        stepper: the stepper of the optimizer.
        check: raises an error for a state dict that does not fit; called before anything changes.
    """
    stepper.store.drain()
    before = [dict(optimizer.state.get(entry.p, {})) for entry in entries]
    rates = [group["lr"] for group in optimizer.param_groups]
    keys = [entry.key for entry in entries]
    after: list[dict[str, Any]] = []

    def prepare(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        # Everything that can fail is done here, before anything changes.
        found = check(given)
        try:
            for entry, saved in zip(entries, found.states, strict=True):
                if saved and saved.key is not None:
                    entry.key, entry.spec = saved.key, None
            stepper.place([entry for entry, saved in zip(entries, found.states, strict=True) if saved], loading=True)
            for entry, state, saved in zip(entries, before, found.states, strict=True):
                after.append(
                    {**saved.others_on(entry.p.device), **stepper.state_to_load(entry, state)} if saved else {}
                )
        except BaseException:
            for entry, key in zip(entries, keys, strict=True):
                if entry.key != key:
                    entry.key, entry.spec = key, None
            raise
        for entry, state, saved in zip(entries, after, found.states, strict=True):
            entry.forget()
            if saved:
                state["step"].fill_(saved.step)
                for name, moment in zip(stepper.spec(entry).tensors, saved.moments, strict=True):
                    local(state[name]).copy_(moment)
        return {**given, "param_groups": found.groups, "state": found.rest}

    def finish(_: Optimizer) -> None:
        optimizer.state.update({entry.p: state for entry, state in zip(entries, after, strict=True) if state})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):  # others, such as a captured graph, may have a reference to this tensor
                group["lr"] = rate.fill_(float(group["lr"]))

    hooks = (
        optimizer.register_load_state_dict_pre_hook(prepare),
        optimizer.register_load_state_dict_post_hook(finish, prepend=True),
    )
    try:
        with HeldInterrupts(), ordinary_tensors(), torch.no_grad():  # overwrites state that requires gradients too
            Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        for hook in hooks:
            hook.remove()
