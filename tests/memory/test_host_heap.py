"""Memory that the host's C library keeps, or gives back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import contextlib, ctypes, sys
from fusewright.memory.host_heap import large_blocks_mapped, trim
from fusewright.memory.meter import process_status

heap = ctypes.CDLL(None)
heap.malloc.restype, heap.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
heap.free.restype, heap.free.argtypes = None, [ctypes.c_void_p]
heap.free(heap.malloc(31 << 20))  # from now on such blocks come from the heap

def left():
    before, large = process_status("VmRSS"), []
    for _ in range(64):
        large.append(heap.malloc(2 << 20))
        ctypes.memset(large[-1], 1, 2 << 20)
        heap.malloc(64 << 10)  # stays, and holds the heap above what is freed
    for block in large:
        heap.free(block)
    return (process_status("VmRSS") - before) >> 20

with large_blocks_mapped() if sys.argv[1] == "mapped" else contextlib.nullcontext():
    print(left())
print(left())
before = process_status("VmRSS")
trim()
print((before - process_status("VmRSS")) >> 20)
"""

glibc = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})


@pytest.mark.skipif(not glibc, reason="the heap of another C library is left alone")
def test_what_is_freed_goes_back_to_the_system() -> None:
    def measured(how: str) -> list[int]:
        command = [sys.executable, "-c", CODE, how]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [int(line) for line in text.split()]

    left, after, trimmed = measured("mapped")
    assert left < 16  # MiB; 128 were freed
    assert after > 100  # it is over with the block
    assert trimmed > 100
    left, *_ = measured("plain")
    assert left > 100
