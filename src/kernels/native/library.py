"""The C++ kernels of this folder, loaded: compiled in the background, when they are first needed.

They are libraries, by the names of ``build.SOURCES``; ``"kernels"`` is what most models need.

Where there is a C++ compiler the kernels take its seconds once (``build.py``). Where there is none,
or it fails, ops run their forms in plain PyTorch: ``problem`` and ``explain`` say why.

The kernels know nothing of Python or PyTorch: they are given addresses, sizes and strides.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..fallback import FAILED
from ..fork_lock import ForkLock
from .build import SECONDS, built, is_temporary


class Loading:
    """A library of this process, loaded by a thread, or the ``problem`` why there is none."""

    def __init__(self, name: str = "kernels") -> None:
        self.name = name
        self.library: ctypes.CDLL | None = None
        self.file: Path | None = None  # where it is kept
        self.problem: str | None = None
        self.thread = threading.Thread(target=self._run, name="fusewright kernels", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            path = built(self.name)
            self.library = ctypes.CDLL(str(path))
            if is_temporary(path):
                shutil.rmtree(path.parent, ignore_errors=True)
            else:
                self.file = path
        except Exception as error:  # whatever it is, ops have another form
            self.problem = FAILED["kernels in C++"] = _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"the C++ compiler took longer than {SECONDS} seconds"
    return str(error) or type(error).__name__


_lock = ForkLock()
_loading: dict[str, Loading] = {}


def start(name: str = "kernels") -> Loading:
    """Compile or find a library in the background, unless that was begun before."""
    with _lock:
        if name not in _loading:
            _loading[name] = Loading(name)
        return _loading[name]


def has_started() -> bool:
    """Whether the kernels have been needed so far."""
    return bool(_loading)


def _forget_unfinished() -> None:
    for name, loading in list(_loading.items()):
        if loading.library is None and loading.problem is None:
            del _loading[name]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_unfinished)


def start_for(tensors: Iterable[Tensor]) -> None:
    """``start`` where there are kernels for one of these."""
    if any(t.dtype is torch.bfloat16 and t.device.type == "cpu" and are_real(t) for t in tensors):
        start()


def library(name: str = "kernels") -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be had; waits for the compiler."""
    loading = start(name)
    if loading.thread.is_alive():
        loading.thread.join()
    return loading.library


def problem() -> str | None:
    """Why there are no kernels, or None if there are; waits for the compiler."""
    library()
    return start().problem


def are_real(*tensors: Tensor) -> bool:
    """Whether tensors have memory: ``doctor`` runs the implementations of ops on fake ones."""
    return not any(isinstance(t, FakeTensor) for t in tensors)


def check(status: int) -> None:
    """Raise MemoryError if a kernel's return value says that there was not enough memory."""
    if status:
        raise MemoryError("a kernel of fusewright could not allocate its memory")
