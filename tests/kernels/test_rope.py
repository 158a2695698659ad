"""Rotary embedding: parity, the transposed backward, layouts, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.attention.rope import LAYOUTS, OP, rope

from .util import assert_parity, saved_tensors

B16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def _randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def _heads(batch: int, heads: int, time: int, dim: int, kind: str, dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) with the strides of: itself, a projection, a slice of a packed projection."""
    if kind == "plain":
        return _randn(batch, heads, time, dim, dtype=dtype, seed=heads)
    if kind == "projected":
        return _randn(batch, time, heads, dim, dtype=dtype, seed=heads).transpose(1, 2)
    packed = _randn(batch, time, heads + 2, dim + 3, dtype=dtype, seed=heads)
    return packed[:, :, 1:-1, 1:-2].transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.sampled_from(((2, 3, 5, 12), (1, 4, 1, 16), (3, 1, 7, 10), (0, 2, 3, 8))),
    kv=st.integers(1, 3),
    kinds=st.tuples(*[st.sampled_from(("plain", "projected", "sliced"))] * 2),
    dtypes=st.sampled_from(
        ((F64, F64), (F32, F32), (B16, B16), (B16, F32), (F32, B16), (torch.float16,) * 2)
    ),
    partial=st.sampled_from((0, 2, 6)),
    per_sample=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    tables=st.sampled_from(("full", "half", "complex")),
    inverse=st.booleans(),
    needs=st.sampled_from(((True, True), (True, False), (False, True), (False, False))),
)
def test_parity(
    sizes: tuple[int, int, int, int],
    kv: int,
    kinds: tuple[str, str],
    dtypes: tuple[torch.dtype, torch.dtype],
    partial: int,
    per_sample: bool,
    layout: str,
    tables: str,
    inverse: bool,
    needs: tuple[bool, bool],
) -> None:
    batch, heads, time, dim = sizes
    width = dim - partial
    q = _heads(batch, heads, time, dim, kinds[0], dtypes[0]).requires_grad_(needs[0])
    k = _heads(batch, kv, time, dim, kinds[1], dtypes[0]).requires_grad_(needs[1])
    # the two halves of the tables are not equal: backward may not assume it
    rows = batch if per_sample else 1
    wide = width if tables == "full" else width // 2
    cos, sin = (_randn(rows, 1, time, wide, dtype=dtypes[1], seed=s) for s in (8, 9))

    def of(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> Any:
            if tables == "complex" and c.dtype in (F32, F64):
                return op((q, k), torch.complex(c, s), None, width, layout, inverse)
            return op((q, k), c, s, width, layout, inverse)

        return run

    assert_parity(of(rope), of(OP.reference), q, k, cos, sin)


@pytest.mark.parametrize(
    ("shape", "table"),
    [((4, 8), (4, 8)), ((3, 4, 8), (1, 4, 8)), ((2, 4, 3, 8), (4, 1, 8)), ((2, 2, 3, 4, 8), (8,))],
)
def test_other_ranks(shape: tuple[int, ...], table: tuple[int, ...]) -> None:
    x = _randn(*shape).requires_grad_()
    cos, sin = _randn(*table, seed=1), _randn(*table, seed=2)
    assert_parity(
        lambda x, c, s: rope((x,), c, s, 8),
        lambda x, c, s: OP.reference((x,), c, s, 8),
        x,
        cos,
        sin,
    )


def test_expanded_tables_and_gradients() -> None:
    q = _heads(2, 3, 4, 8, "projected", B16).requires_grad_()
    cos, sin = (_randn(1, 1, 4, 8, seed=s).expand(2, 3, 4, 8) for s in (1, 2))
    (got,) = torch.autograd.grad(rope((q,), cos, sin, 8)[0].sum(), q)  # a gradient of strides 0
    (want,) = torch.autograd.grad(OP.reference((q,), cos, sin, 8)[0].sum(), q)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dim", [8, 11])
def test_the_order_of_strides_is_kept(dim: int) -> None:
    q = _heads(2, 3, 4, dim, "projected", F32).requires_grad_()
    cos, sin = _randn(1, 1, 4, 8, seed=1), _randn(1, 1, 4, 8, seed=2)
    (out,) = rope((q,), cos, sin, 8)
    assert out.stride() == q.stride()
    (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert grad.stride() == q.stride()


def test_an_unused_output_has_no_gradient() -> None:
    q, k = (_heads(2, 3, 4, 8, "plain", F32).requires_grad_() for _ in range(2))
    cos, sin = _randn(1, 1, 4, 8, seed=1), _randn(1, 1, 4, 8, seed=2)
    out, _ = rope((q, k), cos, sin, 8)
    out.square().sum().backward()
    assert q.grad is not None
    assert k.grad is None


def test_only_the_tables_are_saved() -> None:
    q, k = (_heads(2, 3, 4, 8, "plain", F32).requires_grad_() for _ in range(2))
    cos, sin = _randn(1, 1, 4, 8, seed=1), _randn(1, 1, 4, 8, seed=2)
    with saved_tensors() as saved:
        rope((q, k), cos, sin, 8)
    assert [t.data_ptr() for t in saved] == [cos.data_ptr(), sin.data_ptr()]


def test_refusals() -> None:
    x, cos = _randn(2, 3, 4, 8), _randn(1, 1, 4, 8)
    assert OP.unsupported((x, x), cos, cos, 8) == []
    learnt = cos.clone().requires_grad_()
    for tensors, c, s, width, reason in (
        ((x,), learnt, cos, 8, "gradient"),
        ((x,), cos, cos.double(), 8, "float64"),
        ((x,), cos, cos, 6, "rotary_dim"),
        ((x,), cos, None, 8, "beside a real cos"),
        ((x, x.double()), cos, cos, 8, "dtype"),
        ((x[..., :6],), cos, cos, 8, "narrower"),
    ):
        assert any(reason in why for why in OP.unsupported(tensors, c, s, width))
        with pytest.raises(ValueError, match=reason):
            rope(tensors, c, s, width)
    assert OP.unsupported((x,), _randn(2, 1, 1, 4, 8), cos, 8)
    assert OP.unsupported((x,), _randn(1, 1, 3, 8), cos, 8)
