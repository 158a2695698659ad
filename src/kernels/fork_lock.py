"""A lock that is free in a forked process, where the thread that held it does not exist."""

from __future__ import annotations

import os
import threading
from types import TracebackType


class ForkLock:
    """As ``threading.RLock``; for objects that live as long as the process."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def acquire(self, timeout: float = -1) -> bool:
        """Wait for the lock, at most ``timeout`` seconds; whether it is held now."""
        return self._lock.acquire(timeout=timeout)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
