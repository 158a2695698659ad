"""Ops with products as a T4 runs them, in fp16: by libraries, no kernel multiplies tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from fusewright.kernels import launch
from tests.kernels.calls import LAUNCHING
from tests.kernels.interpreted import run
from tests.kernels.test_conformance import check_parity

F16, F32 = torch.float16, torch.float32
PRODUCTS = (
    "linear_cross_entropy", "linear_logprob", "lora_linear", "mlp_block",
    "moe_experts", "qkv_block", "quant_linear", "rms_norm_linear",
)  # fmt: skip


def _refuse(*_: Any) -> None:
    raise AssertionError("a kernel multiplies tiles")


def check_a_hopper_multiplies_tiles() -> None:
    assert launch.gpu_of(torch.empty(0)).multiplies_tiles
    with pytest.raises(InterpreterError, match="multiplies tiles"):
        check_parity(replace(LAUNCHING["lora_linear"], dtype=F16, adapters=F16))


def check_fp16_parity() -> None:
    launch._ELSEWHERE = launch.Gpu(7, 64 << 10)
    for name in PRODUCTS:
        case = LAUNCHING[name]
        for train, adapters in ((False, F32), (True, F16)):
            check_parity(replace(case, dtype=F16, train=train, adapters=adapters))
            print(name, "trained" if train else "frozen", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    InterpreterBuilder.create_dot = _refuse
    run(check_a_hopper_multiplies_tiles, check_fp16_parity)
