"""RMSNorm: divide each row by its root mean square, times a weight (Zhang & Sennrich 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..captured import capturable
from ..choice import Implementation, drawn
from ..direct import direct
from ..launch import library_op, use_triton
from ..op import Maker, Op, away_from, no_kernel_of_rows, not_floating
from ..second_order import differentiable, double_backward

MAX_DIM = 16384
"""Longest row that the Triton kernels take (one program holds whole rows)."""

ROUNDINGS = ("inner", "outer")


# ------------------------------------------------------------------------------------- reference
def reference(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, rounding: str = "inner"
) -> Tensor:
    """Define the op; see ``rms_norm`` for the arguments."""
    wide = x.to(work_dtype(x))
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return (offset * n if offset else n).to(x.dtype)
    if rounding == "outer":
        return ((offset + weight.to(wide.dtype)) * n).to(x.dtype)
    return (offset + weight if offset else weight) * n.to(x.dtype)


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def output_dtype(x: Tensor, weight: Tensor | None, outer: bool) -> torch.dtype:
    """The dtype of the normed rows: ``inner`` rounds before the weight, so the weight decides."""
    if outer or weight is None:
        return x.dtype
    return torch.promote_types(weight.dtype, x.dtype)


# ------------------------------------------------------------------------------------------- cpu
# Temporaries are reused in place: on the CPU, touching fresh memory costs more than arithmetic.
# Whether a temporary is ours is read off the dtypes, because `x.to(same dtype)` is `x` in eager
# mode but a new alias of it under functionalization.
def _forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor]:
    work = work_dtype(x)
    if x.dtype is work:
        n = x.square()
        rstd = n.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, rstd, out=n)
    else:  # the norm reads once and needs no temporary, for one more rounding in fp32
        n = x.to(work)
        norm = torch.linalg.vector_norm(n, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        n.mul_(rstd)
    if weight is None:
        return (n.mul_(offset) if offset else n).to(x.dtype), rstd
    if outer:
        return n.mul_(_scale(weight, offset, outer, work)).to(x.dtype), rstd
    y = n.to(x.dtype)
    scale = _scale(weight, offset, outer, work)
    return (y.mul_(scale) if output_dtype(x, weight, outer) is x.dtype else y * scale), rstd


def _scale(weight: Tensor, offset: float, outer: bool, work: torch.dtype) -> Tensor:
    """What the norm is multiplied with, rounded as the model rounds it."""
    wide = weight.to(work) if outer else weight
    return wide + offset if offset else wide


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, extra: Tensor | None,
    offset: float, outer: bool, need_x: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    work = work_dtype(x)
    g, n = grad.to(work), x.to(work)
    n = n * rstd if x.dtype is work else n.mul_(rstd)
    product = g * n
    d_weight = None
    if need_weight and weight is not None:
        d_weight = product.unsqueeze(0).flatten(0, -2).sum(0).to(weight.dtype)
    if not need_x:
        return None, d_weight
    if weight is not None:
        scale = _scale(weight, offset, outer, work).to(work)
        g = g * scale if grad.dtype is work else g.mul_(scale)
        product = product.mul_(scale)
    elif offset:
        g, product = g * offset, product.mul_(offset)
    is_fresh = weight is not None or offset or grad.dtype is not work
    mean = product.mean(-1, keepdim=True)
    if is_fresh:
        d_x = g.addcmul_(n, mean, value=-1).mul_(rstd)
    else:
        d_x = torch.addcmul(g, n, mean, value=-1).mul_(rstd)
    if extra is not None:
        d_x = d_x.add_(extra)
    return d_x.to(x.dtype), d_weight


# ---------------------------------------------------------------------------------------- triton
def _forward_fake(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=output_dtype(x, weight, outer))
    return y, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, extra: Tensor | None,
    offset: float, outer: bool, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d_x = torch.empty_like(x) if need_x else x.new_empty(0, x.shape[-1])
    if need_weight and weight is not None:
        return d_x, weight.new_empty(weight.shape)
    return d_x, x.new_empty(0)


def _why_not_torch(
    x: Tensor, weight: Tensor | None, offset: float, extra: Tensor | None = None
) -> str:
    if weight is None or offset or weight.dtype is not x.dtype:
        return "it multiplies by a weight in the dtype of x, as it is"
    if extra is not None:
        return "it adds no other gradient"
    return "" if hasattr(torch.ops.aten, "_fused_rms_norm") else "this PyTorch has none"


def _torch_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor]:
    y, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    return y, rstd


def _torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, extra: Tensor | None, offset: float,
    outer: bool, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    needs = [need_x, need_weight]
    grads = torch.ops.aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], rstd, weight, needs)
    return grads[0] if need_x else x.new_empty(0, x.shape[-1]), (
        grads[1] if need_weight else x.new_empty(0)
    )


def _with_rstd(args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    grad, x, weight, rstd, *rest = drawn(args, generator)
    rstd.copy_(x.float().square().mean(-1, keepdim=True).add_(1e-6).rsqrt_())
    return grad, x, weight, rstd, *rest


_forward_op = library_op(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, float offset, bool outer)"
    " -> (Tensor, Tensor)",
    "norms.rms_norm:forward",
    _forward_fake,
    plain=_forward,
    libraries=(
        Implementation(
            "F.rms_norm",
            _torch_forward,
            lambda x, weight, eps, offset, outer: _why_not_torch(x, weight, offset),
        ),
    ),
)
_backward_op = library_op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, Tensor? extra,"
    " float offset, bool outer, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    "norms.rms_norm:backward",
    _backward_fake,
    plain=_backward,
    libraries=(
        Implementation(
            "F.rms_norm",
            _torch_backward,
            lambda grad, x, weight, rstd, extra, offset, *_: _why_not_torch(
                x, weight, offset, extra
            ),
        ),
    ),
    inputs=_with_rstd,
)
_launch_forward, _launch_backward = direct(_forward_op), direct(_backward_op)


# -------------------------------------------------------------------------------------- autograd
def forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor]:
    """Norm ``x`` without a gradient: (y, rstd), rstd (..., 1) the reciprocal root mean squares."""
    run = _launch_forward if use_triton(x, weight) and x.shape[-1] <= MAX_DIM else _forward
    y, rstd = run(x, weight, eps, offset, outer)
    return y, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, extra: Tensor | None,
    offset: float, outer: bool, need_x: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dweight), None where not needed, reductions in fp32; ``rstd`` is from ``forward``.

    ``extra`` (..., D) is another gradient of x, added before the result is rounded.
    """
    need_weight = need_weight and weight is not None
    if use_triton(x, weight, grad) and x.shape[-1] <= MAX_DIM:
        d_x, d_weight = _launch_backward(
            grad, x, weight, rstd, extra, offset, outer, need_x, need_weight
        )
        return d_x if need_x else None, d_weight if need_weight else None
    return _backward(grad, x, weight, rstd, extra, offset, outer, need_x, need_weight)


@capturable
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        y, rstd = forward(x, weight, eps, offset, outer)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = eps, offset, rounding_of(outer)
        return y

    @staticmethod
    @differentiable(double_backward(reference, 2))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        _, offset, rounding = ctx.options
        d_x, d_weight = backward(
            grad, x, weight, rstd, None, offset, is_outer(rounding), need_x, need_weight
        )
        return d_x, d_weight, None, None, None


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, rounding: str = "inner"
) -> Tensor:
    """Return n · (offset + weight), where n = x / sqrt(mean(x², -1) + eps) in fp32 (or fp64).

    Args:
        x: (..., D), floating-point, any strides.
        weight: (D,), of any floating-point dtype, or None.
        eps: added to the mean square.
        offset: added to the weight (1.0 in Gemma); without a weight, the factor unless 0.
        rounding: ``"inner"`` rounds n to x's dtype before the weight (Llama); ``"outer"`` applies
            the weight in fp32 and rounds the product (OLMo-2, Gemma).

    Returns:
        (..., D), in x's dtype, or with ``"inner"`` in the dtype that weight and x promote to.

    Raises:
        ValueError: if ``rounding`` is neither.
    """
    # 2026-11-24: torch does not type Function.apply
    y: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, eps, offset, is_outer(rounding)
    )
    return y


def is_outer(rounding: str) -> bool:
    """Whether ``rounding`` is ``"outer"``; raises ValueError for an unknown one."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, not {rounding!r}")
    return rounding == "outer"


def rounding_of(outer: bool) -> str:
    """The inverse of ``is_outer``."""
    return "outer" if outer else "inner"  # PyTorch 2.11 traces no index that is a bool


# -------------------------------------------------------------------------------------------- op
def unsupported(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, rounding: str = "inner"
) -> list[str]:
    """Why the fast implementation of their device does not take these tensors."""
    reasons = not_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        reasons.append("x has no features")
    elif weight is not None and weight.shape != x.shape[-1:]:
        reasons.append(f"the weight is {tuple(weight.shape)}, not one per feature of x")
    if weight is not None:
        reasons += not_floating("the weight", weight) + away_from(x, "the weight", weight)
    return reasons + no_kernel_of_rows(MAX_DIM, x, weight)


def _example(m: Maker, offset: float = 0.0, rounding: str = "inner") -> tuple[Any, ...]:
    return m.x(m.sizes.hidden), m.weight(m.sizes.hidden), 1e-6, offset, rounding


OP = Op(
    "rms_norm",
    reference,
    rms_norm,
    unsupported,
    example=_example,
    variants={
        "outer-offset": lambda m: _example(m, 1.0, "outer"),
        "factor": lambda m: (m.x(m.sizes.hidden), None, 1e-6, 0.125, "outer"),
    },
)
