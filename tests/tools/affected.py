"""Print the test files that a change can break, one a line, by the imports between modules.

    pytest $(python -m tests.tools.affected)           # what is not committed
    pytest $(python -m tests.tools.affected BASE)      # what has changed since the revision BASE
    python -m tests.tools.affected BASE --near 2       # tests within two imports of a change

A module of ``src``, ``tests`` or ``benchmarks`` depends on what it imports, at the top or inside of
a function, and a module that names the file of another one (``"launches"`` in a test) on that.
Other files: a C++ source belongs to the module beside it that names it, a page of ``docs`` to
``tests/docs``; ``pyproject.toml``, ``.ci`` and every ``conftest.py`` to all tests below them.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from .house import ROOT

_ROOTS = {"src": "fusewright", "tests": "tests", "benchmarks": ""}
"""Folders with Python modules, and the package that each one is imported as."""


class Imports:
    """Which modules of a checkout import which.

    Args:
        root: the folder of the checkout.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.names: dict[str, Path] = {}
        for folder, package in _ROOTS.items():
            for path in sorted((root / folder).rglob("*.py")):
                parts = [*filter(None, [package]), *path.relative_to(root / folder).parts]
                parts[-1] = parts[-1].removesuffix(".py")
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                self.names[name] = path.relative_to(root)

    def _imported(self, name: str) -> set[str]:
        path = self.names[name]
        tree = ast.parse((self.root / path).read_text(encoding="utf-8"))
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*base, *filter(None, [node.module])])
                found |= {start, *(f"{start}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)  # imported by its name, or run as a program
        return found & self.names.keys()

    @cached_property
    def importers(self) -> dict[str, set[str]]:
        """Of each module, those that import it."""
        by: dict[str, set[str]] = defaultdict(set)
        for name in self.names:
            for source in self._imported(name):
                by[source].add(name)
        return by

    def affected(self, changed: list[str], near: int | None = None) -> list[Path]:
        """The test files that depend on the changed files, within ``near`` imports if given."""
        at = {path: name for name, path in self.names.items()}
        border, tests = set(), set()
        every = [p for p in self.names.values() if p.name.startswith("test_")]
        for text in changed:
            path = Path(text)
            if path.parts[0] == ".ci" or text == "pyproject.toml":
                tests |= set(every)
            elif path.parts[0] == "docs" or path.suffix == ".md":
                tests |= {p for p in every if p.is_relative_to("tests/docs")}
            elif path.suffix in (".cpp", ".h"):
                border |= {n for n, p in self.names.items() if p.parent == path.parent}
            elif path.name == "conftest.py":
                tests |= {p for p in every if p.is_relative_to(path.parent)}
            elif path in at:
                border.add(at[path])
        seen: set[str] = set()
        while border and (near is None or near >= 0):
            seen |= border
            border = {m for name in border for m in self.importers[name]} - seen
            near = None if near is None else near - 1
        tests |= {self.names[n] for n in seen if self.names[n].name.startswith("test_")}
        return sorted(tests)


def changed_since(base: str | None) -> list[str]:
    """The files that differ from the revision ``base``, or from HEAD; untracked ones too."""

    def git(*arguments: str) -> list[str]:
        said = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return said.stdout.splitlines()

    untracked = git("ls-files", "--others", "--exclude-standard")
    return [*git("diff", "--name-only", base or "HEAD"), *untracked]


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", help="a revision of git; default: HEAD")
    parser.add_argument("--near", type=int, help="the most imports between a change and a test")
    options = parser.parse_args()
    print(*Imports().affected(changed_since(options.base), options.near), sep="\n")


if __name__ == "__main__":
    main()
