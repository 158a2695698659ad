"""LayerNorm by PyTorch's own fused kernels: what serves in eager mode on the CPU.

Given fp32 parameters they keep fp32 statistics, whatever the dtype of x. Two things they do not do
well enough: they sum the gradients of parameters in x's dtype, one row after the other (at 4096
rows of bf16 that is wrong by 5%; at 1024 rows of fp32, in one thread, its error is six times that
of a sum in a tree), and their decomposition, which a tracer would get, rounds the statistics to x's
dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rms_norm import work_dtype

_TILE = 1 << 17
"""Elements that are widened at a time: what fits into a core's cache."""


def serves(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernels take these tensors, and nobody traces."""
    vectors = all(p is None or p.ndim == 1 for p in (weight, bias))
    traced = type(x) is not Tensor or torch.compiler.is_compiling()
    return vectors and not traced and x.device.type == "cpu" and x.is_contiguous()


def has_rule(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's autograd rule is good enough, too: in C++, it is the fastest one."""
    trained = any(p is not None and p.requires_grad for p in (weight, bias))
    exact = not (trained and torch.is_grad_enabled())
    # under torch.func our own rule cannot be used
    return serves(x, weight, bias) and (exact or torch._C._are_functorch_transforms_active())


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd); differentiable. See ``layer_norm.forward``."""
    # F.layer_norm asks autocast first, which knows nothing of the model's own casts
    return torch.native_layer_norm(x, x.shape[-1:], *_wide(x, weight, bias), eps)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return (dx, dweight, dbias); see ``layer_norm.backward``."""
    d_x: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    if need_x:
        d_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, rstd, *_wide(x, weight, bias), (True, False, False)
        )
    if need_weight or need_bias:
        d_weight, d_bias = _sums(grad, x, mean, rstd, need_weight, need_bias)
    return d_x, _like(d_weight, weight), _like(d_bias, bias)


def _sums(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias, (D,) each, summed in fp32 or fp64, a tile at a time."""
    dim = x.shape[-1]
    d_weight = torch.zeros(dim, dtype=mean.dtype) if need_weight else None
    d_bias = torch.zeros(dim, dtype=mean.dtype) if need_bias else None
    tile = max(1, _TILE // max(1, dim))
    rows = (t.reshape(-1, t.shape[-1]).split(tile) for t in (grad, x, mean, rstd))
    for g, part, m, r in zip(*rows, strict=True):
        wide = g.to(mean.dtype)
        if d_weight is not None:
            d_weight.add_((part - m).mul_(wide).mul_(r).sum(0))
        if d_bias is not None:
            d_bias.add_(wide.sum(0))
    return d_weight, d_bias


def _wide(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The parameters in the dtype of the arithmetic; ones where a weight must tell it."""
    work = work_dtype(x)
    if weight is None and x.dtype is not work:
        weight = torch.ones(x.shape[-1], dtype=work)
    return None if weight is None else weight.to(work), None if bias is None else bias.to(work)


def _like(t: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if t is None or parameter is None else t.to(parameter.dtype)
