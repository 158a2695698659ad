"""What a run prints, how long its parts take, and which of them failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console

from ..recipe.secrets import scrub
from ..terminal import say
from .result import RunResult


class RunLog:
    """Prints, and notes times and failures in the result.

    Args:
        result: of the run.
        console: where to print.
    """

    def __init__(self, result: RunResult, console: Console) -> None:
        self.result, self.console = result, console

    def say(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to those of ``part``."""
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"at {part}")  # for the last line, if nobody foresaw it
            raise
        finally:
            before = self.result.seconds.get(part, 0.0)
            self.result.seconds[part] = before + time.perf_counter() - begun

    @contextlib.contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """After training: a failure in the block is reported and recorded; the run continues."""
        try:
            with self.timed(part):
                yield
        except Exception as error:  # a signal is none of these
            why = scrub(f"{type(error).__name__}: {error}")
            self.result.problems.append({"part": part, "error": why})
            self.say(f"{part} failed; the run continues without it: {why}")
