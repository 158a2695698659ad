"""Residual add and RMSNorm of the sum, in one pass; both results are returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..captured import capturable
from ..direct import direct
from ..launch import library_op, use_triton
from ..op import Maker, Op, away_from, not_floating
from ..second_order import differentiable, gradients
from . import rms_norm as norm


# ------------------------------------------------------------------------------------- reference
def reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0,
    rounding: str = "inner",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Define the op; see ``add_rms_norm`` for the arguments."""
    total = x + residual
    return total, norm.reference(total, weight, eps, offset, rounding)


# ------------------------------------------------------------------------------------------- cpu
def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    return total, *norm.forward(total, weight, eps, offset, outer)


# ---------------------------------------------------------------------------------------- triton
def _forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = torch.empty_like(x, dtype=norm.output_dtype(total, weight, outer))
    return total, y, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_forward_op = library_op(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor? weight, float eps, float offset,"
    " bool outer) -> (Tensor, Tensor, Tensor)",
    "norms.rms_norm:forward_of_sum",
    _forward_fake,
    plain=_forward,
)
_launch_forward = direct(_forward_op)


# -------------------------------------------------------------------------------------- autograd
def _double_backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple[Any, ...]:
    total, weight, _ = ctx.saved_tensors
    need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
    formula = ctx.eps, ctx.offset, norm.rounding_of(ctx.outer)
    d_total, d_weight = gradients(
        lambda total, weight: norm.reference(total, weight, *formula),
        (total, weight),
        (need_x or need_residual, need_weight),
        (grad,),
    )
    if grad_total is not None:
        d_total = grad_total if d_total is None else d_total + grad_total
    d_x, d_residual = (
        d_total.to(dtype) if needed and d_total is not None else None
        for needed, dtype in zip((need_x, need_residual), ctx.dtypes, strict=True)
    )
    return d_x, d_residual, d_weight, None, None, None


@capturable
class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum and one rstd per row; the norm's backward adds the sum's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float,
        outer: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        fast = use_triton(x, residual, weight) and x.shape[-1] <= norm.MAX_DIM
        run = _launch_forward if fast else _forward
        total, y, rstd = run(x, residual, weight, eps, offset, outer)
        ctx.save_for_backward(total, weight, rstd)
        ctx.eps, ctx.offset, ctx.outer = eps, offset, outer
        ctx.dtypes = x.dtype, residual.dtype
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @differentiable(_double_backward)
    def backward(
        ctx: Any, grad_total: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        d_total, d_weight = grad_total, None
        if grad is not None:
            need = need_x or need_residual
            d_total, d_weight = norm.backward(
                grad, total, weight, rstd, grad_total, ctx.offset, ctx.outer, need, need_weight
            )
        d_x, d_residual = (
            d_total.to(dtype) if needed and d_total is not None else None
            for needed, dtype in zip((need_x, need_residual), ctx.dtypes, strict=True)
        )
        return d_x, d_residual, d_weight, None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0,
    rounding: str = "inner",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (x + residual, its norm); the sum is rounded to the dtype that both promote to.

    x and residual are (..., D), of any floating-point dtypes and strides, and so are both results.
    The other arguments are those of ``rms_norm``, for the sum. Raises ValueError if x and residual
    differ in shape, or ``rounding`` is unknown.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} and residual {tuple(residual.shape)}")
    total: Tensor
    y: Tensor
    # 2026-11-24: torch does not type Function.apply
    total, y = _AddRMSNorm.apply(  # type: ignore[no-untyped-call]
        x, residual, weight, eps, offset, norm.is_outer(rounding)
    )
    return total, y


# -------------------------------------------------------------------------------------------- op
def unsupported(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0,
    rounding: str = "inner",
) -> list[str]:  # fmt: skip
    """Why the fast implementation of their device does not take these tensors."""
    reasons = norm.unsupported(x, weight, eps, offset, rounding)
    if x.shape != residual.shape:
        reasons.append(f"x is {tuple(x.shape)} and the residual {tuple(residual.shape)}")
    reasons += not_floating("the residual", residual) + away_from(x, "the residual", residual)
    if residual.is_cuda and residual.dtype is torch.float64 and x.dtype is not torch.float64:
        reasons.append("fp64 runs in plain PyTorch")
    return reasons


def _example(m: Maker, offset: float = 0.0, rounding: str = "inner") -> tuple[Any, ...]:
    x, residual = m.x(m.sizes.hidden), m.x(m.sizes.hidden)
    return x, residual, m.weight(m.sizes.hidden), 1e-6, offset, rounding


OP = Op(
    "add_rms_norm",
    reference,
    add_rms_norm,
    unsupported,
    saved_outputs=(0,),
    example=_example,
    variants={"outer-offset": lambda m: _example(m, 1.0, "outer")},
)
