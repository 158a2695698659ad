"""The command, called as a user would; and what it must leave behind when it refuses."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from fusewright.cli.main import app


def fusewright(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(tmp_path: Path, *arguments: str) -> str:
    """The message of a run that must be refused: exit code 2, nothing printed, nothing changed."""
    before = snapshot(tmp_path)
    result = fusewright("train", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("fusewright: ")
    assert "Traceback" not in result.output
    assert snapshot(tmp_path) == before
    return result.stderr.removeprefix("fusewright: ").strip()
