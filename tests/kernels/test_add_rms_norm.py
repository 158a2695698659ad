from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.norms import add_rms_norm as op
from fusewright.kernels.norms.add_rms_norm import OP, add_rms_norm, reference
from tests.kernels.test_rms_norm import DTYPES, EPS, FORMULAS
from tests.kernels.util import assert_parity, assert_parity_of_draws

pytestmark = pytest.mark.usefixtures("seeded")


def _bind(fn: Callable[..., tuple[Tensor, Tensor]], offset: float, rounding: str):
    return lambda x, r, w=None: fn(x, r, w, EPS, offset, rounding)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(3, 123), (2, 5, 252), (1, 2, 3, 507), (33, 96)]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    formula=st.sampled_from(FORMULAS),
    trained=st.sampled_from([(1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 0, 0), (0, 0, 1)]),
    has_weight=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parity(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    formula: tuple[float, str],
    trained: tuple[int, ...],
    has_weight: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)

    def draw() -> list[Tensor]:
        made = zip((shape, shape, shape[-1]), dtypes, trained, strict=True)
        inputs = [torch.randn(s, dtype=d, requires_grad=bool(needs)) for s, d, needs in made]
        return inputs if has_weight else inputs[:2]

    # the weight's gradient has few elements, each the sum of few rows
    assert_parity_of_draws(_bind(add_rms_norm, *formula), _bind(reference, *formula), draw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 4, 96, dtype=dtype)[..., :48].transpose(1, 2).requires_grad_()
    w = torch.randn(96, dtype=dtype)[::2].requires_grad_()
    for r in (
        torch.randn(3, 4, 5, 48, dtype=dtype, requires_grad=True),
        torch.randn(3, 1, 5, 48, dtype=dtype).expand(3, 4, 5, 48).requires_grad_(),
    ):
        assert_parity(_bind(add_rms_norm, 0.0, "inner"), _bind(reference, 0.0, "inner"), x, r, w)


def test_the_two_gradients_are_independent() -> None:
    x, r = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    w = torch.randn(16)
    for i in range(3):  # accumulates in place into .grad from the second time on
        total, y = add_rms_norm(x, r, w, EPS)
        (total.square().sum() + y.sum() + i * x.sum()).backward()
    kept = r.grad.clone()
    x.grad.zero_()
    assert torch.equal(r.grad, kept)
    x.grad = r.grad = None
    twice = torch.randn(4, 16, requires_grad=True)
    assert_parity(
        lambda t: add_rms_norm(t, t, None, EPS), lambda t: reference(t, t, None, EPS), twice
    )


def test_unused_outputs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = op.norm.backward
    monkeypatch.setattr(op.norm, "backward", lambda *args: calls.append(args) or real(*args))
    x, r = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    add_rms_norm(x, r, None, EPS)[0].sum().backward()
    assert not calls
    assert torch.equal(x.grad, torch.ones(4, 16))
    add_rms_norm(x, r, torch.ones(16), EPS)[1].sum().backward()
    extra, (need_x, need_weight) = calls[0][4], calls[0][-2:]
    assert extra is None
    assert (need_x, need_weight) == (True, False)


def test_writing_to_the_sum_is_noticed() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    total, y = add_rms_norm(x, torch.randn(4, 16), None, EPS)
    total.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.randn(2, 4), torch.randn(4), None, EPS)
    with pytest.raises(ValueError, match="rounding"):
        add_rms_norm(torch.randn(2, 4), torch.randn(2, 4), None, EPS, rounding="middle")


def test_reasons() -> None:
    x, w = torch.randn(2, 16), torch.randn(16)
    assert OP.unsupported(x, x.bfloat16(), w, EPS) == []
    assert "the residual (16,)" in OP.unsupported(x, w, w, EPS)[0]
    assert "residual is on meta" in OP.unsupported(x, x.to("meta"), w, EPS)[0]
    assert "not floating-point" in OP.unsupported(x, x.long(), w, EPS)[0]
    assert "not one per feature" in OP.unsupported(x, x, w[:8], EPS)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [507, 4096, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    for offset, rounding in FORMULAS:
        x, r = (
            torch.randn(3, 67, dim, dtype=dtype, device="cuda", requires_grad=True)
            for _ in range(2)
        )
        w = torch.randn(dim, dtype=dtype, device="cuda", requires_grad=True)
        bound = _bind(add_rms_norm, offset, rounding), _bind(reference, offset, rounding)
        assert_parity(*bound, x, r, w)
        assert_parity(*bound, x, r, w.detach())
