"""Time limits of tests, which grow with the load of the machine."""

from __future__ import annotations

import os
import time


def stretched(seconds: float) -> float:
    """Return ``seconds`` times the processes that wait for each core now, at least once."""
    return seconds * _stretch()


class Limit:
    """A time limit, which passes more slowly while other processes use the machine.

    Args:
        seconds: on an idle machine.
    """

    def __init__(self, seconds: float) -> None:
        self._left, self._seen = seconds, time.monotonic()

    def left(self) -> float:
        """Return the seconds that are left, on an idle machine; 0 when the limit has passed."""
        now = time.monotonic()
        self._left -= (now - self._seen) / _stretch()
        self._seen = now
        return max(0.0, self._left)


def _stretch() -> float:
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
