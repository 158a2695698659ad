"""Run each module of ``tests/kernels/interpreted`` under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusewright.kernels.launch import has_triton

from ..load import stretched

FOLDER = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[2]
LONG = ("head", "mlp_block", "old_gpu", "rope")
"""The longest in the interpreter: twenty seconds to minutes each."""
OPS = [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
    for name in sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))
]


@pytest.mark.long(
    "add_rms_norm",
    "corrected",
    "fallback",
    "glu",
    "layer_norm",
    "head_bounds",
    "lora_linear",
    "moe_experts",
    "quant_linear",
    "rms_norm",
    "rms_norm_linear",
)
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("op", OPS)
def test_kernels_under_the_interpreter(op: str) -> None:
    _run(op, expected=" checks passed")


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_kernel_leaves_its_tensors_or_races(dtype: str) -> None:
    """Every launched kernel; a few of them are in ``interpreted/sanitizer.py``'s checks."""
    _run("sanitizer", dtype, expected="\n0 problems")


def _run(module: str, *arguments: str, expected: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.interpreted.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=stretched(1800),
    )
    output = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, output
    assert expected in result.stdout, output
