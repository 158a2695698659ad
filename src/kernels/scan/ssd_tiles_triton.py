"""What the Triton kernels of ``ssd`` load, each in the same way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(ptr, rows, columns, row_stride, column_stride, row_end, column_end):
    """A matrix in its own dtype, zero outside."""
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    place = ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def decays(
    step_ptr, sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """The steps of a chunk, and its decays: zero from one segment to another.

    Returns:
        The steps; the decays to each from the state before, and from each to the state after, all
        (Q,); and the decay over the whole chunk.
    """
    first = (sample * chunks + k) * Q
    places = (first + tl.arange(0, Q)) * heads + head
    s = tl.load(sums_ptr + places)
    last = tl.load(sums_ptr + (first + Q - 1) * heads + head)
    into, rest = tl.exp2(s.to(tl.float32)), tl.exp2((last - s).to(tl.float32))
    whole = tl.exp2(last.to(tl.float32))
    if HAS_SEGMENTS:
        rows = k * Q + tl.arange(0, Q)
        end = tl.load(segments_ptr + first + Q - 1)
        into = tl.where(tl.load(segments_ptr + first + tl.arange(0, Q)) < k * Q, into, 0.0)
        rest = tl.where(rows >= end, rest, 0.0)
        whole = tl.where(end < k * Q, whole, 0.0)
    return tl.load(step_ptr + places), into, rest, whole


@triton.jit
def within(
    sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """The decays (Q, Q) from step j to step i of a chunk, zero for i < j and between segments."""
    qs = tl.arange(0, Q)
    s = tl.load(sums_ptr + ((sample * chunks + k) * Q + qs) * heads + head)
    between = (s[:, None] - s[None, :]).to(tl.float32)
    seen = qs[:, None] >= qs[None, :]
    if HAS_SEGMENTS:
        begin = tl.load(segments_ptr + (sample * chunks + k) * Q + qs)
        seen = seen & (k * Q + qs[None, :] >= begin[:, None])
    return tl.exp2(tl.where(seen, between, float("-inf")))
