"""RMSNorm kernels: one read and one write per direction (twin of ``kernels/rms_norm.py``).

Both kernels work on tiles of ``ROWS`` whole rows. Arithmetic is fp32, whatever is stored. The
residual add of ``add_rms_norm`` is a branch of the same kernels.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    dim,
    x_stride,
    residual_stride,
    sum_stride,
    y_stride,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = norm(x [+ residual]) · (offset + weight); stores one rstd per row."""
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


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    extra_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    dim,
    tiles,
    grad_stride,
    x_stride,
    extra_stride,
    dx_stride,
    offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = rstd · (g·w − n · mean(g·w·n)) [+ extra]; one partial dW per program, summed later.

    Each program takes ``tiles`` neighbouring tiles, so that dW has as many partial sums as there
    are programs and the result does not depend on the order in which they run.
    """
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    in_col = col < dim
    if NEED_WEIGHT:
        dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        g = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0)
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
            dx = rstd[:, None] * (g - n * (tl.sum(g * n, axis=1) / dim)[:, None])
            if HAS_EXTRA:
                extra = tl.load(
                    extra_ptr + row[:, None] * extra_stride + col[None, :], mask=mask, other=0.0
                )
                dx += extra.to(tl.float32)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row[:, None] * dx_stride + col[None, :], dx, mask=mask)
    if NEED_WEIGHT:
        tl.store(partial_ptr + program * dim + col, tl.sum(dw, axis=0), mask=in_col)


def tile_of(dim: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, num_warps) for rows of ``dim`` features: 8 elements per thread, 16 if long."""
    block = triton.next_power_of_2(dim)
    rows = max(1, min(16, 1024 // block))
    warps = max(1, min(16, rows * block // 256))
    return rows, block, 32 if block > 8192 else warps


def as_rows(t: Tensor) -> Tensor:
    """View ``t`` (..., D) as (rows, D) with unit feature stride; copy only if strides force it."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def output_like(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Allocate an output with the strides that eager would give it, and rows to write it through.

    Returns:
        (output, rows): the same memory where the output's strides allow that, else ``rows`` is a
        buffer that ``finish`` copies.
    """
    out = torch.empty_like(x, dtype=dtype)
    dim = x.shape[-1]
    return out, out.view(-1, dim) if out.is_contiguous() else out.new_empty(x.numel() // dim, dim)


def finish(out: Tensor, rows: Tensor) -> Tensor:
    """Return ``out``, holding what was written through ``rows``."""
    if out.data_ptr() != rows.data_ptr():
        out.copy_(rows.view(out.shape))
    return out


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _programs(device: torch.device) -> int:
    """How many programs share the rows when dW is wanted: two for each multiprocessor."""
    if device.type != "cuda":
        return 4
    return 2 * _multiprocessors(torch.cuda.current_device())


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Launch ``forward_kernel``; returns (sum or None, y, rstd)."""
    normed = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = normed if outer or weight is None else torch.promote_types(weight.dtype, normed)
    y, y_rows = output_like(x, dtype)
    total, total_rows = (None, y_rows) if residual is None else output_like(x, normed)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        x_rows = as_rows(x)
        r_rows = x_rows if residual is None else as_rows(residual)
        rows, dim = x_rows.shape
        tile, block, warps = tile_of(dim)
        forward_kernel[(triton.cdiv(rows, tile),)](
            x_rows,
            r_rows,
            None if weight is None else weight.contiguous(),
            total_rows,
            y_rows,
            rstd,
            rows,
            dim,
            x_rows.stride(0),
            r_rows.stride(0),
            total_rows.stride(0),
            y_rows.stride(0),
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_OFFSET=offset != 0.0,
            OUTER=outer,
            ROWS=tile,
            BLOCK=block,
            num_warps=warps,
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
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    extra: Tensor | None,
    offset: float,
    outer: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
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
    x_rows, grad_rows = as_rows(x), as_rows(grad)
    extra_rows = grad_rows if extra is None else as_rows(extra)
    rows, dim = x_rows.shape
    tile, block, warps = tile_of(dim)
    count = triton.cdiv(rows, tile)
    tiles = triton.cdiv(count, _programs(x.device)) if need_weight else 1
    programs = triton.cdiv(count, tiles)
    partial = rstd.new_empty((programs, dim) if need_weight else 0)
    backward_kernel[(programs,)](
        grad_rows,
        x_rows,
        None if weight is None else weight.contiguous(),
        rstd.contiguous(),
        extra_rows,
        dx_rows,
        partial,
        rows,
        dim,
        tiles,
        grad_rows.stride(0),
        x_rows.stride(0),
        extra_rows.stride(0),
        dx_rows.stride(0),
        offset,
        HAS_WEIGHT=weight is not None,
        HAS_OFFSET=offset != 0.0,
        OUTER=outer,
        HAS_EXTRA=extra is not None,
        NEED_X=need_x,
        NEED_WEIGHT=need_weight,
        ROWS=tile,
        BLOCK=block,
        num_warps=warps,
    )
    return finish(dx, dx_rows), partial.sum(0).to(weight.dtype) if need_weight else x.new_empty(0)


def forward_case(
    name: str,
    dim: int,
    types: tuple[str, str, str],
    *,
    weight: bool = True,
    offset: bool = False,
    outer: bool = False,
    residual: bool = False,
) -> AotCase:
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
    name: str,
    dim: int,
    types: tuple[str, str],
    *,
    weight: bool = True,
    offset: bool = False,
    outer: bool = False,
    extra: bool = False,
    need_x: bool = True,
    need_weight: bool = True,
) -> AotCase:
    """The backward kernel for rows of ``dim``; ``types`` of x (and its gradients) and weight."""
    rows, block, warps = tile_of(dim)
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


_BF16 = ("bf16", "bf16", "bf16")
AOT = (
    forward_case("D=128", 128, _BF16),
    forward_case("D=507 fp32 weight", 507, ("bf16", "fp32", "fp32")),
    forward_case("D=2048 gemma", 2048, _BF16, offset=True, outer=True),
    forward_case("D=4096 inner offset", 4096, _BF16, offset=True),
    forward_case("D=8192 fp16", 8192, ("fp16", "fp16", "fp16")),
    forward_case("D=16384 no weight", 16384, ("fp32", "fp32", "fp32"), weight=False),
    forward_case("D=32768", 32768, _BF16),
    backward_case("D=128", 128, _BF16[:2]),
    backward_case("D=507 fp32 weight", 507, ("bf16", "fp32")),
    backward_case("D=2048 gemma", 2048, _BF16[:2], offset=True, outer=True),
    backward_case("D=4096 frozen, inner offset", 4096, _BF16[:2], offset=True, need_weight=False),
    backward_case("D=8192 fp16, only dW", 8192, ("fp16", "fp16"), need_x=False),
    backward_case("D=16384", 16384, _BF16[:2]),
    backward_case("D=32768 no weight", 32768, ("fp32", "fp32"), weight=False, need_weight=False),
)
"""Every tile shape, each with another mix of the branches; one odd size."""
