"""The selective scan against the loop over time: values, gradients, layouts, chunks, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.kernels.scan import selective_scan as chunks
from fusewright.kernels.scan.selective_scan import OP, selective_scan
from fusewright.kernels.tolerance import errors

from .util import assert_parity_of, assert_parity_over, bound, saved_tensors

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def draw(
    batch: int, channels: int, states: int, length: int, dtype: torch.dtype,
    skip: bool = True, gate: bool = True, bias: bool = True,
) -> list[Any]:  # fmt: skip
    """Inputs as model code has them: parameters in fp32, projections transposed and sliced."""
    wide = FP64 if dtype is FP64 else FP32
    both = torch.randn(batch, length, 2 * channels).to(dtype)
    ssm = torch.randn(batch, length, 2 * states).to(dtype).split(states, -1)
    inputs = [
        torch.randn(batch, channels, length).to(dtype),
        torch.rand(batch, length, channels).to(dtype).transpose(1, 2),
        -0.5 - 4 * torch.rand(channels, states, dtype=wide),
        *(t.transpose(1, 2) for t in ssm),
        torch.randn(channels, dtype=wide) if skip else None,
        both[..., channels:].transpose(1, 2) if gate else None,
        torch.rand(channels, dtype=wide) if bias else None,  # a step is positive
    ]
    return [None if t is None else t.detach().requires_grad_() for t in inputs]


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(*(st.integers(*n) for n in ((1, 3), (3, 40), (2, 9), (1, 23)))),
    dtype=st.sampled_from((FP32, BF16, FP16)),
    given=st.tuples(*(st.booleans() for _ in range(3))),
    softplus=st.booleans(),
)
def test_parity(
    size: tuple[int, ...], dtype: torch.dtype, given: tuple[bool, ...], softplus: bool
) -> None:
    torch.manual_seed(sum(size))
    previous = chunks._SHORTEST, chunks._LONGEST
    chunks._SHORTEST = chunks._LONGEST = 4  # many chunks in few steps
    try:
        assert_parity_over(OP, lambda: draw(*size, dtype, *given), softplus)  # type: ignore[call-arg, arg-type]
    finally:
        chunks._SHORTEST, chunks._LONGEST = previous


@pytest.mark.parametrize("channels", [13, 96, 128])
def test_the_gradient_of_b_is_as_exact_as_eagers(channels: int) -> None:
    """Over many draws, so that luck is no part of it: the sum over channels rounds most."""
    torch.manual_seed(0)
    like = draw(1, channels, 2, 6, FP32)
    fns = bound(selective_scan, like, True), bound(OP.reference, like, True)
    off = [0.0, 0.0]
    for _ in range(200):
        inputs = draw(1, channels, 2, 6, FP32)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        ours, eager, exact = (
            torch.autograd.grad(fn(*given).sum(), given[3])[0]
            for fn, given in ((fns[0], inputs), (fns[1], inputs), (fns[1], wide))
        )
        for i, found in enumerate((ours, eager)):
            off[i] += errors(found, exact).rms ** 2
    assert off[0] <= off[1]


@pytest.mark.parametrize("length", [1, 127, 300])
def test_parity_over_real_chunks(length: int) -> None:
    torch.manual_seed(0)
    assert_parity_of(OP, draw(2, 96, 16, length, FP32), True)


def test_samples_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_BUFFER", 64)
    assert chunks.samples_at_once(4, 80) == 1
    assert_parity_of(OP, draw(3, 80, 4, 40, FP32), True)


def test_steep_decays_do_not_overflow() -> None:
    """Cumulated exponents of -1e5 have no finite quotient; states simply vanish."""
    u, delta, a, b, c, *_ = draw(1, 3, 2, 200, FP32)
    a = (a.detach() * 1e4).requires_grad_()
    out = selective_scan(u, delta, a, b, c)
    grads = torch.autograd.grad(out.square().sum(), (u, delta, a, b, c))
    assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))


def test_memory_between_forward_and_backward() -> None:
    inputs = draw(1, 64, 16, 512, FP32)
    own = {t.untyped_storage().data_ptr() for t in inputs}
    with saved_tensors() as saved:
        selective_scan(*inputs, True)
    kept = sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() not in own)
    assert kept * 50 < 64 * 16 * 512 * 4  # all states


def test_what_cannot_be_taken_is_said() -> None:
    inputs = [t.detach() for t in draw(2, 5, 3, 9, FP32)]
    for i, wrong in ((2, inputs[2].to(torch.complex64)), (3, inputs[3][0]), (5, inputs[5][:2])):
        given = [wrong if j == i else t for j, t in enumerate(inputs)]
        assert OP.unsupported(*given)
        with pytest.raises(ValueError, match=r"not fit|not 4|complex|one vector"):
            selective_scan(*given)
    assert OP.unsupported(*inputs) == []
