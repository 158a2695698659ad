"""Print the test files that a change is most likely to break, the closest first.

    python -m tests.tools.affected               # what is not committed
    python -m tests.tools.affected BASE          # what has changed since the revision BASE
    python -m tests.tools.affected BASE --run    # run them, for up to ten minutes

It saves time and proves nothing: the core decides (``pytest`` without arguments).

A module of ``src``, ``tests`` or ``benchmarks`` depends on what it imports, at the top or inside of
a function, and on modules and ops that it names in a string; tests depend on the ``conftest.py`` of
their folders. Relations end at registries, which list rules, keys, methods, formats or features:
the users of a list depend on everything in it. A listed module, or what it imports, selects
instead, in this order, the tests that name it, those of the packages that import it, and
``CROSS_SECTION``.

The distance is the sum, over the modules from the change to the test, of the logarithm of the
number of their importers: what few modules import says much about those. Tests of the folder or
the name of what has changed come earlier.

Other files: a C++ source belongs to the modules beside it, a page of documentation to
``tests/docs``, a file of a folder of tests to the tests that name it or its folder, and
``pyproject.toml`` and ``.ci`` to ``tests/test_*.py``.
"""

from __future__ import annotations

import argparse
import ast
import heapq
import itertools
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from .house import ROOT

HUBS = ("src/__init__.py", "src/cli/main.py")
"""Modules through which all tests depend on all modules."""

REGISTRIES = (
    "src/compiler/features/__init__.py",
    "src/passes/__init__.py",
    "src/train/data/formats/registry.py",
    "src/train/methods/table.py",
    "src/train/recipe/keys/__init__.py",
)
"""Modules whose users depend on all that these modules import."""

CROSS_SECTION = (
    "tests/models/test_coverage.py",
    "tests/models/test_lora_settings.py",
    "tests/models/test_moe.py",
    "tests/models/test_precision.py",
    "tests/models/test_qlora.py",
    "tests/models/test_setups.py",
    "tests/train/test_run.py",
    "tests/trl/test_trainers.py",
)
"""At most 100 tests of whole models and runs."""

SECONDS = 540
"""Tests that would begin later are skipped; the last ones and the start take the tenth minute."""

_NAMED, _FAR = 3.0, 100.0
"""Distances from a listed module to tests that name it, and to tests of packages that import it."""

_PACKAGES = {"src": "fusewright", "tests": "tests", "benchmarks": ""}
"""Folders with Python modules, and the package that each one is imported as."""


class Imports:
    """Relations between the modules of a checkout.

    Args:
        root: the folder of the checkout.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.names: dict[str, Path] = {}
        for folder, package in _PACKAGES.items():
            for path in sorted((root / folder).rglob("*.py")):
                parts = [*filter(None, [package]), *path.relative_to(root / folder).parts]
                parts[-1] = parts[-1].removesuffix(".py")
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                self.names[name] = path.relative_to(root)
        self.tests = [p for p in self.names.values() if p.name.startswith("test_")]

    @cached_property
    def _texts(self) -> dict[Path, str]:
        return {p: (self.root / p).read_text(encoding="utf-8") for p in self.names.values()}

    @cached_property
    def _trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse(self._texts[path]) for name, path in self.names.items()}

    @cached_property
    def _ops(self) -> dict[str, str]:
        """The modules of ops, which are loaded by the names of the ops."""
        return {
            name.rpartition(".")[2]: name
            for name, tree in self._trees.items()
            if any(map(_is_op, tree.body))
        }

    def _imported(self, name: str) -> set[str]:
        path = self.names[name]
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found: set[str] = set()
        for node in ast.walk(self._trees[name]):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*base, *filter(None, [node.module])])
                found |= {start, *(f"{start}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # imported by its name, run as a program, or the name of an op
                found.add(self._ops.get(node.value, node.value))
        if path.name.startswith("test_"):
            found |= {f"{'.'.join(package[:i])}.conftest" for i in range(1, len(package) + 1)}
        return found & self.names.keys()

    @cached_property
    def importers(self) -> dict[str, set[str]]:
        """The importers of each module."""
        by: dict[str, set[str]] = defaultdict(set)
        for name in self.names:
            for source in self._imported(name):
                by[source].add(name)
        return by

    def affected(self, changed: Iterable[str]) -> list[Path]:
        """Return the test files that depend on changed files, the closest first.

        Args:
            changed: paths relative to the root; files that are gone select nothing.
        """
        at = {path: name for name, path in self.names.items()}
        modules: set[str] = set()
        found: dict[Path, float] = {}
        changed = [*map(Path, changed)]
        for path in changed:
            if path in at:
                modules.add(at[path])
            elif path.suffix in (".cpp", ".h"):
                modules |= {n for n, p in self.names.items() if p.parent == path.parent}
            else:
                found |= dict.fromkeys(self._of_other_file(path), 0.0)
        registries = {at[Path(p)] for p in REGISTRIES if Path(p) in at} - modules
        hubs = {at[Path(p)] for p in HUBS if Path(p) in at} - modules
        distances = self._distances(modules, registries | hubs)
        for name, distance in distances.items():
            found.setdefault(self.names[name], distance)
        for name, distance in distances.items():
            if self.importers[name] & registries:
                self._of_listed(name, distance, found)
                for text in CROSS_SECTION:
                    found.setdefault(Path(text), _FAR + 1)

        def rank(path: Path) -> tuple[float, Path]:
            return found[path] - max(_likeness(path, other) for other in changed), path

        return sorted(set(self.tests) & found.keys(), key=rank)

    def _distances(self, modules: set[str], ends: set[str]) -> dict[str, float]:
        """Return the distances of the modules that depend on ``modules``, not through ``ends``."""
        distances: dict[str, float] = {}
        border = [(0.0, name) for name in sorted(modules)]
        while border:
            distance, name = heapq.heappop(border)
            if name in distances or name in ends:
                continue
            distances[name] = distance
            step = math.log2(1 + len(self.importers[name]))
            for importer in self.importers[name]:
                heapq.heappush(border, (distance + step, importer))
        return distances

    def _of_listed(self, name: str, distance: float, found: dict[Path, float]) -> None:
        """Note the tests of something that a registry lists."""
        stem = name.rpartition(".")[2]
        classes = [n.name for n in self._trees[name].body if isinstance(n, ast.ClassDef)]
        named = re.compile(rf"\b({'|'.join(map(re.escape, [stem, *classes]))})\b")
        packages = {self.names[importer].parts[1] for importer in self.importers[name]}
        for path in self.tests:
            if named.search(self._texts[path]):
                found[path] = min(found.get(path, _FAR), distance + _NAMED)
            elif path.parts[1] in packages:
                found.setdefault(path, _FAR)

    def _of_other_file(self, path: Path) -> set[Path]:
        if path.suffix == ".md" or path.parts[0] == "docs":
            return {p for p in self.tests if p.is_relative_to("tests/docs")}
        if path.parts[0] == ".ci" or str(path) == "pyproject.toml":
            return {p for p in self.tests if p.parent == Path("tests")}
        if path.parts[0] != "tests":
            return set()
        words = re.compile("|".join(map(re.escape, [path.name, path.parent.name])))
        return {
            p
            for p in self.tests
            if path.parent.is_relative_to(p.parent) and words.search(self._texts[p])
        }


def _likeness(test: Path, changed: Path) -> int:
    """Return a larger number for a test in the folder, or with the name, of a changed file."""
    folders = zip(test.parent.parts[1:], changed.parent.parts[1:], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], folders))
    named = 4 * (test.stem == f"test_{changed.stem}") + 2 * (changed.parent.name in test.stem)
    return 2 * shared + named


def _is_op(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OP"


def changed_since(base: str | None) -> list[str]:
    """The files that differ from the revision ``base``, or from HEAD; untracked ones too."""

    def git(*arguments: str) -> list[str]:
        said = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return said.stdout.splitlines()

    untracked = git("ls-files", "--others", "--exclude-standard")
    return [*git("diff", "--name-only", base or "HEAD"), *untracked]


def main() -> int:
    """Print the files, or run their tests; the exit status is pytest's."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.affected", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("base", nargs="?", help="a revision of git; default: HEAD")
    parser.add_argument("--run", action="store_true", help="run their tests")
    options = parser.parse_args()
    files = list(map(str, Imports().affected(changed_since(options.base))))
    if not options.run:
        print(*files, sep="\n")
        return 0
    if not files:
        print("no test depends on what has changed")
        return 0
    command = [sys.executable, "-m", "pytest", "-q", f"--begin-within={SECONDS}", *files]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
