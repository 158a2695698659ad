"""fp32 matrix products by oneDNN, on CPUs that PyTorch's BLAS uses badly.

PyTorch multiplies fp32 matrices with MKL, which on AMD's CPUs does without their widest vectors.
Measured (AMD EPYC of the Zen 5 generation, one thread, torch 2.13, 2026-11-28), in GFLOP/s: 384 x
64 x 256 100 by MKL and 210 by oneDNN; 16 x 1024 x 1536, the wide matrix in bf16 and not in the
cache, 45 and 117.

oneDNN adds up in longer chains: the relative error of a sum of 1,024 products is 4.1e-7, and MKL's
2.5e-7. So long sums are made in parts of at most ``PART``, with which it is 2.9e-7.

Nothing here is for traced code: see ``products.narrow_product`` and ``attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PART = 320
"""Products that are added up in one chain, at most."""

ROWS = 512
"""Rows of which there is an fp32 copy at once: ``PART`` features of them stay in the cache."""

LEAST = 1 << 20
"""Multiplications in one call, at least: to call oneDNN takes 13 µs, and MKL 1."""

_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _measured_faster() -> bool:
    """Whether this is a CPU of the kind that has been measured, with the library for it."""
    if _linear is None or not (
        torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    ):
        return False
    found = torch.cpu.get_capabilities()
    return "AMD" in str(found.get("cpu_name")) and bool(found.get("avx512_f"))


IS_FASTER = _measured_faster()


def is_faster(t: Tensor) -> bool:
    """Whether fp32 products of ``t`` are made faster here than by ``torch.mm``."""
    return IS_FASTER and t.device.type == "cpu"


def pays(t: Tensor, rows: int, inner: int, columns: int) -> bool:
    """Whether oneDNN should make a product, or one part of it, of these sizes.

    For use inside an opaque op: a traced graph may not know the sizes.

    Args:
        t: a factor.
        rows: N of (N, K) · (K, M).
        inner: K.
        columns: M.
    """
    return is_faster(t) and rows * inner * columns >= LEAST and torch._C._get_mkldnn_enabled()


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """``left (N, K) · rightᵀ``, right (M, K), both fp32; with K above ``PART`` it is inexact."""
    if not right.is_contiguous() and not right.t().is_contiguous():
        # any other strides take a hundred times as long; a copy in the same order is a fast one
        by_rows = right.stride(1) < right.stride(0)
        right = right.contiguous() if by_rows else right.t().contiguous().t()
    product: Tensor = _linear(left, right, None, "none", [], "")
    return product


def transposed_products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``torch.bmm(left, right.transpose(1, 2), out=out)`` of (B, N, K) and (B, M, K)."""
    batch, rows, inner = left.shape
    if (
        left.dtype is not torch.float32
        or inner > PART
        or not pays(left, rows, inner, right.shape[1])
    ):
        return torch.bmm(left, right.transpose(1, 2), out=out)
    for i in range(batch):
        out[i] = transposed_product(left[i], right[i])
    return out


def sum_over_rows(narrow: Tensor, wide: Tensor) -> Tensor:
    """``narrowᵀ · wide`` (r, M) in fp32, of narrow (N, r) in fp32 and wide (N, M) of any width."""
    total: Tensor | None = None
    for part in _parts(wide.shape[0]):
        there = wide[part].to(narrow.dtype)
        added = transposed_product(narrow[part].t().contiguous(), there.t())
        total = added if total is None else total.add_(added)
    return narrow.new_zeros(narrow.shape[1], wide.shape[1]) if total is None else total


def rows_times(wide: Tensor, narrow: Tensor) -> Tensor:
    """``wide · narrow`` (N, r) in fp32, of wide (N, K) of any width and narrow (K, r) in fp32."""
    out = narrow.new_empty(wide.shape[0], narrow.shape[1])
    factors = [(part, narrow[part].t().contiguous()) for part in _parts(wide.shape[1])]
    if not factors:
        return out.zero_()
    for start in range(0, wide.shape[0], ROWS):
        these = slice(start, start + ROWS)
        rows = out[these]
        for i, (part, factor) in enumerate(factors):
            added = transposed_product(wide[these, part].to(narrow.dtype), factor)
            _ = rows.add_(added) if i else rows.copy_(added)
    return out


def _parts(size: int) -> list[slice]:
    """``range(size)`` in parts of the same size, of at most ``PART``."""
    count = -(-size // PART)
    step = -(-size // count) if count else 1
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]
