"""Triton twins of ``lora_linear.py``: matmuls with one small dimension.

The rank update is a product with a small inner dimension, added to what is there. The wide product
has few columns: of a bf16 matrix and a few columns in fp32, which is what adapters are by default
over a bf16 base. Copying the wide one to fp32 costs twice its own traffic, and fp32 products a
tenth of the tensor cores' speed.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, Gpu, cdiv, dot_precision, gpu_of, next_power_of_2


@triton.jit
def rank_update_kernel(
    base, left, right, out, rows, columns, rank, base_stride, left_stride_n, left_stride_r,
    right_stride_r, right_stride_m, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out = base + left · right``: one (BLOCK_N, BLOCK_M) tile per program, fp32 accumulator.

    Both factors are cast to the dtype of ``base`` on load, so that fp32 adapters over a bf16 base
    use the tensor cores; the sum is rounded once. ``out`` is contiguous.
    """
    # the row block varies slowest: neighbouring programs share ``left`` and write one row band
    blocks_m = tl.cdiv(columns, BLOCK_M)
    pid = tl.program_id(0)
    n = (pid // blocks_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = (n < rows)[:, None], (m < columns)[None, :]
    dtype = base.dtype.element_ty
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a = tl.load(
            left + n[:, None] * left_stride_n + r[None, :] * left_stride_r,
            mask=n_in & (r < rank)[None, :],
            other=0.0,
        ).to(dtype)
        b = tl.load(
            right + r[:, None] * right_stride_r + m[None, :] * right_stride_m,
            mask=(r < rank)[:, None] & m_in,
            other=0.0,
        ).to(dtype)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    inside = n_in & m_in
    old = tl.load(base + n[:, None] * base_stride + m[None, :], mask=inside, other=0.0)
    new = old.to(tl.float32) + product
    tl.store(out + n[:, None] * columns + m[None, :], new.to(dtype), mask=inside)


@functools.cache
def _config(rank: int, gpu: Gpu) -> dict[str, int]:
    """Memory-bound whatever the shape; only the rank's block changes.

    AMD's cards have less shared memory to keep it in: of 64, a quarter of their threads would run.
    """
    block_r = min(32 if gpu.hip else 64, max(16, next_power_of_2(rank)))
    block_m = 128 if gpu.multiplies_from_shared else 64
    return {"BLOCK_N": 64, "BLOCK_M": block_m, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2}


def rank_update(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``base (N, M) + left (N, r) · right (r, M)`` in a fresh contiguous tensor of base's dtype.

    Args:
        base: (N, M), rows contiguous (copied if not).
        left: (N, r), any strides and floating dtype.
        right: (r, M), any strides and floating dtype.
    """
    base = base if base.stride(1) == 1 else base.contiguous()
    rows, columns = base.shape
    out = base.new_empty(rows, columns)
    if not rows or not columns:
        return out
    rank = left.shape[1]
    config = _config(rank, gpu_of(base))
    blocks = cdiv(rows, config["BLOCK_N"]) * cdiv(columns, config["BLOCK_M"])
    rank_update_kernel[(blocks,)](
        base,
        left,
        right,
        out,
        rows,
        columns,
        rank,
        base.stride(0),
        *left.stride(),
        *right.stride(),
        PRECISION=dot_precision(base.dtype),
        **config,
        enable_fp_fusion=FP_FUSION,
    )
    return out


@triton.jit
def wide_product_kernel(
    wide, narrow, out, rows, columns, inner, share, scale, wide_stride_m, wide_stride_k,
    narrow_stride_k, narrow_stride_r, out_stride_m, out_stride_r, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out (rows, columns) = scale · wide · narrow``: one (BLOCK_M, BLOCK_R) tile per program.

    ``narrow`` is split on load into three parts of the dtype of ``wide``, each what is left of the
    number after those before: 8 bits each in bf16, the 24 of an fp32 number together (Ootomo &
    Yokota 2022). A part times a number of ``wide`` is exact in fp32; the smallest are added first.

    Of a sum, a program adds up ``share`` terms, a multiple of BLOCK_K. Where those are not all
    ``inner``, ``out`` is (shares, rows, columns) without gaps, and holds sums of shares.
    """
    # the block of columns varies fastest: neighbouring programs share the rows of ``wide``
    blocks_r = tl.cdiv(columns, BLOCK_R)
    pid = tl.program_id(0)
    first_k = tl.program_id(1).to(tl.int64) * share
    first_m, first_r = (pid // blocks_r) * BLOCK_M, (pid % blocks_r) * BLOCK_R
    m, r, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    m_in, r_in = (first_m + m < rows)[:, None], (first_r + r < columns)[None, :]
    # where the tiles begin may be out of reach of 32 bits, places within them are not
    wide += first_m.to(tl.int64) * wide_stride_m + first_k * wide_stride_k
    narrow += first_r * narrow_stride_r + first_k * narrow_stride_k
    at_a = m[:, None] * wide_stride_m + k[None, :] * wide_stride_k
    at_b = k[:, None] * narrow_stride_k + r[None, :] * narrow_stride_r
    dtype = wide.dtype.element_ty
    product = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    left = (inner - first_k).to(tl.int32)
    for start in range(0, tl.minimum(share, left), BLOCK_K):
        k_in = start + k < left
        from_k = tl.full((), start, tl.int64)
        a = tl.load(wide + from_k * wide_stride_k + at_a, mask=m_in & k_in[None, :], other=0.0)
        b = tl.load(narrow + from_k * narrow_stride_k + at_b, mask=k_in[:, None] & r_in, other=0.0)
        high = b.to(dtype)
        rest = b - high.to(tl.float32)
        middle = rest.to(dtype)
        low = (rest - middle.to(tl.float32)).to(dtype)
        # tensor cores cut off what a sum cannot hold: many terms are added up outside, rounded
        part = tl.dot(a, middle, tl.dot(a, low))
        product += tl.dot(a, high, part)
    out += tl.program_id(1).to(tl.int64) * rows * columns
    out += first_m.to(tl.int64) * out_stride_m + first_r.to(tl.int64) * out_stride_r
    at_out = m[:, None] * out_stride_m + r[None, :] * out_stride_r
    tl.store(out + at_out, product * scale, mask=m_in & r_in)


_WIDE_TILES = {
    (64, 16): {"BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    (64, 32): {"BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
}
"""What goes with a wide product's tile of so many rows and columns. More columns spill."""

_WIDE_TILES_IN_REGISTERS = {(64, 16): {"BLOCK_K": 32, "num_warps": 4, "num_stages": 4}}
"""The same, for tensor cores that take their operands from registers.

There each warp holds, and splits, all of a tile's columns: of more there would be too many.
"""

_PROGRAMS = 256
"""Two for each multiprocessor of a large card: one alone waits for memory, and at barriers."""

_STEPS = 16
"""A sum of so few blocks is not shared: to add up the shares is a launch that takes as long."""


@functools.lru_cache(4096)
def _wide_config(
    rows: int, columns: int, inner: int, gpu: Gpu
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid, the terms of a sum that a program adds up, and its tile.

    Few tiles share their sums among programs: at 2,048 tokens there are 32 tiles, and matrices of
    4,096 to 14,336 columns to read. Each share costs a result that is written and read again.
    """
    tiles = _WIDE_TILES if gpu.multiplies_from_shared else _WIDE_TILES_IN_REGISTERS
    block_m, block_r = next((t for t in tiles if t[1] >= columns), max(tiles))
    config = tiles[block_m, block_r]
    programs = cdiv(rows, block_m) * cdiv(columns, block_r)
    steps = cdiv(inner, config["BLOCK_K"])
    shares = 1
    if steps > _STEPS and 4 * programs < 3 * _PROGRAMS:
        shares = cdiv(steps, cdiv(steps, cdiv(_PROGRAMS, programs)))
    share = cdiv(max(steps, 1), shares) * config["BLOCK_K"]
    tile = {"BLOCK_M": block_m, "BLOCK_R": block_r} | config
    return (programs, cdiv(max(inner, 1), share)), share, tile


def wide_product(wide: Tensor, narrow: Tensor, scale: float, transposed: bool) -> Tensor:
    """``scale · wide (M, K) · narrow (K, R)`` in fp32, as exact as a product in fp32.

    Args:
        wide: bf16, any strides. In fp16 the parts of small numbers would be lost.
        narrow: fp32, any strides.
        scale: of the product.
        transposed: return (R, M), contiguous, in place of (M, R).
    """
    rows, inner = wide.shape
    columns = narrow.shape[1]
    shape = (columns, rows) if transposed else (rows, columns)
    if not rows or not columns:
        return narrow.new_empty(shape)
    grid, share, config = _wide_config(rows, columns, inner, gpu_of(wide))
    sums = narrow.new_empty((grid[1], *shape))
    wide_product_kernel[grid](
        wide,
        narrow,
        sums,
        rows,
        columns,
        inner,
        share,
        scale,
        *wide.stride(),
        *narrow.stride(),
        *((1, rows) if transposed else (columns, 1)),
        **config,
        enable_fp_fusion=FP_FUSION,
    )
    # the same order each time: whichever program ends first
    return sums.view(shape) if grid[1] == 1 else sums.sum(0)
