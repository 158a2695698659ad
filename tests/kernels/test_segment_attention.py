"""Attention within segments: each as if it were alone, in one call for those of one length."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusewright.kernels.attention.segment_attention import OP, runs, segment_attention

from .util import assert_parity_of_draws

B16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _qkv(
    batch: int, heads: int, time: int, dim: int, dtype: torch.dtype,
    generator: torch.Generator | None = None, share: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Parts of one projection, as towers have them; ``share`` heads have keys in common."""
    drawn = torch.randn(batch, time, 3, heads, dim, generator=generator).to(dtype)
    q, k, v = drawn.transpose(1, 3).unbind(2)
    return [t.detach().requires_grad_() for t in (q, k[:, ::share], v[:, ::share])]


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from((0, 1, 4, 4, 7, 16)), min_size=1, max_size=8).filter(sum),
    batch=st.sampled_from((1, 2)),
    share=st.sampled_from((1, 2, 4)),
    dtype=st.sampled_from((B16, F16, F32)),
    seed=st.integers(0, 9),
)
def test_each_segment_is_as_if_it_were_alone(
    lengths: list[int], batch: int, share: int, dtype: torch.dtype, seed: int
) -> None:
    bounds, generator = _bounds(lengths), torch.Generator().manual_seed(seed)
    assert_parity_of_draws(
        lambda *qkv: segment_attention(*qkv, bounds, 0.4),
        lambda *qkv: OP.reference(*qkv, bounds, 0.4),
        lambda: _qkv(batch, 4, sum(lengths), 8, dtype, generator, share),
    )


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([5], [(0, 5, 1)]),
        ([4] * 9, [(0, 4, 9)]),
        ([4, 4, 2, 4], [(0, 4, 2), (8, 2, 1), (10, 4, 1)]),
        ([0, 3, 0, 3], [(0, 3, 1), (3, 3, 1)]),
    ],
)
def test_neighbours_of_one_length_are_one_call(
    lengths: list[int], calls: list[tuple[int, int, int]]
) -> None:
    assert list(runs(_bounds(lengths), sum(lengths))) == calls


def test_what_another_segment_holds_makes_no_difference() -> None:
    q, k, v = _qkv(1, 2, 10, 4, F64)
    out = segment_attention(q, k, v, _bounds([4, 6]))
    grads = torch.autograd.grad(out[:, :, :4].sum(), (q, k, v))
    assert all(g[:, :, :4].any() and not g[:, :, 4:].any() for g in grads)
    alone = F.scaled_dot_product_attention(*(t[:, :, :4] for t in (q, k, v)))
    torch.testing.assert_close(out[:, :, :4], alone)


@pytest.mark.parametrize("bounds", [[0, 4], [0, 4, 12], [0, 6, 2, 10], [0]])
def test_segments_that_do_not_add_up_are_an_error(bounds: list[int]) -> None:
    qkv = _qkv(1, 2, 10, 4, F32)
    with pytest.raises(RuntimeError):
        segment_attention(*qkv, torch.tensor(bounds))
    with pytest.raises(RuntimeError):
        OP.reference(*qkv, torch.tensor(bounds))


def test_what_it_does_not_take() -> None:
    q, k, v = _qkv(1, 2, 10, 4, F32)
    bounds = _bounds([10])
    with pytest.raises(ValueError, match="not alike"):
        segment_attention(q, k[:, :, :5], v[:, :, :5], bounds)
    with pytest.raises(ValueError, match="2 heads are not a multiple of 3"):
        segment_attention(q, *[torch.cat((t, t[:, :1]), 1) for t in (k, v)], bounds)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        segment_attention(q, k.double(), v, bounds)
    with pytest.raises(ValueError, match="whole numbers"):
        segment_attention(q, k, v, bounds.float())
    assert "each segment" in OP.unsupported(*(t.to("meta") for t in (q, k, v, bounds)))[0]
