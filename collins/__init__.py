"""Collins: AdamW whose moment buffers live in Count-Sketch tables, 0.25 byte of state per parameter.

How data flows: `Collins.step` (optimizer) checks every gradient, looks up how each parameter is divided into buckets
(bucketing) and hashed (hashing), and hands a list of `UpdateTask` to the engine in `collins.compile`. The engine calls
`update_` (update), eagerly or compiled, which encodes a gradient into bucket means and decays the tables (sketch),
applies the update rule (rule) and writes the results (rounding). `Collins.memory_report` (report) counts bytes from the
bucketing alone.

State dicts are checked against the optimizer before anything changes (checkpoint), by what each parameter's tables mean
(fingerprint). `save` and `load` (files) keep them in files that are whole or refused, `whole_folder` (folders) those
that many ranks write; `convert` (conversion) makes AdamW's, and those of other settings, loadable.
"""

from pathlib import Path

from collins._source_tree import find_rooms_of

find_rooms_of(Path(__file__).resolve().parent)

from collins.conversion import convert  # noqa: E402
from collins.files import CheckpointError, load, save  # noqa: E402
from collins.folders import whole_folder  # noqa: E402
from collins.hashing import BlockHash, UniversalHash  # noqa: E402
from collins.optimizer import Collins  # noqa: E402
from collins.report import MemoryReport, ParameterRow  # noqa: E402

__all__ = [
    "BlockHash",
    "CheckpointError",
    "Collins",
    "MemoryReport",
    "ParameterRow",
    "UniversalHash",
    "convert",
    "load",
    "save",
    "whole_folder",
]
