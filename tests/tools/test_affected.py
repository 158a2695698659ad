"""The tests that a change selects."""

from __future__ import annotations

from pathlib import Path

import pytest

from .affected import Imports

FILES = {
    "src/__init__.py": "",
    "src/a.py": "",
    "src/b.py": "from .a import f",
    "src/native/__init__.py": "",
    "src/native/library.py": "",
    "tests/__init__.py": "",
    "tests/docs/__init__.py": "",
    "tests/docs/test_pages.py": "",
    "tests/test_a.py": "from fusewright import a",
    "tests/test_b.py": "def test_b():\n    from fusewright.b import g",
    "tests/test_native.py": "import fusewright.native.library",
    "tests/test_program.py": 'PROGRAM = "speed"',
    "benchmarks/speed.py": "import fusewright.a",
}


@pytest.fixture
def imports(tmp_path: Path) -> Imports:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Imports(tmp_path)


@pytest.mark.parametrize(
    ("changed", "near", "expected"),
    [
        ("src/b.py", None, ["tests/test_b.py"]),
        ("src/a.py", None, ["tests/test_a.py", "tests/test_b.py", "tests/test_program.py"]),
        ("src/a.py", 1, ["tests/test_a.py"]),
        ("tests/test_a.py", None, ["tests/test_a.py"]),
        ("benchmarks/speed.py", None, ["tests/test_program.py"]),
        ("src/native/kernel.cpp", None, ["tests/test_native.py"]),
        ("docs/page.md", None, ["tests/docs/test_pages.py"]),
        ("src/gone.py", None, []),
    ],
)
def test_a_change_selects_the_tests_that_import_it(
    imports: Imports, changed: str, near: int | None, expected: list[str]
) -> None:
    assert [str(p) for p in imports.affected([changed], near)] == expected


def test_the_requirements_select_every_test(imports: Imports) -> None:
    assert len(imports.affected(["pyproject.toml"])) == 5


def test_an_op_of_this_checkout_selects_its_own_tests() -> None:
    near = {str(p) for p in Imports().affected(["src/kernels/norms/layer_norm.py"], 1)}
    assert "tests/kernels/test_layer_norm.py" in near
    assert "tests/train/data/test_chat.py" not in near
