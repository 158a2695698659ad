"""Ahead-of-time cases of Triton kernels, a module for each ``OP_triton.py``.

Each ends with ``AOT``: cases that together cover every configuration its launchers can choose.
"""

from __future__ import annotations

import importlib

from tests.kernels.aot import AotCase

SHARED = ("head_matmul_triton", "head_rows_triton")
"""Modules of kernels whose cases are those of the module that launches them."""


def cases_of(module: str) -> tuple[AotCase, ...]:
    """The cases of a module of kernels, such as "mlp.glu_triton"; none of a shared one."""
    if module.endswith(SHARED):
        return ()
    name = module.rpartition(".")[2].removesuffix("_triton")
    return tuple(importlib.import_module(f"{__name__}.{name}").AOT)
