"""The two projections of ``moe_experts`` in plain PyTorch, for derivatives of derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..second_order import absent, gradients, require_kept


def _grouped(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``grouped_mm`` in plain PyTorch: rows of no expert are zero."""
    ends = offsets.tolist()
    parts = []
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        y = rows[start:end] @ weight[e]
        parts.append(y if bias is None else y + bias[e])
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[2])])


def up_again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The backward pass of ``moe_up``, differentiable."""
    x, weight, _, offsets, order = ctx.saved_tensors
    tokens = order // ctx.active
    if x is None:
        x = absent((order.shape[0] // ctx.active, weight.shape[1]), weight)
    bias = None if ctx.bias is None else absent((weight.shape[0], weight.shape[2]), weight)

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _grouped(x.index_select(0, tokens), weight, bias, offsets)

    return gradients(formula, (x, weight, bias), ctx.needs_input_grad, (grad,))


def down_again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The backward pass of ``moe_down``, differentiable."""
    h, _, weights, weight, bias, order, offsets, _ = ctx.saved_tensors
    tokens, kept = order // ctx.active, h is not None
    why = "the experts are frozen and their weights in the sum are not"
    require_kept(kept or not ctx.needs_input_grad[1], "moe_experts", why)
    h = h if kept else absent((order.shape[0], weight.shape[1]), weight)

    def formula(h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _grouped(h, weight, bias, offsets) * weights.index_select(0, order).unsqueeze(1)
        total = y.new_zeros(order.shape[0] // ctx.active, y.shape[1])
        return total.index_add(0, tokens, y).to(h.dtype)

    return gradients(formula, (h, weights, weight, bias), ctx.needs_input_grad, (grad,))
