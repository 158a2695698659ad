"""Chunked state-space duality against the recurrence: values, gradients, groups, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.kernels.scan import ssd as module
from fusewright.kernels.scan.ssd import OP, ssd

from .util import assert_parity_of, assert_parity_over

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def draw(
    size: Sequence[int], dtype: torch.dtype, skip: bool = True, bias: bool = True
) -> list[Any]:
    """Inputs of (batch, length, heads, groups, features, states), projections sliced."""
    batch, length, heads, groups, features, states = size
    wide = FP64 if dtype is FP64 else FP32
    packed = torch.randn(batch, length, heads * features + 2 * groups * states).to(dtype)
    x, b, c = packed.split([heads * features, groups * states, groups * states], -1)
    inputs = [
        x.view(batch, length, heads, features), torch.rand(batch, length, heads).to(dtype),
        -0.2 - 2 * torch.rand(heads, dtype=wide),
        b.view(batch, length, groups, states), c.view(batch, length, groups, states),
        torch.randn(heads, dtype=wide) if skip else None,
        torch.rand(heads, dtype=wide) if bias else None,
    ]  # fmt: skip
    return [None if t is None else t.detach().requires_grad_() for t in inputs]


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(*(st.integers(*n) for n in ((1, 3), (9, 40), (1, 2), (1, 3), (5, 9), (4, 9)))),
    dtype=st.sampled_from((FP32, BF16, FP16)),
    given=st.tuples(st.booleans(), st.booleans()),
    softplus=st.booleans(),
)
def test_parity(
    size: tuple[int, ...], dtype: torch.dtype, given: tuple[bool, bool], softplus: bool
) -> None:
    torch.manual_seed(sum(size))
    batch, length, each, groups, features, states = size
    previous, module.CHUNK = module.CHUNK, 8
    try:
        shape = (batch, length, 8 * each * groups, groups, features, states)
        assert_parity_over(OP, lambda: draw(shape, dtype, *given), softplus)
    finally:
        module.CHUNK = previous


@pytest.mark.parametrize("length", [1, 64, 130])
def test_parity_over_real_chunks(length: int) -> None:
    torch.manual_seed(0)
    assert_parity_of(OP, draw((2, length, 24, 2, 8, 16), FP32), True)


def test_tiles_of_few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 64 * 64 * 3)
    torch.manual_seed(0)
    assert_parity_of(OP, draw((2, 40, 32, 2, 8, 8), FP32), True)


def test_steps_are_clamped() -> None:
    torch.manual_seed(0)
    assert_parity_of(OP, draw((2, 40, 32, 1, 8, 8), FP32), True, (0.7, 1.2))


def test_steep_decays_do_not_overflow() -> None:
    inputs = draw((1, 100, 4, 2, 4, 4), FP32)
    inputs[2] = (inputs[2].detach() * 1e4).requires_grad_()
    out = ssd(*inputs, True)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))


def test_what_cannot_be_taken_is_said() -> None:
    inputs = [t.detach() for t in draw((1, 6, 4, 2, 4, 4), FP32)]
    for i, wrong in ((0, inputs[0][0]), (3, inputs[3][:, :, :1].repeat(1, 1, 3, 1))):
        given = [wrong if j == i else t for j, t in enumerate(inputs)]
        with pytest.raises(ValueError, match=r"not fit|not 4|complex|one vector"):
            ssd(*given)
    assert OP.unsupported(*inputs) == []
