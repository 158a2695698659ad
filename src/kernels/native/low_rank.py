"""Products of wide matrices in bf16 and low-rank ones in fp32 on the CPU (``low_rank.cpp``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import are_real, check, library

_Strides = ctypes.c_int64 * 2
_SUMS = 1 << 16
"""Products that are worth another thread."""


def available(wide: Tensor, low_rank: Tensor) -> bool:
    """Whether there is a kernel for these dtypes on the CPU; waits for the compiler if need be."""
    # TorchDynamo, where it traces the op's own code, cannot find out: it takes the plain form.
    return (
        wide.dtype is torch.bfloat16
        and low_rank.dtype is torch.float32
        and wide.device.type == low_rank.device.type == "cpu"
        and not torch.compiler.is_dynamo_compiling()
        and library() is not None
    )


def takes(wide: Tensor, low_rank: Tensor) -> bool:
    """Whether the kernel computes ``wide · low_rank``: by its rows, or those of its transpose."""
    if not are_real(wide, low_rank):
        return False
    return available(wide, low_rank) and 1 in wide.stride() and wide.numel() > 0 < low_rank.numel()


def product(wide: Tensor, low_rank: Tensor, scale: float, transposed: bool) -> Tensor:
    """``scale · wide (N, K) · low_rank (K, R)`` in fp32, contiguous, or its transpose is."""
    rank = low_rank.shape[1]
    shape = (rank, wide.shape[0]) if transposed else (wide.shape[0], rank)
    by_rows = wide.stride(1) == 1
    # by rows, only the small result is to be turned
    out = low_rank.new_empty((wide.shape[0], rank) if by_rows else shape)
    rows = wide if by_rows else wide.t()
    arguments = [
        ctypes.c_void_p(rows.data_ptr()),
        *map(ctypes.c_int64, (rows.stride(0), *rows.shape)),
        ctypes.c_void_p(low_rank.data_ptr()),
        _Strides(*low_rank.stride()),
        ctypes.c_int64(rank),
        ctypes.c_float(scale),
        ctypes.c_void_p(out.data_ptr()),
    ]
    if not by_rows:
        arguments.append(_Strides(*(out.t() if transposed else out).stride()))
    threads = min(torch.get_num_threads(), 1 + wide.numel() * rank // _SUMS)
    kernels = library()
    if kernels is None:
        raise RuntimeError("there are no kernels: takes() has not been asked")
    name = "low_rank_over_rows" if by_rows else "low_rank_over_features"
    check(kernels[name](*arguments, threads))
    return out.t().contiguous() if by_rows and transposed else out
