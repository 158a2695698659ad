"""The ops where there is no C++ compiler: their other form, with the same budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewright.kernels.native import attention as native

from .. import (
    test_attention,
    test_lora_linear,
    test_mlp_block,
    test_qkv_block,
    test_quantized_blocks,
)
from . import libraries

OPS = [
    test_attention.test_parity,
    test_attention.test_masks,
    test_lora_linear.test_parity,
    test_mlp_block.test_parity,
    test_qkv_block.test_parity,
    test_quantized_blocks.test_parity_of_linears,
]


@pytest.mark.parametrize("parity", OPS, ids=lambda test: f"{test.__module__.split('.')[-1]}")
def test_parity(parity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.use(monkeypatch, None)
    parity()


def test_no_kernel_takes_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.require()
    q, k, v = (torch.randn(2, 3, 50, 32).bfloat16() for _ in range(3))
    assert native.takes(q, k, v, None)
    libraries.use(monkeypatch, None)
    assert not native.takes(q, k, v, None)
