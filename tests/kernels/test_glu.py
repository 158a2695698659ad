"""The gated linear units: parity, gradients, layouts, tracing."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.mlp.glu import ACTIVATIONS, OP, OP_PACKED, glu, glu_packed

from .util import assert_parity, assert_parity_of_draws, saved_tensors

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

acts = st.sampled_from(tuple(ACTIVATIONS))
dtypes = st.sampled_from(DTYPES)
shapes = st.sampled_from(((1,), (3, 252), (2, 5, 123), (0, 8), (2, 3, 1), (1, 4, 2, 33)))


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(dtype)


def _layout(t: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "sliced":
        return torch.cat((t, t), -1)[..., : t.shape[-1]]
    if kind == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t


@settings(max_examples=40, deadline=None)
@given(
    act=acts,
    dtype=dtypes,
    shape=shapes,
    kinds=st.tuples(*[st.sampled_from(("plain", "sliced", "transposed"))] * 2),
    needs=st.sampled_from(((True, True), (True, False), (False, True))),
    seed=st.integers(0, 99),
)
def test_parity(
    act: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    kinds: tuple[str, str],
    needs: tuple[bool, bool],
    seed: int,
) -> None:
    seeds = count(2 * seed)

    def draw() -> list[Tensor]:
        return [
            _layout(_randn(*shape, dtype=dtype, seed=next(seeds)), kind).requires_grad_(need)
            for kind, need in zip(kinds, needs, strict=True)
        ]

    assert_parity_of_draws(lambda g, u: glu(g, u, act), lambda g, u: OP.reference(g, u, act), draw)


@settings(max_examples=40, deadline=None)
@given(
    act=acts,
    dtype=dtypes,
    shape=shapes,
    kind=st.sampled_from(("plain", "sliced", "transposed")),
    gate_first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_parity(
    act: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str, gate_first: bool, seed: int
) -> None:
    seeds = count(seed)

    def draw() -> list[Tensor]:
        packed = _randn(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=next(seeds))
        return [_layout(packed, kind).requires_grad_()]

    assert_parity_of_draws(
        lambda x: glu_packed(x, act, gate_first),
        lambda x: OP_PACKED.reference(x, act, gate_first),
        draw,
    )


def test_the_activation_is_not_saved() -> None:
    gate, up = (_randn(4, 16, seed=i).requires_grad_() for i in (1, 2))
    with saved_tensors() as saved:
        glu(gate, up, "silu")
        glu_packed(torch.cat((gate, up), -1), "silu")
    assert [t.shape[-1] for t in saved] == [16, 16, 32]
    assert saved[0].data_ptr() == gate.data_ptr()
    assert saved[1].data_ptr() == up.data_ptr()


def test_one_packed_gradient_without_copies() -> None:
    packed = _randn(2, 6, 16).requires_grad_()
    (grad,) = torch.autograd.grad(glu_packed(packed, "gelu").square().sum(), packed)
    assert grad.is_contiguous()
    assert grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()


def test_halves_of_one_tensor_may_be_given_apart() -> None:
    packed = _randn(5, 18, dtype=torch.bfloat16).requires_grad_()
    assert_parity(
        lambda x: glu(*x.chunk(2, -1), "silu"),
        lambda x: OP_PACKED.reference(x, "silu"),
        packed,
    )


@pytest.mark.parametrize(
    ("gate", "up", "act", "reason"),
    [
        (_randn(2, 4), _randn(2, 4), "tanh", "activation"),
        (_randn(2, 4), _randn(4), "silu", "shape"),
        (_randn(2, 4), _randn(2, 4).double(), "silu", "float64"),
    ],
)
def test_refusals(gate: Tensor, up: Tensor, act: str, reason: str) -> None:
    assert any(reason in why for why in OP.unsupported(gate, up, act))
    with pytest.raises(ValueError, match=reason):
        glu(gate, up, act)


def test_packed_refusals() -> None:
    assert OP_PACKED.unsupported(_randn(2, 5), "silu")
    with pytest.raises(ValueError, match="halves"):
        glu_packed(_randn(2, 5), "silu")
    assert OP_PACKED.unsupported(torch.ones(2, 4, dtype=torch.int64), "silu")
    assert OP_PACKED.unsupported(_randn(2, 4), "silu") == []
