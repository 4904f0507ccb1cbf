"""Collins: AdamW with its moments in Count-Sketch tables, 0.2 byte of state per parameter of a large model.

Data flow: `Collins.step` (optimizer) calls the `Stepper` (stepper). The stepper finds the entry of each parameter
(entries): its role in the model (roles), its buckets (bucketing), its hash (hashing) and its storage format (formats).
It checks gradients and state (parameter), allocates or adopts the state (state), and builds a program of `UpdateTask`s
(`collins.compile.program`), which later steps run again. The program's executor calls `update_` (update), eagerly or
compiled: it encodes a gradient into bucket means and decays the tables (sketch), applies the update rule (rule) and
writes the results (rounding). A store decides where moments are allocated (`collins.offload.tiers`).
`Collins.memory_report` (report) computes bytes from shapes alone.

State dicts are checked before anything changes (checkpoint), including the fingerprint that says how each table was
encoded (fingerprint). `save` and `load` (files) use files that are either complete or rejected; `whole_folder`
(folders) does the same for folders that many ranks write. `convert` (conversion) makes state dicts of AdamW, and of
Collins under other settings, loadable. `collins.integrations` is for frameworks that choose their optimizer by name in
a configuration file.
"""

from pathlib import Path

from collins._source_tree import find_subpackages

__version__ = "0.3.0"  # pyproject.toml reads it here

find_subpackages(Path(__file__).resolve().parent)

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
