"""RMSNorm inside a matmul (twin of ``kernels/norms/rms_norm_linear.py``).

The kernel multiplies x by the norm weight as it loads it, sums the squares of x on the way, and
scales its result by rstd: the normed rows never exist. It competes with the norm's own kernel
followed by the vendor's matmul; ``prefers_fused`` weighs the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, cdiv
from .rms_norm_triton import forward as norm_forward
from .rms_norm_triton import rows_of

PEAK = 8e14
"""Matmul rate of the vendor's library in bf16, FLOP/s (order of an H100's)."""
EFFICIENCY = 0.7
"""The part of it that a Triton matmul reaches when its operand passes through registers."""
BANDWIDTH = 3e12
"""Memory bandwidth, bytes/s. What counts is PEAK / BANDWIDTH, which is 150-300 on all targets."""
TRITON_LAUNCH, LIBRARY_LAUNCH = 10e-6, 5e-6
"""Host time of one launch, seconds."""


@triton.jit
def matmul_kernel(
    x_ptr, norm_weight_ptr, weight_ptr, bias_ptr, out_ptr, rstd_ptr, rows, features, dim, x_stride,
    weight_stride, eps, offset, HAS_NORM_WEIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store rstd · ((x · (offset + norm_weight)) weightᵀ) + bias, and rstd of each row."""
    # neighbouring programs share weight and x tiles in the cache: GROUP tiles of rows at a time
    program = tl.program_id(0)
    row_tiles, feature_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(features, BLOCK_FEATURES)
    group = program // (GROUP * feature_tiles)
    group_size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + (program % (GROUP * feature_tiles)) % group_size
    feature_tile = (program % (GROUP * feature_tiles)) // group_size

    row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = feature_tile.to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    in_row, in_feature = row < rows, feature < features
    squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        col = start + tl.arange(0, BLOCK_DIM)
        in_col = col < dim
        x = tl.load(
            x_ptr + row[:, None] * x_stride + col[None, :],
            mask=in_row[:, None] & in_col[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + feature[None, :] * weight_stride + col[:, None],
            mask=in_feature[None, :] & in_col[:, None],
            other=0.0,
        )
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        if HAS_NORM_WEIGHT:
            g = tl.load(norm_weight_ptr + col, mask=in_col, other=0.0).to(tl.float32)
            if HAS_OFFSET:
                g += offset
                if not OUTER:
                    g = g.to(norm_weight_ptr.dtype.element_ty).to(tl.float32)
            x = (wide * g[None, :]).to(w.dtype)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    rstd = 1.0 / tl.sqrt(squares / dim + eps)
    acc *= rstd[:, None]
    if HAS_OFFSET and not HAS_NORM_WEIGHT:
        acc *= offset
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=in_feature, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row[:, None] * features + feature[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_row[:, None] & in_feature[None, :])
    if feature_tile == 0:
        tl.store(rstd_ptr + row, rstd, mask=in_row)


def tile_of(rows: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_ROWS, BLOCK_FEATURES, BLOCK_DIM, num_warps, num_stages) for so many rows."""
    if rows <= 16:
        return 16, 64, 128, 4, 4
    if rows <= 64:
        return 64, 64, 64, 4, 4
    return 128, 128, 64, 8, 3


def prefers_fused(rows: int, dim: int, features: Sequence[int]) -> bool:
    """Whether one kernel beats the norm followed by the library's matmul (2-byte elements).

    The norm costs a launch and the normed rows a write and a read; the fused kernel runs the matmul
    at ``EFFICIENCY`` of the library's rate. So it pays where the matmul is limited by memory or by
    launches: few rows, or few output features.
    """
    split, fused = TRITON_LAUNCH + 4 * rows * dim / BANDWIDTH, 0.0
    for n in features:
        memory = 2 * (rows * dim + dim * n + rows * n) / BANDWIDTH
        compute = 2 * rows * dim * n / PEAK
        split += LIBRARY_LAUNCH + max(memory, compute)
        fused += TRITON_LAUNCH + max(memory, compute / EFFICIENCY)
    return fused < split


def fits_fused(
    x: Tensor, norm_weight: Tensor | None, weights: Sequence[Tensor], outer: bool
) -> bool:
    """Whether the fused kernel means the same for these tensors.

    In fp16, x · weight can overflow where the normed rows do not; in fp32 the library is faster.
    Rows that are not a multiple of 16 long would be loaded one element at a time.
    """
    normed = x.dtype
    if not outer and norm_weight is not None:
        normed = torch.promote_types(x.dtype, norm_weight.dtype)
    fits = x.dtype is normed is torch.bfloat16 and x.shape[-1] % 16 == 0
    return fits and all(w.dtype is torch.bfloat16 and w.stride(-1) == 1 for w in weights)


def launch_fused(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, outer: bool,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """Launch ``matmul_kernel`` for each linear; see ``forward``. x must not be empty."""
    x_rows, x_stride = rows_of(x)
    dim = x.shape[-1]
    rows = x.numel() // dim
    block_rows, block_features, block_dim, warps, stages = tile_of(rows)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    outs = []
    for w, b in zip(weights, biases, strict=True):
        features = w.shape[0]
        out = x.new_empty((*x.shape[:-1], features), dtype=w.dtype)
        tiles = cdiv(rows, block_rows) * cdiv(features, block_features)
        matmul_kernel[(tiles,)](
            x_rows,
            norm_weight,
            w,
            None if b is None else b.contiguous(),
            out,
            rstd,
            rows,
            features,
            dim,
            x_stride,
            w.stride(0),
            eps,
            offset,
            HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_OFFSET=offset != 0.0,
            OUTER=outer,
            HAS_BIAS=b is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_FEATURES=block_features,
            BLOCK_DIM=block_dim,
            GROUP=8,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=FP_FUSION,
        )
        outs.append(out)
    return [*outs, rstd]


def forward(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, outer: bool,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """Norm and linears by the faster way; nothing here waits for the GPU.

    Args:
        x: (..., D).
        norm_weight: (D,) or None.
        eps: added to the mean square.
        offset: added to the norm weight.
        outer: whether the norm weight is applied before rounding.
        weights: (F_i, D) each.
        biases: (F_i,) or None each.

    Returns:
        One (..., F_i) for each linear, then rstd (..., 1) in fp32.
    """
    dim = x.shape[-1]
    if (
        x.numel()
        and weights
        and fits_fused(x, norm_weight, weights, outer)
        and prefers_fused(x.numel() // dim, dim, [w.shape[0] for w in weights])
    ):
        return launch_fused(x, norm_weight, eps, offset, outer, weights, biases)
    y, rstd = norm_forward(x, norm_weight, eps, offset, outer)
    outs = [
        F.linear(y.to(w.dtype), w, b).contiguous() for w, b in zip(weights, biases, strict=True)
    ]
    return [*outs, rstd]
