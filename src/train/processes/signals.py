"""Ctrl-C, SIGTERM and SIGHUP, handled at the right moment."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .world import World


def heeded() -> list[int]:
    """The signals to handle: SIGHUP unless nohup has it ignored, and not on Windows."""
    hangup: Any = getattr(signal, "SIGHUP", None)
    closed = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hangup] if closed else [])]


_ECHO = 1.0
"""Seconds in which a signal of another kind is the same request: on Ctrl-C, DeepSpeed's launcher
sends a SIGTERM besides the SIGINT of the terminal."""


class Stopped(KeyboardInterrupt):
    """The user or the system asked the run to end at once, by the signal ``signal``."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Interrupts:
    """While entered, turns SIGINT, SIGTERM and SIGHUP into an orderly end.

    Outside of ``deferring_signals`` a signal raises ``Stopped`` where it arrives. Inside, the first
    one only sets ``signal``, for the training loop to see after the batch, step or validation that
    it is at (``FlowCallback``); a second one raises.

    Attributes:
        signal: the one that came, to this process or, once they agree, to another; or None.
    """

    STOPPING = "Stopping after this step and saving; press Ctrl-C again to quit without saving."
    WRITING = "Writing the last files; press Ctrl-C again to quit without them."

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.signal: int | None = None
        self._arrived: int | None = None
        self._when = 0.0
        self._shown_elsewhere = False
        self._message = ""
        self._before: dict[int, Any] = {}
        self._process = os.getpid()  # the workers of a data loader are forks, and get Ctrl-C, too

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            for number in heeded():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> None:
        """Make a deferred signal known to all processes of the run; a collective.

        Before that, ``signal`` is set in none of them, so that all of them end at the same step.
        """
        if self.world.several and self.signal is None:
            self.signal = self.world.most(self._arrived or 0) or None

    @contextlib.contextmanager
    def deferring_signals(self, message: str = STOPPING) -> Iterator[None]:
        """Defer the first signal to the end of the step, or of the block; ``message`` says so."""
        self._message = message
        try:
            yield
        finally:
            self._message = ""

    @contextlib.contextmanager
    def shown_elsewhere(self) -> Iterator[None]:
        """Leave it to a live display to say that a signal came; a line from here would be lost."""
        self._shown_elsewhere = True
        try:
            yield
        finally:
            self._shown_elsewhere = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._message or (self._arrived is not None and not self._echoes(number)):
            self.signal = number
            raise Stopped(number)
        if self._arrived is not None:
            return
        self._arrived, self._when = number, time.monotonic()
        if not self.world.several:
            self.signal = number
        quiet = self._shown_elsewhere or os.getpid() != self._process
        if self.world.main and not quiet:
            # not through a file object: this may interrupt one of its own writes
            os.write(2, f"\n{self._message}\n".encode())

    def _echoes(self, number: int) -> bool:
        """Whether a launcher has sent this signal because of the first."""
        return number != self._arrived and time.monotonic() - self._when < _ECHO
