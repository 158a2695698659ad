"""RMSNorm on the GPU, of rows or of a sum: one read and one write per direction.

Both kernels work on tiles of ``ROWS`` whole rows. Arithmetic is fp32, whatever is stored. The
residual add of ``add_rms_norm`` is a branch of the same kernels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, cdiv, gpu_of, next_power_of_2


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, rows, dim, x_stride, residual_stride,
    sum_stride, y_stride, eps, offset, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, OUTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store y = norm(x [+ residual]) · (offset + weight), and one rstd per row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    in_row, in_col = row < rows, col < dim
    mask = in_row[:, None] & in_col[None, :]
    x_raw = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
    x = x_raw.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0
        )
        total = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row[:, None] * sum_stride + col[None, :], total, mask=mask)
        x = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / dim + eps)
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    y = x * rstd[:, None]
    if HAS_OFFSET and not HAS_WEIGHT:
        y *= offset
    if not OUTER:  # the norm is rounded to the dtype that was normed, before the weight
        if HAS_RESIDUAL:
            y = y.to(sum_ptr.dtype.element_ty).to(tl.float32)
        else:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        w_raw = tl.load(weight_ptr + col, mask=in_col, other=0.0)
        w = w_raw.to(tl.float32)
        if HAS_OFFSET:
            w += offset
            if not OUTER:
                w = w.to(weight_ptr.dtype.element_ty).to(tl.float32)
        y *= w[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * y_stride + col[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, extra_ptr, dx_ptr, partial_ptr, rows, dim, tiles,
    grad_stride, x_stride, extra_stride, dx_stride, offset, HAS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, OUTER: tl.constexpr, HAS_EXTRA: tl.constexpr, NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store dx = rstd · (g·w − n · mean(g·w·n)) [+ extra], and one partial dW per program.

    Each program takes ``tiles`` neighbouring tiles, so that dW has as many partial sums as there
    are programs and the result does not depend on the order in which they run. For dW alone, rows
    may be cut into blocks of columns.
    """
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    if not NEED_X:
        col += tl.program_id(1) * BLOCK
    in_col = col < dim
    if NEED_WEIGHT:
        dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        g = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0)
        if NEED_X and HAS_EXTRA:
            extra = tl.load(
                extra_ptr + row[:, None] * extra_stride + col[None, :], mask=mask, other=0.0
            )
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
        n = x.to(tl.float32) * rstd[:, None]
        g = g.to(tl.float32)
        if NEED_WEIGHT:
            dw += g * n
        if NEED_X:
            if HAS_WEIGHT:
                w = tl.load(weight_ptr + col, mask=in_col, other=0.0).to(tl.float32)
                if HAS_OFFSET:
                    w += offset
                    if not OUTER:
                        w = w.to(weight_ptr.dtype.element_ty).to(tl.float32)
                g *= w[None, :]
            elif HAS_OFFSET:
                g *= offset
            dx = rstd[:, None] * (g - n * (tl.sum(g * n, axis=1) / dim)[:, None])
            if HAS_EXTRA:
                dx += extra.to(tl.float32)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row[:, None] * dx_stride + col[None, :], dx, mask=mask)
    if NEED_WEIGHT:
        tl.store(partial_ptr + program * dim + col, tl.sum(dw, axis=0), mask=in_col)


COLUMNS = 8192
"""Of longer rows, a program has no registers for dx and the sums of dW."""


@functools.cache
def tile_of(dim: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, num_warps) for rows of ``dim`` features: 8 elements per thread, more if long.

    A program has at most 1024 threads; an AMD warp has 64 of them.
    """
    block = next_power_of_2(dim)
    rows = max(1, min(16, 1024 // block))
    warps = max(1, min(16, rows * block // 256))
    return rows, block, 32 if block > 8192 and torch.version.hip is None else warps


class BackwardTiles(NamedTuple):
    """The division of rows in a launch of a norm's backward kernel (``backward_tiles``)."""

    programs: int  # over the rows, of each head
    blocks: int  # over the columns
    tiles: int  # of a program, one after another
    rows: int  # of a tile
    block: int
    warps: int


def backward_tiles(
    x: Tensor, rows: int, need_x: bool, need_sums: bool, heads: int = 1
) -> BackwardTiles:
    """The tiles of ``rows`` of x (..., D), or of every ``heads``-th of them.

    With ``need_sums``, of dW or db, there are as many programs as keep the card busy: each stores
    the sums of its tiles.
    """
    dim = x.shape[-1]
    width = dim if need_x else min(dim, COLUMNS)
    tile, block, warps = tile_of(width)
    count = cdiv(rows // heads, tile)
    most = max(1, 2 * gpu_of(x).multiprocessors // heads)
    tiles = cdiv(count, most) if need_sums else 1
    return BackwardTiles(cdiv(count, tiles), cdiv(dim, width), tiles, tile, block, warps)


def sums_apart(dim: int, need_x: bool, need_sums: bool) -> bool:
    """Return True if dx and the sums of a backward pass take a launch each."""
    return need_x and need_sums and dim > COLUMNS


def as_rows(t: Tensor) -> Tensor:
    """View ``t`` (..., D) as (rows, D) with unit feature stride; copy only if strides force it."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def rows_of(t: Tensor) -> tuple[Tensor, int]:
    """What a kernel reads the rows of ``t`` (..., D) through, and the stride from row to row."""
    if t.is_contiguous():  # no view: it would cost more than the rest of a launch's arguments
        return t, t.shape[-1]
    rows = as_rows(t)
    return rows, rows.stride(0)


def output_like(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Allocate an output with the strides that eager would give it, and rows to write it through.

    Returns:
        (output, rows): the same tensor where it is contiguous, else ``rows`` is a buffer that is,
        and that ``finish`` copies.
    """
    out = torch.empty_like(x, dtype=dtype)
    dim = x.shape[-1]
    return out, out if out.is_contiguous() else out.new_empty(x.numel() // dim, dim)


def finish(out: Tensor, rows: Tensor) -> Tensor:
    """Return ``out``, holding what was written through ``rows``."""
    if rows is not out:
        out.copy_(rows.view(out.shape))
    return out


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float,
    outer: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Launch ``forward_kernel``; returns (sum or None, y, rstd)."""
    normed = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = normed if outer or weight is None else torch.promote_types(weight.dtype, normed)
    y, y_rows = output_like(x, dtype)
    total, total_rows = (None, y_rows) if residual is None else output_like(x, normed)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if size := x.numel():
        x_rows, x_stride = rows_of(x)
        r_rows, r_stride = (x_rows, x_stride) if residual is None else rows_of(residual)
        dim = x.shape[-1]
        rows = size // dim
        tile, block, warps = tile_of(dim)
        forward_kernel[(cdiv(rows, tile),)](
            x_rows,
            r_rows,
            None if weight is None else weight.contiguous(),
            total_rows,
            y_rows,
            rstd,
            rows,
            dim,
            x_stride,
            r_stride,
            dim,
            dim,
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_OFFSET=offset != 0.0,
            OUTER=outer,
            ROWS=tile,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=FP_FUSION,
        )
    return None if total is None else finish(total, total_rows), finish(y, y_rows), rstd


def forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor]:
    """Norm ``x`` (..., D).

    Returns:
        (y, rstd): y in x's shape and strides; rstd (..., 1) in fp32.
    """
    _, y, rstd = launch_forward(x, None, weight, eps, offset, outer)
    return y, rstd


def forward_of_sum(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Add and norm rows (..., D): (sum, y, rstd)."""
    total, y, rstd = launch_forward(x, residual, weight, eps, offset, outer)
    assert total is not None
    return total, y, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, extra: Tensor | None,
    offset: float, outer: bool, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the norm.

    Args:
        grad: gradient of y, (..., D).
        x: what was normed, (..., D).
        weight: (D,) or None.
        rstd: (..., 1), fp32, contiguous.
        extra: another gradient of ``x``, added to dx before it is rounded.
        offset: added to the weight.
        outer: whether the weight was applied before rounding.
        need_x: whether dx is wanted.
        need_weight: whether dW is wanted.

    Returns:
        (dx, dW) in the dtypes of x and weight; what was not wanted has no elements.
    """
    dx, dx_rows = output_like(x if need_x else x.new_empty(0, x.shape[-1]), x.dtype)
    if not x.numel() or not (need_x or need_weight):
        return dx, weight.new_zeros(weight.shape) if need_weight else x.new_empty(0)
    (x_rows, x_stride), (grad_rows, grad_stride) = rows_of(x), rows_of(grad)
    extra_rows, extra_stride = (grad_rows, grad_stride) if extra is None else rows_of(extra)
    dim = x.shape[-1]
    rows = x.numel() // dim

    def launch(need_x: bool, need_weight: bool) -> Tensor:
        of = backward_tiles(x, rows, need_x, need_weight)
        partial = rstd.new_empty((of.programs, dim) if need_weight else 0)
        backward_kernel[(of.programs, of.blocks)](
            grad_rows,
            x_rows,
            None if weight is None else weight.contiguous(),
            rstd.contiguous(),
            extra_rows,
            dx_rows,
            partial,
            rows,
            dim,
            of.tiles,
            grad_stride,
            x_stride,
            extra_stride,
            dim,
            offset,
            HAS_WEIGHT=weight is not None,
            HAS_OFFSET=offset != 0.0,
            OUTER=outer,
            HAS_EXTRA=extra is not None,
            NEED_X=need_x,
            NEED_WEIGHT=need_weight,
            ROWS=of.rows,
            BLOCK=of.block,
            num_warps=of.warps,
            enable_fp_fusion=FP_FUSION,
        )
        return partial

    if sums_apart(dim, need_x, need_weight):
        launch(True, False)
        partial = launch(False, True)
    else:
        partial = launch(need_x, need_weight)
    return finish(dx, dx_rows), partial.sum(0).to(weight.dtype) if need_weight else x.new_empty(0)
