"""Imports `collins.compile` and `collins.offload` in a source tree, where their folders are siblings of `collins/`.

A wheel has both inside `collins/`, where Python finds them without help. Adding the tree to `collins.__path__` instead
would also make `collins.tests`, `collins.examples` and a second `collins.collins` importable.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

SUBPACKAGES = ("compile", "offload")


class SourceTreeFinder:
    """A finder for `sys.meta_path` that finds the subpackages of one tree, and nothing else.

    Args:
        tree: the folder that holds `collins/`, `compile/` and `offload/`.
    """

    def __init__(self, tree: Path) -> None:
        self._files = {f"collins.{name}": tree / name / "__init__.py" for name in SUBPACKAGES}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def find_subpackages(package: Path) -> None:
    """Makes the subpackages beside a package importable, if the package is in a source tree.

    Args:
        package: the folder of `collins`.
    """
    tree = package.parent
    if (tree / "pyproject.toml").is_file() and all((tree / name / "__init__.py").is_file() for name in SUBPACKAGES):
        # First in the list, before the finder of an editable install, which may be of another tree.
        sys.meta_path.insert(0, SourceTreeFinder(tree))
