"""How an installation behaves: in each folder, editable or not, without extras."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from .load import stretched

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def backend() -> Any:
    """The build backend."""
    spec = importlib.util.spec_from_file_location("backend", ROOT / ".ci" / "backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Place:
    """An environment, and the folder above a clone called ``fusewright``."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = folder.glob("venv/lib/python*/site-packages")
        others = (p for p in sys.path if p and Path(p) != ROOT)
        others = (p for p in others if not Path(p, "fusewright").exists())
        (self.site / "others.pth").write_text("\n".join(others))
        self.above = folder / "above"
        self.above.mkdir()
        (self.above / "fusewright").symlink_to(ROOT)

    def run(self, *arguments: str, folder: Path | None = None, **options: Any) -> Any:
        """What Python does in the folder above the clone."""
        return subprocess.run(
            [str(self.python), *arguments], capture_output=True, text=True, check=False,
            timeout=stretched(300), cwd=folder or self.above, env={"PATH": "/usr/bin:/bin"},
            **options,
        )  # fmt: skip

    def source(self) -> str:
        """Where the package comes from, as a script, a notebook and ``-m`` find it."""
        code = "from fusewright import FusewrightError, __file__ as f; print(f)"
        found = {self.run("-c", code).stdout, self.run("-", input=code).stdout}
        (self.above / "script.py").write_text(code)
        found.add(self.run("script.py").stdout)
        (line,) = found
        said = self.run("-m", "fusewright", "--help")
        assert "Usage: python -m fusewright" in said.stdout, said.stderr
        return str(line).strip()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_an_editable_installation_is_found_above_the_clone(
    place: Place, backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shadowed = place.run("-c", "import fusewright; print(fusewright.__file__)")
    assert shadowed.stdout.strip() == "None", "the clone's folder is taken for a package"
    wheel = tmp_path / backend.build_editable(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place.site)
        names = archive.namelist()
    assert place.source() == str(ROOT / "src" / "__init__.py")
    # what griffe, which makes the API reference, cannot read
    assert not [name for name in names if name.endswith(("_editable.py", "_editable_loader.py"))]
    (record,) = (place.site / n for n in names if n.endswith("RECORD"))
    assert {line.partition(",")[0] for line in record.read_text().splitlines()} == set(names)
    code = "from importlib.metadata import version; print(version('fusewright'))"
    assert place.run("-c", code).stdout.strip() == _version()

    (tmp_path / "other" / "fusewright").mkdir(parents=True)
    (tmp_path / "other" / "fusewright" / "__init__.py").write_text("mine = True")
    code = "import fusewright; print(fusewright.mine)"
    said = place.run("-c", code, folder=tmp_path / "other").stdout
    assert said == "True\n", "a real package on the path comes first, as always"


def test_a_plain_installation_is_found_above_the_clone(place: Place) -> None:
    (place.site / "fusewright").symlink_to(ROOT / "src")
    assert place.source() == str(place.site / "fusewright" / "__init__.py")


def test_no_module_has_the_name_of_one_of_pythons() -> None:
    """Else Python's own would not be found in its folder."""
    names = {p.stem: p for p in (ROOT / "src").rglob("*.py")}
    assert {str(p) for name, p in names.items() if name in sys.stdlib_module_names} == set()


def test_without_the_extra_the_command_says_what_installs_it(place: Place) -> None:
    (place.site / "fusewright").symlink_to(ROOT / "src")
    (place.site / "hidden.py").write_text(_HIDDEN.format(names=("typer", "rich")))
    done = place.run("-c", "import hidden, runpy; runpy.run_module('fusewright')")
    assert done.stderr == 'fusewright: rich, typer missing; pip install "fusewright[train]"\n'
    assert done.returncode == 2


def test_without_what_only_training_imports_the_command_starts(place: Place) -> None:
    (place.site / "fusewright").symlink_to(ROOT / "src")
    names = ("datasets", "gguf", "jinja2", "matplotlib")
    (place.site / "hidden.py").write_text(_HIDDEN.format(names=names))
    (place.site / "recipe.yaml").write_text("base_model: x\ndatasets: [{path: x.jsonl}]\n")
    (place.site / "x.jsonl").write_text('{"text": "x"}\n')
    start = "import hidden, runpy, sys; sys.argv[1:] = {}; runpy.run_module('fusewright')"
    done = place.run("-c", start.format(["--version"]))
    assert done.returncode == 0, done.stderr
    recipe = str(place.site / "recipe.yaml")
    done = place.run("-c", start.format(["train", recipe, "--dry-run"]))
    assert done.returncode == 2
    assert "not installed (datasets, jinja2, matplotlib)" in done.stderr


_HIDDEN = """
import importlib.util
import sys

names = {names}
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in names else find(name)
sys.modules.update(dict.fromkeys(names))
"""


def _version() -> str:
    code = (ROOT / "src" / "__init__.py").read_text(encoding="utf-8")
    return next(line for line in code.splitlines() if line.startswith("__version__")).split('"')[1]
