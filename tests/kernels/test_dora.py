from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.linear import dora
from fusewright.kernels.linear.dora import NORMS, OP, rescaled, rescaled_reference, row_norms
from fusewright.kernels.tolerance import exceeded

from .util import Watch, assert_parity_of_draws, saved_tensors

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def operands(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], rest: bool, update: bool
) -> list[Tensor | None]:
    """base, factor, rest, update; all of them require a gradient."""
    kind, wide = dtypes

    def make(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, dtype=F64).to(dtype).requires_grad_()

    whole = shape if update else shape[-1:]
    return [
        make(*shape, dtype=kind),
        make(shape[-1], dtype=wide),
        make(*whole, dtype=kind) if rest else None,
        make(*shape, dtype=wide) if update else None,
    ]


KINDS = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(7, 16), (33, 65), (2, 5, 24), (3, 1, 2, 17)]),
    dtypes=st.sampled_from(KINDS),
    rest=st.booleans(),
    update=st.booleans(),
    scale=st.sampled_from([1.0, 2.0, 8.0, 0.37]),
)
def test_parity(shape, dtypes, rest, update, scale):
    def over(fn):
        def call(*present: Tensor) -> Tensor:
            left = iter(present)
            full = [next(left) if t is not None else None for t in template]
            return fn(*full, scale)

        return call

    template = operands(shape, dtypes, rest, update)
    torch.manual_seed(0)

    def draw() -> list[Tensor]:
        return [t for t in operands(shape, dtypes, rest, update) if t is not None]

    assert_parity_of_draws(over(rescaled), over(rescaled_reference), draw)


def test_a_wide_sum_is_rounded_once():
    """A base in fp32 and a bf16 result: as exact as rounding can be."""
    base, factor, bias = torch.randn(40, 64), torch.rand(64) + 0.5, torch.randn(64).to(BF16)
    exact = factor.double() * base.double() + bias.double()
    assert torch.equal(rescaled(base, factor, bias, dtype=BF16), exact.to(BF16))


@pytest.mark.parametrize("needed", range(4))
def test_only_wanted_gradients_are_computed_and_kept(needed):
    given = [t.detach() for t in operands((4, 6), (F32, F32), True, True)]
    given[needed].requires_grad_()
    with saved_tensors() as kept:
        y = rescaled(*given, 2.0)
    of_both = [t.numel() for t in kept].count(24)  # the products' sum, for the factor alone
    assert bool(of_both) == (needed == 1)
    y.backward(torch.randn(4, 6))
    assert [t.grad is not None for t in given] == [i == needed for i in range(4)]


def _matrices(dtype: torch.dtype, adapter: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    weight = (torch.randn(37, 50) / 50**0.5).to(dtype)
    return weight, torch.randn(3, 50).to(adapter).mul(0.2), torch.randn(37, 3).to(adapter).mul(0.2)


@pytest.mark.parametrize("tile", [1 << 20, 600, 1])
@pytest.mark.parametrize(
    ("dtype", "adapter", "into"),
    [(F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16), (F16, F32, F32), (F64, F64, F64)],
)
def test_row_norms(monkeypatch, tile, dtype, adapter, into):
    monkeypatch.setattr(dora, "_TILE", tile)
    given = _matrices(dtype, adapter)
    for weight, a, b in (given, (given[0].t().contiguous().t(), *given[1:])):
        a.requires_grad_()
        ours = row_norms(weight, a, b, 1.3, into)
        assert not ours.requires_grad
        exact = NORMS.reference(weight.double(), a.double(), b.double(), 1.3, F64)
        if into is F64:
            torch.testing.assert_close(ours, exact)
        else:
            assert exceeded(ours, NORMS.reference(weight, a, b, 1.3, into), exact) is None


def test_the_sum_is_never_whole(monkeypatch):
    monkeypatch.setattr(dora, "_TILE", 4 * 50 * 5)
    sizes: list[int] = []

    def note(op: Any, args: Any, outs: list[Tensor]) -> None:
        if op is not torch.ops.aten.detach.default:
            sizes.extend(t.numel() for t in outs)

    weight, a, b = _matrices(F32, F32)
    with Watch(note):
        torch.ops.fusewright.dora_row_norms.default(weight, a, b, 2.0, F32)
        dora._row_norms(weight, a, b, 2.0, F32)
    assert 0 < max(sizes) <= 5 * 50


def test_autocast_leaves_both_alone():
    weight, a, b = _matrices(F32, F32)
    base, factor, rest, update = operands((4, 6), (F32, F32), True, True)
    plain = row_norms(weight, a, b, 2.0, F32), rescaled(base, factor, rest, update)
    with torch.autocast("cpu", torch.bfloat16):
        under = row_norms(weight, a, b, 2.0, F32), rescaled(base, factor, rest, update)
    assert all(torch.equal(x, y) for x, y in zip(plain, under, strict=True))


def test_reasons():
    base, factor, *_ = operands((4, 6), (F32, F32), False, False)
    assert OP.unsupported(base, factor) == []
    assert "a factor of (5,) for (4, 6)" in OP.unsupported(base, factor[:5])
    assert "narrower" in OP.unsupported(base, factor.to(BF16))[0]
    weight, a, b = _matrices(F32, F32)
    assert NORMS.unsupported(weight, a, b, 1.0, F32) == []
    assert "does not fit" in NORMS.unsupported(weight.t(), a, b, 1.0, F32)[0]


def test_no_rounding_is_scaled_in_fp16() -> None:
    torch.manual_seed(0)
    base, factor, update = torch.randn(64, 24), 1 + torch.randn(24) / 10, torch.randn(64, 24)
    upstream = (torch.randn(64, 24) * 2.0**-20).half()
    found = []
    for fn, dtype in (
        (rescaled, F16), (rescaled_reference, F16), (rescaled_reference, torch.float64)
    ):  # fmt: skip
        leaves = [t.half().to(dtype).requires_grad_() for t in (base, factor, update)]
        out = fn(leaves[0], leaves[1], None, leaves[2], 8.0)
        found.append(torch.autograd.grad(out, leaves, upstream.to(dtype)))
    for ours, eager, exact in zip(*found, strict=True):
        assert exceeded(ours, eager, exact) is None
