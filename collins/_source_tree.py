"""In a source tree, `compile/` and `offload/` stand beside `collins/`: here is what finds them.

A wheel puts both inside `collins/`, where Python finds them by itself. With the tree in `collins.__path__` it would
find them too, and `collins.tests`, `collins.examples` and a second `collins.collins` as well.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

ROOMS = ("compile", "offload")


class SourceTreeFinder:
    """Finds the rooms of one tree, as a finder in `sys.meta_path`, and nothing else.

    Args:
        tree: the folder that holds `collins/`, `compile/` and `offload/`.
    """

    def __init__(self, tree: Path) -> None:
        self._files = {f"collins.{room}": tree / room / "__init__.py" for room in ROOMS}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def find_rooms_of(package: Path) -> None:
    """Makes the rooms beside a package importable, if it lies in a source tree.

    Args:
        package: the folder of `collins`.
    """
    tree = package.parent
    if (tree / "pyproject.toml").is_file() and all((tree / room / "__init__.py").is_file() for room in ROOMS):
        # First, since an editable install of another tree has a finder that would find that tree's rooms.
        sys.meta_path.insert(0, SourceTreeFinder(tree))
