"""Support for training frameworks that choose their optimizer by name in a configuration file.

Most frameworks import the class that a configuration names, `collins.Collins`, and need nothing of this package. Each
of the others has a module here, which imports its framework: `transformers` (also for TRL, and for everything else that
trains by `Trainer`), `axolotl`, `lightning`, `timm`, `torchtitan`, `torchtune`. `examples/README.md` has a recipe for
each.
"""

from __future__ import annotations

from importlib import import_module

from collins.options import listed, require

NAME = "collins"
HOSTS = ("transformers", "timm")


def register(*hosts: str) -> None:
    """Registers the optimizer name "collins" in frameworks that keep a list of names.

    In transformers, `TrainingArguments(optim="collins", optim_args="compress_ratio=32")` then trains with Collins, and
    so do the configurations of TRL and all others that derive from it. In timm, `create_optimizer_v2(model, "collins")`
    builds it. Repeated calls have no effect.

    Args:
        hosts: "transformers", "timm", or both; by default transformers.

    Raises:
        ValueError: for another framework.
        ImportError: if a framework is not installed.
        RuntimeError: if a framework's version has no list of names; the message names the alternative.
    """
    for host in hosts:
        require(host in HOSTS, "hosts", host, listed(tuple(map(repr, HOSTS))))
    for host in hosts or HOSTS[:1]:
        import_module(f"collins.integrations.{host}").register()
