"""Rows that the package itself makes, so that a recipe can be tried without a download."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError

PREFIX = "fusewright:"
"""What the paths of such rows begin with."""

_MADE_BY = {
    "docstrings": ("data/readers/docstrings.py", "chats"),
    "docstring_pairs": ("data/readers/docstrings.py", "pairs"),
    "docstring_prompts": ("data/readers/docstrings.py", "prompts"),
}
"""The file that makes the rows of a name, and their form."""


def is_own(path: str) -> bool:
    """Whether a dataset's ``path`` names rows of the package."""
    return path.startswith(PREFIX)


def why_none(path: str) -> str | None:
    """Why there are no rows under this name; None: there are."""
    if path.removeprefix(PREFIX) in _MADE_BY:
        return None
    return f"there are no rows {path}; there are {', '.join(PREFIX + name for name in _MADE_BY)}"


class PackageRows:
    """The rows of a name, made by a process of their own: what it imports does not stay here.

    Args:
        path: such as ``fusewright:docstrings``.

    Raises:
        DataError: there is no such name, or they cannot be made.
    """

    def __init__(self, path: str) -> None:
        problem = why_none(path)
        if problem is not None:
            raise DataError(problem)
        file, form = _MADE_BY[path.removeprefix(PREFIX)]
        maker = Path(__file__).parent / file
        with tempfile.TemporaryDirectory(prefix="fusewright-") as folder:
            made = Path(folder) / "rows.jsonl"
            # -I: neither the current folder nor the environment can put a module in the way
            asked = [sys.executable, "-I", str(maker), str(made), form]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                raise DataError(f"{path}: cannot be made: {said[-1] if said else done.returncode}")
            text = made.read_bytes()
        self._lines = text.splitlines()
        self._fingerprint = hashlib.sha256(text).hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Any]:
        return map(json.loads, self._lines)
