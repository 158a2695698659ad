"""The C++ kernels of this room, compiled by this machine's compiler for its processor.

Where there is a C++ compiler the kernels take its seconds once: the library is kept in a folder of
the user's, and made anew only for other sources, another compiler or another processor. Where there
is none, or it fails, ops run their forms in plain PyTorch. ``problem`` says why, and ``explain``
that it failed.

The kernels know nothing of Python or PyTorch: they are given addresses, sizes and strides.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..fallback import FAILED

_SOURCES = ("vectors.h", "attention_plan.h", "attention.cpp", "narrow.cpp")
# 2026-11-28: sums of products are fused by default in GNU C++, as in Clang
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared")
_OWN = ("-march=native",)
_SECONDS = 120
"""How long the compiler may take."""


class _AbsentError(Exception):
    """There is nothing to compile the kernels with."""


class _Build:
    """The library of this process, made by a thread: ``library`` and ``problem`` when it is done.

    Attributes:
        library: the loaded library, or None.
        problem: why there is none.
    """

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.problem: str | None = "the process was forked while they were compiled"
        self.thread = threading.Thread(target=self._run, name="fusewright kernels", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.library, self.problem = ctypes.CDLL(str(_built())), None
        except _AbsentError as error:
            self.problem = str(error)
        except Exception as error:  # whatever it is, ops have another form
            self.problem = FAILED["kernels in C++"] = _reason(error)


@functools.cache
def start() -> _Build:
    """Compile or find the library in the background, unless that was begun before."""
    return _Build()


def start_for(tensors: Iterable[Tensor]) -> None:
    """``start`` where there are kernels for one of these."""
    if any(t.dtype is torch.bfloat16 and t.device.type == "cpu" for t in tensors):
        start()


def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be had; waits for the compiler."""
    build = start()
    if build.thread.is_alive():
        build.thread.join()
    return build.library


def problem() -> str | None:
    """Why there are no kernels, or None if there are; waits for the compiler."""
    library()
    return start().problem


def check(status: int) -> None:
    """Raise what a kernel's return value says.

    Raises:
        MemoryError: there was not enough memory.
    """
    if status:
        raise MemoryError("a kernel of fusewright could not allocate its memory")


def _built() -> Path:
    """The library's file; compiled unless it is there.

    Raises:
        _AbsentError: this machine has no compiler for them.
        RuntimeError: it fails.
    """
    if sys.platform != "linux":
        raise _AbsentError("they are compiled on Linux only")
    compiler = _compiler()
    if compiler is None:
        raise _AbsentError("no C++ compiler was found (g++ or clang++)")
    source = _source()
    what = (source, compiler, *_FLAGS, *_OWN, platform.machine(), _processor())
    name = hashlib.sha256("\0".join(what).encode()).hexdigest()[:32]
    folder = _folder()
    path = folder / f"kernels-{name}.so"
    if not path.exists():
        _compile(compiler, source, path, _OWN)
    return path


def _compiler() -> str | None:
    """The compiler that Inductor would take."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, filter(None, (asked, "g++", "clang++")))), None)


def _processor() -> str:
    """What decides which instructions there are: libraries are kept where several machines look."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    kinds = ("flags", "features", "model name", "cpu part")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(kinds)}))


def _folder() -> Path:
    """Where libraries are kept: nobody else may write there, for they are executed."""
    asked = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(asked or Path.home() / ".cache", "fusewright", "kernels")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = folder.stat()
        private = known.st_uid == os.getuid() and not known.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if private and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home
        pass
    return Path(tempfile.mkdtemp(prefix="fusewright-"))


def _source() -> str:
    return "".join((Path(__file__).parent / name).read_text() for name in _SOURCES)


def _compile(compiler: str, source: str, path: Path, flags: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as folder:
        text, made = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        text.write_text(source)
        command = [compiler, *_FLAGS, *flags, str(text), "-o", str(made)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            line = next((line for line in lines if "error" in line), (lines or ["no message"])[0])
            raise RuntimeError(f"{compiler} fails: {line[:200]}")
        made.replace(path)  # other processes see all of it or nothing


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"the C++ compiler took longer than {_SECONDS} seconds"
    return str(error) or type(error).__name__
