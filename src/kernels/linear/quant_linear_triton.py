"""Triton twin of ``quantized.py``: 4 bits on the GPU, dequantized in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from .quantized import NESTED as PER_OUTER
from .quantized import table


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
    block, in_block = (start + row) * 2 // BLOCKSIZE, row < left
    if NESTED:
        inner = tl.load(absmax_8bit + block, mask=in_block, other=0).to(tl.int32)
        outer = tl.load(absmax + block // OUTER, mask=in_block, other=0.0)
        scale = tl.load(code + inner) * outer + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=in_block, other=0.0)
    high = tl.load(values + (codes >> 4)) * scale[:, None]
    low = tl.load(values + (codes & 15)) * scale[:, None]
    both = tl.interleave(high, low).to(out.dtype.element_ty)
    at = row[:, None] * 2 + tl.arange(0, 2 * BLOCK)[None, :]
    left = tl.minimum(size - start * 2, 2 * BLOCKS * BLOCK).to(tl.int32)
    tl.store(out + start * 2 + at, both, mask=at < left)


_BYTES = 1024
"""Bytes per program when dequantizing: 8 for each thread, and enough programs for any card."""


def _tile(blocksize: int) -> dict[str, int]:
    """The tile of ``_BYTES`` bytes: blocks, or parts of one, in as many rows as it takes."""
    half = blocksize // 2
    row = min(half & -half, _BYTES)  # the largest power of two that divides a block
    return {"BLOCKS": _BYTES // row, "BLOCK": row}


def dequantize(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, code: Tensor | None,
    offset: Tensor | None, out: int, into: int, blocksize: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix (out, into) in ``dtype``; the arguments are fields of ``Quantized``."""
    result = torch.empty((out, into), dtype=dtype, device=packed.device)
    size = out * into
    if size == 0:
        return result
    # pointers of scales of scales that are not there are never read
    optional = (absmax if t is None else t for t in (absmax_8bit, code, offset))
    values = table(kind, torch.float32, packed.device)
    size_packed = cdiv(size, 2)
    # without fused multiply-adds a scale is rounded as where it is unpacked in two steps
    dequantize_kernel[(cdiv(size_packed, _BYTES),)](
        packed.reshape(-1).view(torch.uint8), absmax, *optional, values, result, size, size_packed,
        BLOCKSIZE=blocksize, NESTED=absmax_8bit is not None, OUTER=PER_OUTER, **_tile(blocksize),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return result
