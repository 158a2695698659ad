"""The house: rooms of few and small files, and importing the package is cheap.

That imports run one way is ``lint-imports``'s to say: the contracts are in ``pyproject.toml``.
"""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

SRC = pathlib.Path(__file__).parent.parent / "src"

ROOMS = sorted(p for p in [SRC, *SRC.rglob("*")] if p.is_dir() and p.name != "__pycache__")


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: str(p.relative_to(SRC)))
def test_a_room_is_seen_at_a_glance(room: pathlib.Path) -> None:
    files = [f for f in room.iterdir() if f.is_file() and f.name != "__init__.py"]
    assert len(files) <= 14
    assert (room / "__init__.py").read_text().startswith('"""'), "a room says what it holds"


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: str(p.relative_to(SRC)))
def test_a_room_names_what_is_in_it(room: pathlib.Path) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    there = {p.stem for p in room.iterdir()}
    for path in room.glob("*.py"):
        body = ast.parse(path.read_text()).body
        there |= {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert set(re.findall(r"``(\w+)``", text)) <= there


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_a_file_that_is_named_is_there(path: pathlib.Path) -> None:
    files = {p.name for p in [*SRC.rglob("*.py"), *SRC.parent.glob("benchmarks/*.py")]}
    named = set(re.findall(r"\b([a-z_]+\.py)\b", path.read_text()))
    assert named <= files


def test_every_room_is_packaged() -> None:
    settings = tomllib.loads((SRC.parent / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = [".".join(("fusewright", *room.relative_to(SRC).parts)) for room in ROOMS]
    assert settings["tool"]["setuptools"]["packages"] == rooms


def test_the_root_is_seen_at_a_glance() -> None:
    apart = ("__init__.py", "py.typed", "__pycache__")
    assert len([p for p in SRC.iterdir() if p.name not in apart]) <= 12


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_files_are_small(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= 320


PLAIN = sorted(p for p in SRC.rglob("*.py") if not p.name.endswith("_triton.py"))


@pytest.mark.parametrize("path", PLAIN, ids=lambda p: str(p.relative_to(SRC)))
def test_functions_fit_a_screen(path: pathlib.Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60]
    assert not long


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
        "print([m for m in sys.modules if m.startswith('transformers.models.') "
        "or m.startswith('fusewright') and m.endswith('_triton')])"
    )
    assert out.strip() == "[]"


def test_what_mutation_needs_is_there() -> None:
    from tests.mutation.targets import EQUIVALENT, TESTS

    root = SRC.parent
    tests = {t.split("::")[0] for names in TESTS.values() for t in names if t[:1] != "-"}
    assert {t for t in tests if t.startswith("tests/") and not (root / t).exists()} == set()
    files = {*TESTS, *EQUIVALENT} - {"any file"}
    assert {f for f in files if not (SRC / f).exists()} == set()


LONG = pathlib.Path(__file__).with_name("long.txt")


@pytest.mark.parametrize("line", LONG.read_text().splitlines())
def test_a_long_test_is_there(line: str) -> None:
    path, _, name = line.partition("::")
    assert f"def {name.partition('[')[0]}(" in (LONG.parents[1] / path).read_text()
