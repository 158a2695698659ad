"""LayerNorm on the GPU: one read and one write per direction (twin of ``layer_norm.py``).

A program works on tiles of ``ROWS`` whole rows that share one row of the weight: with a weight of
(heads, D) those are every ``heads``-th row of x. Arithmetic is fp32, whatever is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, cdiv
from .rms_norm_triton import backward_tiles, finish, output_like, rows_of, sums_apart, tile_of


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, dim, heads, x_stride, y_stride,
    eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store y = norm(x) · weight + bias, and the statistics of each row."""
    head = tl.program_id(1)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)) * heads + head
    col = tl.arange(0, BLOCK)
    in_row, in_col = row < rows, col < dim
    mask = in_row[:, None] & in_col[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / dim
    y = tl.where(in_col[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / dim + eps)
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    y *= rstd[:, None]
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + head * dim + col, mask=in_col, other=0.0)
        y *= w.to(tl.float32)[None, :]
    if HAS_BIAS:
        b = tl.load(bias_ptr + head * dim + col, mask=in_col, other=0.0)
        y += b.to(tl.float32)[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * y_stride + col[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, rows, dim, heads,
    tiles, grad_stride, x_stride, dx_stride, HAS_WEIGHT: tl.constexpr, NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store dx = rstd · (g·w − mean(g·w) − n · mean(g·w·n)), and one partial dW and db per program.

    Each program takes ``tiles`` neighbouring tiles, so that the result does not depend on the
    order in which the programs run. For the parameters alone, rows may be cut into blocks of
    columns.
    """
    program, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    if not NEED_X:
        col += tl.program_id(2) * BLOCK
    in_col = col < dim
    if NEED_WEIGHT:
        dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if NEED_BIAS:
        db = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tiles):
        row = ((program * tiles + tile) * ROWS + tl.arange(0, ROWS)) * heads + head
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        g = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if NEED_BIAS:
            db += g
        if NEED_X or NEED_WEIGHT:
            x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
            mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
            n = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if NEED_WEIGHT:
                dw += g * n
            if NEED_X:
                if HAS_WEIGHT:
                    w = tl.load(weight_ptr + head * dim + col, mask=in_col, other=0.0)
                    g *= w.to(tl.float32)[None, :]
                # beyond the row g is zero, whatever n is there
                slope = tl.sum(g * n, axis=1) / dim
                dx = g - (tl.sum(g, axis=1) / dim)[:, None] - n * slope[:, None]
                dx = (dx * rstd[:, None]).to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + row[:, None] * dx_stride + col[None, :], dx, mask=mask)
    partial = (program * heads + head) * dim + col
    if NEED_WEIGHT:
        tl.store(dw_ptr + partial, tl.sum(dw, axis=0), mask=in_col)
    if NEED_BIAS:
        tl.store(db_ptr + partial, tl.sum(db, axis=0), mask=in_col)


def _heads(x: Tensor, *parameters: Tensor | None) -> int:
    """How many rows the weight (or the bias) has."""
    return max((p.numel() // x.shape[-1] for p in parameters if p is not None), default=1)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm ``x`` (..., D).

    Returns:
        (y, mean, rstd): y in x's shape and strides; the others (..., 1) in fp32.
    """
    y, y_rows = output_like(x, x.dtype)
    mean = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        (x_rows, x_stride), heads = rows_of(x), _heads(x, weight, bias)
        dim = x.shape[-1]
        rows = x.numel() // dim
        tile, block, warps = tile_of(dim)
        forward_kernel[(cdiv(rows // heads, tile), heads)](
            x_rows,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y_rows,
            mean,
            rstd,
            rows,
            dim,
            heads,
            x_stride,
            dim,
            eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            ROWS=tile,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=FP_FUSION,
        )
    return finish(y, y_rows), mean, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the norm.

    Args:
        grad: gradient of y, (..., D).
        x: what was normed, (..., D).
        weight: (D,) or (heads, D), or None.
        bias: in the weight's shape, or None.
        mean: (..., 1), fp32.
        rstd: (..., 1), fp32.
        need_x: whether dx is wanted.
        need_weight: whether dW is wanted.
        need_bias: whether db is wanted.

    Returns:
        (dx, dW, db) in the dtypes of x, weight and bias; what was not wanted has no elements.
    """
    dx, dx_rows = output_like(x if need_x else x.new_empty(0, x.shape[-1]), x.dtype)
    if not x.numel() or not (need_x or need_weight or need_bias):
        zeros = [t.new_zeros(t.shape) if t is not None and need else x.new_empty(0)
                 for t, need in ((weight, need_weight), (bias, need_bias))]  # fmt: skip
        return dx, zeros[0], zeros[1]
    (x_rows, x_stride), (grad_rows, grad_stride) = rows_of(x), rows_of(grad)
    heads, dim = _heads(x, weight, bias), x.shape[-1]
    rows = x.numel() // dim

    def launch(need_x: bool, need_weight: bool, need_bias: bool) -> list[Tensor]:
        of = backward_tiles(x, rows, need_x, need_weight or need_bias, heads)
        partial = [rstd.new_empty((of.programs, heads * dim) if need else 0)
                   for need in (need_weight, need_bias)]  # fmt: skip
        backward_kernel[(of.programs, heads, of.blocks)](
            grad_rows,
            x_rows,
            None if weight is None else weight.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            dx_rows,
            *partial,
            rows,
            dim,
            heads,
            of.tiles,
            grad_stride,
            x_stride,
            dim,
            HAS_WEIGHT=weight is not None,
            NEED_X=need_x,
            NEED_WEIGHT=need_weight,
            NEED_BIAS=need_bias,
            ROWS=of.rows,
            BLOCK=of.block,
            num_warps=of.warps,
            enable_fp_fusion=FP_FUSION,
        )
        return partial

    if sums_apart(dim, need_x, need_weight or need_bias):
        launch(True, False, False)
        partial = launch(False, need_weight, need_bias)
    else:
        partial = launch(need_x, need_weight, need_bias)
    d_weight, d_bias = (
        p.sum(0).view(t.shape).to(t.dtype) if t is not None and need else x.new_empty(0)
        for p, t, need in ((partial[0], weight, need_weight), (partial[1], bias, need_bias))
    )
    return finish(dx, dx_rows), d_weight, d_bias
