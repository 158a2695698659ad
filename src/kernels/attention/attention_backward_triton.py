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

from .attention_tiles_triton import hide, partly_seen, rows_of, span


@triton.jit
def _narrow_dot(left, right, total, PRECISION: tl.constexpr, HALF: tl.constexpr):
    """``total + left · right`` with ``left``, in fp32, rounded to the dtype of ``right``."""
    if HALF:
        most = tl.max(tl.abs(left), 1)
        size = tl.exp2(tl.floor(tl.log2(tl.maximum(most, 1e-35))))[:, None]
        return total + size * tl.dot((left / size).to(right.dtype), right)
    return tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)


@triton.jit
def _of_queries(
    q, do, k, v, mask, dq, most, inverse, delta, row, key, rows, columns, dims, value_dims,
    k_row, v_row, time, keys, dim, value_dim, mask_row, mask_key, window, scale,
    FREE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``dq`` with what one tile of keys adds to it."""
    k_tile = rows_of(k, key, columns, dims, k_row, keys, dim)
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
    if not FREE:
        scores = hide(
            scores, mask, row, key, rows[:, None], columns[None, :], time, keys, mask_row,
            mask_key, window, MODE,
        )  # fmt: skip
    p = tl.exp2(scores - most[:, None]) * inverse[:, None]
    v_tile = rows_of(v, key, columns, value_dims, v_row, keys, value_dim)
    dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
    return _narrow_dot(p * (dp - delta[:, None]), k_tile, dq, PRECISION, HALF)


@triton.jit
def queries_kernel(
    q, k, v, mask, table, grad, out, stats, delta, dq,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row, dq_batch, dq_head, dq_row,
    mask_batch, mask_head, mask_row, mask_key, table_batch, table_head, row_blocks, key_blocks,
    heads, share, time, keys, dim, value_dim, window, scale, factor,
    WANTED: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The row sums of ``grad * out`` (B, H, T), and ``dq`` if it is WANTED."""
    blocks = tl.cdiv(time, M)
    row, outer = tl.program_id(0) % blocks * M, (tl.program_id(0) // blocks).to(tl.int64)
    sample, head = outer // heads, outer % heads
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    dims, value_dims = tl.arange(0, D), tl.arange(0, E)
    grad += sample * grad_batch + head * grad_head
    out += sample * out_batch + head * out_head
    do = rows_of(grad, row, rows, value_dims, grad_row, time, value_dim)
    o = rows_of(out, row, rows, value_dims, out_row, time, value_dim)
    sums = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + outer * time + row + rows, sums, mask=rows < time - row)
    if WANTED:
        q += sample * q_batch + head * q_head
        k += sample * k_batch + head // share * k_head
        v += sample * v_batch + head // share * v_head
        mask += sample * mask_batch + head * mask_head
        first, free, free_end, end = span(
            table + sample * table_batch + head * table_head, row_blocks, key_blocks,
            row, time, keys, window, MODE, False, M, N, GRAIN, CHUNK,
        )  # fmt: skip
        q_tile = rows_of(q, row, rows, dims, q_row, time, dim)
        stats += (outer * time + row + rows) * 2
        most = tl.load(stats, mask=rows < time - row, other=float("inf"))
        inverse = tl.load(stats + 1, mask=rows < time - row, other=0.0)
        total = tl.zeros((M, D), tl.float32)
        for i in range(0, free_end - free):
            key = (free + i) * N
            total = _of_queries(
                q_tile, do, k, v, mask, total, most, inverse, sums, row, key, rows, columns,
                dims, value_dims, k_row, v_row, time, keys, dim, value_dim, mask_row, mask_key,
                window, scale, True, MODE, PRECISION, HALF,
            )  # fmt: skip
        for i in range(0, free - first + end - free_end):
            key = partly_seen(i, first, free, free_end) * N
            total = _of_queries(
                q_tile, do, k, v, mask, total, most, inverse, sums, row, key, rows, columns,
                dims, value_dims, k_row, v_row, time, keys, dim, value_dim, mask_row, mask_key,
                window, scale, False, MODE, PRECISION, HALF,
            )  # fmt: skip
        dq += sample * dq_batch + head * dq_head + row.to(tl.int64) * dq_row
        inside = (rows < time - row)[:, None] & (dims < dim)[None, :]
        place = dq + rows[:, None] * dq_row + dims[None, :]
        tl.store(place, (total * factor).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _of_keys(
    k, v, q, grad, mask, stats, delta, dk, dv, row, key, rows, columns, dims, value_dims,
    q_row, grad_row, time, keys, dim, value_dim, mask_row, mask_key, window, scale,
    FREE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
    WANTED: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` with what one tile of positions adds to them. Scores are (keys, rows)."""
    q_tile = rows_of(q, row, rows, dims, q_row, time, dim)
    scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale
    if not FREE:
        scores = hide(
            scores, mask, row, key, rows[None, :], columns[:, None], time, keys, mask_row,
            mask_key, window, MODE,
        )  # fmt: skip
    inside = rows < time - row
    stats += (row + rows) * 2
    most = tl.load(stats, mask=inside, other=float("inf"))
    inverse = tl.load(stats + 1, mask=inside, other=0.0)
    p = tl.exp2(scores - most[None, :]) * inverse[None, :]
    do = rows_of(grad, row, rows, value_dims, grad_row, time, value_dim)
    if WANTED != "k":
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    if WANTED != "v":
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        sums = tl.load(delta + row + rows, mask=inside, other=0.0)
        dk = _narrow_dot(p * (dp - sums[None, :]), q_tile, dk, PRECISION, HALF)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, mask, table, grad, stats, delta, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row,
    dk_split, dk_batch, dk_head, dk_row, dv_split, dv_batch, dv_head, dv_row,
    mask_batch, mask_head, mask_row, mask_key, table_batch, table_head, row_blocks, key_blocks,
    heads, share, time, keys, dim, value_dim, window, scale, factor,
    WANTED: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``dk`` (splits, B, KV, S, D) and ``dv``: what up to HEADS heads of a group add to them."""
    blocks, groups, splits = tl.cdiv(keys, N), heads // share, tl.cdiv(share, HEADS)
    key, outer = tl.program_id(0) % blocks * N, (tl.program_id(0) // blocks).to(tl.int64)
    split, group, sample = outer % splits, outer // splits % groups, outer // splits // groups
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    dims, value_dims = tl.arange(0, D), tl.arange(0, E)
    k += sample * k_batch + group * k_head
    v += sample * v_batch + group * v_head
    k_tile = rows_of(k, key, columns, dims, k_row, keys, dim)
    v_tile = rows_of(v, key, columns, value_dims, v_row, keys, value_dim)
    total_k, total_v = tl.zeros((N, D), tl.float32), tl.zeros((N, E), tl.float32)
    table += sample * table_batch
    first, free, free_end, end = span(
        table, row_blocks, key_blocks, key, time, keys, window, MODE, True, N, M, GRAIN, CHUNK
    )
    last = tl.minimum(share, (split + 1) * HEADS)
    for own in range(split * HEADS, last):
        head = group * share + own
        if PER_HEAD:
            first, free, free_end, end = span(
                table + head * table_head, row_blocks, key_blocks, key, time, keys, window,
                MODE, True, N, M, GRAIN, CHUNK,
            )  # fmt: skip
        q_own = q + sample * q_batch + head * q_head
        grad_own = grad + sample * grad_batch + head * grad_head
        mask_own = mask + sample * mask_batch + head * mask_head
        place = (sample * heads + head) * time
        for i in range(0, free_end - free):
            row = (free + i) * M
            total_k, total_v = _of_keys(
                k_tile, v_tile, q_own, grad_own, mask_own, stats + 2 * place, delta + place,
                total_k, total_v, row, key, rows, columns, dims, value_dims, q_row, grad_row,
                time, keys, dim, value_dim, mask_row, mask_key, window, scale,
                True, MODE, PRECISION, HALF, WANTED,
            )  # fmt: skip
        for i in range(0, free - first + end - free_end):
            row = partly_seen(i, first, free, free_end) * M
            total_k, total_v = _of_keys(
                k_tile, v_tile, q_own, grad_own, mask_own, stats + 2 * place, delta + place,
                total_k, total_v, row, key, rows, columns, dims, value_dims, q_row, grad_row,
                time, keys, dim, value_dim, mask_row, mask_key, window, scale,
                False, MODE, PRECISION, HALF, WANTED,
            )  # fmt: skip
    inside = (columns < keys - key)[:, None]
    if WANTED != "v":
        dk += split * dk_split + sample * dk_batch + group * dk_head + key.to(tl.int64) * dk_row
        place = dk + columns[:, None] * dk_row + dims[None, :]
        total_k = (total_k * factor).to(dk.dtype.element_ty)
        tl.store(place, total_k, mask=inside & (dims < dim)[None, :])
    if WANTED != "k":
        dv += split * dv_split + sample * dv_batch + group * dv_head + key.to(tl.int64) * dv_row
        place = dv + columns[:, None] * dv_row + value_dims[None, :]
        total_v = total_v.to(dv.dtype.element_ty)
        tl.store(place, total_v, mask=inside & (value_dims < value_dim)[None, :])
