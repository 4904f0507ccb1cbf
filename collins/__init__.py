"""Collins: AdamW whose moment buffers live in Count-Sketch tables, 0.2 byte of state per parameter of a large model.

How data flows: `Collins.step` (optimizer) asks the `Stepper` (stepper) for a step. It finds the entry of each parameter
(entries), with what it is to its model (roles), how it is divided into buckets (bucketing), hashed (hashing) and stored
(formats), checks gradients and state (parameter), makes or adopts the state (state), and builds a program of
`UpdateTask`s (`collins.compile.program`), which later steps run again. Its executors call `update_` (update), eagerly
or compiled: that encodes a gradient into bucket means and decays the tables (sketch), applies the update rule (rule)
and writes the results (rounding). Where moments live is a store's to say (`collins.offload.tiers`).
`Collins.memory_report` (report) counts bytes from shapes alone.

State dicts are checked against the optimizer before anything changes (checkpoint), by what each parameter's tables mean
(fingerprint). `save` and `load` (files) keep them in files that are whole or refused, `whole_folder` (folders) those
that many ranks write; `convert` (conversion) makes AdamW's, and those of other settings, loadable. Frameworks that
choose their optimizer in a configuration file find what they need in `collins.integrations`.
"""

from pathlib import Path

from collins._source_tree import find_rooms_of

__version__ = "0.3.0"  # pyproject.toml reads it here

find_rooms_of(Path(__file__).resolve().parent)

from collins.conversion import convert  # noqa: E402
from collins.files import CheckpointError, load, save  # noqa: E402
from collins.folders import whole_folder  # noqa: E402
from collins.groups import param_groups  # noqa: E402
from collins.hashing import BlockHash, UniversalHash  # noqa: E402
from collins.integrations import register  # noqa: E402
from collins.optimizer import Collins  # noqa: E402
from collins.report import MemoryReport, ParameterRow  # noqa: E402

__all__ = [
    "BlockHash",
    "CheckpointError",
    "Collins",
    "MemoryReport",
    "ParameterRow",
    "UniversalHash",
    "__version__",
    "convert",
    "load",
    "param_groups",
    "register",
    "save",
    "whole_folder",
]
