"""What a release and its recipes are made of: one version, and what ``pyproject.toml`` declares."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def release() -> Any:
    """The script that makes one."""
    return _program("release")


def _program(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_release_writes_its_version_everywhere(release: Any, tmp_path: Path) -> None:
    names = [*release._VERSIONS, "CHANGELOG.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = {name: (tmp_path / name).read_text(encoding="utf-8") for name in names}
    release.write_version(tmp_path, "9.8.7", "2031-02-03")
    for name in names:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count("9.8.7") == 1, name
        assert PROJECT["version"] in before[name]
        if name != "CHANGELOG.md":
            old = next(line for line in before[name].splitlines() if line not in text)
            new = old.replace(PROJECT["version"], "9.8.7")
            assert text == before[name].replace(old, new), "nothing else is changed"
    changes = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]\n\n## [9.8.7] - 2031-02-03\n\n###" in changes


def test_a_failed_release_leaves_nothing(
    release: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init")
    for key in ("user.name", "user.email", "user.signingkey", "core.hooksPath"):
        git("config", key, "" if "sign" in key else "nobody")
    file = tmp_path / "version"
    file.write_text("1")
    git("add", ".")
    git("commit", "--message", "first")
    git("tag", "v9.8.7/in-the-way")  # a folder where the tag would be a file
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["release.py", "9.8.7"])
    monkeypatch.setattr(release, "write_version", lambda root, new, day: file.write_text(new))
    monkeypatch.setattr(release, "_build", lambda version: [Path("fusewright.tar.gz")])
    for name in ("_run", "write_checksum_of_source"):
        monkeypatch.setattr(release, name, lambda *words: None)
    monkeypatch.setattr(release, "_sums", lambda artifacts, key: [])
    with pytest.raises(SystemExit, match="git tag --annotate"):
        release.main()
    assert (file.read_text(), git("log", "--format=%s"), git("status", "-s")) == ("1", "first", "")
    git("tag", "--delete", "v9.8.7/in-the-way")
    release.main()
    assert (file.read_text(), git("describe")) == ("9.8.7", "v9.8.7")


@pytest.mark.parametrize("version", ["9.8", "v9.8.7", "9.8.7-rc1", "next"])
def test_what_is_no_version_is_refused(release: Any, tmp_path: Path, version: str) -> None:
    with pytest.raises(SystemExit, match="is no version"):
        release.write_version(tmp_path, version, "2031-02-03")


def test_the_corners_are_what_is_declared() -> None:
    limits = _program("limits").limits
    oldest = {r.name: r.specifier for r in map(Requirement, limits("oldest"))}
    for line in [*PROJECT["dependencies"], *EXTRAS["rl"]]:
        one = Requirement(line)
        if one.name in oldest:
            (lowest,) = (s.version for s in one.specifier if s.operator == ">=")
            assert str(oldest[one.name]) == f"=={lowest}.*"
    assert limits("newest") == EXTRAS["tested"]


def test_the_recipe_needs_what_is_declared() -> None:
    recipe = yaml.safe_load((ROOT / ".ci/conda/recipe.yaml").read_text(encoding="utf-8"))
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # as they are called there
    declared = map(Requirement, [*PROJECT["dependencies"], *EXTRAS["train"]])
    expected = {f"{names.get(r.name, r.name)} {r.specifier}" for r in declared if not r.marker}
    python, *others = recipe["requirements"]["run"]
    assert set(others) == expected
    assert python == "python >=${{ python_min }}"
    assert f">={recipe['context']['python_min']}" == PROJECT["requires-python"]
    assert recipe["context"]["version"] == PROJECT["version"]
    (script,) = recipe["build"]["python"]["entry_points"]
    assert script == "fusewright = " + PROJECT["scripts"]["fusewright"]


_INSTRUCTIONS = ["README.md", "CONTRIBUTING.md", *(ROOT / ".ci/containers").glob("*.Dockerfile")]


@pytest.mark.parametrize("file", _INSTRUCTIONS, ids=lambda file: Path(file).name)
def test_instructions_install_tested_versions(file: str | Path) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    builds = re.findall(r"pip install (\S+) --index-url", text)
    assert [build.strip('"') for build in builds] == [EXTRAS["tested"][0]]
    command = r'(?m)^(?: {4}|RUN )pip install (?:-e )?"[/\w.]*\[([\w,]+)\]"'
    extras = [found.split(",") for found in re.findall(command, text)]
    assert len(extras) == (2 if file == "README.md" else 1)
    assert all("tested" in names for names in extras)


def test_the_gate_has_a_version_of_each_package_within_the_tested_range() -> None:
    lines = (ROOT / ".ci/versions.txt").read_text(encoding="utf-8").splitlines()
    versions = {}
    for one in map(Requirement, lines):
        (exact,) = one.specifier
        assert exact.operator == "=="
        assert "+" not in exact.version  # which only some indexes have
        versions[canonicalize_name(one.name)] = exact.version
    wanted = [*PROJECT["dependencies"]]
    for extra in ("tested", "test", "train", "quant", "rl", "export", "images", "dev", "docs"):
        wanted += EXTRAS[extra]
    for one in map(Requirement, wanted):
        if one.name != "fusewright" and one.name != "setuptools":
            assert one.specifier.contains(versions[canonicalize_name(one.name)]), one


def test_the_gate_runs_the_second_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ((install, run),) = re.findall(r"(?m)^ +(pip install -e \S+) && (pytest)$", readme)
    environment = (ROOT / ".ci/environment").read_text(encoding="utf-8")
    assert install.replace("install", "install --quiet") in environment.splitlines()
    gate = (ROOT / ".ci/run").read_text(encoding="utf-8")
    (line,) = re.findall(rf"(?m)^{run}\b.*$", gate)
    assert [word for word in line.split()[1:] if not word.startswith("--durations")] == []


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_container_is_made_of_what_is_there(name: str) -> None:
    text = (ROOT / ".ci" / "containers" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    copied = [file for line in re.findall(r"(?m)^COPY (.*)$", text) for file in line.split()[:-1]]
    assert {f for f in copied if not (ROOT / f).exists()} == set()
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "src"}
    assert needed | {".ci/backend.py", ".ci/manifest.in"} <= set(copied)
    (extras,) = re.findall(r"/source\[(.*)\]", text)
    assert set(extras.split(",")) <= EXTRAS.keys()


@pytest.mark.slow
def test_what_is_built_works_where_nothing_else_is(tmp_path: Path) -> None:
    """Half a minute of CPU time; CI does so with the wheel."""
    options: dict[str, Any] = {"check": True, "cwd": ROOT, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path)], **options)
    artifacts = sorted(map(str, tmp_path.iterdir()))
    smoke = [sys.executable, ".ci/smoke.py", *artifacts, "--shared"]
    said = subprocess.run(smoke, **options).stdout
    assert said.count(" modules, ") == 2
    assert [line.split()[0] for line in said.splitlines() if " works (" in line] == [
        Path(a).name for a in artifacts
    ]
