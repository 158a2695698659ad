"""Attention on the GPU, forward.

One program for some positions of one head goes through the tiles of keys that these positions may
see (``attention_tiles_triton``), with a running maximum and sum of the softmax (Dao et al.,
"FlashAttention", 2022). Keys and values are never repeated: the heads of a group read the same.
Scores and softmax are in fp32, the latter in base 2, and probabilities are rounded to the dtype.

For backward each row's maximum and the inverse of its sum are kept. As one number, the logarithm
of the sum, they would be less exact the larger the scores are; and where a mask hides all keys by
the smallest number that there is, the sum would be lost. A sink is where both begin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launcher import launched
from .attention_tiles_triton import LOG2E, capped, hide, positions_of, rows_of, span, store_rows


@launched
@triton.jit
def forward_kernel(
    q, k, v, mask, table, out, stats, sinks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, mask_batch, mask_head, mask_row, mask_key,
    table_batch, table_head, row_blocks, key_blocks,
    heads, share, time, keys, window, scale, cap,
    SINKS: tl.constexpr, CAPPED: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs, and statistics (B, H, T, 2): maximum in base 2, inverse of the sum.

    Where nothing is seen the maximum is inf, so that probabilities computed from it are zero.
    """
    row, outer, sample, head, group = positions_of(time, heads, share, M)
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    dims, value_dims = tl.arange(0, D), tl.arange(0, E)
    q += sample * q_batch + head * q_head
    k += sample * k_batch + group * k_head
    v += sample * v_batch + group * v_head
    mask += sample * mask_batch + head * mask_head
    first, free, free_end, end = span(
        mask, table + sample * table_batch + head * table_head, row_blocks, key_blocks,
        row, time, keys, window, mask_row, MODE, False, M, N, GRAIN, CHUNK,
    )  # fmt: skip
    q_tile = rows_of(q, row, rows, dims, q_row, time, DIM, D)
    total = tl.zeros((M, E), tl.float32)
    most, sums = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        most, sums = tl.zeros((M,), tl.float32) + sink, tl.full((M,), 1.0, tl.float32)
    for i in range(0, end - first):
        key = (first + i) * N
        k_tile = rows_of(k, key, columns, dims, k_row, keys, DIM, D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        scores = capped(scores, cap, CAPPED)
        if (first + i < free) | (first + i >= free_end):
            scores = hide(
                scores, mask, row, key, rows[:, None], columns[None, :], time, keys, mask_row,
                mask_key, window, MODE, False,
            )  # fmt: skip
        new = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing was seen so far
        p, factor = tl.exp2(scores - base[:, None]), tl.exp2(most - base)
        v_tile = rows_of(v, key, columns, value_dims, v_row, keys, VALUE_DIM, E)
        total *= factor[:, None]
        total = tl.dot(p.to(v_tile.dtype), v_tile, total, input_precision=PRECISION)
        most, sums = new, sums * factor + tl.sum(p, 1)
    dead = sums == 0
    sums = tl.where(dead, 1.0, sums)
    total /= sums[:, None]
    out += sample * out_batch + head * out_head
    store_rows(out, total, row, rows, value_dims, out_row, time, VALUE_DIM)
    stats += (outer.to(tl.int64) * time + row + rows) * 2
    tl.store(stats, tl.where(dead, float("inf"), most), mask=rows < time - row)
    tl.store(stats + 1, tl.where(dead, 0.0, 1 / sums), mask=rows < time - row)
