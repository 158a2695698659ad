"""LayerNorm: each row less its mean, over its standard deviation (Ba, Kiros & Hinton 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..captured import capturable
from ..direct import direct
from ..launch import library_op, use_triton
from ..op import Maker, Op, away_from, no_kernel_of_rows, not_floating
from ..second_order import differentiable, double_backward
from .rms_norm import work_dtype

MAX_DIM = 16384
"""Longest row that the Triton kernels take (one program holds whole rows)."""


# ------------------------------------------------------------------------------------- reference
def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Define the op; see ``layer_norm`` for the arguments."""
    wide = x.to(work_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    n = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        n = weight.to(wide.dtype) * n
    if bias is not None:
        n = n + bias.to(wide.dtype)
    return n.to(x.dtype)


# --------------------------------------------------------------------- cpu: PyTorch's fused kernels
# Given fp32 parameters they keep fp32 statistics, whatever the dtype of x. But they sum the
# gradients of parameters in x's dtype, one row after the other (at 4096 rows of bf16 that is wrong
# by 5%; at 1024 rows of fp32, in one thread, its error is six times that of a sum in a tree), and
# their decomposition, which a tracer would get, rounds the statistics to x's dtype.
_SUM_TILE = 1 << 17
"""Elements that are widened at a time: what fits into a core's cache."""


def _pytorch_serves(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    vectors = all(p is None or p.ndim == 1 for p in (weight, bias))
    traced = type(x) is not Tensor or torch.compiler.is_compiling()
    return vectors and not traced and x.device.type == "cpu" and x.is_contiguous()


def _pytorch_rule_serves(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's autograd rule is good enough, too: in C++, it is the fastest one."""
    trained = any(p is not None and p.requires_grad for p in (weight, bias))
    exact = not (trained and torch.is_grad_enabled())
    # under torch.func our own rule cannot be used
    return _pytorch_serves(x, weight, bias) and (
        exact or torch._C._are_functorch_transforms_active()
    )


def _pytorch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # F.layer_norm asks autocast first, which knows nothing of the model's own casts
    return torch.native_layer_norm(x, x.shape[-1:], *_parameters(x, weight, bias), eps)


def _pytorch_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    d_x: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    if need_x:
        d_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, rstd, *_parameters(x, weight, bias), (True, False, False)
        )
    if need_weight or need_bias:
        d_weight, d_bias = _parameter_sums(grad, x, mean, rstd, need_weight, need_bias)
    return d_x, _cast_like(d_weight, weight), _cast_like(d_bias, bias)


def _parameter_sums(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    dim = x.shape[-1]
    d_weight = torch.zeros(dim, dtype=mean.dtype) if need_weight else None
    d_bias = torch.zeros(dim, dtype=mean.dtype) if need_bias else None
    tile = max(1, _SUM_TILE // max(1, dim))
    rows = (t.reshape(-1, t.shape[-1]).split(tile) for t in (grad, x, mean, rstd))
    for g, part, m, r in zip(*rows, strict=True):
        wide = g.to(mean.dtype)
        if d_weight is not None:
            d_weight.add_((part - m).mul_(wide).mul_(r).sum(0))
        if d_bias is not None:
            d_bias.add_(wide.sum(0))
    return d_weight, d_bias


def _parameters(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The parameters in the dtype of the arithmetic; ones where a weight must tell it."""
    work = work_dtype(x)
    if weight is None and x.dtype is not work:
        weight = torch.ones(x.shape[-1], dtype=work)
    return None if weight is None else weight.to(work), None if bias is None else bias.to(work)


def _cast_like(t: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if t is None or parameter is None else t.to(parameter.dtype)


# --------------------------------------------------------------------------------------- cpu: ATen
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if _pytorch_serves(x, weight, bias):
        return _pytorch_forward(x, weight, bias, eps)
    wide = x.to(work_dtype(x))
    mean = wide.mean(-1, keepdim=True)
    n = wide - mean
    rstd = n.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    n.mul_(rstd)
    if weight is not None:
        n.mul_(weight)
    if bias is not None:
        n.add_(bias)
    return n.to(x.dtype), mean, rstd


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    if _pytorch_serves(x, weight, bias):
        needs = need_x, need_weight, need_bias
        return _pytorch_backward(grad, x, weight, bias, mean, rstd, *needs)
    d_weight = d_bias = None
    if need_bias and bias is not None:
        d_bias = _summed(grad, bias)
    if not (need_x or need_weight):
        return None, None, d_bias
    work = work_dtype(x)
    g = grad.to(work)
    n = (x.to(work) - mean).mul_(rstd)
    product = g * n
    if need_weight and weight is not None:
        d_weight = _summed(product, weight)
    if not need_x:
        return None, d_weight, d_bias
    if weight is not None:
        g = g * weight.to(work)
        product.mul_(weight)
    slope = product.mean(-1, keepdim=True)
    d_x = (g - g.mean(-1, keepdim=True)).addcmul_(n, slope, value=-1).mul_(rstd)
    return d_x.to(x.dtype), d_weight, d_bias


def _summed(t: Tensor, parameter: Tensor) -> Tensor:
    """The sum of ``t`` (..., *parameter.shape) over all leading dimensions."""
    rows = t.unsqueeze(0).flatten(0, -1 - parameter.ndim)
    return rows.sum(0, dtype=work_dtype(t)).to(parameter.dtype)


# ---------------------------------------------------------------------------------------- triton
def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_x = torch.empty_like(x) if need_x else x.new_empty(0, x.shape[-1])
    d_weight = weight.new_empty(weight.shape) if need_weight and weight is not None else None
    d_bias = bias.new_empty(bias.shape) if need_bias and bias is not None else None
    return (
        d_x,
        x.new_empty(0) if d_weight is None else d_weight,
        x.new_empty(0) if d_bias is None else d_bias,
    )


_forward_op = library_op(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "norms.layer_norm:forward",
    _forward_fake,
    plain=_forward,
)
_backward_op = library_op(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor rstd, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    "norms.layer_norm:backward",
    _backward_fake,
    plain=_backward,
)
_launch_forward, _launch_backward = direct(_forward_op), direct(_backward_op)


# -------------------------------------------------------------------------------------- autograd
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm ``x`` without a gradient: (y, mean, rstd), the statistics (..., 1) each."""
    fast = use_triton(x, weight, bias) and x.shape[-1] <= MAX_DIM
    run = _launch_forward if fast else _forward
    y, mean, rstd = run(x, weight, bias, eps)
    return y, mean, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dweight, dbias), None where not needed; ``mean`` and ``rstd`` are from ``forward``."""
    needs = need_x, need_weight and weight is not None, need_bias and bias is not None
    triton = use_triton(x, weight, bias, grad) and x.shape[-1] <= MAX_DIM
    run = _launch_backward if triton else _backward
    grads = run(grad, x, weight, bias, mean, rstd, *needs)
    d_x, d_weight, d_bias = (g if w else None for g, w in zip(grads, needs, strict=True))
    return d_x, d_weight, d_bias


@capturable
class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        y, mean, rstd = forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = (eps,)
        return y

    @staticmethod
    @differentiable(double_backward(reference, 3))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:3]), None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return n · weight + bias, where n = (x - mean) / sqrt(var + eps), in fp32 (or fp64).

    The variance is the biased one. There is one rounding, of the result: so do
    ``F.layer_norm`` and the spellings that models have of it.

    Args:
        x: (..., D), floating-point, any strides.
        weight: (D,), or (heads, D) for x of (..., heads, D); of any floating-point dtype; or None.
        bias: in the weight's shape, (D,) if there is none; or None.
        eps: added to the variance.

    Returns:
        (..., D), in x's dtype.
    """
    if _pytorch_rule_serves(x, weight, bias) and not use_triton(x, weight, bias):
        return _pytorch_forward(x, weight, bias, eps)[0]
    # 2026-11-24: torch does not type Function.apply
    y: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


# -------------------------------------------------------------------------------------------- op
def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[str]:
    """Why the fast implementation of their device does not take these tensors."""
    reasons = not_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        reasons.append("x has no features")
    for name, t in (("the weight", weight), ("the bias", bias)):
        if t is None:
            continue
        if x.ndim and (t.ndim == 0 or t.shape != x.shape[-t.ndim :]):
            reasons.append(f"{name} is {tuple(t.shape)}, not one per feature of x")
        reasons += not_floating(name, t) + away_from(x, name, t)
    if weight is not None and bias is not None and weight.shape != bias.shape:
        reasons.append("weight and bias have different shapes")
    if weight is None and bias is not None and bias.ndim != 1:
        reasons.append("a bias without a weight must be one vector")
    return reasons + no_kernel_of_rows(MAX_DIM, x, weight, bias)


def _example(m: Maker) -> tuple[Any, ...]:
    return m.x(m.sizes.hidden), m.weight(m.sizes.hidden), m.weight(m.sizes.hidden, mean=0.0), 1e-5


def _example_of_heads(m: Maker) -> tuple[Any, ...]:
    features = m.sizes.heads, m.sizes.head_dim
    return m.x(*features), m.weight(*features), None, 1e-5


OP = Op(
    "layer_norm",
    reference,
    layer_norm,
    unsupported,
    example=_example,
    variants={
        "heads": _example_of_heads,
        "plain": lambda m: (m.x(m.sizes.hidden), None, None, 1e-5),
    },
)
