"""The matmuls of the head op, which end at a row count that only the device knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, Gpu, cdiv, dot_precision, gpu_of


@triton.jit
def matmul_kernel(
    a, b, bias, c, kept, first, rows, columns, inner, rows_a, inner_b, columns_b, stride_am,
    stride_ak, stride_bk, stride_bn,
    BOUND: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``c (rows, columns) = a · b (+ bias)``, or ``+=``, as far as ``kept - first`` reaches.

    With BOUND "rows", blocks of rows past the bound are left as they are; with BOUND "inner", the
    inner dimension ends there. ``c`` is contiguous; products are summed in fp32.

    Where one of the three has more room than the others fill, as tiles of logits have, the sizes
    are those of the room (``rows_a``, ``columns``, ``inner``), which whole vectors are read and
    written in, and what the narrower operand lacks counts as zero.
    """
    live = tl.load(kept) - first
    if BOUND == "rows":
        rows = tl.minimum(rows, live)
        rows_a = rows
    else:
        inner = tl.minimum(inner, live)
    # neighbouring programs share GROUP_M row blocks of a and one column block of b in the cache
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    blocks_m = tl.num_programs(0) // blocks_n
    group = pid // (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + (pid % (GROUP_M * blocks_n)) % height
    block_n = (pid % (GROUP_M * blocks_n)) // height
    if block_m * BLOCK_M >= rows:
        return
    m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        left = tl.load(
            a + m[:, None] * stride_am + k[None, :] * stride_ak,
            mask=(m < rows_a)[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + k[:, None] * stride_bk + n[None, :] * stride_bn,
            mask=(k < tl.minimum(inner, inner_b))[:, None] & (n < columns_b)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < columns_b, other=0.0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    out = c + m[:, None] * columns + n[None, :]
    if ACCUMULATE:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(c.dtype.element_ty), mask=inside)


def matmul_config(dtype: torch.dtype, precision: str, accumulate: bool, gpu: Gpu) -> dict[str, int]:
    """One configuration per kind of arithmetic and of GPU; the operands are always large."""
    if dtype is not torch.float32:
        # the wide tile has no registers left where it is added to what is there
        wide = gpu.multiplies_from_shared and not accumulate
        block = {"BLOCK_M": 128, "BLOCK_N": 256 if wide else 128, "BLOCK_K": 64}
        stages = 3 if gpu.shared > 96 << 10 else 2
        return block | {"GROUP_M": 8, "num_warps": 8, "num_stages": stages}
    if precision == "tf32":
        block = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
        return block | {"GROUP_M": 8, "num_warps": 8, "num_stages": 3}
    block = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
    return block | {"GROUP_M": 8, "num_warps": 4, "num_stages": 2}


def logits_tile(x: Tensor, vocabulary: int) -> Tensor:
    """Room for the logits of the rows of x (R, H): (R, V rounded up).

    With a number of classes that no vector divides, all accesses would be scalar, and the products
    would need more registers than there are. The columns past the last class are zero.
    """
    return x.new_empty((x.shape[0], -(-vocabulary // _ROOM) * _ROOM))


_ROOM = 64
"""Elements: 128 bytes in 16 bits, a line of the cache."""


def bounded_product(
    out: Tensor, a: Tensor, b: Tensor, kept: Tensor, first: int, bound: str,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """``out (M, N) = a (M, K) · b (K, N)``, bounded in M; bounded in K, it is added to ``out``.

    A ``logits_tile`` may be wider than the classes of the two others.
    """
    precision = dot_precision(a.dtype)
    config = matmul_config(a.dtype, precision, bound == "inner", gpu_of(a))
    rows, columns = out.shape
    blocks = cdiv(rows, config["BLOCK_M"]) * cdiv(columns, config["BLOCK_N"])
    matmul_kernel[(blocks,)](
        a,
        b,
        bias,
        out,
        kept,
        first,
        rows,
        columns,
        a.shape[1],
        a.shape[0],
        *b.shape,
        *a.stride(),
        *b.stride(),
        BOUND=bound,
        HAS_BIAS=bias is not None,
        ACCUMULATE=bound == "inner",
        PRECISION=precision,
        **config,
        enable_fp_fusion=FP_FUSION,
    )
