"""The gradients of attention: two kernels, neither of which adds to what another has written.

    queries   of some positions of one head: the row sums of dO * O, and dQ
    keys      of some keys of one group: dK and dV, over the heads of the group and their positions

Both compute the probabilities again, and visit the tiles that the mask leaves. In fp16, whose
smallest numbers have few digits, the gradients of the scores are scaled by powers of 2 before they
are rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launcher import launched
from .attention_tiles_triton import capped, hide, positions_of, rows_of, span, store_rows


@triton.jit
def _rounded_dot(left, right, total, PRECISION: tl.constexpr, HALF: tl.constexpr):
    """``total + left · right`` with ``left``, in fp32, rounded to the dtype of ``right``."""
    if HALF:
        most = tl.max(tl.abs(left), 1)
        size = tl.exp2(tl.floor(tl.log2(tl.maximum(most, 1e-35))))[:, None]
        return total + size * tl.dot((left / size).to(right.dtype), right)
    return tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)


@triton.jit
def _bent(ds, bounded, cap, CAPPED: tl.constexpr):
    """``ds`` times the derivative of ``capped``, where that has made ``bounded``."""
    if CAPPED:
        tanh = bounded / cap
        return ds * (1 - tanh * tanh)
    return ds


@launched
@triton.jit
def queries_kernel(
    q, k, v, mask, table, grad, out, stats, delta, dq,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row, dq_batch, dq_head, dq_row,
    mask_batch, mask_head, mask_row, mask_key, table_batch, table_head, row_blocks, key_blocks,
    heads, share, time, keys, window, scale, cap, factor,
    CAPPED: tl.constexpr, NEEDS_DQ: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The row sums of ``grad * out`` (B, H, T), and ``dq`` if NEEDS_DQ."""
    row, outer, sample, head, group = positions_of(time, heads, share, M)
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    dims, value_dims = tl.arange(0, D), tl.arange(0, E)
    grad += sample * grad_batch + head * grad_head
    out += sample * out_batch + head * out_head
    do = rows_of(grad, row, rows, value_dims, grad_row, time, VALUE_DIM, E)
    o = rows_of(out, row, rows, value_dims, out_row, time, VALUE_DIM, E)
    sums = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + outer.to(tl.int64) * time + row + rows, sums, mask=rows < time - row)
    if NEEDS_DQ:
        q += sample * q_batch + head * q_head
        k += sample * k_batch + group * k_head
        v += sample * v_batch + group * v_head
        mask += sample * mask_batch + head * mask_head
        first, free, free_end, end = span(
            mask, table + sample * table_batch + head * table_head, row_blocks, key_blocks,
            row, time, keys, window, mask_row, MODE, False, M, N, GRAIN, CHUNK,
        )  # fmt: skip
        q_tile = rows_of(q, row, rows, dims, q_row, time, DIM, D)
        stats += (outer.to(tl.int64) * time + row + rows) * 2
        most = tl.load(stats, mask=rows < time - row, other=float("inf"))
        inverse = tl.load(stats + 1, mask=rows < time - row, other=0.0)
        total = tl.zeros((M, D), tl.float32)
        for i in range(0, end - first):
            key = (first + i) * N
            k_tile = rows_of(k, key, columns, dims, k_row, keys, DIM, D)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            bounded = capped(scores, cap, CAPPED)
            scores = bounded
            if (first + i < free) | (first + i >= free_end):
                scores = hide(
                    scores, mask, row, key, rows[:, None], columns[None, :], time, keys, mask_row,
                    mask_key, window, MODE, False,
                )  # fmt: skip
            p = tl.exp2(scores - most[:, None]) * inverse[:, None]
            v_tile = rows_of(v, key, columns, value_dims, v_row, keys, VALUE_DIM, E)
            dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
            ds = _bent(p * (dp - sums[:, None]), bounded, cap, CAPPED)
            total = _rounded_dot(ds, k_tile, total, PRECISION, HALF)
        dq += sample * dq_batch + head * dq_head
        store_rows(dq, total * factor, row, rows, dims, dq_row, time, DIM)


@launched
@triton.jit
def keys_kernel(
    q, k, v, mask, table, grad, stats, delta, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row,
    dk_split, dk_batch, dk_head, dk_row, dv_split, dv_batch, dv_head, dv_row,
    mask_batch, mask_head, mask_row, mask_key, table_batch, table_head, row_blocks, key_blocks,
    heads, share, time, keys, window, scale, cap, factor,
    CAPPED: tl.constexpr, GRADS: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``dk`` (splits, B, KV, S, D) and ``dv``: what up to HEADS heads of a group add to them."""
    blocks, groups, splits = tl.cdiv(keys, N), heads // share, tl.cdiv(share, HEADS)
    key, outer = tl.program_id(0) % blocks * N, tl.program_id(0) // blocks
    split, group = outer % splits, (outer // splits % groups).to(tl.int64)
    sample = (outer // splits // groups).to(tl.int64)
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    dims, value_dims = tl.arange(0, D), tl.arange(0, E)
    k += sample * k_batch + group * k_head
    v += sample * v_batch + group * v_head
    k_tile = rows_of(k, key, columns, dims, k_row, keys, DIM, D)
    v_tile = rows_of(v, key, columns, value_dims, v_row, keys, VALUE_DIM, E)
    total_k, total_v = tl.zeros((N, D), tl.float32), tl.zeros((N, E), tl.float32)
    table += sample * table_batch
    first, free, free_end, end = span(
        mask, table, row_blocks, key_blocks, key, time, keys, window, mask_row, MODE, True,
        N, M, GRAIN, CHUNK,
    )  # fmt: skip
    last = tl.minimum(share, (split + 1) * HEADS)
    for index in range(split * HEADS, last):
        head = group * share + index
        if PER_HEAD:
            first, free, free_end, end = span(
                mask, table + head * table_head, row_blocks, key_blocks, key, time, keys, window,
                mask_row, MODE, True, N, M, GRAIN, CHUNK,
            )  # fmt: skip
        q_of_head = q + sample * q_batch + head * q_head
        grad_of_head = grad + sample * grad_batch + head * grad_head
        mask_of_head = mask + sample * mask_batch + head * mask_head
        place = (sample * heads + head) * time
        for i in range(0, end - first):
            row = (first + i) * M
            q_tile = rows_of(q_of_head, row, rows, dims, q_row, time, DIM, D)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
            bounded = capped(scores, cap, CAPPED)
            scores = bounded
            if (first + i < free) | (first + i >= free_end):
                scores = hide(
                    scores, mask_of_head, row, key, rows[None, :], columns[:, None], time, keys,
                    mask_row, mask_key, window, MODE, True,
                )  # fmt: skip
            inside = rows < time - row
            of_row = stats + (place + row + rows) * 2
            most = tl.load(of_row, mask=inside, other=float("inf"))
            inverse = tl.load(of_row + 1, mask=inside, other=0.0)
            p = tl.exp2(scores - most[None, :]) * inverse[None, :]
            do = rows_of(grad_of_head, row, rows, value_dims, grad_row, time, VALUE_DIM, E)
            if GRADS != "k":
                total_v = tl.dot(p.to(do.dtype), do, total_v, input_precision=PRECISION)
            if GRADS != "v":
                dp = tl.dot(v_tile, tl.trans(do), input_precision=PRECISION)
                sums = tl.load(delta + place + row + rows, mask=inside, other=0.0)
                ds = _bent(p * (dp - sums[None, :]), bounded, cap, CAPPED)
                total_k = _rounded_dot(ds, q_tile, total_k, PRECISION, HALF)
    if GRADS != "v":
        dk += split.to(tl.int64) * dk_split + sample * dk_batch + group * dk_head
        store_rows(dk, total_k * factor, key, columns, dims, dk_row, keys, DIM)
    if GRADS != "k":
        dv += split.to(tl.int64) * dv_split + sample * dv_batch + group * dv_head
        store_rows(dv, total_v, key, columns, value_dims, dv_row, keys, VALUE_DIM)
