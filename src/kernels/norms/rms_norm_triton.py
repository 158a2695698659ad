"""RMSNorm on the GPU: one read and one write per direction (twin of ``rms_norm.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import FP_FUSION, cdiv
from .rms_norm_kernels_triton import (
    backward_case,
    backward_kernel,
    backward_tiles,
    forward_case,
    forward_kernel,
    sums_apart,
    tile_of,
)


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


_BF16 = ("bf16", "bf16", "bf16")
AOT = (
    forward_case("D=128", 128, _BF16),
    forward_case("D=507 fp32 weight", 507, ("bf16", "fp32", "fp32")),
    forward_case("D=2048 offset", 2048, _BF16, offset=True, outer=True),
    forward_case("D=4096 inner offset", 4096, _BF16, offset=True),
    forward_case("D=8192 fp16", 8192, ("fp16", "fp16", "fp16")),
    forward_case("D=16384 no weight", 16384, ("fp32", "fp32", "fp32"), weight=False),
    forward_case("D=64 only a factor", 64, _BF16, weight=False, offset=True, outer=True),
    backward_case("D=128", 128, _BF16[:2]),
    backward_case("D=507 fp32 weight", 507, ("bf16", "fp32")),
    backward_case("D=2048 offset", 2048, _BF16[:2], offset=True, outer=True),
    backward_case("D=4096 frozen, inner offset", 4096, _BF16[:2], offset=True, need_weight=False),
    backward_case("D=8192 fp16, only dW", 8192, ("fp16", "fp16"), need_x=False),
    backward_case("D=16384, frozen", 16384, _BF16[:2], need_weight=False),
    backward_case("D=16384, only dW", 16384, _BF16[:2], need_x=False),
    backward_case("D=64 factor", 64, _BF16[:2], weight=False, offset=True, need_weight=False),
    backward_case("D=16384 no weight", 16384, ("fp32", "fp32"), weight=False, need_weight=False),
)
"""Every tile shape, each with another mix of the branches; one odd size."""
