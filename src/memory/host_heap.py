"""The heap of the host's C library, where it is glibc's."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_OWN_MAPPING = 2**20
_HIGHEST = 32 * 2**20
"""The mapping threshold that glibc raises by itself to, as large blocks are freed."""


def _glibc() -> Any:
    """The C library; None where it is another one."""
    with contextlib.suppress(OSError, TypeError):
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            return library
    return None


def trim() -> None:
    """Give free pages back to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """While entered, map each block of 1 MiB and more by itself.

    It costs page faults, but what is freed is gone at once. Where thousands of blocks of many sizes
    come and go, the holes that they leave in the heap take more memory than the blocks.
    """
    library = _glibc()
    if library is None or any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
        yield  # another library, or the user has settings for this one
        return
    library.malloc_trim(0)
    library.mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)
    try:
        yield
    finally:
        # a threshold that was set no longer rises by itself: set those that it has after long use
        library.mallopt(_MMAP_THRESHOLD, _HIGHEST)
        library.mallopt(_TRIM_THRESHOLD, 2 * _HIGHEST)
        library.malloc_trim(0)
