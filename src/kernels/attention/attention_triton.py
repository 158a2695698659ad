"""Attention on the GPU: forward, and what launches both directions.

One program for some positions of one head goes through the tiles of keys that these positions may
see (``attention_tiles_triton``), with a running maximum and sum of the softmax (Dao et al.,
"FlashAttention", 2022). Keys and values are never repeated: the heads of a group read the same.
Scores and softmax are in fp32, the latter in base 2, and probabilities are rounded to the dtype.

For backward each row's maximum and the inverse of its sum are kept. As one number, the logarithm
of the sum, they would be less exact the larger the scores are; and where a mask hides all keys by
the smallest number that there is, the sum would be lost.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase
from ..launch import FP_FUSION, Gpu, dot_precision, gpu_of
from .attention_backward_triton import keys_kernel, queries_kernel
from .attention_tiles_triton import STEP, hide, partly_seen, rows_of, span, table_kernel
from .sizes import GRAIN, HEADS

CHUNK = 128
"""Entries of a table that are looked at together."""


@triton.jit
def _attend(
    q, k, v, mask, total, most, sums, row, key, rows, columns, dims, value_dims, k_row, v_row,
    time, keys, dim, value_dim, mask_row, mask_key, window, scale,
    MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the outputs, the maximum and the sums of some rows."""
    k_tile = rows_of(k, key, columns, dims, k_row, keys, dim)
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
    if MODE != "free":
        scores = hide(
            scores, mask, row, key, rows[:, None], columns[None, :], time, keys, mask_row,
            mask_key, window, MODE,
        )  # fmt: skip
    new = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing was seen so far
    p, factor = tl.exp2(scores - base[:, None]), tl.exp2(most - base)
    v_tile = rows_of(v, key, columns, value_dims, v_row, keys, value_dim)
    total = tl.dot(
        p.to(v_tile.dtype), v_tile, total * factor[:, None], input_precision=PRECISION
    )  # fmt: skip
    return total, new, sums * factor + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    q, k, v, mask, table, out, stats,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, mask_batch, mask_head, mask_row, mask_key,
    table_batch, table_head, row_blocks, key_blocks,
    heads, share, time, keys, dim, value_dim, window, scale,
    MODE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs, and statistics (B, H, T, 2): maximum in base 2, inverse of the sum.

    Where nothing is seen the maximum is inf, so that probabilities computed from it are zero.
    """
    blocks = tl.cdiv(time, M)
    row, outer = tl.program_id(0) % blocks * M, (tl.program_id(0) // blocks).to(tl.int64)
    sample, head = outer // heads, outer % heads
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    dims, value_dims = tl.arange(0, D), tl.arange(0, E)
    q += sample * q_batch + head * q_head
    k += sample * k_batch + head // share * k_head
    v += sample * v_batch + head // share * v_head
    mask += sample * mask_batch + head * mask_head
    first, free, free_end, end = span(
        table + sample * table_batch + head * table_head, row_blocks, key_blocks,
        row, time, keys, window, MODE, False, M, N, GRAIN, CHUNK,
    )  # fmt: skip
    q_tile = rows_of(q, row, rows, dims, q_row, time, dim)
    total = tl.zeros((M, E), tl.float32)
    most, sums = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    for i in range(0, free_end - free):
        key = (free + i) * N
        total, most, sums = _attend(
            q_tile, k, v, mask, total, most, sums, row, key, rows, columns, dims, value_dims,
            k_row, v_row, time, keys, dim, value_dim, mask_row, mask_key, window, scale,
            "free", PRECISION,
        )  # fmt: skip
    for i in range(0, free - first + end - free_end):
        key = partly_seen(i, first, free, free_end) * N
        total, most, sums = _attend(
            q_tile, k, v, mask, total, most, sums, row, key, rows, columns, dims, value_dims, k_row, v_row, time, keys, dim, value_dim, mask_row,
            mask_key, window, scale, MODE, PRECISION,
        )  # fmt: skip
    dead = sums == 0
    sums = tl.where(dead, 1.0, sums)
    total /= sums[:, None]
    out += sample * out_batch + head * out_head + row.to(tl.int64) * out_row
    inside = (rows < time - row)[:, None] & (value_dims < value_dim)[None, :]
    place = out + rows[:, None] * out_row + value_dims[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)
    stats += (outer * time + row + rows) * 2
    tl.store(stats, tl.where(dead, float("inf"), most), mask=rows < time - row)
    tl.store(stats + 1, tl.where(dead, 0.0, 1 / sums), mask=rows < time - row)


def _config(
    kernel: str, precision: str, dim: int, value_dim: int, dtype: torch.dtype, gpu: Gpu
) -> dict[str, int]:
    """Tiles of M positions and N keys, by what fits into registers and shared memory."""
    d, e = (max(16, triton.next_power_of_2(n)) for n in (dim, value_dim))
    sizes = {"D": d, "E": e, "GRAIN": GRAIN, "CHUNK": CHUNK}
    return sizes | {"M": 64, "N": 32, "num_warps": 4, "num_stages": 2}


def plain(t: Tensor) -> Tensor:
    """``t`` (..., T, D) with adjacent features, and rows near enough for 32-bit offsets."""
    return t if t.stride(-1) == 1 and t.stride(-2) < 1 << 23 else t.contiguous()


def mask_table(mask: Tensor) -> Tensor:
    """See ``table_kernel``: of a mask (B, H, T or 1, S), whose table is (B, H, blocks, blocks)."""
    batch, heads, rows, keys = mask.shape
    row_blocks, blocks = -(-rows // GRAIN), -(-keys // GRAIN)
    table = torch.empty(
        (batch, heads, row_blocks, blocks + 1), dtype=torch.int8, device=mask.device
    )
    if not table.numel():
        return table
    boolean = mask.dtype is torch.bool
    table_kernel[(batch * heads * row_blocks,)](
        mask.view(torch.uint8) if boolean else mask, table, rows, keys, blocks, heads,
        *mask.stride(), 0.0 if boolean else torch.finfo(mask.dtype).min,
        ADDITIVE=not boolean, GRAIN=GRAIN, STEP=STEP, num_warps=4, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return table


class _Call:
    """What all kernels are told.

    Attributes:
        pointers: q, k, v, mask and table, where there are these two.
        strides: of q, k and v.
        of_mask: the strides of mask and table, and the sizes of the table.
        sizes: heads, heads of a group, positions, keys, features of keys and values, the window,
            and the scale in base 2.
        flags: MODE and PRECISION.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
        table: Tensor | None, window: int | None,
    ) -> None:  # fmt: skip
        q, k, v = (plain(t) for t in (q, k, v))
        self.q, self.k, self.v = q, k, v
        time, keys = q.shape[2], k.shape[2]
        mode, self.of_mask = "causal" if causal else "none", [0] * 8
        if mask is not None and table is not None:
            mode = "boolean" if mask.dtype is torch.bool else "additive"
            mask = mask.view(torch.uint8) if mode == "boolean" else mask
            if max(mask.stride()[2:]) >= 1 << 23:
                mask = mask.contiguous()
            # one for all samples, heads or positions
            strides = [*mask.stride(), *table.stride()[:2]]
            shape = [*mask.shape, *table.shape[:2]]
            kept = [0 if n == 1 else s for n, s in zip(shape, strides, strict=True)]
            self.of_mask = [*kept, table.shape[2], table.shape[3] - 1]
        self.pointers = (q, k, v, q if mask is None else mask, q if table is None else table)
        self.strides = [s for t in (q, k, v) for s in t.stride()[:3]]
        wide = time + keys if window is None else window
        self.heads, self.share = q.shape[1], q.shape[1] // k.shape[1]
        self.sizes = (
            self.heads, self.share, time, keys, q.shape[3], v.shape[3], wide,
            scale * math.log2(math.e),
        )  # fmt: skip
        self.precision = dot_precision(q.dtype)
        self.flags: dict[str, Any] = {"MODE": mode, "PRECISION": self.precision}

    def config(self, kernel: str) -> dict[str, Any]:
        """The constants and options of a launch."""
        dims = self.q.shape[3], self.v.shape[3]
        chosen = _config(kernel, self.precision, *dims, self.q.dtype, gpu_of(self.q))
        return self.flags | chosen | {"enable_fp_fusion": FP_FUSION}


def _like(t: Tensor, dim: int, splits: int = 1) -> Tensor:
    """(splits, B, H, T, dim), in memory (splits, B, T, H, dim); in fp32 if there are several."""
    batch, heads, time, _ = t.shape
    dtype = t.dtype if splits == 1 else torch.float32
    return t.new_empty((splits, batch, time, heads, dim), dtype=dtype).transpose(2, 3)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    table: Tensor | None, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs (B, H, T, E) and the statistics (B, H, T, 2) of their rows."""
    out = _like(q, v.shape[3])[0]
    stats = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    if not out.numel():
        return out, stats
    call = _Call(q, k, v, scale, causal, mask, table, window)
    config = call.config("forward")
    blocks = -(-q.shape[2] // config["M"])
    forward_kernel[(blocks * q.shape[0] * q.shape[1],)](
        *call.pointers, out, stats, *call.strides, *out.stride()[:3], *call.of_mask, *call.sizes,
        **config,
    )  # fmt: skip
    return out, stats


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, scale: float,
    causal: bool, mask: Tensor | None, table: Tensor | None, window: int | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of dq, dk and dv."""
    need_q, need_k, need_v = needs
    if not (q.numel() and k.numel() and v.numel()):
        pairs = zip((q, k, v), needs, strict=True)
        return [_like(t, t.shape[3])[0].zero_() for t, needed in pairs if needed]
    call = _Call(q, k, v, scale, causal, mask, table, window)
    grad, half = plain(grad), q.dtype is torch.float16
    delta, dq = stats.new_empty(q.shape[:3]), _like(q, q.shape[3])[0] if need_q else grad
    if need_q or need_k:
        config = call.config("queries")
        blocks = -(-q.shape[2] // config["M"])
        queries_kernel[(blocks * q.shape[0] * q.shape[1],)](
            *call.pointers, grad, out, stats, delta, dq, *call.strides, *grad.stride()[:3],
            *out.stride()[:3], *dq.stride()[:3], *call.of_mask, *call.sizes, scale,
            WANTED=need_q, HALF=half, **config,
        )  # fmt: skip
    found = [dq] if need_q else []
    if need_k or need_v:
        found += _of_keys(call, grad, stats, delta, scale, need_k, need_v)
    return found


def _of_keys(
    call: _Call, grad: Tensor, stats: Tensor, delta: Tensor, scale: float, need_k: bool,
    need_v: bool,
) -> list[Tensor]:  # fmt: skip
    """The needed ones of dk and dv."""
    k, v, splits = call.k, call.v, -(-call.share // HEADS)
    config = call.config("keys")
    dk, dv = (
        _like(t, t.shape[3], splits) if needed else delta.new_empty((1,) * 5)
        for t, needed in ((k, need_k), (v, need_v))
    )
    blocks = -(-k.shape[2] // config["N"])
    keys_kernel[(blocks * splits * k.shape[0] * k.shape[1],)](
        *call.pointers, grad, stats, delta, dk, dv, *call.strides, *grad.stride()[:3],
        *dk.stride()[:4], *dv.stride()[:4], *call.of_mask, *call.sizes, scale,
        WANTED="both" if need_k and need_v else "k" if need_k else "v", HEADS=HEADS,
        PER_HEAD=call.of_mask[1] != 0, HALF=call.q.dtype is torch.float16, **config,
    )  # fmt: skip
    made = [t for t, needed in ((dk, need_k), (dv, need_v)) if needed]
    return [t[0] if splits == 1 else t.sum(0).to(k.dtype) for t in made]
