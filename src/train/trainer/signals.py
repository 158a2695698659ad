"""Ctrl-C, SIGTERM and SIGHUP, at the right moment."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""Ctrl-C, the system's wish, and a terminal that was closed (which Windows has not)."""


class Stopped(KeyboardInterrupt):
    """The user or the system asked the run to end at once.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Interrupts:
    """While entered, turns SIGINT, SIGTERM and SIGHUP into an orderly end.

    Outside of ``deferring_signals`` a signal raises ``Stopped`` where it arrives. Inside, the first
    one only sets ``signal``, for the training loop to see after the batch, step or validation that
    it is at (``FlowCallback``); a second one raises.

    Attributes:
        signal: the one that came, or None.
    """

    STOPPING = "Stopping after this step and saving; press Ctrl-C again to quit without saving."
    WRITING = "Writing the last files; press Ctrl-C again to quit without them."

    def __init__(self) -> None:
        self.signal: int | None = None
        self._shown_elsewhere = False
        self._message = ""
        self._before: dict[int, Any] = {}
        self._process = os.getpid()  # the workers of a data loader are forks, and get Ctrl-C, too

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
        if not self._message or self.signal is not None:
            self.signal = number
            raise Stopped(number)
        self.signal = number
        if not self._shown_elsewhere and os.getpid() == self._process:
            # not through a file object: this may interrupt one of its own writes
            os.write(2, f"\n{self._message}\n".encode())
