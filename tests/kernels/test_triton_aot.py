"""Every Triton kernel compiles ahead of time, in each configuration, for every target."""

from __future__ import annotations

import pkgutil

import pytest

from fusewright import kernels
from tests.kernels import aot

from .aot_cases import SHARED, cases_of
from .util import needs_triton

MODULES = sorted(
    m.name.removeprefix(f"{kernels.__name__}.")
    for m in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    if m.name.endswith("_triton") and not m.name.endswith(SHARED)
)
QUICK = (
    "attention.rope_triton", "loss.head_triton", "mlp.glu_triton", "norms.rms_norm_triton",
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
    cases = cases_of(module)
    assert cases, f"{module} has no cases"
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
