"""Attention of a few positions over a cache: parity with PyTorch's, masks, layout, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.attention import decode_attention as module
from fusewright.kernels.attention.decode_attention import OP, decode_attention
from fusewright.kernels.processor import KINDS

from .util import assert_parity_of_draws

B16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _qkv(
    batch: int, heads: int, groups: int, time: int, keys: int, dim: int, value_dim: int,
    dtype: torch.dtype, size: float, generator: torch.Generator, projected: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def make(n: int, length: int, width: int, factor: float) -> Tensor:
        t = factor * torch.randn(batch, length, n, width, generator=generator)
        t = t.transpose(1, 2)
        return (t if projected else t.contiguous()).to(dtype)

    return (
        make(heads, time, dim, size),
        make(groups, keys, dim, size),
        make(groups, keys, value_dim, 1.0),
    )


def _mask(kind: str, batch: int, heads: int, time: int, keys: int) -> Tensor | None:
    """Left padding, and for each head or position something else hidden."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(keys)
    shape = {
        "padding": (batch, 1, 1, keys), "shared": (1, 1, 1, keys),
        "heads": (batch, heads, 1, keys), "positions": (batch, 1, time, keys),
        "additive": (batch, heads, time, keys), "low": (batch, 1, 1, keys),
    }[kind]  # fmt: skip
    seen = torch.rand(shape, generator=generator) > 0.3
    seen[..., -1] = True
    if kind in ("additive", "low"):
        hidden = -torch.inf if kind == "additive" else torch.finfo(B16).min
        return torch.zeros(shape).masked_fill_(~seen, hidden)
    return seen


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from(((3, 3), (6, 2), (4, 1), (9, 3))),
    time=st.sampled_from((1, 1, 2, 5)),
    keys=st.sampled_from((1, 7, 64, 129, 300)),
    batch=st.integers(1, 3),
    dims=st.sampled_from(((16, 16), (24, 8), (5, 3), (64, 64))),
    dtype=st.sampled_from((B16, F16, F64)),  # fp32 is left to PyTorch
    mask=st.sampled_from(
        ("none", "none", "padding", "shared", "heads", "positions", "additive", "low")
    ),
    scale=st.sampled_from((None, 0.3)),
    size=st.sampled_from((0.01, 1.0, 3.0)),
    projected=st.booleans(),
)
def test_parity(
    heads: tuple[int, int], time: int, keys: int, batch: int, dims: tuple[int, int],
    dtype: torch.dtype, mask: str, scale: float | None, size: float, projected: bool,
) -> None:  # fmt: skip
    made = _mask(mask, batch, heads[0], time, keys)
    generator = torch.Generator().manual_seed(keys)

    def draw() -> tuple[Tensor, ...]:
        return _qkv(batch, *heads, time, keys, *dims, dtype, size, generator, projected)

    def hidden(q: Tensor) -> Tensor | None:
        # an additive mask has the dtype of the queries, as PyTorch's kernel demands
        return made if made is None or made.dtype is torch.bool else made.to(q.dtype)

    if dtype is F64:
        q, k, v = draw()
        ours = decode_attention(q, k, v, scale, hidden(q))
        torch.testing.assert_close(ours, OP.reference(q, k, v, scale, hidden(q)))
        return
    assert_parity_of_draws(
        lambda q, k, v: decode_attention(q, k, v, scale, hidden(q)),
        lambda q, k, v: OP.reference(q, k, v, scale, hidden(q)),
        draw,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [B16, F16])
def test_parity_on_each_processor(
    dtype: torch.dtype, kind: str, choose_for: Callable[[str], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    choose_for(kind)
    assert_parity_of_draws(
        decode_attention, OP.reference, lambda: _qkv(2, 6, 2, 1, 90, 16, 16, dtype, 1.0, generator)
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_are_worked_on_in_parts(per_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv(5, 6, 2, 1, 40, 16, 8, F64, 1.0, torch.Generator().manual_seed(0))
    mask = torch.rand(5 if per_sample else 1, 1, 1, 40) > 0.4
    whole = decode_attention(q, k, v, None, mask)
    for elements in (1, 2 * k[0].numel()):
        monkeypatch.setattr(module, "_WIDE", elements)
        torch.testing.assert_close(decode_attention(q, k, v, None, mask), whole)


@pytest.mark.parametrize("additive", [False, True])
def test_a_position_that_sees_nothing_gets_zeros(additive: bool) -> None:
    q, k, v = _qkv(2, 4, 2, 1, 30, 16, 16, F32, 1.0, torch.Generator().manual_seed(0))
    seen = torch.ones(2, 1, 1, 30, dtype=torch.bool)
    seen[1] = False
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf) if additive else seen
    ours = decode_attention(q, k, v, None, mask)
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    torch.testing.assert_close(ours, OP.reference(q, k, v, None, mask))


@pytest.mark.parametrize("time", [1, 3])
def test_the_layout_is_that_of_pytorch(time: int) -> None:
    q, k, v = _qkv(2, 6, 2, time, 50, 16, 16, B16, 1.0, torch.Generator().manual_seed(0))
    assert decode_attention(q, k, v).stride() == OP.reference(q, k, v).stride()


def test_what_it_does_not_take(choose_for: Callable[[str], None]) -> None:
    choose_for("avx512_bf16")
    generator = torch.Generator().manual_seed(0)
    large = _qkv(2, 6, 2, 1, 400, 64, 64, F16, 1.0, generator)
    assert OP.unsupported(*large) == []
    small = _qkv(1, 6, 2, 1, 20, 64, 64, F16, 1.0, generator)
    assert OP.unsupported(*small) == ["so few keys are as fast in PyTorch's kernel"]
    many = _qkv(2, 6, 2, 17, 400, 64, 64, F16, 1.0, generator)
    assert OP.unsupported(*many) == ["17 positions are not few"]
    several = _qkv(2, 6, 2, 2, 400, 64, 64, B16, 1.0, generator)
    assert "so few keys are as fast in PyTorch's kernel" in OP.unsupported(*several)
    choose_for("avx2")
    assert "PyTorch's kernel is as fast where rows share the keys" in OP.unsupported(*several)
    wide = _qkv(2, 6, 2, 1, 400, 64, 64, F32, 1.0, generator)
    assert OP.unsupported(*wide) == ["PyTorch's CPU kernel is as fast in torch.float32"]
    with pytest.raises(ValueError, match="has no gradients: use attention"):
        decode_attention(large[0].requires_grad_(), *large[1:])
    with pytest.raises(ValueError, match="heads are not a multiple"):
        decode_attention(wide[0][:, :5], *wide[1:])
