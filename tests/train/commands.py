"""The command, called as a user would; and what it must leave behind when it refuses."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from fusewright.cli.main import app

WAITS = (
    "checking this machine", "comparing the tensors", "compiling it", "computing with",
    "counting a training step", "evaluating", "importing PyTorch", "loading", "planning a training",
    "reading", "writing",
)  # fmt: skip
"""How the lines begin that announce what takes a while."""


def fusewright(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def complaint(result: Result) -> str:
    """What a command says is wrong, behind what it has waited for."""
    waits, begin, text = result.stderr.partition("fusewright: ")
    unexpected = [line for line in waits.splitlines() if not line.startswith(WAITS)]
    assert unexpected == []
    return begin + text


def refused(*arguments: str | Path, stdin: str | None = None, in_a_line: bool = True) -> str:
    """What a command says that must not work, and nothing else."""
    result = fusewright(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == "" or arguments[0] == "merge"  # which says what it does
    said = complaint(result)
    assert said
    assert said.count("\n") == 1 or not in_a_line
    assert "Traceback" not in result.output
    return said.removeprefix("fusewright: ").strip()


def refused_run(folder: Path, *arguments: str) -> str:
    """What ``train`` says that must not begin, and must change no file of ``folder``."""
    before = snapshot(folder)
    said = refused("train", *arguments, in_a_line=False)
    assert snapshot(folder) == before
    return said
