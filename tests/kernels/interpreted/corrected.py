"""What ``_bf16`` makes of the interpreter: casts, products, and arithmetic that no kernel means."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interpreted import run


@triton.jit
def _cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _sum(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(out + at))


def check_casts_round_to_nearest_even() -> None:
    halfway = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3895e38, 1e-40, torch.inf])
    x = torch.cat((halfway, torch.randn(250)))
    out = torch.empty(256, dtype=torch.bfloat16)
    _cast[(1,)](x, out, N=256)
    assert torch.equal(out, x.bfloat16())


def check_products_are_exact_in_fp32() -> None:
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    _product[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


def check_arithmetic_in_bf16_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="must cast to fp32 first"):
        _sum[(1,)](x, x.clone(), N=16)


if __name__ == "__main__":
    torch.manual_seed(0)
    run(
        check_casts_round_to_nearest_even,
        check_products_are_exact_in_fp32,
        check_arithmetic_in_bf16_is_refused,
    )
