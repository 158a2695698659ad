"""The console that commands print to: what acts on a terminal is shown, not sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from .printable import shown
from .recipe.secrets import scrub


class Terminal(Console):
    """Rich's console, which sends its own escapes and none of the text's.

    Rows, prompts, answers, names of files and errors of libraries may be anybody's words. This is
    where all of them pass, in tables and bars, too.
    """

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer([_plain(segment) for segment in buffer])


def say(console: Console, text: str) -> None:
    """Print a line as it is, on any console."""
    plain = shown(scrub(text))
    options: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(plain, **options)


def _plain(segment: Segment) -> Segment:
    return segment if segment.control else segment._replace(text=shown(segment.text))
