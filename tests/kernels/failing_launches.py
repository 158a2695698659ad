"""Kernels that cannot be compiled or launched, on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fusewright.rewrite.op_table  # noqa: F401  2026-11-28: defines all ops
from fusewright.kernels import fallback
from fusewright.kernels.launch import has_triton


def _triton_errors() -> dict[str, Callable[[], Exception]]:
    if not has_triton():
        return {}
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "resources": lambda: OutOfResources(300000, 232448, "shared memory"),
        "type": lambda: CompilationError("x = 1\ny = 2", _caused(), "fp8 is not supported\nhere"),
        "ptxas": lambda: PTXASError("Internal Triton PTX codegen error\n`ptxas` stderr: ..."),
    }


def _caused() -> Any:
    import ast

    return ast.parse("x = 1").body[0]


ERRORS: dict[str, Callable[[], Exception]] = {
    **_triton_errors(),
    "compiler": lambda: subprocess.CalledProcessError(255, ["ptxas", "-v"]),
    "driver": lambda: RuntimeError("0 active drivers ([]). There should only be one."),
    "no image": lambda: torch.AcceleratorError(
        "CUDA error: no kernel image is available for execution on the device\nCompile with ..."
    ),
    "grid": lambda: RuntimeError("Triton Error [CUDA]: invalid argument"),
}
"""How compiling or launching fails."""

RAISED: dict[str, Callable[[], Exception]] = {
    "assert": lambda: torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA ..."),
    "access": lambda: RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "module memory": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "host memory": lambda: MemoryError(),
}
"""What a kernel that ran, or the machine, has to say: raised, as in eager code."""


@contextmanager
def clean() -> Iterator[None]:
    """No kernel has failed before, and none is known to have failed afterwards."""
    before = dict(fallback.FAILED)
    fallback.FAILED.clear()
    try:
        yield
    finally:
        fallback.FAILED.clear()
        fallback.FAILED.update(before)


@contextmanager
def as_on_a_gpu(make: Callable[[], Exception]) -> Iterator[mock.Mock]:
    """Let ops choose Triton on the CPU, and each launch raise what ``make`` makes.

    Yields:
        What is called in place of Triton's launcher.
    """

    def use_triton(*tensors: Tensor | None) -> bool:
        return not any(t is not None and t.dtype is torch.float64 for t in tensors)

    modules = [
        m
        for name, m in list(sys.modules.items())
        if name.startswith("fusewright.kernels.") and hasattr(m, "use_triton")
    ]
    assert len(modules) >= 10
    with clean(), mock.patch("triton.runtime.jit.JITFunction.run") as run:
        run.side_effect = lambda *args, **kwargs: _raise(make())
        patches = [mock.patch.object(m, "use_triton", use_triton) for m in modules]
        for patch in patches:
            patch.start()
        try:
            yield run
        finally:
            for patch in patches:
                patch.stop()


def _raise(error: Exception) -> None:
    raise error
