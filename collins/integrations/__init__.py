"""Collins by name: what training frameworks need that choose their optimizer in a configuration file.

Most of them import what a configuration names, `collins.Collins`, and need nothing of this. For the others there is a
module each, which imports its framework: `transformers` (with TRL, and all that trains through `Trainer`), `axolotl`,
`lightning`, `timm`, `torchtitan`, `torchtune`. `examples/README.md` has a recipe for each.
"""

from __future__ import annotations

from importlib import import_module

from collins.options import listed, require

NAME = "collins"
HOSTS = ("transformers", "timm")


def register(*hosts: str) -> None:
    """Makes "collins" the name of an optimizer in frameworks that keep a list of names.

    In transformers `TrainingArguments(optim="collins", optim_args="compress_ratio=32")` then trains with Collins, and
    so do the configurations of TRL and all others that derive from it; in timm `create_optimizer_v2(model, "collins")`.
    Calling it again changes nothing.

    Args:
        hosts: "transformers", "timm", or both; transformers if none is given.

    Raises:
        ValueError: for another framework.
        ImportError: where one is not installed.
        RuntimeError: where its version keeps no list that could be added to, saying what to do instead.
    """
    for host in hosts:
        require(host in HOSTS, "hosts", host, listed(tuple(map(repr, HOSTS))))
    for host in hosts or HOSTS[:1]:
        import_module(f"collins.integrations.{host}").register()
