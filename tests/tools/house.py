"""Count the house: how many modules there are, and how far a reader walks.

    python -m tests.tools.house            # this checkout
    python -m tests.tools.house DIR ...    # other checkouts, side by side

The figures are looked at, not asserted. All of them are read from the source, by its syntax trees:

- modules and lines of ``src``, lines of ``tests``;
- modules that one module alone imports, and how many of them are in the folder of that module
  (rules, Triton kernels and packages' ``__init__`` are left out);
- circles: groups of modules that import one another, imports for type checking included;
- depth of the trainer: how many classes of the package stand one upon another below a class that
  inherits from transformers' or TRL's trainers;
- modules entered from ``compile_graph``: what a reader opens who follows each function that it
  calls once, and those which its stages call within ``compiler`` (two levels).
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class House:
    """A checkout, read.

    Attributes:
        root: its folder.
    """

    root: Path
    _trees: dict[str, ast.Module] = field(default_factory=dict)
    _paths: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        src = self.root / "src"
        for path in sorted(src.rglob("*.py")):
            parts = path.relative_to(src).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self._trees[name] = ast.parse(path.read_text(encoding="utf-8"))
            self._paths[name] = path

    @property
    def modules(self) -> int:
        return len(self._trees)

    def lines(self, folder: str) -> int:
        files = (self.root / folder).rglob("*.py")
        return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files)

    def _package(self, module: str) -> list[str]:
        parts = module.split(".") if module else []
        return parts if self._paths[module].name == "__init__.py" else parts[:-1]

    def _sources(self, module: str, node: ast.ImportFrom) -> list[tuple[str, str, str]]:
        """What an import brings: (name here, module of the package, name there or '')."""
        if not node.level:
            return []
        package = self._package(module)
        base = package[: len(package) - node.level + 1]
        base += node.module.split(".") if node.module else []
        brought = []
        for a in node.names:
            whole = ".".join([*base, a.name])
            if whole in self._trees:
                brought.append((a.asname or a.name, whole, ""))
            elif ".".join(base) in self._trees:
                brought.append((a.asname or a.name, ".".join(base), a.name))
        return brought

    @cached_property
    def imports(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Of each module: name here -> (module, name there)."""
        return {
            module: {
                here: (source, there)
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                for here, source, there in self._sources(module, node)
            }
            for module, tree in self._trees.items()
        }

    def with_one_importer(self) -> tuple[int, int]:
        importers = defaultdict(set)
        for module, names in self.imports.items():
            for source, _ in names.values():
                importers[source].add(module)
        alone = [
            (module, next(iter(by)))
            for module, by in importers.items()
            if len(by) == 1
            and not module.endswith("_triton")
            and not module.startswith("passes.")
            and self._paths[module].name != "__init__.py"
        ]
        near = [m for m, by in alone if m.rpartition(".")[0] == by.rpartition(".")[0]]
        return len(alone), len(near)

    def circles(self) -> list[list[str]]:
        """The strongly connected groups of more than one module (Tarjan 1972)."""
        after = {m: {s for s, _ in names.values()} - {m} for m, names in self.imports.items()}
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        groups: list[list[str]] = []

        def visit(m: str) -> None:
            index[m] = low[m] = len(index)
            stack.append(m)
            for n in sorted(after[m]):
                if n not in index:
                    visit(n)
                    low[m] = min(low[m], low[n])
                elif n in stack:
                    low[m] = min(low[m], index[n])
            if low[m] == index[m]:
                group = stack[stack.index(m) :]
                del stack[stack.index(m) :]
                if len(group) > 1:
                    groups.append(sorted(group))

        for m in sorted(after):
            if m not in index:
                visit(m)
        return groups

    def trainer_depth(self) -> tuple[int, list[str]]:
        """The longest chain of classes of the package over a trainer of transformers or TRL."""
        bases: dict[str, list[str]] = {}
        for tree in self._trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = [ast.unparse(b).rpartition(".")[2] for b in node.bases]

        def is_trainer(name: str) -> bool:
            here = bases.get(name)
            if here is None:
                return name.endswith("Trainer")
            return any(map(is_trainer, here))

        def chain(name: str) -> list[str]:
            longest = max((chain(b) for b in bases[name] if b in bases), key=len, default=[])
            return [name, *longest]

        chains = [chain(name) for name in bases if is_trainer(name)]
        longest = max(chains, key=len, default=[])
        return len(longest), longest

    def entered(self, module: str, function: str, levels: int = 2) -> set[str]:
        """The modules of what ``function`` calls, and of what that calls in ``module``'s room."""
        room = module.split(".")[0]
        seen: set[tuple[str, str]] = set()
        border = {(module, function)}
        for level in range(levels):
            called = set()
            for place in border - seen:
                called |= self._called(*place, within=room if level else None)
            seen |= border
            border = called
        return {m for m, _ in seen | border}

    def _called(self, module: str, function: str, within: str | None) -> set[tuple[str, str]]:
        if within is not None and module.split(".")[0] != within:
            return set()
        functions = {
            n.name: n
            for n in self._trees[module].body
            if isinstance(n, ast.FunctionDef | ast.ClassDef)
        }
        names, done, todo = set(), set(), [function]
        while todo:  # what is called in the same file is read without leaving it
            here = todo.pop()
            if here in done or here not in functions:
                continue
            done.add(here)
            loaded = {n.id for n in ast.walk(functions[here]) if isinstance(n, ast.Name)}
            names |= loaded
            todo += sorted(loaded)
        imports = self.imports[module]
        return {imports[n] for n in names if n in imports}


def rows(house: House) -> dict[str, str]:
    alone, near = house.with_one_importer()
    depth, chain = house.trainer_depth()
    start = "compiler.backend"
    entered = house.entered(start, "compile_graph")
    circles = house.circles()
    return {
        "modules entered from compile_graph": str(len(entered)),
        "depth of the trainer's classes": f"{depth} ({' < '.join(chain)})",
        "circles of imports": f"{len(circles)} (of {', '.join(str(len(c)) for c in circles)})",
        "modules of src": str(house.modules),
        "modules with one importer": f"{alone}, {near} of them beside it",
        "lines of src": f"{house.lines('src'):,}",
        "lines of tests": f"{house.lines('tests'):,}",
    }


def main(roots: list[str]) -> None:
    columns = [rows(House(Path(r).resolve())) for r in roots or [str(ROOT)]]
    for name in columns[0]:
        print(f"{name:38}", "  |  ".join(f"{c[name]}" for c in columns))


if __name__ == "__main__":
    main(sys.argv[1:])
