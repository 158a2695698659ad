"""How commands end: exit codes, one line, and a traceback that is kept and not shown."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from ..load import stretched
from .commands import complaint, fusewright


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def failing(error: BaseException, file: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A run in which loading the model raises ``error``."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("fusewright.train.trainer.ready.load_model", fail)
    result = fusewright("train", str(file))
    assert not (file.parent / "out").exists()
    return result


def test_an_error_that_nobody_foresaw(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = failing(KeyError("layers"), file, monkeypatch)
    assert result.exit_code == 1
    (line,) = complaint(result).splitlines()
    assert line.startswith("fusewright: train, at load: KeyError: 'layers'. This may be a bug")
    (kept,) = tmp_path.glob("fusewright-traceback-*.txt")
    assert line.endswith(f"the traceback in {kept}")
    assert "in _model" in kept.read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["asked for", "no place"])
def test_a_traceback_that_is_printed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "asked for":
        monkeypatch.setenv("FUSEWRIGHT_TRACEBACK", "1")
    else:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        monkeypatch.setattr("fusewright.train.run.TrainingRun._prepare", lambda *_: None)
    result = failing(KeyError("layers"), file, monkeypatch)
    assert result.exit_code == 1
    assert "in _model" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("the traceback above")


def test_the_traceback_of_a_mistake_is_there_for_who_asks(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEWRIGHT_TRACEBACK", "1")
    result = fusewright("train", str(file), "--max_steps", "many")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "must be a whole number" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_not_enough_memory(
    error: Exception, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = failing(error, file, monkeypatch)
    assert result.exit_code == 1
    (line,) = complaint(result).splitlines()
    assert line.startswith("fusewright: train, at load: there is not enough memory (")
    assert "micro_batch_size" in line
    assert not list(tmp_path.glob("fusewright-traceback-*"))


def test_a_reader_that_went_away(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dup2: list[Any] = []
    monkeypatch.setattr("os.dup2", lambda *fds: dup2.append(fds))
    result = failing(BrokenPipeError(errno.EPIPE, "gone"), file, monkeypatch)
    assert (result.exit_code, complaint(result), len(dup2)) == (141, "", 1)


def test_a_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_FUEL", "lots")
    result = fusewright("schema")
    assert result.exit_code == 2
    assert result.stderr == (
        "fusewright: FUSEWRIGHT_FUEL='lots': the number of rewrites allowed, as in 12\n"
    )


def test_no_command_shows_the_help() -> None:
    result = fusewright()
    assert result.exit_code == 2
    assert "preprocess" in result.output


def run_in(encoding: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run(
        [sys.executable, "-m", "fusewright.cli", *arguments],
        capture_output=True, text=True, env=environment, timeout=stretched(300), check=False,
        encoding=encoding,
    )  # fmt: skip


@pytest.mark.long
def test_output_that_is_not_utf_8(recipe: dict[str, Any], tmp_path: Path) -> None:
    words = {"sample_prompt": "Grüße, 猫?", "default_system_message": "žluťoučký"}
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump({**recipe, **words, "max_steps": 1}, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    done = run_in("ascii", "train", str(path))
    assert done.returncode == 0, done.stderr
    assert r"answering: Gr\xfc\xdfe, \u732b?" in done.stdout
    asked = ("generate", str(tmp_path / "out"), "Grüße, 猫 😀?", "--json", "--max_new_tokens=2")
    answer = run_in("ascii", *asked)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["messages"][-1]["content"] == "Grüße, 猫 😀?"
