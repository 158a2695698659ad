"""The house: every folder is packaged and described, and importing the package is cheap.

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

from .load import stretched

SRC = pathlib.Path(__file__).parent.parent / "src"

ROOMS = sorted(p for p in [SRC, *SRC.rglob("*")] if p.is_dir() and p.name != "__pycache__")


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: str(p.relative_to(SRC)))
def test_a_room_says_what_it_holds(room: pathlib.Path) -> None:
    assert (room / "__init__.py").read_text().startswith('"""')


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


def test_the_architecture_names_files_that_are_there() -> None:
    text = (SRC.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = text.partition("| `FUSEWRIGHT_DUMP=DIR` |")[0]  # which names what it writes
    files = [f"/{p.relative_to(SRC.parent)}" for p in SRC.parent.rglob("*.py")]
    named = {n for n in re.findall(r"[\w/]+\.py\b", text) if not n.startswith("OP_")}
    assert {n for n in named if not any(f.endswith(f"/{n}") for f in files)} == set()


def test_every_room_is_packaged() -> None:
    settings = tomllib.loads((SRC.parent / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = [".".join(("fusewright", *room.relative_to(SRC).parts)) for room in ROOMS]
    assert settings["tool"]["setuptools"]["packages"] == rooms


def test_what_runs_as_a_program_is_at_the_end_of_its_file() -> None:
    """What is defined below it would not be there yet."""
    for path in sorted(SRC.rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        guards = [n for n in body if isinstance(n, ast.If) and "__name__" in ast.unparse(n.test)]
        assert guards in ([], body[-1:]), path


def test_a_public_class_name_is_used_once() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(SRC)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def _fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=stretched(120),
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
    from tests.tools.mutation.targets import EQUIVALENT, TESTS

    root = SRC.parent
    tests = {t.split("::")[0] for names in TESTS.values() for t in names if t[:1] != "-"}
    assert {t for t in tests if t.startswith("tests/") and not (root / t).exists()} == set()
    files = {*TESTS, *EQUIVALENT} - {"any file"}
    assert {f for f in files if not (SRC / f).exists()} == set()
