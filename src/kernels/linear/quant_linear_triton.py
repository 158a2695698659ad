"""Triton twin of ``quantized.py`` and ``quant_linear.py``: 4 bits on the GPU.

Dequantizing is one launch, scales of scales included. For a few tokens the product unpacks the
weight on its way and nothing of full precision is ever written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase
from ..launch import cdiv, dot_precision
from ..launcher import launched
from .quantized import NESTED as PER_OUTER
from .quantized import table


@triton.jit
def _scale(
    absmax, absmax_8bit, code, offset, block, mask, NESTED: tl.constexpr, OUTER: tl.constexpr
):
    """The scale of each ``block``: stored, or unpacked from the scales of scales."""
    if NESTED:
        packed = tl.load(absmax_8bit + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(absmax + block // OUTER, mask=mask, other=0.0)
        return tl.load(code + packed) * outer + tl.load(offset)
    return tl.load(absmax + block, mask=mask, other=0.0)


@launched
@triton.jit
def dequantize_kernel(
    packed, absmax, absmax_8bit, code, offset, values, out, size, size_packed,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OUTER: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[i] = values[code i] · scale``: (BLOCKS, BLOCK) bytes and their values per program.

    The bytes of a row have one scale, which is read once for all of them.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCKS * BLOCK
    row, byte = tl.arange(0, BLOCKS) * BLOCK, tl.arange(0, BLOCK)
    # places within the tile need no more than 32 bits
    left = tl.minimum(size_packed - start, BLOCKS * BLOCK).to(tl.int32)
    at = row[:, None] + byte[None, :]
    codes = tl.load(packed + start + at, mask=at < left, other=0).to(tl.int32)
    block = (start + row) * 2 // BLOCKSIZE
    scale = _scale(absmax, absmax_8bit, code, offset, block, row < left, NESTED, OUTER)
    high = tl.load(values + (codes >> 4)) * scale[:, None]
    low = tl.load(values + (codes & 15)) * scale[:, None]
    both = tl.interleave(high, low).to(out.dtype.element_ty)
    at = row[:, None] * 2 + tl.arange(0, 2 * BLOCK)[None, :]
    left = tl.minimum(size - start * 2, 2 * BLOCKS * BLOCK).to(tl.int32)
    tl.store(out + start * 2 + at, both, mask=at < left)


@launched
@triton.jit
def few_kernel(
    x, packed, absmax, absmax_8bit, code, offset, values, bias, out, rows, columns, into,
    x_stride_n, x_stride_k,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = x · Wᵀ + bias`` for at most BLOCK_N rows: BLOCK_M outputs per program.

    The rows of W are whole blocks. W is rounded to the dtype of x, the sum is in fp32.
    """
    n = tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_in = m < columns
    dtype = x.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, into, BLOCK_K):
        even = start + 2 * tl.arange(0, BLOCK_K // 2)
        at = m.to(tl.int64)[:, None] * into + even[None, :]
        mask = m_in[:, None] & (even < into)[None, :]
        codes = tl.load(packed + at // 2, mask=mask, other=0).to(tl.int32)
        scale = _scale(absmax, absmax_8bit, code, offset, at // BLOCKSIZE, mask, NESTED, OUTER)
        first = tl.load(values + (codes >> 4)) * scale
        second = tl.load(values + (codes & 15)) * scale
        w = tl.interleave(first, second).to(dtype)
        k = start + tl.arange(0, BLOCK_K)
        rows_of_x = tl.load(
            x + n[:, None] * x_stride_n + k[None, :] * x_stride_k,
            mask=(n < rows)[:, None] & (k < into)[None, :],
            other=0.0,
        )
        total = tl.dot(rows_of_x, tl.trans(w), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + m, mask=m_in, other=0.0).to(tl.float32)[None, :]
    inside = (n < rows)[:, None] & m_in[None, :]
    tl.store(out + n[:, None] * columns + m[None, :], total.to(dtype), mask=inside)


_BYTES = 1024
"""Bytes per program when dequantizing: 8 for each thread, and enough programs for any card."""


def _tile(blocksize: int) -> dict[str, int]:
    """The tile of ``_BYTES`` bytes: blocks, or parts of one, in as many rows as it takes."""
    half = blocksize // 2
    row = min(half & -half, _BYTES)  # the largest power of two that divides a block
    return {"BLOCKS": _BYTES // row, "BLOCK": row}


_FEW = {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
"""Narrow tiles: with few rows the programs come from the outputs; what is read is the weight."""


def _state(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, code: Tensor | None,
    offset: Tensor | None, kind: str,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:  # fmt: skip
    """The pointers and flags that both kernels take; those of missing scales are never read."""
    nested = absmax_8bit is not None
    values = table(kind, torch.float32, packed.device)
    optional = [absmax if t is None else t for t in (absmax_8bit, code, offset)]
    # without fused multiply-adds a scale is rounded as where it is unpacked in two steps
    flags = {"NESTED": nested, "OUTER": PER_OUTER, "enable_fp_fusion": False}
    return (packed.reshape(-1).view(torch.uint8), absmax, *optional, values), flags


def dequantize(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, code: Tensor | None,
    offset: Tensor | None, out: int, into: int, blocksize: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix (out, into) in ``dtype``; the arguments are fields of ``Quantized``."""
    result = torch.empty((out, into), dtype=dtype, device=packed.device)
    size = out * into
    if size == 0:
        return result
    pointers, flags = _state(packed, absmax, absmax_8bit, code, offset, kind)
    size_packed = cdiv(size, 2)
    dequantize_kernel[(cdiv(size_packed, _BYTES),)](
        *pointers, result, size, size_packed,
        BLOCKSIZE=blocksize, **_tile(blocksize), num_warps=4, **flags,
    )  # fmt: skip
    return result


def few(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, code: Tensor | None,
    offset: Tensor | None, out: int, into: int, blocksize: int, kind: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """``x·Wᵀ + bias`` for x (N, into) with N of at most 16; rows of W must be whole blocks."""
    rows = x.shape[0]
    result = torch.empty((rows, out), dtype=x.dtype, device=x.device)
    if result.numel() == 0:
        return result
    pointers, flags = _state(packed, absmax, absmax_8bit, code, offset, kind)
    few_kernel[(cdiv(out, _FEW["BLOCK_M"]),)](
        x, *pointers, x if bias is None else bias, result, rows, out, into, *x.stride(),
        BLOCKSIZE=blocksize, HAS_BIAS=bias is not None,
        PRECISION=dot_precision(x.dtype), **_FEW, **flags,
    )  # fmt: skip
    return result


_POINTERS = {
    "packed": "*u8", "absmax": "*fp32", "absmax_8bit": "*u8", "code": "*fp32", "offset": "*fp32",
    "values": "*fp32",
}  # fmt: skip


def _aot_dequantize(dtype: str, blocksize: int, nested: bool) -> AotCase:
    return AotCase(
        name=f"dequantize-{dtype}-b{blocksize}-{'nested' if nested else 'plain'}",
        kernel=dequantize_kernel,
        signature=_POINTERS
        | {"absmax_8bit": "*u8" if nested else "*fp32", "out": f"*{dtype}"}
        | dict.fromkeys(("size", "size_packed"), "i32"),
        constants={"BLOCKSIZE": blocksize, "NESTED": nested, "OUTER": PER_OUTER} | _tile(blocksize),
        num_warps=4,
        divisible=("size", "size_packed"),
    )


def _aot_few(dtype: str, nested: bool, bias: bool, precision: str) -> AotCase:
    options = ("nested" if nested else "plain") + ("-bias" if bias else "")
    sizes = ("rows", "columns", "into", "x_stride_n", "x_stride_k")
    return AotCase(
        name=f"few-{dtype}-{options}-{precision}",
        kernel=few_kernel,
        signature=_POINTERS
        | {"absmax_8bit": "*u8" if nested else "*fp32"}
        | dict.fromkeys(("x", "bias", "out"), f"*{dtype}")
        | dict.fromkeys(sizes, "i32"),
        constants={"BLOCKSIZE": 64, "NESTED": nested, "OUTER": PER_OUTER, "HAS_BIAS": bias,
                   "PRECISION": precision} | {k: v for k, v in _FEW.items() if k.isupper()},
        num_warps=_FEW["num_warps"],
        num_stages=_FEW["num_stages"],
        divisible=("into", "columns"),
    )  # fmt: skip


AOT = (
    _aot_dequantize("bf16", 64, True),
    _aot_dequantize("fp16", 128, False),
    _aot_dequantize("fp32", 4096, True),
    _aot_few("bf16", True, False, "ieee"),
    _aot_few("fp16", False, True, "ieee"),
    _aot_few("fp32", True, True, "ieee"),
    _aot_few("fp32", False, False, "tf32"),
)
