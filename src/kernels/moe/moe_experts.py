"""Routed experts: each token through K of E expert networks, the results added by their weights.

    out[t] = sum over k of  w[t, k] * (act(x[t] · U[e]) · D[e]),   e = index[t, k]

Shazeer et al., "Outrageously large neural networks", 2017. The S = T·K pairs of a token and an
expert are sorted by expert (``moe_route``). Both projections are then matmuls of consecutive rows
by one matrix each: ``moe_up`` reads its rows from where the tokens are, ``moe_down`` adds its rows
to where they belong, and what stands between the two is any function of a row. Neither permuted
inputs nor permuted outputs are kept for backward:

    dw = dout[t] · y;   g = w dout[t];   dh = g · D[e]ᵀ;   dD[e] = hᵀ g;   y = h · D[e]
    dU[e] = xᵀ du;   dx[t] = sum over k of du · U[e]ᵀ
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..op import Op
from ..second_order import differentiable
from .grouped_products import combine, grouped_mm, grouped_outer, segment_sum
from .moe_experts_second import down_again, up_again

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    activation: Callable[[Tensor], Tensor], up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One expert at a time, on the rows of its tokens."""
    tokens, active = index.shape
    ids = index.reshape(-1)
    pairs = [(ids == expert).nonzero().view(-1) for expert in range(up.shape[0])]
    parts = []
    for e, mine in enumerate(pairs):
        h = x[mine // active] @ up[e]
        h = activation(h if up_bias is None else h + up_bias[e])
        y = h @ down[e]
        parts.append(y if down_bias is None else y + down_bias[e])
    y = torch.cat(parts)[torch.cat(pairs).argsort()] * weights.reshape(-1, 1)
    return y.view(tokens, active, -1).sum(1).to(x.dtype)


def up_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor, offsets: Tensor,
    active: int,
) -> Tensor:  # fmt: skip
    """The first projection of each pair, in the order of ``order``."""
    return _by_expert(x[order // active], weight, bias, offsets)


def down_reference(
    h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor,
    offsets: Tensor, active: int,
) -> Tensor:  # fmt: skip
    """The second one, and the weighted sum of each token's rows."""
    y = _by_expert(h, weight, bias, offsets)[where] * weights.unsqueeze(1)
    return y.view(len(where) // active, active, -1).sum(1).to(h.dtype)


def _by_expert(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    parts, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        y = rows[start:end] @ weight[e]
        parts.append(y if bias is None else y + bias[e])
        start = end
    nobodys = rows.new_zeros(len(rows) - start, weight.shape[2])
    return torch.cat([*parts, nobodys])


# -- cpu and triton: grouped_products.py -----------------------------------------------------------


def moe_route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the pairs of a token and an expert by expert.

    Args:
        ids: (S,), the expert of each pair; pairs of one token are adjacent. A pair whose expert
            is E or more has none here, and adds nothing.
        experts: the number E of experts.

    Returns:
        The pair at each sorted place (S,), the place of each pair (S,), and the end of each
        expert's places (E,) in int32.
    """
    ordered, order = torch.sort(ids, stable=True)
    ends = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ordered, ends, right=True, out_int32=True)
    return order, inverse_permutation(order), offsets


def inverse_permutation(order: Tensor) -> Tensor:
    """The place of each number in the permutation ``order`` (S,) of 0 .. S - 1."""
    places = torch.arange(order.shape[0], device=order.device, dtype=order.dtype)
    return torch.zeros_like(order).scatter(0, order, places)


# -- autograd --------------------------------------------------------------------------------------


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor,
        offsets: Tensor, active: int,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        tokens = order // active
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, where, offsets, order)
        ctx.active, ctx.bias = active, None if bias is None else bias.dtype
        return grouped_mm(x, tokens, weight, offsets, bias)

    @staticmethod
    @differentiable(up_again)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, where, offsets, order = ctx.saved_tensors
        w_x, w_weight, w_bias, *_ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if w_x:
            rows = grouped_mm(grad, None, weight.transpose(1, 2), offsets, None)
            dx = combine(rows, where, None, ctx.active)
        if w_weight:
            dweight = grouped_outer(x, order // ctx.active, grad, offsets, weight)
        if w_bias:
            dbias = segment_sum(grad, offsets).to(ctx.bias)
        return dx, dweight, dbias, None, None, None, None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor,
        where: Tensor, offsets: Tensor, active: int,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        w_weights, w_weight = ctx.needs_input_grad[1:3]
        y = grouped_mm(h, None, weight, offsets, bias)
        ctx.save_for_backward(
            h if w_weight else None, y if w_weights else None, weights, weight, bias, order,
            offsets, where,
        )  # fmt: skip
        ctx.active, ctx.bias = active, None if bias is None else bias.dtype
        return combine(y, where, weights, active)

    @staticmethod
    @differentiable(down_again)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, y, weights, weight, _, order, offsets, where = ctx.saved_tensors
        w_h, w_weights, w_weight, w_bias, *_ = ctx.needs_input_grad
        dh = dweights = dweight = dbias = None
        rows = grad.index_select(0, order // ctx.active)
        if w_weights:
            wide = torch.promote_types(grad.dtype, torch.float32)
            by_place = (rows.to(wide) * y).sum(1)
            dweights = by_place.index_select(0, where).to(weights.dtype)
        scaled = (rows * weights.index_select(0, order).unsqueeze(1)).to(grad.dtype)
        if w_h:
            dh = grouped_mm(scaled, None, weight.transpose(1, 2), offsets, None)
        if w_weight:
            dweight = grouped_outer(h, None, scaled, offsets, weight)
        if w_bias:
            dbias = segment_sum(scaled, offsets).to(ctx.bias)
        return dh, dweights, dweight, dbias, None, None, None, None


def moe_up(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor, offsets: Tensor,
    active: int,
) -> Tensor:  # fmt: skip
    """``x[t] · weight[e] + bias[e]`` for each pair of a token and an expert, sorted by expert.

    Args:
        x: (T, H).
        weight: (E, H, F), in x's dtype, any strides (the transpose of (E, F, H) as well).
        bias: (E, F) or None.
        order: (S,), from ``moe_route``, like the next two.
        where: (S,).
        offsets: (E,).
        active: the number K of experts of a token; S = T·K.

    Returns:
        (S, F) in x's dtype, in the order of ``order``.
    """
    return _Up.apply(x, weight, bias, order, where, offsets, active)  # type: ignore[no-any-return, no-untyped-call]


def moe_down(
    h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor,
    offsets: Tensor, active: int,
) -> Tensor:  # fmt: skip
    """Project each pair's row, and add up each token's rows by their weights.

    Args:
        h: (S, F), in the order of ``order``.
        weights: (S,), the weight of each pair, in the order of the tokens.
        weight: (E, F, H), in h's dtype, any strides.
        bias: (E, H) or None.
        order: (S,), from ``moe_route``, like the next two.
        where: (S,).
        offsets: (E,).
        active: the number K of experts of a token.

    Returns:
        (T, H) in h's dtype; the sum is in fp32.
    """
    return _Down.apply(h, weights, weight, bias, order, where, offsets, active)  # type: ignore[no-any-return, no-untyped-call]


def moe_experts(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    activation: Callable[[Tensor], Tensor], up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Send each token through its experts. Backward may run more than once.

    Args:
        x: (T, H).
        index: (T, K), the experts of each token.
        weights: (T, K), what their outputs are multiplied by; any floating dtype.
        up: (E, H, F), in x's dtype, any strides; frozen or trainable.
        down: (E, F', H), likewise.
        activation: from the rows (S, F) of the first product to the rows (S, F') of the second.
        up_bias: (E, F) or None.
        down_bias: (E, H) or None.

    Returns:
        (T, H) in x's dtype.
    """
    active = index.shape[1]
    routing = moe_route(index.reshape(-1), up.shape[0])
    h = activation(moe_up(x, up, up_bias, *routing, active))
    return moe_down(h, weights.reshape(-1), down, down_bias, *routing, active)


# -- OP --------------------------------------------------------------------------------------------


def unsupported(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    activation: Callable[[Tensor], Tensor], up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Say why the op cannot take these arguments, which are those of ``moe_experts``."""
    devices = [] if index.device == weights.device == x.device else ["several devices"]
    inner = x.new_empty(0, down.shape[1])
    return [*devices, *_unsupported(x, up, up_bias), *_unsupported(inner, down, down_bias)]


def _unsupported(rows: Tensor, weight: Tensor, bias: Tensor | None, *routing: Any) -> list[str]:
    """Likewise of one of the two projections: ``moe_up``, or (with h for x) ``moe_down``."""
    reasons = []
    if rows.ndim != 2 or weight.ndim != 3:
        reasons.append("the rows are not (N, in), or the weights are not (E, in, out)")
    elif rows.shape[1] != weight.shape[1]:
        reasons.append(f"shapes do not fit: {tuple(rows.shape)}, {tuple(weight.shape)}")
    given = [t for t in (rows, weight, bias) if t is not None]
    if len({t.dtype for t in given}) > 1:
        reasons.append(f"several dtypes: {', '.join(str(t.dtype) for t in given)}")
    if not rows.is_floating_point() or rows.dtype.itemsize < 2:
        reasons.append(f"dtype {rows.dtype} is not a floating-point dtype of 16 bits or more")
    if len({t.device for t in (*given, *routing) if isinstance(t, Tensor)}) > 1:
        reasons.append("the operands are on several devices")
    return reasons


def _down_unsupported(
    h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, *routing: Any
) -> list[str]:
    return _unsupported(h, weight, bias, weights, *routing)


OP = Op("moe_experts", reference, moe_experts, unsupported)
UP = Op("moe_up", up_reference, moe_up, _unsupported)
DOWN = Op("moe_down", down_reference, moe_down, _down_unsupported)
