"""The console that commands print to: control characters are shown, not sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .printable import shown
from .recipe.secret_values import scrub

_PIPE = 10_000
"""Columns where the output is no terminal, so that nothing is wrapped there."""


class Terminal(Console):
    """Rich's console, which sends its own escapes and none of the text's.

    Rows, prompts, answers, names of files and errors of libraries may be anybody's words. All of
    them are printed by this class, in tables and bars, too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_terminal and "width" not in options:
            self.width = _PIPE

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; but a table in which words would be broken as lines.

        Of those lines, the first columns are still aligned, as far as three quarters of the width.
        """
        if not (objects and isinstance(objects[0], Table)):
            return super().print(*objects, **options)
        if self._fits(objects[0]):
            if self.is_terminal:
                return super().print(*objects, **options)
            with self.capture() as table:  # a file needs no spaces up to the longest cell
                super().print(*objects, **options)
            lines = (line.rstrip() for line in table.get().splitlines())
            return super().print(Text("\n").join(map(Text, lines)), soft_wrap=True)
        columns, used = [], 0
        for column in objects[0].columns:
            header = (column.header,) if objects[0].show_header else ()
            entries: Any = (*header, *column.cells)
            cells = [self.render_str(c) if isinstance(c, str) else c.copy() for c in entries]
            widest = max(cell.cell_len for cell in cells)
            used += widest + 2
            for cell in cells if used <= self.width * 3 // 4 else ():
                cell.pad_right(widest - cell.cell_len)
            columns.append(cells)
        for row in zip(*columns, strict=True):
            line = Text("  ").join(text for text in row if text)
            line.rstrip()
            say(self, line)

    def _fits(self, table: Table) -> bool:
        wide = self.options.update(width=_PIPE)
        for column in table.columns:
            if column.no_wrap:
                cells = (column.header, *column.cells)
                column.min_width = max(Measurement.get(self, wide, c).maximum for c in cells)
        return Measurement.get(self, wide, table).minimum <= self.width

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer([_plain(segment) for segment in buffer])


def say(console: Console, text: str | Text) -> None:
    """Print text as it is, on any console.

    On a terminal it is wrapped between words; one that is longer than a line stays whole, so that
    paths can be copied. A pipe gets it unwrapped.
    """
    whole = Text(shown(scrub(text))) if isinstance(text, str) else text
    whole.overflow = "ignore"  # of long words
    lines = whole.wrap(console, console.width) if console.is_terminal else [whole]
    console.print(Text("\n").join(lines), soft_wrap=True)


def announce(text: str) -> None:
    """Announce on standard error what takes a while.

    In a log as well: after minutes without a word a command seems to hang.
    """
    say(Terminal(stderr=True), text)


def _plain(segment: Segment) -> Segment:
    return segment if segment.control else segment._replace(text=shown(segment.text))
