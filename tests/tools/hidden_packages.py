"""A plugin for pytest: packages that ``HIDDEN_PACKAGES`` names are not there.

HIDDEN_PACKAGES=pydantic,trl python -m pytest -p tests.tools.hidden_packages ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HIDDEN = frozenset(os.environ["HIDDEN_PACKAGES"].split(","))


class _Finder(PathFinder):
    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[:] = [_Finder if finder is PathFinder else finder for finder in sys.meta_path]
