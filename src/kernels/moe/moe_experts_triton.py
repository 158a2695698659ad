"""Triton twin of ``moe_experts.py``: matmuls by group, gathering rows as they load.

Which rows an expert has is only known on the device. The rows are cut into blocks that belong to
one expert each: at most ``ceil(S / BLOCK) + E`` of them, however the rows are spread, so that many
programs are launched and a table (``_blocks``), made on the device, says what each has to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, cdiv, dot_precision, next_power_of_2


@triton.jit
def _grouped_mm_kernel(
    a, rows, weight, bias, out, block_expert, block_start, offsets,
    inner, columns, a_stride, w_stride_e, w_stride_k, w_stride_n, bias_stride,
    low, lora_b, rank, b_stride_e, b_stride_r, b_stride_n,
    GATHER: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_M, BLOCK_N) tile of ``out[s] = a[rows[s]] · weight[e] + bias[e] + low[s] · b[e]``.

    ``low`` (S, rank) is contiguous and in fp32; without it BLOCK_R is 0.
    """
    blocks_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    block = pid // blocks_n
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert >= EXPERTS:
        return
    place = tl.load(block_start + block).to(tl.int64) + tl.arange(0, BLOCK_M)
    here = place < tl.load(offsets + expert)
    row = tl.load(rows + place, mask=here, other=0).to(tl.int64) if GATHER else place
    n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < columns
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < inner
        left = tl.load(
            a + row[:, None] * a_stride + k[None, :], mask=here[:, None] & in_k[None, :], other=0.0
        )
        right = tl.load(
            weight + expert * w_stride_e + k[:, None] * w_stride_k + n[None, :] * w_stride_n,
            mask=in_k[:, None] & in_n[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if BLOCK_R > 0:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            in_r = r < rank
            left = tl.load(
                low + place[:, None] * rank + r[None, :],
                mask=here[:, None] & in_r[None, :],
                other=0.0,
            )
            right = tl.load(
                lora_b + expert * b_stride_e + r[:, None] * b_stride_r + n[None, :] * b_stride_n,
                mask=in_r[:, None] & in_n[None, :],
                other=0.0,
            )
            right = right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=LOW_PRECISION)
    if BIAS:
        b = tl.load(bias + expert * bias_stride + n, mask=in_n, other=0.0)
        total += b.to(tl.float32)[None, :]
    tl.store(
        out + place[:, None] * columns + n[None, :],
        total.to(out.dtype.element_ty),
        mask=here[:, None] & in_n[None, :],
    )


@triton.jit
def _grouped_outer_kernel(
    a, rows, b, out, offsets,
    inner, columns, a_stride, b_stride, o_stride_e, o_stride_k, o_stride_n,
    GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_K, BLOCK_N) tile of an expert's ``sum of a[rows[s]]ᵀ b[s]``."""
    blocks_n = tl.cdiv(columns, BLOCK_N)
    expert = tl.program_id(1).to(tl.int64)
    pid = tl.program_id(0)
    k = (pid // blocks_n) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k, in_n = k < inner, n < columns
    first = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, BLOCK_M):
        place = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        here = place < end
        row = tl.load(rows + place, mask=here, other=0).to(tl.int64) if GATHER else place
        left = tl.load(
            a + row[None, :] * a_stride + k[:, None], mask=here[None, :] & in_k[:, None], other=0.0
        )
        right = tl.load(
            b + place[:, None] * b_stride + n[None, :],
            mask=here[:, None] & in_n[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(
        out + expert * o_stride_e + k[:, None] * o_stride_k + n[None, :] * o_stride_n,
        total.to(out.dtype.element_ty),
        mask=in_k[:, None] & in_n[None, :],
    )


@triton.jit
def _combine_kernel(
    y, where, weights, out, columns, active, y_stride,
    WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum over k of weights[t, k] · y[where[t, k]]`` for some columns of one token."""
    blocks = tl.cdiv(columns, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(active):
        pair = token * active + k
        place = tl.load(where + pair).to(tl.int64)
        value = tl.load(y + place * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTS:
            value *= tl.load(weights + pair).to(tl.float32)
        total += value
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=mask)


def _config(dtype: torch.dtype, places: int, experts: int) -> dict[str, int]:
    """Tiles by what an expert has on average; in fp32 half as deep, and of 64 rows at most."""
    single = dtype is torch.float32  # whose operands are in registers
    block_m = 128 if places >= 96 * experts else 64 if places >= 48 * experts else 32
    block_m, block_k = (min(block_m, 64), 32) if single else (block_m, 64)
    warps = 8 if block_m == 128 or (single and block_m == 64) else 4
    return {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": block_k, "num_warps": warps,
            "num_stages": 3}  # fmt: skip


_OUTER = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


def _blocks(offsets: Tensor, places: int, size: int) -> tuple[Tensor, Tensor]:
    """The expert of each block (E where there is no such block), and its first place."""
    experts = offsets.shape[0]
    ends = offsets.to(torch.int64)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    last = torch.cumsum((ends - begins + size - 1) // size, 0)
    number = torch.arange(cdiv(places, size) + experts, device=offsets.device)
    expert = torch.searchsorted(last, number, right=True)
    known = expert.clamp(max=experts - 1)
    before = torch.where(known > 0, last[(known - 1).clamp(min=0)], 0)
    return expert, begins[known] + (number - before) * size


def grouped_mm(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None,
    low: Tensor | None = None, lora_b: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Launch ``_grouped_mm_kernel``; the arguments are those of ``moe_experts.grouped_mm``.

    Added is ``low · lora_b``: ``low`` (S, r), contiguous and in fp32, and ``lora_b`` (E, r, N).
    """
    places = a.shape[0] if rows is None else rows.shape[0]
    experts, inner, columns = weight.shape
    # places may be no expert's, and no block's
    out = a.new_zeros(places, columns, dtype=dtype or a.dtype)
    if out.numel() == 0:
        return out
    a = a if a.stride(1) == 1 else a.contiguous()
    config = _config(a.dtype, places, experts)
    expert, start = _blocks(offsets, places, config["BLOCK_M"])
    grid = (expert.shape[0] * cdiv(columns, config["BLOCK_N"]),)
    bias = bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
    rank = 0 if lora_b is None else lora_b.shape[1]
    low, lora_b = (a, weight) if low is None or lora_b is None else (low, lora_b)
    _grouped_mm_kernel[grid](
        a, expert if rows is None else rows, weight, a if bias is None else bias, out,
        expert, start, offsets, inner, columns, a.stride(0), *weight.stride(),
        0 if bias is None else bias.stride(0), low, lora_b, rank, *lora_b.stride(),
        GATHER=rows is not None, BIAS=bias is not None, PRECISION=dot_precision(a.dtype),
        EXPERTS=experts, BLOCK_R=_block_r(rank), LOW_PRECISION=_low_precision(a.dtype), **config,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


def _block_r(rank: int) -> int:
    return 0 if rank == 0 else 16 if rank <= 16 else 32


def _low_precision(dtype: torch.dtype) -> str:
    # tf32 has as many digits as the factors
    return dot_precision(dtype) if dtype is torch.float32 else "tf32"


def grouped_lora(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None,
    lora_a: Tensor, lora_b: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The thin product, then one launch that adds it to the other."""
    low = grouped_mm(a, rows, lora_a, offsets, None, dtype=torch.float32).mul_(scale)
    return grouped_mm(a, rows, weight, offsets, bias, low, lora_b), low


def grouped_outer(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    """Launch ``_grouped_outer_kernel``; arguments of ``moe_experts_ops.grouped_outer``."""
    out = torch.empty_like(like)
    experts, inner, columns = like.shape
    if out.numel() == 0:
        return out
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    tiles = cdiv(inner, _OUTER["BLOCK_K"]) * cdiv(columns, _OUTER["BLOCK_N"])
    _grouped_outer_kernel[(tiles, experts)](
        a, offsets if rows is None else rows, b, out, offsets, inner, columns,
        a.stride(0), b.stride(0), *out.stride(),
        GATHER=rows is not None, PRECISION=dot_precision(a.dtype), **_OUTER,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


def combine(y: Tensor, where: Tensor, weights: Tensor | None, active: int) -> Tensor:
    """Launch ``_combine_kernel``; the arguments are those of ``moe_experts_ops.combine``."""
    tokens, columns = where.shape[0] // active, y.shape[1]
    out = y.new_empty(tokens, columns)
    if out.numel() == 0:
        return out
    y = y if y.stride(1) == 1 else y.contiguous()
    where = where.contiguous()
    weights = None if weights is None else weights.contiguous()
    block = min(1024, next_power_of_2(columns))
    _combine_kernel[(tokens * cdiv(columns, block),)](
        y, where, y if weights is None else weights, out, columns, active, y.stride(0),
        WEIGHTS=weights is not None, BLOCK=block,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out
