"""What the ops return where tensors are on a GPU: the code of that case, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusewright.kernels.linear import products

from .by_parts import LORA, MLP, QKV

WIDE, OUT, RANK = 64, 48, 4
DTYPES = [torch.bfloat16, torch.float32]
"""Of adapters over a base in bfloat16."""


def _made(*shape: int, dtype: torch.dtype = torch.bfloat16, trained: bool = True) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(trained)


def _linears(dtype: torch.dtype, *outs: int, into: int = WIDE) -> list[list[Any]]:
    """Frozen weights, no biases, A's, B's, scales, no biases of B."""
    return [
        [_made(out, into, trained=False) for out in outs],
        [None] * len(outs),
        [_made(RANK, into, dtype=dtype) for _ in outs],
        [_made(out, RANK, dtype=dtype) for out in outs],
        [2.0] * len(outs),
        [None] * len(outs),
    ]


def _lora(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Any]]:
    one = [parts[0] for parts in _linears(dtype, OUT)]
    return LORA.call(x, *one), one


def _qkv(x: Tensor, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    several = _linears(dtype, OUT, 8, 8)
    return QKV.call(x, *several, "all"), several


def _mlp(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Any]]:
    pairs = zip(_linears(dtype, OUT, OUT), _linears(dtype, WIDE, into=OUT), strict=True)
    several = [a + b for a, b in pairs]
    return MLP.call(x, *several, "silu", "two", "gate_up"), several


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [_lora, _qkv, _mlp], ids=lambda f: f.__name__)
def test_gradients_of_adapters_have_the_strides_of_the_parameters(
    build: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd would clone them otherwise, and DDP's buckets would not fit."""
    monkeypatch.setattr(products, "_on_cpu", lambda t: False)
    out, given = build(_made(2, 35, WIDE), dtype)
    outs = tree_leaves(out)
    trained = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(outs, trained, [torch.empty_like(o) for o in outs])
    assert [g.stride() for g in grads] == [t.stride() for t in trained]
    assert {g.dtype for g in grads} == {dtype}
