"""16-bit matrix products on CPUs that multiply these slowly: through float32.

oneDNN multiplies 16-bit matrices fast where the CPU has the vector instructions that it wants.
Elsewhere PyTorch falls back to plain loops. Measured (AMD EPYC with AVX2 alone, one thread,
256 x 576 x 1536, GFLOP/s, 2026-11-26): fp32 60-83, bf16 2-15, fp16 2-10; through fp32, casts
included, 47-87. A product of two 16-bit numbers is exact in fp32, and the sum is rounded once, so
the results are at least as accurate.

The functions here are PyTorch's of the same name where the dtype is multiplied fast. They are for
use where autocast is off, as it is inside the ops: it would make 16-bit products of these again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import library_op
from .processor import processor

SLICE_ELEMENTS = 1 << 22
"""How much of each operand, and of the result, is in fp32 at once (16 MB)."""

LEAST = 256
"""Rows and columns of a slice, at least: fewer make for slow products."""


def through_fp32(x: Tensor) -> bool:
    """Whether products of ``x`` go through fp32: 16 bits, on a CPU that is slow with them."""
    return x.dtype in processor().slow_products and x.device.type == "cpu"


def widens(dtype: torch.dtype) -> bool:
    """Whether products of a few rows by a large matrix are fastest in fp32, casts included.

    Measured (Xeon with AVX-512 without products of bf16, one thread, 104 x 2048 x 1536, GFLOP/s,
    2026-11-30): bf16, as oneDNN imitates it, 23, through fp32 176.
    """
    return dtype in processor().slow_products


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.mm``: left (N, K) · right (K, M)."""
    if not through_fp32(left) or left.dtype is not right.dtype:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    return _product(None, left, right, out)


def addmm(bias: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.addmm``: bias (M,) or (N, M) + left (N, K) · right (K, M)."""
    if not through_fp32(left) or left.dtype is not right.dtype:
        return torch.addmm(bias, left, right, out=out)
    return _product(bias, left, right, out)


def addmm_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``total.addmm_(left, right)``: the sum is rounded once."""
    if not through_fp32(left) or left.dtype is not right.dtype:
        return total.addmm_(left, right)
    return _product(total, left, right, total)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., K), weight (M, K), bias (M,) or None."""
    if not through_fp32(x) or x.dtype is not weight.dtype:
        return F.linear(x, weight, bias)
    rows = _product(bias, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.t(), None)
    if x.dim() == 2:
        return rows
    # no view, as PyTorch's is none: what an op returns may be written to
    out: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], weight.shape[0]])
    return out


def _product(bias: Tensor | None, left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """``bias + left · right``, rounded once from fp32; into ``out`` if there is one."""
    every = left.shape[0], left.shape[1], right.shape[1]
    # A traced graph would have the loops unrolled, and its sizes may be unknown. And Inductor
    # leaves out a rounding between operations that it fuses: a call with gradients, which keeps
    # the rounded product, and one without would have other results.
    if torch.compiler.is_compiling() or not all(isinstance(n, int) for n in every):
        total: Tensor = _product_op(bias, left, right)
        return total if out is None else out.copy_(total)
    return _computed(bias, left, right, out)


def _computed(bias: Tensor | None, left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    every = left.shape[0], left.shape[1], right.shape[1]
    out = left.new_empty(every[0], every[2]) if out is None else out
    for rows in _slices(every[0], max(every[1], every[2])):
        added = bias if bias is None or bias.dim() == 1 else bias[rows]
        _into(out[rows], added, left[rows], right)
    return out


def _into(out: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> None:
    # As ``_product``, for some rows, a slice of ``right`` at a time.
    inner, columns = right.shape
    if right.stride(0) == 1 and right.stride(1) != 1:  # a transposed weight: its rows are columns
        wide = left.float()
        for part in _slices(columns, inner):
            added = None if bias is None else bias[..., part].float()
            out[:, part] = _sum(added, wide, right[:, part].float())
        return
    total = None if bias is None else bias.float()
    for part in _slices(inner, columns):
        total = _sum(total, left[:, part].float(), right[part].float())
    out.copy_(torch.zeros(()) if total is None else total)


def _sum(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else torch.addmm(total, left, right)


def _slices(length: int, other: int) -> Iterator[slice]:
    """Parts of ``length``, each of about ``SLICE_ELEMENTS`` when ``other`` is the second size."""
    most = max(LEAST, SLICE_ELEMENTS // max(1, other))
    count = -(-length // most)
    step = -(-length // max(1, count))
    return (slice(start, start + step) for start in range(0, length, step or 1))


_product_op = library_op(
    "product_through_fp32(Tensor? bias, Tensor left, Tensor right) -> Tensor",
    lambda bias, left, right: _computed(bias, left, right, None),
    lambda bias, left, right: left.new_empty(left.shape[0], right.shape[1]),
    flops=lambda bias, left, right: 2 * left.shape[0] * left.shape[1] * right.shape[1],
)
