"""What is said of a check that the doctor's child does not finish; the checks are made up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fusewright.train.doctor import child, compiler
from fusewright.train.doctor.child import CHECKS, ask
from fusewright.train.doctor.imports import NEEDED
from fusewright.train.doctor.report import Diagnosis, show
from fusewright.train.doctor.result import RERUN, CheckResult
from fusewright.train.terminal import Terminal


def make_up(monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """Let each check run a line, with its name in ``name``."""
    lines = (
        "import json, os, sys, time",
        "for name in sys.argv[2:]:",
        "    print(json.dumps(dict(name=name)), flush=True)",
        f"    {does}",
        "    found = [dict(name=name, value='works', state='ok', note='', mend='', needed=False)]",
        "    print(json.dumps(dict(name=name, found=found)), flush=True)",
    )
    monkeypatch.setattr(child, "_START", "\n".join(lines))


def test_a_crash_recommends_no_package_that_is_named_like_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_up(monkeypatch, "os.abort()")
    known = {"torch", "triton", "bitsandbytes"}
    for name in CHECKS:
        (found,) = ask([name], 60)[name]
        assert found["state"] == "broken"
        assert "SIGABRT" in found["note"]
        assert set(re.findall(r"pip \S+ (?:--\S+ )?([\w-]+)", found["mend"])) <= known, name
        assert bool(found["mend"]) is (name != "packages")
        assert found["needed"] is (name.removeprefix("import ") in NEEDED)
    (found,) = ask(["compiler"], 60)["compiler"]
    assert found["mend"].startswith("sudo apt-get install --reinstall g++")


@pytest.mark.long
def test_what_takes_too_long_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch, "time.sleep(60 * (name in ('import torch', 'attention')))")
    monkeypatch.setattr(child, "_EACH", 1)
    monkeypatch.setattr(child, "_SLOW", 2)
    found = ask(["packages", "import torch", "machine", "attention"], 60)
    sections = {name: [CheckResult.of(one) for one in records] for name, records in found.items()}
    (torch,), (attention,) = sections["import torch"], sections["attention"]
    assert (torch.state, torch.note) == ("unknown", "not finished after 2 seconds")
    assert (attention.state, attention.note) == ("unknown", "not finished after 1 seconds")
    assert sections["machine"][0].state == "ok"
    diagnosis = Diagnosis(sections)
    assert diagnosis.gaps() == []
    assert diagnosis.can_train()


def test_the_limit_of_all_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch, "time.sleep(60)")
    found = ask(["import torch", "machine"], 1)
    assert [records[0]["state"] for records in found.values()] == ["unknown"] * 2
    assert found["machine"][0]["note"] == "not checked: doctor reached its limit of 1 seconds"


@pytest.mark.parametrize("name", ["import transformers.trainer", "compiler", "rules"])
def test_a_slow_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Libraries and the compiler get longer than other checks, and the first check does."""
    make_up(monkeypatch, f"time.sleep(2.5 * (name == {name!r}))")
    monkeypatch.setattr(child, "_EACH", 1)
    first = [] if name == "rules" else ["packages"]
    (found,) = ask([*first, name], 60)[name]
    assert found["state"] == "ok"
    assert child._SLOW >= 60


def test_a_compiler_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "g++"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(compiler, "_path", lambda: str(slow))
    monkeypatch.setattr(compiler, "_SECONDS", 1)
    (found,) = compiler.compiler()
    assert (found.state, found.mend) == ("unknown", RERUN)


def test_a_folder_that_keeps_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compiler._not_kept() == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "fusewright" / "kernels").mkdir(parents=True)
    (tmp_path / "fusewright" / "kernels").chmod(0o777)
    assert re.search("kernels .* anew: PermissionError: others may write to", compiler._not_kept())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null")
    assert "anew: NotADirectoryError" in compiler._not_kept()


def test_the_unknown_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    empty: dict[str, list[CheckResult]] = {name: [] for name in CHECKS}
    late = CheckResult("import torch", "not known", "unknown", "not finished", RERUN)
    show(Diagnosis({**empty, "import torch": [late]}), Terminal(highlight=False))
    printed = capsys.readouterr().out
    assert f"not known: import torch; {RERUN}" in printed
    assert "no gaps" not in printed
