"""Other libraries of C++ kernels than this machine's own: none, or one for a lesser CPU."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusewright.kernels.native import build, library


def use(monkeypatch: pytest.MonkeyPatch, found: ctypes.CDLL | None) -> None:
    """Let ops find this library, or none."""
    problem = None if found else "a test"
    loading = SimpleNamespace(library=found, problem=problem, thread=threading.Thread())
    monkeypatch.setattr(library, "start", lambda name="": loading)


def compiled(folder: Path, *flags: str, name: str = "kernels") -> ctypes.CDLL:
    """A library, compiled with these flags in place of ``-march=native``."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip(build.missing_compiler())
    path = folder / "kernels.so"
    build.compile_kernels(compiler, build.source(name), path, flags)
    return ctypes.CDLL(str(path))


def require() -> None:
    """Skip where this machine has no kernels: there is nothing to test."""
    problem = library.problem()
    if problem:
        pytest.skip(f"there are no C++ kernels: {problem}")
