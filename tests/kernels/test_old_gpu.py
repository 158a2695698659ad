"""On a T4 no kernel that multiplies tiles is tried, of any op; the other kernels stay ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright.kernels import launch
from fusewright.kernels.op import ExampleSizes
from fusewright.kernels.op import Maker as Examples
from fusewright.rewrite.op_table import OPS

from .util import needs_triton

F16, F32 = torch.float16, torch.float32
T4 = launch.Gpu(7, 64 << 10)
HOPPER = launch.Gpu(9, 227 << 10)
EXAMPLES = {
    name: make
    for op in OPS
    for name, make in op.examples().items()
    if not name.startswith((
        "attention", "gated", "glu-", "kda", "moe", "segment_attention", "selective_scan", "short",
        "ssd",
    ))
}  # fmt: skip
"""Without what has no kernel, what reads values (``interpreted/old_gpu.py``), and activations."""
ON_A_T4 = {
    "add_rms_norm": {"forward", "backward"},
    "glu": {"forward", "backward"},
    "linear_cross_entropy": {"rows"},
    "linear_logprob": {"rows"},
    "lora_linear": set(),
    "lora_linear-quantized": {"dequantize"},
    "mlp_block": {"forward", "backward"},
    "quant_linear": {"dequantize"},
    "rope": {"rope"},
}
"""Op -> the kernels that it may launch there, of frozen weights."""

pytestmark = needs_triton


@pytest.fixture(scope="module")
def launches() -> Iterator[Any]:
    """The benchmark's module."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        yield importlib.import_module("launches")
    finally:
        sys.path.pop(0)


class _Maker:
    """What ``launches_of`` takes, of every example at small sizes."""

    def __init__(self, train: bool, adapters: torch.dtype) -> None:
        self.options = F16, "cpu", ExampleSizes(), train, adapters

    def make(self, name: str) -> Any:
        case = importlib.import_module("op_cases").Case
        return case(EXAMPLES[name](Examples(*self.options, torch.Generator().manual_seed(0))))


def _launched(launches: Any, name: str, gpu: launch.Gpu, train: bool, adapters: Any) -> list[Any]:
    return launches.launches_of(name, _Maker(train, adapters), gpu)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_kernel_multiplies_tiles(name: str, launches: Any) -> None:
    for train, adapters in ((False, F32), (True, F16)):
        every = _launched(launches, name, T4, train, adapters)
        assert not [one.full_name for one in every if one.multiplies]
        if not train and name in ON_A_T4:
            assert {one.name for one in every} == ON_A_T4[name]


@pytest.mark.parametrize(
    "name", ["linear_cross_entropy", "lora_linear", "lora_linear-quantized", "qkv_block"]
)
def test_a_newer_card_multiplies_tiles(name: str, launches: Any) -> None:
    """The question that the test above asks has another answer there."""
    assert any(one.multiplies for one in _launched(launches, name, HOPPER, True, F32))
