"""Triton twin of ``lora_linear.py``: a matmul of small inner dimension, accumulated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase
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


def _config(rank: int, gpu: Gpu) -> dict[str, int]:
    """Memory-bound whatever the shape; only the rank's block changes."""
    block_r = min(64, max(16, next_power_of_2(rank)))
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
    out = torch.empty((rows, columns), dtype=base.dtype, device=base.device)
    if out.numel() == 0:
        return out
    config = _config(left.shape[1], gpu_of(base))
    blocks = cdiv(rows, config["BLOCK_N"]) * cdiv(columns, config["BLOCK_M"])
    rank_update_kernel[(blocks,)](
        base,
        left,
        right,
        out,
        rows,
        columns,
        left.shape[1],
        base.stride(0),
        *left.stride(),
        *right.stride(),
        PRECISION=dot_precision(base.dtype),
        **config,
        enable_fp_fusion=FP_FUSION,
    )
    return out


def _aot(base: str, factor: str, rank: int, precision: str) -> AotCase:
    config = _config(rank, gpu_of(torch.empty(0)))
    pointers = {"base": f"*{base}", "left": f"*{factor}", "right": f"*{factor}", "out": f"*{base}"}
    integers = ("rows", "columns", "rank", "base_stride", "left_stride_n", "left_stride_r")
    return AotCase(
        name=f"rank_update-{base}-{factor}-r{rank}-{precision}",
        kernel=rank_update_kernel,
        signature=pointers | dict.fromkeys((*integers, "right_stride_r", "right_stride_m"), "i32"),
        constants={"PRECISION": precision} | {k: config[k] for k in config if k.isupper()},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


AOT = (
    _aot("bf16", "bf16", 16, "ieee"),
    _aot("bf16", "fp32", 32, "ieee"),
    _aot("fp16", "fp32", 64, "ieee"),
    _aot("fp32", "fp32", 16, "ieee"),
    _aot("fp32", "fp32", 64, "tf32"),
)
