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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
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
    if folder is None:
        yield
        return
    lock = FileLock(folder / _name(graph, examples), mode=0o600, fallback_to_soft=False)
    # a file that cannot be locked counts as locked: it is a link, say, or its file system has no
    # locks; a time-out is an ``OSError``, too
    with contextlib.suppress(OSError):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            lock.acquire(timeout=PATIENCE, poll_interval=_PAUSE)
            # at once, so that all that have waited go on side by side: they read what was
            # compiled, or compile a graph that Inductor does not cache
            lock.release()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.release()


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
