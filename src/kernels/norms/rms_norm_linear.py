"""RMSNorm feeding one or several linears, without keeping the normed rows.

The row scale commutes with the matmul: ``(x · rstd · g) Wᵀ = rstd · ((x · g) Wᵀ)``. So a matmul can
multiply by the norm weight as it loads x and scale its result, and the normed rows never exist; or
they exist between two calls and are freed. Either way backward has x and one rstd per row, and
recomputes the normed rows only for the gradients of linear weights: with frozen ones, never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..captured import capturable
from ..launch import library_op, use_triton_dot
from ..linear import projections
from ..linear.products import Rows, shaped
from ..linear.projections import Grads, Linear, rows_of
from ..op import Maker, Op, away_from, not_floating
from ..second_order import absent, differentiable, gradients
from . import rms_norm as norm


# ------------------------------------------------------------------------------------- reference
def reference(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, rounding: str,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Define the op; see ``rms_norm_linear`` for the arguments."""
    y = norm.reference(x, norm_weight, eps, offset, rounding)
    return tuple(F.linear(y, w, b) for w, b in zip(weights, biases, strict=True))


# ------------------------------------------------------------------------------------------- cpu
# The products are those of ``linear/projections.py``.
def _layers(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Linear]:
    pairs = zip(weights, biases, strict=True)
    return [Linear(w, b, compute=w.dtype, dtype=w.dtype) for w, b in pairs]


def _forward(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, outer: bool,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    y, rstd = norm.forward(x, norm_weight, eps, offset, outer)
    outs, _ = projections.forward(Rows(rows_of(y)), _layers(weights, biases))
    return [*(shaped(out, x) for out in outs), rstd]


# ---------------------------------------------------------------------------------------- triton
def _forward_fake(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, outer: bool,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    rows = x.shape[:-1]
    outs = [x.new_empty((*rows, w.shape[0]), dtype=w.dtype) for w in weights]
    return [*outs, x.new_empty((*rows, 1), dtype=torch.float32)]


_forward_op = library_op(
    "rms_norm_linear_forward(Tensor x, Tensor? norm_weight, float eps, float offset, bool outer,"
    " Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    "norms.rms_norm_linear:forward",
    _forward_fake,
    lambda x, *rest: 2 * x.numel() // x.shape[-1] * sum(w.numel() for w in rest[4]),
    plain=_forward,
)


# -------------------------------------------------------------------------------------- autograd
def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, norm_weight, _, *weights = ctx.saved_tensors
    eps, offset, outer = ctx.formula
    needed, count = ctx.needs_input_grad, len(weights)

    def formula(x: Tensor, norm_weight: Tensor | None, *tensors: Any) -> list[Tensor]:
        y = norm.reference(x, norm_weight, eps, offset, norm.rounding_of(outer))
        pairs = zip(tensors[:count], tensors[count:], strict=True)
        return [F.linear(y.to(w.dtype), w, b) for w, b in pairs]

    biases = (
        absent(w.shape[:1], w) if need else None
        for w, need in zip(weights, needed[5 + count :], strict=True)
    )
    inputs = x, norm_weight, *weights, *biases
    d_x, d_norm, *rest = gradients(formula, inputs, (*needed[:2], *needed[5:]), grads)
    return d_x, d_norm, None, None, None, *rest


@capturable
class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, outer: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        count = len(tensors) // 2
        weights = [w for w in tensors[:count] if w is not None]
        biases = tensors[count:]
        fast = use_triton_dot(x, norm_weight, *tensors) and x.shape[-1] <= norm.MAX_DIM
        run = _forward_op if fast else _forward
        *outs, rstd = run(x, norm_weight, eps, offset, outer, weights, biases)
        ctx.save_for_backward(x, norm_weight, rstd, *weights)
        ctx.formula = eps, offset, outer
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, *out_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, norm_weight, rstd, *weights = ctx.saved_tensors
        eps, offset, outer = ctx.formula
        need_x, need_norm_weight, *_ = ctx.needs_input_grad
        needed, count = ctx.needs_input_grad[5:], len(weights)
        needs = [Grads(w, b) for w, b in zip(needed[:count], needed[count:], strict=True)]
        grads = [g if g is None else rows_of(g) for g in out_grads]
        layers = _layers(weights, [None] * count)
        y = None
        if any(need.weight for need in needs):
            y = Rows(rows_of(norm.forward(x, norm_weight, eps, offset, outer)[0]))
        normed = norm.output_dtype(x, norm_weight, outer)
        d_y, of_layers = projections.backward(
            y, layers, [None] * count, grads, need_x or need_norm_weight, needs, normed
        )
        d_x = d_norm_weight = None
        if d_y is not None:
            d_x, d_norm_weight = norm.backward(
                d_y.view(x.shape), x, norm_weight, rstd, None, offset, outer, need_x,
                need_norm_weight,
            )  # fmt: skip
        d_weights, d_biases = ([g[i] for g in of_layers] for i in range(2))
        return d_x, d_norm_weight, None, None, None, *d_weights, *d_biases


def rms_norm_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, rounding: str,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Each result is ``linear(rms_norm(x), weight, bias)``; the normed rows are not kept.

    Under autocast the linears run in its dtype, as they do in eager mode. The first arguments are
    those of ``rms_norm``, for x (..., D). Of each linear there is one of ``weights`` (F_i, D), one
    of ``biases`` (F_i,) or None, and one result (..., F_i). Raises ValueError if there are not as
    many biases as weights, or ``rounding`` is unknown.
    """
    outer = norm.is_outer(rounding)
    if len(weights) != len(biases):
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases")
    outs: tuple[Tensor, ...]
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        # 2026-11-24: torch does not type Function.apply
        outs = _RMSNormLinear.apply(  # type: ignore[no-untyped-call]
            x, norm_weight, eps, offset, outer, *weights, *biases
        )
        return outs
    lower = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        tensors = [
            t if t is None or t.dtype is torch.float64 else t.to(lower) for t in (*weights, *biases)
        ]
        outs = _RMSNormLinear.apply(  # type: ignore[no-untyped-call]
            x, norm_weight, eps, offset, outer, *tensors
        )
    return outs


# -------------------------------------------------------------------------------------------- op
def unsupported(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, rounding: str,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None],
) -> list[str]:  # fmt: skip
    """Why the fast implementation of their device does not take these tensors."""
    reasons = norm.unsupported(x, norm_weight, eps, offset, rounding)
    normed = norm.output_dtype(x, norm_weight, norm.is_outer(rounding))
    autocast = torch.is_autocast_enabled(x.device.type)
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.ndim != 2 or w.shape[1:] != x.shape[-1:]:
            reasons.append(f"linear {i}'s weight is {tuple(w.shape)}, not (features, D)")
        reasons += not_floating(f"linear {i}'s weight", w)
        if w.is_floating_point() and w.dtype is not normed and not autocast:
            reasons.append(f"linear {i}'s weight is {w.dtype} and the normed rows are {normed}")
        reasons += away_from(x, f"linear {i}'s weight", w)
        if b is not None and (b.shape != w.shape[:1] or b.device != w.device):
            reasons.append(f"linear {i}'s bias does not fit its weight")
    return reasons


def _example(m: Maker, bias: bool = False) -> tuple[Any, ...]:
    counts = m.sizes.heads, m.sizes.kv_heads, m.sizes.kv_heads
    weights = [m.weight(n * m.sizes.head_dim, m.sizes.hidden) for n in counts]
    biases = [m.weight(len(w), mean=0.0) if bias else None for w in weights]
    return m.x(m.sizes.hidden), m.weight(m.sizes.hidden), 1e-6, 0.0, "inner", weights, biases


def _example_of_one(m: Maker) -> tuple[Any, ...]:
    return *_example(m)[:5], [m.weight(m.sizes.inner, m.sizes.hidden)], [None]


OP = Op(
    "rms_norm_linear",
    reference,
    rms_norm_linear,
    unsupported,
    example=_example,
    variants={"bias": lambda m: _example(m, True), "one": _example_of_one},
)
