"""One compilation by Inductor for the processes of a machine: the others read its cache.

Inductor keeps what it has compiled in a folder of the user's, under a key of graph, inputs,
settings, versions and processor, and validates it when it is read. Processes that compile the same
graph at the same time would all miss it; here the first one compiles, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ...sharding import has_peers

PATIENCE = 300.0
"""Seconds that a process waits for the compilation of another one."""

_PAUSE = 0.1
"""Seconds between two looks at the lock, at most."""

FOLDER = "fusewright-locks"
"""The name of the folder of the locks, in that of Inductor's cache."""


@contextlib.contextmanager
def first_one_compiles(graph: Any, examples: Sequence[Any]) -> Iterator[None]:
    """While a graph is compiled: wait first for another process that compiles it, if one does."""
    # The system releases the lock of a process that ends, however it ends. A process that has
    # waited in vain compiles by itself. With one process, nothing is locked.
    folder = lock_folder() if has_peers() and isinstance(graph, fx.GraphModule) else None
    lock = None if folder is None else _opened(folder / _name(graph, examples))
    if lock is None:
        yield
        return
    try:
        if not _take(lock, shared=False):
            _wait(lock)
        yield
    finally:
        _release(lock)  # closing is not enough where a process was forked meanwhile
        os.close(lock)


def lock_folder() -> Path | None:
    """The folder of the locks; None without a cache, or if others could write to it."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if not config.fx_graph_cache or config.force_disable_caches:
        return None
    try:
        folder = Path(cache_dir(), FOLDER)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    others = stat.S_IWGRP | stat.S_IWOTH
    private = status.st_uid == os.geteuid() and not status.st_mode & others
    return folder if private and stat.S_ISDIR(status.st_mode) else None


def _name(graph: fx.GraphModule, examples: Sequence[Any]) -> str:
    """The same for equal graphs and inputs; other settings are told apart by Inductor's own key."""
    inputs = [
        f"{tuple(x.shape)} {x.stride()} {x.dtype} {x.device}" if isinstance(x, Tensor) else str(x)
        for x in examples
    ]
    return hashlib.sha256("\n".join([graph.code, *inputs]).encode()).hexdigest()


def _opened(path: Path) -> int | None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except OSError:
        return None


def _take(lock: int, shared: bool) -> bool:
    """Lock the file, unless another process has it; one that cannot be locked counts as ours."""
    import fcntl

    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _wait(lock: int) -> None:
    """Wait until the process that has the lock is done; then all that wait go on at once."""
    # so a graph that Inductor does not cache is compiled by them side by side
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if _take(lock, shared=True):
            _release(lock)
            return
        time.sleep(_PAUSE)


def _release(lock: int) -> None:
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
