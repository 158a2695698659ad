"""Gated linear units on the GPU: one pass over rows whose elements are adjacent.

Everything is computed in fp32 and rounded once. All tensors are seen as (rows, columns) with a
stride between rows, which covers contiguous tensors (as a single long row), the halves of a packed
tensor, and slices of wider projections.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import FP_FUSION, cdiv

BLOCK = 1024  # 8 elements per thread: one 16-byte access each in 16-bit dtypes


@triton.jit
def _activation(x, ACT: tl.constexpr):
    """``(act(x), act'(x))``; the compiler drops what is not used."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1 + x * (1 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), with 2u = sqrt(8 / pi) * (x + 0.044715 x^3)
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        value = x * s
        slope = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "relu":
        slope = tl.where(x <= 0, 0.0, 1.0)
        value = tl.where(x <= 0, 0.0, x)  # keeps NaN
    elif ACT == "relu2":
        slope = 2 * tl.where(x <= 0, 0.0, x)
        value = tl.where(x <= 0, 0.0, x * x)
    else:
        value = tl.sigmoid(x)
        slope = value * (1 - value)
    return value, slope


@triton.jit
def _columns(columns, blocks_per_row, BLOCK: tl.constexpr):
    """The row of this program, the columns it covers, and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    column = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns


@triton.jit
def _forward_kernel(
    gate, up, out, gate_stride, up_stride, columns, blocks_per_row,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, mask = _columns(columns, blocks_per_row, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(g, ACT)
    y = (value * u).to(out.dtype.element_ty)
    tl.store(out + row * columns + column, y, mask=mask)


@triton.jit
def _backward_kernel(
    grad, gate, up, grad_gate, grad_up,
    grad_stride, gate_stride, up_stride, out_stride, columns, blocks_per_row,
    ACT: tl.constexpr, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, mask = _columns(columns, blocks_per_row, BLOCK)
    dy = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(g, ACT)
    if NEED_GATE:
        u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
        d = (dy * u * slope).to(grad_gate.dtype.element_ty)
        tl.store(grad_gate + row * out_stride + column, d, mask=mask)
    if NEED_UP:
        d = (dy * value).to(grad_up.dtype.element_ty)
        tl.store(grad_up + row * out_stride + column, d, mask=mask)


def _rows(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """Equally shaped tensors (..., F) as (rows, columns) with adjacent elements in a row.

    Copies only a tensor for which there is no such view; contiguous ones are one long row.

    Returns:
        What a kernel reads them through, their strides from row to row, rows and columns.
    """
    if all([t.is_contiguous() for t in tensors]):
        size = tensors[0].numel()
        return list(tensors), [size] * len(tensors), 1, size
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors]
    rows = [t if t.stride(1) == 1 else t.contiguous() for t in rows]
    return rows, [t.stride(0) for t in rows], *rows[0].shape


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up``, contiguous."""
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    inputs, strides, rows, columns = _rows(gate, up)
    blocks = cdiv(columns, BLOCK)
    _forward_kernel[(rows * blocks,)](
        *inputs,
        out,
        *strides,
        columns,
        blocks,
        ACT=activation,
        BLOCK=BLOCK,
        enable_fp_fusion=FP_FUSION,
    )
    return out


def backward(
    grad: Tensor, outs: list[Tensor], activation: str, layout: str, needed: list[bool]
) -> list[Tensor]:
    """The needed gradients of ``outs``, contiguous: see ``glu.backward``."""
    grads = [t.new_empty(t.shape) if need else None for t, need in zip(outs, needed, strict=True)]
    made = [d for d in grads if d is not None]
    if not made or made[0].numel() == 0:
        return made
    if layout == "two":
        (gate, up), (d_gate, d_up) = outs, grads
    else:
        pairs = [t.chunk(2, -1) for t in (outs[0], made[0])]
        (gate, up), (d_gate, d_up) = (p if layout == "gate first" else p[::-1] for p in pairs)
    # fresh halves and fresh tensors always have such a view; both have one stride between rows
    views, strides, rows, columns = _rows(
        grad, gate, up, *(d for d in (d_gate, d_up) if d is not None)
    )
    to = [v if d is not None else views[3] for d, v in ((d_gate, views[3]), (d_up, views[-1]))]
    blocks = cdiv(columns, BLOCK)
    _backward_kernel[(rows * blocks,)](
        *views[:3], *to, *strides[:4], columns, blocks, ACT=activation,
        NEED_GATE=d_gate is not None, NEED_UP=d_up is not None, BLOCK=BLOCK,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return made
