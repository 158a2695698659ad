"""Recipes with one mistake, and what must be said about it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .commands import refused_run

GOOD = "base_model: some/model\ndatasets:\n  - path: rows.jsonl\n"


class Case(NamedTuple):
    """A recipe, what must be said about it, and the command line besides."""

    name: str
    text: str
    said: str
    arguments: tuple[str, ...] = ()


def good(name: str, more: str, said: str, *arguments: str) -> Case:
    """A recipe that is right but for what is added at line 4."""
    return Case(name, GOOD + more, said, arguments)


def check(case: Case, folder: Path) -> None:
    """Let the command refuse the recipe; one mistake is one line, and nothing is written.

    Args:
        case: the recipe.
        folder: an empty one, which is the current one.
    """
    (folder / "rows.jsonl").write_text("{}\n")
    path = folder / "recipe.yaml"
    path.write_text(case.text, encoding="utf-8")
    message = refused_run(folder, str(path), *case.arguments)
    assert case.said in message
    assert len(message.splitlines()) == 1 or case.said.startswith("has 2 problems")
    if not case.arguments:
        assert message.startswith(str(path))
