"""The house: imports run one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

SRC = pathlib.Path(__file__).parent.parent / "src"

FLOORS = {
    "options": 0, "report": 0, "errors": 0, "budget": 0, "memory_budget": 0,
    "flat_buffers": 1, "flat": 1,
    "lazy": 1, "graph": 1, "kernels": 1, "match": 1,
    "passes": 2,
    "regions": 3, "bypass": 3, "leaves": 3, "watch": 3, "sampling": 3, "verify": 3,
    "verify_runs": 3, "verify_exact": 3, "verify_compare": 3, "smaller_weights": 3,
    "caller_writes": 3,
    "codegen": 3, "memory": 3, "sharing": 3, "session": 3, "capture": 3, "forwards": 3,
    "default_cache": 3, "opaque": 3, "heads": 3, "install": 3,
    "pipeline": 4, "listing": 4,
    "train": 5,
    "__init__": 6, "cli_switches": 6, "cli_group": 6, "cli_data": 6, "cli_after": 6, "cli": 6,
}  # fmt: skip
"""A module may import from lower floors; on one floor, only from what stands to its left below."""

ON_ONE_FLOOR = [("sampling", "verify"), ("verify_runs", "verify"), ("verify_exact", "verify"),
                ("verify_compare", "verify"), ("verify_runs", "verify_compare"),
                ("smaller_weights", "verify"),
                ("sampling", "smaller_weights"), ("verify_exact", "smaller_weights"),
                ("graph", "match"), ("codegen", "capture"),
                ("codegen", "memory"), ("sampling", "memory"), ("memory", "capture"),
                ("memory", "forwards"),
                ("memory_budget", "options"),
                ("verify", "capture"), ("capture", "install"), ("regions", "install"),
                ("regions", "forwards"), ("leaves", "forwards"),
                ("leaves", "install"), ("leaves", "watch"), ("bypass", "watch"),
                ("watch", "session"), ("watch", "forwards"), ("verify", "session"),
                ("caller_writes", "session"), ("caller_writes", "capture"),
                ("codegen", "session"), ("memory", "session"), ("sharing", "session"),
                ("session", "capture"), ("session", "forwards"), ("session", "install"),
                ("bypass", "forwards"),
                ("forwards", "install"),
                ("bypass", "regions"), ("bypass", "heads"), ("regions", "heads"),
                ("session", "heads"), ("session", "opaque"), ("watch", "heads"),
                ("memory", "heads"), ("default_cache", "heads"), ("forwards", "heads"),
                ("opaque", "heads"), ("opaque", "install"), ("heads", "install"),
                ("flat_buffers", "flat"),
                ("cli_switches", "cli_data"), ("cli_switches", "cli_after"),
                ("cli_switches", "cli"), ("cli_group", "cli"), ("cli_data", "cli"),
                ("cli_after", "cli")]  # fmt: skip


def _imports(path: pathlib.Path) -> list[str]:
    """The top-level parts of the package that a file imports, at run time."""
    package = path.relative_to(SRC).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = (*base, *(node.module or "").split(".")) if node.module else base
            parts = tuple(p for p in parts if p)
            names = [parts[0]] if parts else [a.name for a in node.names]
            found += [n for n in names if n in FLOORS]
    return found


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_run_downwards(path: pathlib.Path) -> None:
    relative = path.relative_to(SRC)
    own = relative.parts[0].removesuffix(".py")
    assert own in FLOORS, f"{relative} stands on no floor: add it to FLOORS"
    for other in _imports(path):
        downwards = other == own or FLOORS[other] < FLOORS[own] or (other, own) in ON_ONE_FLOOR
        assert downwards, f"{relative} (floor {FLOORS[own]}) imports {other} ({FLOORS[other]})"


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_rooms_are_small(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= 320


def _fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_importing_loads_no_triton_and_no_model_files() -> None:
    out = _fresh(
        "import torch, sys; before = set(sys.modules); import fusewright; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] in ('triton', 'transformers', 'peft')])"
    )
    assert out.strip() == "[]"


def test_the_whole_compiler_loads_no_kernel() -> None:
    # torch._dynamo itself imports Triton where it is installed; our kernels wait for a GPU tensor
    out = _fresh(
        "import sys; from fusewright import optimize; "
        "print([m for m in sys.modules if m.startswith(('fusewright.kernels.triton.', "
        "'transformers.models.'))])"
    )
    assert out.strip() == "[]"
