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
def decays(step_ptr, sums_ptr, sample, head, k, chunks, heads, Q: tl.constexpr):
    """The steps of a chunk, and its decays.

    Returns:
        The steps; the decays to each from the state before, and from each to the state after, all
        (Q,); and the decay over the whole chunk.
    """
    first = (sample * chunks + k) * Q
    places = (first + tl.arange(0, Q)) * heads + head
    s = tl.load(sums_ptr + places)
    last = tl.load(sums_ptr + (first + Q - 1) * heads + head)
    into, rest = tl.exp2(s.to(tl.float32)), tl.exp2((last - s).to(tl.float32))
    return tl.load(step_ptr + places), into, rest, tl.exp2(last.to(tl.float32))


@triton.jit
def within(sums_ptr, sample, head, k, chunks, heads, Q: tl.constexpr):
    """The decays (Q, Q) from step j to step i of a chunk, zero for i < j."""
    qs = tl.arange(0, Q)
    s = tl.load(sums_ptr + ((sample * chunks + k) * Q + qs) * heads + head)
    between = (s[:, None] - s[None, :]).to(tl.float32)
    return tl.exp2(tl.where(qs[:, None] >= qs[None, :], between, float("-inf")))
