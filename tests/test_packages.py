"""What ``pyproject.toml`` declares of versions and extras, and what is said of it."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from torch import nn

from fusewright import optimize, packages
from fusewright.packages import install, install_extra, untested, untested_once

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _with_extra(line: str, extra: str) -> str:
    return f'{line}; extra == "{extra}"'


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The declared requirements, and the versions that seem to be installed."""
    lines = [*PROJECT["dependencies"]]
    lines += [_with_extra(line, extra) for extra in EXTRAS for line in EXTRAS[extra]]
    versions = {"torch": "2.13.0+cpu", "transformers": "5.24.0"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(packages, "_extras", lambda: list(EXTRAS))
    monkeypatch.setattr(packages, "_said", set())
    packages._requirements.cache_clear()
    yield versions
    packages._requirements.cache_clear()


@pytest.mark.parametrize(
    ("name", "version", "is_tested"),
    [
        ("torch", "2.10.1", False),
        ("torch", "2.11.0+cu130", True),
        ("torch", "2.13.2", True),
        ("torch", "2.14.0", False),
        ("torch", "2.15.0.dev20261201", False),
        ("transformers", "5.25.3", True),
        ("transformers", "5.26.0", False),
        ("trl", "1.17.0", False),
    ],
)
def test_versions_beyond_the_tested_ones_are_named(
    declared: dict[str, str], name: str, version: str, is_tested: bool
) -> None:
    assert untested() is None
    declared[name] = version
    message = untested()
    assert (message is None) == is_tested
    if message is not None:
        assert f"has run with {name} {version} (tested: " in message
        assert message.endswith(
            'pip install "fusewright[tested]" installs versions that were tested'
        )


def test_optimize_warns_once_of_what_is_untested(declared: dict[str, str]) -> None:
    declared["torch"], declared["transformers"] = "9.1.0", "9.2.0"
    with pytest.warns(UserWarning, match=r"has run with torch 9\.1\.0 and transformers 9\.2\.0"):
        optimize(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has run with")
        optimize(nn.Linear(2, 2))
    assert untested_once() is None, "a run says no more of it"


def test_what_is_tested_has_an_oldest_and_a_newest_version() -> None:
    newest = {r.name: str(r.specifier) for r in map(Requirement, EXTRAS["tested"])}
    assert all(re.fullmatch(r"<\d+\.\d+", versions) for versions in newest.values())
    oldest = [*PROJECT["dependencies"], *EXTRAS["rl"]]
    lowest = {r.name: str(r.specifier) for r in map(Requirement, oldest)}
    assert all(lowest[name].startswith(">=") for name in newest)
    assert {"torch", "transformers", "peft", "trl"} <= newest.keys()


def test_the_readme_says_what_is_tested() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    oldest = {r.name: str(r.specifier)[2:] for r in map(Requirement, PROJECT["dependencies"])}
    for one in map(Requirement, EXTRAS["tested"][:2]):
        major, minor = str(one.specifier)[1:].split(".")
        assert f"{one.name} {oldest[one.name]} to {major}.{int(minor) - 1}" in text


def test_all_has_every_extra_but_those_with_a_reason() -> None:
    (one,) = map(Requirement, EXTRAS["all"])
    built_at_installation = {"gptq", "hqq"}
    left = {"all", "tested", "test", "dev", "docs"} | built_at_installation
    assert one.name == "fusewright"
    assert one.extras == EXTRAS.keys() - left


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("bitsandbytes", 'pip install "fusewright[quant]"'),
        ("trl", 'pip install "fusewright[rl]"'),
        ("deepspeed", 'pip install "fusewright[distributed]"'),
        ("compressed-tensors", 'pip install "fusewright[compressed-tensors]"'),
        ("torchao", 'pip install "fusewright[torchao]"'),
        ("typer", 'pip install "fusewright[train]"'),
        ("torch", 'pip install "torch>=2.11"'),
        ("lomo-optim", "pip install lomo-optim"),
    ],
)
def test_what_installs_a_package(name: str, command: str) -> None:
    assert install(name) == command


def test_without_metadata_a_package_is_installed_by_its_name(monkeypatch: Any) -> None:
    def requires(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    packages._requirements.cache_clear()
    assert install("bitsandbytes") == "pip install bitsandbytes"
    assert untested() is None


def test_one_place_spells_the_commands() -> None:
    assert install_extra("quant") == 'pip install "fusewright[quant]"'
    texts = [p for p in (ROOT / "src").rglob("*.py") if p.name != "packages.py"]
    texts += [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.yaml")]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        spelled = re.findall(r"""pip install (?:-e )?['"]?(?:fusewright|\.)\[.*""", text)
        if path.suffix == ".py":
            assert not spelled, path
            named = re.findall(r"pip install (?!-)[\w'\"{]\S*", text)
            assert not named or path.name == "files.py", (path, named)  # two packages at once
        else:
            wrong = [s for s in spelled if not re.match(r'pip install (?:-e )?"', s)]
            assert not wrong, path
        assert {e for s in spelled for e in re.split(r"[\[\],]", s)[1:-1] if e.isalpha()} <= {
            *EXTRAS, ""
        }, path  # fmt: skip
