"""The tests that a change selects."""

from __future__ import annotations

from pathlib import Path

import pytest

from .affected import CROSS_SECTION, REGISTRIES, Imports
from .house import ROOT

FILES = {
    "src/__init__.py": "",
    "src/a.py": "",
    "src/b.py": "from .a import f",
    "src/passes/__init__.py": "from .norm import Norm",
    "src/passes/norm.py": "class Norm:\n    op = 'norm'",
    "src/compiler.py": "from .passes import PIPELINE",
    "src/kernels/__init__.py": "",
    "src/kernels/norm.py": "OP = Op()",
    "src/native/__init__.py": "",
    "src/native/library.py": "",
    "tests/__init__.py": "",
    "tests/conftest.py": "",
    "tests/docs/__init__.py": "",
    "tests/docs/test_pages.py": "",
    "tests/models/test_coverage.py": "import fusewright.compiler",
    "tests/passes/__init__.py": "",
    "tests/passes/conftest.py": "import fusewright.a",
    "tests/passes/golden/norm.txt": "",
    "tests/passes/test_goldens.py": "GOLDEN = 'golden'",
    "tests/passes/test_named.py": "RULE = 'Norm'",
    "tests/passes/test_others.py": "",
    "tests/test_a.py": "from fusewright import a",
    "tests/test_b.py": "def test_b():\n    from fusewright.b import g",
    "tests/test_compiler.py": "import fusewright.compiler",
    "tests/test_native.py": "import fusewright.native.library",
    "tests/test_norm.py": "import fusewright.kernels.norm",
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
    ("changed", "expected"),
    [
        ("src/b.py", ["test_b.py"]),
        ("tests/test_a.py", ["test_a.py"]),
        ("benchmarks/speed.py", ["test_program.py"]),
        ("src/native/kernel.cpp", ["test_native.py"]),
        ("docs/page.md", ["docs/test_pages.py"]),
        ("README.md", ["docs/test_pages.py"]),
        ("tests/passes/golden/norm.txt", ["passes/test_goldens.py"]),
        ("src/gone.py", []),
    ],
)
def test_a_change_selects_the_tests_that_depend_on_it(
    imports: Imports, changed: str, expected: list[str]
) -> None:
    found = [str(p.relative_to("tests")) for p in imports.affected([changed])]
    assert found == expected


def test_the_closest_are_first(imports: Imports) -> None:
    found = [p.name for p in imports.affected(["src/a.py"])]
    folder = {"test_goldens.py", "test_named.py", "test_others.py"}  # whose conftest imports it
    assert found[0] == "test_a.py"
    assert set(found[1:]) == {"test_b.py", "test_program.py", *folder}


def test_what_is_listed_selects_tests_that_name_it_then_packages_then_a_cross_section(
    imports: Imports,
) -> None:
    found = [str(p.relative_to("tests")) for p in imports.affected(["src/passes/norm.py"])]
    named, package = found[:2], found[2:-1]
    assert set(named) == {"passes/test_named.py", "test_norm.py"}
    assert package == ["passes/test_goldens.py", "passes/test_others.py"]
    assert found[-1] == "models/test_coverage.py"
    assert "test_compiler.py" not in found  # which depends on all rules


def test_an_op_selects_its_tests_before_those_of_its_rule(imports: Imports) -> None:
    found = [p.name for p in imports.affected(["src/kernels/norm.py"])]
    assert found[0] == "test_norm.py"
    assert "test_named.py" in found


def test_a_registry_that_changes_selects_all_that_use_it(imports: Imports) -> None:
    assert {p.name for p in imports.affected(["src/passes/__init__.py"])} == {
        "test_coverage.py", "test_compiler.py",
    }  # fmt: skip


def test_files_of_the_project_select_tests_of_the_project(imports: Imports) -> None:
    found = imports.affected([".ci/run"])
    assert found == imports.affected(["pyproject.toml"])
    assert len(found) == 6


def test_this_checkout_has_what_is_listed() -> None:
    assert all((ROOT / path).is_file() for path in (*REGISTRIES, *CROSS_SECTION))


def test_an_op_of_this_checkout_selects_its_own_tests() -> None:
    first, second, *_ = Imports().affected(["src/kernels/norms/layer_norm.py"])
    tests = {"tests/kernels/test_layer_norm.py", "tests/passes/test_layer_norm.py"}
    assert {str(first), str(second)} == tests
