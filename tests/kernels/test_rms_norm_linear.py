from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels import launch
from fusewright.kernels.norms import rms_norm_linear as op
from fusewright.kernels.norms.rms_norm_linear import OP, reference, rms_norm_linear
from tests.kernels.test_rms_norm import DTYPES, EPS, FORMULAS
from tests.kernels.util import assert_parity

pytestmark = pytest.mark.usefixtures("seeded")


def _bind(fn: Callable[..., tuple[Tensor, ...]], offset: float, rounding: str, linears: int = 2):
    """Inputs: x, the norm weight, ``linears`` weights, then a bias for each of the first ones."""

    def go(x: Tensor, g: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        biases = [*rest[linears:], *[None] * (2 * linears - len(rest))]
        return fn(x, g, EPS, offset, rounding, rest[:linears], biases)

    return go


def _inputs(
    rows: tuple[int, ...], dim: int, features: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    shapes = [(*rows, dim), (dim,), *((n, dim) for n in features), (features[0],)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([(17,), (2, 25), (3, 2, 11)]),
    dim=st.sampled_from([123, 252, 507]),
    features=st.sampled_from([(33,), (123, 40), (64, 31, 50)]),
    dtype=st.sampled_from(DTYPES),
    formula=st.sampled_from(FORMULAS),
    frozen=st.sampled_from(["none", "norm", "linears", "all but x", "x"]),
    seed=st.integers(0, 1000),
)
def test_parity(
    rows: tuple[int, ...],
    dim: int,
    features: tuple[int, ...],
    dtype: torch.dtype,
    formula: tuple[float, str],
    frozen: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, g, *rest = _inputs(rows, dim, features, dtype)
    x.requires_grad_(frozen != "x")
    g.requires_grad_(frozen not in ("norm", "all but x"))
    for t in rest:
        t.requires_grad_(frozen not in ("linears", "all but x"))
    bound = (_bind(fn, *formula, len(features)) for fn in (rms_norm_linear, reference))
    assert_parity(*bound, x, g, *rest, seed=seed)


def test_norm_weight_of_another_dtype_and_any_strides() -> None:
    base = torch.randn(3, 11, 4, 96, dtype=torch.bfloat16)
    for x in (base[..., :48], base[..., ::2], base[..., 48:].transpose(1, 2)):
        _, _, w, v, b = _inputs((1,), 48, (32, 40), torch.bfloat16)
        g = torch.randn(48, requires_grad=True)
        w = torch.randn(48, 32, dtype=torch.bfloat16).t().requires_grad_()
        bound = (_bind(fn, 1.0, "outer") for fn in (rms_norm_linear, reference))
        assert_parity(*bound, x.requires_grad_(), g, w, v, b)


def test_frozen_linears_never_need_the_normed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = op.norm.forward
    monkeypatch.setattr(op.norm, "forward", lambda *args: calls.append(args) or real(*args))
    x, g, w, v, b = _inputs((6,), 16, (8, 4), torch.float32)
    for trained, expected in ((False, 1), (True, 2)):
        calls.clear()
        outs = _bind(rms_norm_linear, 0.0, "inner")(x, g, w.requires_grad_(trained), v.detach(), b)
        sum(o.sum() for o in outs).backward()
        assert len(calls) == expected


def test_autocast_is_that_of_eager() -> None:
    given_inputs = _inputs((4, 33), 123, (64, 32, 40), torch.float32)

    def under(fn):
        def go(*inputs: Tensor) -> tuple[Tensor, ...]:
            if inputs[0].dtype is torch.float64:
                return fn(*inputs)
            with torch.autocast("cpu", torch.bfloat16):
                return fn(*inputs)

        return go

    bound = [under(_bind(fn, 0.0, "inner", 3)) for fn in (rms_norm_linear, reference)]
    assert bound[0](*given_inputs)[0].dtype is torch.bfloat16
    assert_parity(*bound, *given_inputs)


def test_arguments_must_agree() -> None:
    x, g, w, _, _ = _inputs((2,), 16, (8, 4), torch.float32)
    with pytest.raises(ValueError, match="biases"):
        rms_norm_linear(x, g, EPS, 0.0, "inner", [w], [])
    with pytest.raises(ValueError, match="rounding"):
        rms_norm_linear(x, g, EPS, 0.0, "middle", [w], [None])


@pytest.mark.skipif(not launch.has_triton(), reason="Triton is not installed")
def test_the_choice_between_one_kernel_and_two() -> None:
    from fusewright.kernels.norms.rms_norm_linear_triton import fits_fused, prefers_fused

    assert prefers_fused(8, 4096, [4096])  # limited by launches and by the weight's bytes
    assert prefers_fused(65536, 2048, [64])  # limited by the bytes of x: a router, a LoRA A
    assert not prefers_fused(8192, 4096, [4096, 1024, 1024])  # limited by arithmetic
    x, w = torch.empty(4, 32, dtype=torch.bfloat16), torch.empty(8, 32, dtype=torch.bfloat16)
    assert fits_fused(x, None, [w], False)
    assert not fits_fused(x, torch.empty(32), [w], False)  # "inner" makes fp32 rows
    assert fits_fused(x, torch.empty(32), [w], True)
    assert not fits_fused(x.half(), None, [w.half()], True)
    assert not fits_fused(x[:, :31], None, [w[:, :31]], True)
    assert not fits_fused(x, None, [torch.empty(32, 8, dtype=torch.bfloat16).t()], True)


def test_reasons() -> None:
    x, g, w, v, b = (t.detach() for t in _inputs((2,), 16, (8, 4), torch.float32))

    def reasons(w: Tensor, b: Tensor | None = None) -> list[str]:
        return OP.unsupported(x, g, EPS, 0.0, "inner", [v, w], [None, b])

    assert reasons(w, b) == []
    assert "not (features, D)" in reasons(w[:, :8])[0]
    assert "the normed rows are torch.float32" in reasons(w.bfloat16())[0]
    assert "not floating-point" in reasons(w.long())[0]
    assert "is on meta" in reasons(w.to("meta"))[0]
    assert "does not fit" in reasons(w, b[:3])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert reasons(w.bfloat16()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [9, 60, 300])
@pytest.mark.parametrize("dim", [507, 2048])
def test_parity_on_the_gpu(dim: int, rows: int, dtype: torch.dtype) -> None:
    from fusewright.kernels.norms.rms_norm_linear_triton import launch_fused

    for offset, rounding in FORMULAS:
        inputs = [t.detach().cuda() for t in _inputs((rows,), dim, (130, 64), dtype)]
        for t in inputs:
            t.requires_grad_()
        bound = [_bind(fn, offset, rounding) for fn in (rms_norm_linear, reference)]
        assert_parity(*bound, *inputs)

        def fused(x, g, eps, offset, rounding, weights, biases):
            if x.dtype is torch.float64:
                return reference(x, g, eps, offset, rounding, weights, biases)
            outs = launch_fused(x, g, eps, offset, rounding == "outer", weights, biases)
            return tuple(outs[:-1])

        frozen = [t.detach() for t in inputs]
        assert_parity(_bind(fused, offset, rounding), bound[1], *frozen)


def test_outputs_of_rows_may_be_written_to() -> None:
    """Rows that are a matrix already are not reshaped on the way out."""
    for i in range(2):
        outs = _bind(rms_norm_linear, 0.0, "inner")(*_inputs((3,), 16, (8, 4), torch.float32))
        outs[i].mul_(2)
        sum(o.sum() for o in outs).backward()
