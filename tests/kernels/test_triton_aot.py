"""Every Triton kernel compiles ahead of time, in each configuration, for every target."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from fusewright import kernels
from fusewright.kernels import aot

from .util import needs_triton

SHARED = (
    "attention_backward_triton", "attention_forward_triton", "attention_tiles_triton",
    "linear_logprob_kernels_triton", "rms_norm_kernels_triton", "selective_scan_tiles_triton",
    "ssd_backward_triton", "ssd_tiles_triton",
)  # fmt: skip
"""What others are made of: it is compiled with them."""

MODULES = sorted(
    m.name.removeprefix(f"{kernels.__name__}.")
    for m in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    if m.name.endswith("_triton") and not m.name.endswith(SHARED)
)
QUICK = (
    "attention.rope_triton", "loss.linear_cross_entropy_triton", "mlp.glu_triton",
    "norms.rms_norm_triton",
)  # fmt: skip
"""What the default run compiles; all of them take minutes."""

pytestmark = needs_triton


def test_there_are_kernels() -> None:
    assert MODULES


@pytest.mark.parametrize(
    "module",
    [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MODULES],
)
def test_every_case_compiles_for_every_target(module: str) -> None:
    cases = importlib.import_module(f"{kernels.__name__}.{module}").AOT
    assert cases, f"{module}.AOT is empty"
    assert len({case.name for case in cases}) == len(cases), "two cases have one name"
    failures = []
    for case in cases:
        for target in aot.TARGETS:
            try:
                compiled = aot.compile_case(case, target)
            except Exception as error:
                failures.append(f"{case.name} for {target}: {type(error).__name__}: {error}")
            else:
                assert compiled.asm["cubin" if target[0] == "cuda" else "hsaco"]
    assert not failures, "\n".join(failures)
