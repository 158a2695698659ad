"""The parts of the tests beside the core, and the record of their results."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..parts import PARTS, SHARES, part_of
from . import nightly
from .house import ROOT

NAMES = [part.name for part in nightly.PARTS]


def test_every_set_of_markers_has_one_part_and_none_is_the_core() -> None:
    found = {
        part_of(f"tests/test_{i}.py::test", {"real", *markers})
        for number in range(len(SHARES) + 1)
        for markers in itertools.combinations(SHARES, number)
        for i in range(50)
    }
    assert found == {None, *PARTS}
    assert part_of("tests/test_a.py::test", {"gpu", "real"}) is None


def test_tests_of_a_file_stay_together_except_those_of_the_zoo() -> None:
    ids = [f"tests/test_a.py::test[{i}]" for i in range(50)]
    assert len({part_of(i, {"slow"}) for i in ids}) == 1
    assert len({part_of(i, {"zoo"}) for i in ids}) == SHARES["zoo"]


def test_parts_and_fuzz_run_nightly() -> None:
    assert set(PARTS) < set(NAMES)
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.slow
def test_the_core_and_the_parts_are_all_tests() -> None:
    """Five minutes: the tests are collected once for each part."""
    core, every = _collected(), _collected("-m", "")
    parts = [_collected("--part", name) for name in PARTS]
    assert len(core) > 1000
    assert core | set[str]().union(*parts) == every
    assert len(core) + sum(map(len, parts)) == len(every)


def _collected(*options: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line for line in done.stdout.splitlines() if "::" in line}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, with parts that take no time."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, check=True)

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "nightly.txt").write_text("")
    (tmp_path / "code.py").write_text("")
    git("init")
    for key in ("user.name", "user.email"):
        git("config", key, "tests")
    git("add", ".")
    git("commit", "--message", "first")
    monkeypatch.setattr(nightly, "ROOT", tmp_path)
    monkeypatch.setattr(nightly, "PARTS", (_part("good"), _part("bad", 1), _part("gone", why="x")))
    return tmp_path


def _part(name: str, code: int = 0, why: str | None = None) -> nightly.Part:
    program = (
        f"print('{name} runs'); print('= 7 passed, 2 skipped in 1s ='); raise SystemExit({code})"
    )
    return nightly.Part(name, lambda commit: [sys.executable, "-c", program], lambda: why)


def _recorded(clone: Path) -> list[str]:
    lines = (clone / "tests" / "nightly.txt").read_text(encoding="utf-8").splitlines()
    return [" ".join(line.split(" (")[0].split()[2:]) for line in lines]


def test_results_are_recorded_and_what_passed_is_not_run_again(clone: Path, capfd: Any) -> None:
    assert nightly.main([]) == 1
    results = [
        "good passed: 7 passed, 2 skipped, 0 min", "bad failed: 7 passed, 2 skipped, 0 min",
        "gone not run: x",
    ]  # fmt: skip
    assert _recorded(clone) == results
    assert "good runs" in capfd.readouterr().out
    assert nightly.main([]) == 1
    assert _recorded(clone) == [*results, *results[1:]]
    assert "good runs" not in capfd.readouterr().out
    assert nightly.main(["good"]) == 0
    assert _recorded(clone)[-1] == results[0]
    capfd.readouterr()
    assert nightly.main(["--list"]) == 0
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines()] == [
        ["good", "passed:"], ["bad", "failed:"], ["gone", "not"],
    ]  # fmt: skip


def test_a_changed_work_tree_and_an_unknown_part_are_refused(clone: Path, capfd: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        nightly.main(["none"])
    assert "no part is called 'none'; there are good, bad, gone" in capfd.readouterr().err
    (clone / "new.py").write_text("")
    with pytest.raises(SystemExit, match="2"):
        nightly.main(["good"])
    assert "new.py" in capfd.readouterr().err
    assert _recorded(clone) == []
