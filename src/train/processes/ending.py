"""How one process of several ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn


@contextlib.contextmanager
def ending_as_rank() -> Iterator[None]:
    """End a process by ``end_rank`` if the block calls ``sys.exit`` and is one of several."""
    try:
        yield
    except SystemExit as ended:
        if "torch.distributed" in sys.modules and os.environ.get("WORLD_SIZE", "1") != "1":
            end_rank(ended.code)
        raise


def end_rank(code: Any) -> NoReturn:
    """End this process without taking Python's modules down.

    All is written by then, and PyTorch's group of processes is gone. But threads of PyTorch's C++
    code, whose owners go in no particular order, can abort the process, and a launcher would take a
    run that has finished for one that was killed. ``code`` is that of a ``SystemExit``.
    """
    # as the interpreter ends: idle threads of pools are told to end, then all threads are awaited
    threading._shutdown()  # type: ignore[attr-defined]  # 2026-11-27: not in typeshed
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that is closed
            stream.flush()
    os._exit(code or 0)
