"""Rotary position embedding on the GPU: one program per position rotates all heads of q and k.

A program loads its row of cos and sin once and walks over the heads. Inputs and outputs are
addressed by their strides, so the transposed views that models have are read as they are.
Everything is computed in fp32 and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, next_power_of_2


@triton.jit
def _rotate_heads(
    x, y, x_head, y_head, heads, c1, c2, k1, k2, pair_in, second_in, pair_out, second_out,
    pair_mask, rotary_dim, dim,
    HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate every head at one position: ``x`` and ``y`` point to its first head."""
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        source, target = x + head * x_head, y + head * y_head
        mask = (head < heads) & pair_mask[None, :]
        x1 = tl.load(source + pair_in[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(source + pair_in[None, :] + second_in, mask=mask, other=0.0).to(tl.float32)
        y1 = (x1 * c1 + x2 * k1).to(y.dtype.element_ty)
        y2 = (x2 * c2 + x1 * k2).to(y.dtype.element_ty)
        tl.store(target + pair_out[None, :], y1, mask=mask)
        tl.store(target + pair_out[None, :] + second_out, y2, mask=mask)
        if REST > 0:
            rest = rotary_dim + tl.arange(0, REST)[None, :]
            mask = (head < heads) & (rest < dim)
            value = tl.load(source + rest, mask=mask, other=0.0)
            tl.store(target + rest, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["time"])
def _rope_kernel(
    q, k, q_out, k_out, cos, sin,
    q_batch, q_head, q_time, k_batch, k_head, k_time,
    qo_batch, qo_head, qo_time, ko_batch, ko_head, ko_time,
    cos_batch, cos_time, sin_batch, sin_time,
    time, q_heads, k_heads, rotary_dim, dim,
    PAIRS_IN: tl.constexpr, PAIRS_OUT: tl.constexpr, PAIRS_TABLE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PAIRS: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, t = program // time, program % time
    index = tl.arange(0, PAIRS)
    mask = index < rotary_dim // 2
    half = rotary_dim // 2
    pair = index * 2 if PAIRS_TABLE else index
    second = 1 if PAIRS_TABLE else half
    pair_in = index * 2 if PAIRS_IN else index
    second_in = 1 if PAIRS_IN else half
    pair_out = index * 2 if PAIRS_OUT else index
    second_out = 1 if PAIRS_OUT else half
    cos += b * cos_batch + t * cos_time
    sin += b * sin_batch + t * sin_time
    c1 = tl.load(cos + pair, mask=mask, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + pair + second, mask=mask, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + pair, mask=mask, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + pair + second, mask=mask, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSE:
        k1, k2 = s2, -s1
    else:
        k1, k2 = -s1, s2
    _rotate_heads(
        q + b * q_batch + t * q_time, q_out + b * qo_batch + t * qo_time, q_head, qo_head, q_heads,
        c1, c2, k1, k2, pair_in, second_in, pair_out, second_out, mask, rotary_dim, dim,
        HEADS, REST,
    )  # fmt: skip
    _rotate_heads(
        k + b * k_batch + t * k_time, k_out + b * ko_batch + t * ko_time, k_head, ko_head, k_heads,
        c1, c2, k1, k2, pair_in, second_in, pair_out, second_out, mask, rotary_dim, dim,
        HEADS, REST,
    )  # fmt: skip


def _four(t: Tensor, heads_first: bool) -> Tensor:
    """See ``t`` as (B, H, T, D)."""
    t = t if t.ndim == 4 else t[(None,) * (4 - t.ndim)]
    return t if heads_first else t.transpose(1, 2)


@functools.cache
def _config(rotary_dim: int, dim: int) -> dict[str, int]:
    """Pairs of a head, heads of a step (about 1024 pairs together), features passed through."""
    pairs = max(16, next_power_of_2(rotary_dim // 2))
    rest = next_power_of_2(dim - rotary_dim) if dim > rotary_dim else 0
    return {"PAIRS": pairs, "HEADS": max(1, min(16, 1024 // pairs)), "REST": rest}


def rotate(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, layout: str,
    transpose: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Rotate all tensors (two in a launch), or apply the transposed map, into fresh tensors.

    One of the dimensions -3 and -2 of cos and sin must have size 1 or stride 0: the heads.
    """
    outs = [torch.empty_like(t, dtype=dtype) for t in tensors]
    cos, sin = (_four(x, True) for x in (cos, sin))
    heads_first = all(x.shape[1] == 1 or x.stride(1) == 0 for x in (cos, sin))
    if not heads_first:
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    cos, sin = (x.select(1, 0) for x in (cos, sin))
    cos, sin = (x if x.stride(2) == 1 else x.contiguous() for x in (cos, sin))
    todo = []
    for t, out in zip(tensors, outs, strict=True):
        if out.numel():
            t = t if t.stride(-1) == 1 else t.contiguous()
            todo.append((_four(t, heads_first), _four(out, heads_first)))
    while todo:
        q, q_out = todo.pop(0)
        same_shape = [i for i, (t, _) in enumerate(todo) if t.shape[::3] == q.shape[::3]]
        k, k_out = next(
            (todo.pop(i) for i in same_shape if todo[i][0].shape[2] == q.shape[2]), (None, None)
        )
        _launch(q, q_out, k, k_out, cos, sin, rotary_dim, layout, transpose)
    return outs


def _launch(
    q: Tensor, q_out: Tensor, k: Tensor | None, k_out: Tensor | None, cos: Tensor, sin: Tensor,
    rotary_dim: int, layout: str, transpose: bool,
) -> None:  # fmt: skip
    """Rotate ``q`` and ``k`` (B, H, T, D) by tables (B or 1, T or 1, rotary_dim)."""
    batch, heads, time, dim = q.shape
    second, second_out = (q, q_out) if k is None or k_out is None else (k, k_out)
    tables = [
        s if n == size else 0  # broadcast
        for x in (cos, sin)
        for s, n, size in zip(x.stride(), x.shape, (batch, time), strict=False)
    ]
    _rope_kernel[(batch * time,)](
        q, second, q_out, second_out, cos, sin,
        *q.stride()[:3], *second.stride()[:3], *q_out.stride()[:3], *second_out.stride()[:3],
        *tables, time, heads, 0 if k is None else k.shape[1], rotary_dim, dim,
        **_sides(layout, transpose), **_config(rotary_dim, dim), num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


@functools.cache
def _sides(layout: str, transpose: bool) -> dict[str, bool]:
    """Whether pairs are adjacent in what is read, in what is written, and in the tables."""
    sides = (layout != "halves", layout == "pairs")
    read, written = sides[::-1] if transpose else sides
    return {
        "PAIRS_IN": read, "PAIRS_OUT": written, "PAIRS_TABLE": layout == "pairs",
        "TRANSPOSE": transpose,
    }  # fmt: skip
