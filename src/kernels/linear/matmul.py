"""16-bit matrix products on CPUs without instructions for them: through float32.

oneDNN multiplies 16-bit matrices fast where the CPU can. Elsewhere PyTorch falls back to plain
loops. Measured (AMD EPYC with AVX2 alone, one thread, 256 x 576 x 1536, GFLOP/s, 2026-11-26): fp32
60-83, bf16 2-15, fp16 2-10; through fp32, casts included, 47-87. A product of two 16-bit numbers is
exact in fp32, and the sum is rounded once, so the results are at least as accurate.

The functions here are PyTorch's of the same name where a CPU or a GPU multiplies the dtype itself.
They are for use where autocast is off, as it is inside the ops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

SLICE_ELEMENTS = 1 << 22
"""How much of the right operand is in fp32 at once (16 MB)."""


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` at speed."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def through_fp32(x: Tensor) -> bool:
    """Whether products of ``x`` go through fp32: 16 bits, on a CPU that does not multiply them."""
    return x.device.type == "cpu" and not multiplies(x.dtype)


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.mm``: left (N, K) · right (K, M)."""
    if not through_fp32(left):
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    return _product(None, left, right, out)


def addmm(bias: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.addmm``: bias (M,) or (N, M) + left (N, K) · right (K, M)."""
    if not through_fp32(left):
        return torch.addmm(bias, left, right, out=out)
    return _product(bias, left, right, out)


def addmm_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``total.addmm_(left, right)``: the sum is rounded once."""
    if not through_fp32(left):
        return total.addmm_(left, right)
    return _product(total, left, right, total)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., K), weight (M, K), bias (M,) or None."""
    if not through_fp32(x):
        return F.linear(x, weight, bias)
    rows = _product(bias, x.reshape(-1, x.shape[-1]), weight.t(), None)
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], weight.shape[0])


def _product(bias: Tensor | None, left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """``bias + left · right``, rounded once from fp32; into ``out`` if there is one."""
    if right.stride(0) == 1 and right.stride(1) != 1:  # a transposed weight: its rows are columns
        wide, parts = left.float(), []
        for part in _slices(right, 1):
            more = None if bias is None else bias[..., part].float()
            product = _sum(more, wide, right[:, part].float())
            if out is None:
                parts.append(product.to(left.dtype))
            else:
                out[:, part] = product
        return out if out is not None else parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    total = None if bias is None else bias.float()
    for part in _slices(right, 0):
        total = _sum(total, left[:, part].float(), right[part].float())
    assert total is not None
    return total.to(left.dtype) if out is None else out.copy_(total)


def _sum(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else torch.addmm(total, left, right)


def _slices(matrix: Tensor, dim: int) -> Iterator[slice]:
    """Parts of about ``SLICE_ELEMENTS`` along ``dim``; one where a traced graph has no numbers."""
    rows, columns = matrix.shape
    if isinstance(rows, int) and isinstance(columns, int) and rows * columns > SLICE_ELEMENTS:
        length = matrix.shape[dim]
        step = -(-length // -(-rows * columns // SLICE_ELEMENTS))
        yield from (slice(start, start + step) for start in range(0, length, step))
    else:
        yield slice(None)
