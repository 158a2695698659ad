from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fusewright.kernels.norms import rms_norm as op
from fusewright.kernels.norms.rms_norm import OP, reference, rms_norm
from fusewright.kernels.tolerance import exceeded
from tests.kernels.util import assert_parity, assert_parity_of_draws, strided_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMULAS = tuple(itertools.product((0.0, 0.25, 1.0), ("inner", "outer")))
EPS = 1e-5
pytestmark = pytest.mark.usefixtures("seeded")


def _bind(fn: Callable[..., Tensor], offset: float, rounding: str) -> Callable[..., Tensor]:
    return lambda x, w=None: fn(x, w, EPS, offset, rounding)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(3, 123), (2, 5, 252), (1, 2, 3, 507), (507,), (33, 96)]),
    x_dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from([*DTYPES, None]),
    formula=st.sampled_from(FORMULAS),
    trained=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 1000),
)
def test_parity(
    shape: tuple[int, ...],
    x_dtype: torch.dtype,
    w_dtype: torch.dtype | None,
    formula: tuple[float, str],
    trained: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)

    def draw() -> list[Tensor]:
        inputs = [torch.randn(shape, dtype=x_dtype, requires_grad=trained[0])]
        if w_dtype is not None:
            inputs.append(torch.randn(shape[-1], dtype=w_dtype, requires_grad=trained[1]))
        return inputs

    # the weight's gradient has few elements, each the sum of few rows
    assert_parity_of_draws(_bind(rms_norm, *formula), _bind(reference, *formula), draw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    w = torch.randn(96, dtype=dtype)[::2]
    for x in strided_rows(dtype):
        assert_parity(
            _bind(rms_norm, 0.0, "inner"),
            _bind(reference, 0.0, "inner"),
            x.requires_grad_(),
            w.requires_grad_(),
        )
        assert rms_norm(x, w, EPS).stride() == reference(x, w, EPS).stride()


def test_a_wide_range_of_values() -> None:
    x = torch.randn(64, 576) * torch.logspace(-12, 4, 64).unsqueeze(1)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = x.to(dtype).requires_grad_(), torch.randn(576, dtype=dtype, requires_grad=True)
        assert_parity(_bind(rms_norm, 0.0, "inner"), _bind(reference, 0.0, "inner"), *inputs)


def test_under_activation_checkpointing_and_autocast() -> None:
    x = torch.randn(4, 123, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(123, requires_grad=True)
    plain = _bind(rms_norm, 1.0, "outer")
    upstream = torch.randn(4, 123, dtype=torch.bfloat16)
    expected = torch.autograd.grad(plain(x, w), (x, w), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(plain, x, w, use_reentrant=False)
        ours = torch.autograd.grad(y, (x, w), upstream)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def test_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="rounding"):
        rms_norm(torch.randn(2, 4), None, EPS, rounding="middle")


def test_reasons() -> None:
    x, w = torch.randn(2, 16), torch.randn(16)
    assert OP.unsupported(x, w, EPS) == OP.unsupported(x.bfloat16(), None, EPS) == []
    assert "not one per feature" in OP.unsupported(x, w[:8], EPS)[0]
    assert "not floating-point" in OP.unsupported(x.long(), w, EPS)[0]
    assert "not floating-point" in OP.unsupported(x, w.long(), EPS)[0]
    assert "no features" in OP.unsupported(torch.tensor(1.0), None, EPS)[0]
    assert "is on meta" in OP.unsupported(x, w.to("meta"), EPS)[0]
    with FakeTensorMode():
        long = torch.empty(2, op.MAX_DIM + 1, device="cuda")
        assert any("features" in r for r in OP.unsupported(long, None, EPS))
        wide = torch.empty(2, 16, device="cuda", dtype=torch.float64)
        assert any("fp64" in r for r in OP.unsupported(wide, None, EPS))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 507, 4096, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    for offset, rounding in FORMULAS:
        x = torch.randn(3, 67, dim, dtype=dtype, device="cuda", requires_grad=True)
        w = torch.randn(dim, dtype=dtype, device="cuda", requires_grad=True)
        bound = _bind(rms_norm, offset, rounding), _bind(reference, offset, rounding)
        assert_parity(*bound, x, w)
        assert_parity(*bound, x.detach().requires_grad_(), w.detach())
        assert_parity(*bound, x.detach().transpose(0, 1).requires_grad_(), w)
    ours, eager = rms_norm(x, w, EPS), reference(x, w, EPS)
    assert exceeded(ours, eager, reference(x.double(), w.double(), EPS)) is None
