"""The RMSNorm kernels, their tile shapes, and how to compile them ahead of time.

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

from ..aot import AotCase
from ..launch import cdiv, gpu_of, next_power_of_2
from ..launcher import launched


@launched
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


@launched
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
    """How a launch of a norm's backward kernel divides its rows: ``backward_tiles``."""

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
    """Whether dx and the sums of a backward pass take a launch each."""
    return need_x and need_sums and dim > COLUMNS


def forward_case(
    name: str, dim: int, types: tuple[str, str, str], *, weight: bool = True, offset: bool = False,
    outer: bool = False, residual: bool = False,
) -> AotCase:  # fmt: skip
    """The forward kernel for rows of ``dim``; ``types`` of x, weight and y."""
    rows, block, warps = tile_of(dim)
    x, w, y = types
    pointers = {"x": x, "residual": x, "weight": w, "sum": x, "y": y, "rstd": "fp32"}
    signature = {f"{k}_ptr": f"*{v}" for k, v in pointers.items()}
    signature |= dict.fromkeys(("rows", "dim", "x_stride", "residual_stride"), "i32")
    signature |= {"sum_stride": "i32", "y_stride": "i32", "eps": "fp32", "offset": "fp32"}
    constants = {"HAS_RESIDUAL": residual, "HAS_WEIGHT": weight, "HAS_OFFSET": offset}
    constants |= {"OUTER": outer, "ROWS": rows, "BLOCK": block}
    divisible = () if dim % 16 else ("dim", "x_stride", "residual_stride", "sum_stride", "y_stride")
    return AotCase(
        f"forward {name}", forward_kernel, signature, constants, warps, divisible=divisible
    )


def backward_case(
    name: str, dim: int, types: tuple[str, str], *, weight: bool = True, offset: bool = False,
    outer: bool = False, extra: bool = False, need_x: bool = True, need_weight: bool = True,
) -> AotCase:  # fmt: skip
    """The backward kernel for rows of ``dim``; ``types`` of x (and its gradients) and weight."""
    rows, block, warps = tile_of(dim if need_x else min(dim, COLUMNS))
    x, w = types
    pointers = {"grad": x, "x": x, "weight": w, "rstd": "fp32", "extra": x, "dx": x}
    signature = {f"{k}_ptr": f"*{v}" for k, v in (pointers | {"partial": "fp32"}).items()}
    signature |= dict.fromkeys(("rows", "dim", "tiles", "grad_stride", "x_stride"), "i32")
    signature |= {"extra_stride": "i32", "dx_stride": "i32", "offset": "fp32"}
    constants = {"HAS_WEIGHT": weight, "HAS_OFFSET": offset, "OUTER": outer, "HAS_EXTRA": extra}
    constants |= {"NEED_X": need_x, "NEED_WEIGHT": need_weight, "ROWS": rows, "BLOCK": block}
    divisible = () if dim % 16 else ("dim", "grad_stride", "x_stride", "extra_stride", "dx_stride")
    return AotCase(
        f"backward {name}", backward_kernel, signature, constants, warps, divisible=divisible
    )
