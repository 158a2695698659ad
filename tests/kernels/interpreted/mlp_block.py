"""The blocks over the Triton kernels of their parts: the gated unit and the rank update."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fusewright.kernels.mlp import mlp_block
from tests.kernels.by_parts import MLP, QKV
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _linear(out: int, inner: int, dtype: torch.dtype, adapter: torch.dtype) -> list[Tensor]:
    weights = (torch.randn(out, inner) / inner**0.5).to(dtype), torch.randn(out).to(dtype)
    a, b = torch.randn(3, inner) / inner**0.5, torch.randn(out, 3) / 4
    return [*weights, a.to(adapter), b.to(adapter)]


def _lists(given: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
    return tuple(list(given[i::4]) for i in range(4))


def check_mlp_block() -> None:
    for (dtype, adapter), layout, keep in itertools.product(
        ((F32, F32), (F16, F16), (BF16, BF16)), mlp_block.LAYOUTS, mlp_block.KEEPS
    ):
        first = [_linear(31, 24, dtype, adapter) for _ in range(2)]
        if layout != "two":
            first = [_linear(62, 24, dtype, adapter)]
        tensors = [t for four in (*first, _linear(24, 31, dtype, adapter)) for t in four]
        count = len(tensors) // 4
        options = ([2.0] * count, [None] * count, "silu", layout)
        assert_parity(
            lambda x, *t, o=options, k=keep: MLP.call(x, *_lists(t), *o, k),
            lambda x, *t, o=options: MLP.reference(x, *_lists(t), *o),
            *(t.requires_grad_() for t in (torch.randn(2, 33, 24).to(dtype), *tensors)),
        )


def check_qkv_block() -> None:
    for dtype, adapter in ((F32, F32), (F16, F16), (F16, F32), (BF16, BF16)):
        tensors = [t for out in (40, 31, 8) for t in _linear(out, 24, dtype, adapter)]
        options = ([2.0, 1.0, 0.5], [None] * 3)
        assert_parity(
            lambda x, *t, o=options: QKV.call(x, *_lists(t), *o),
            lambda x, *t, o=options: QKV.reference(x, *_lists(t), *o),
            *(t.requires_grad_() for t in (torch.randn(2, 33, 24).to(dtype), *tensors)),
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    run(check_mlp_block, check_qkv_block)
