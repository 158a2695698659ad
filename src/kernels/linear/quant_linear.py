"""A linear layer whose frozen weight is quantized: ``y = x·dequantize(W)ᵀ + b``.

Its only copy of full precision lives while a product runs, in forward and again in backward, one
layer at a time (``mlp_block`` in tiles: all of its layers, while the op runs). The product is one
opaque op, so that no compiler finds the copy worth keeping. The same op adds the low-rank product
of an adapter (``quant_lora_linear.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..op import Maker, Op, loses_precision, not_floating, on_several_devices
from ..second_order import absent, differentiable, gradients
from .products import shaped
from .quant_products import join, product, split
from .quantized import VALUES, Quantized, dequantize_reference, example_of_quantized

# ------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor,
    weight: Quantized,
    bias: Tensor | None = None,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As bitsandbytes' layers: x and the weight are rounded to ``compute`` before they are used."""
    low = x.to(compute or x.dtype)
    out = linear(low, dequantize_reference(Quantized(*weight), low.dtype), bias)
    return out.to(dtype or out.dtype)


# -------------------------------------------------------------------------------- cpu and triton

# ``quant_products``: a library matmul over a copy of full precision, or one kernel.

# -------------------------------------------------------------------------------------- autograd


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    w = join(ctx.fixed, ctx.saved_tensors)
    kind, compute, bias_kind = ctx.dtypes
    bias = None if bias_kind is None else absent(w.shape[:1], grad, bias_kind)

    def formula(x: Tensor, bias: Tensor | None) -> Tensor:
        return reference(x, w, bias, compute, grad.dtype).reshape(grad.shape)

    inputs = (absent(ctx.shape, grad, kind), bias)
    return gradients(formula, inputs, ctx.needs_input_grad, (grad,))


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, compute: torch.dtype, dtype: torch.dtype,
        fixed: Any, *tensors: Any,
    ) -> Tensor:  # fmt: skip
        # ``fixed`` and ``tensors`` are the two halves of the weight (``split``).
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.fixed, ctx.shape = fixed, x.shape
        ctx.dtypes = x.dtype, compute, None if bias is None else bias.dtype
        rows = x.reshape(-1, x.shape[-1]).to(compute)
        return product(rows, join(fixed, tensors), bias=bias, dtype=dtype)

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx = dbias = None
        tensors = ctx.saved_tensors  # once: a checkpoint does not give them a second time
        kind, compute, bias_kind = ctx.dtypes
        if ctx.needs_input_grad[0]:
            w, low = join(ctx.fixed, tensors), grad.to(compute)
            dx = product(low, w, transposed=True, dtype=kind).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dbias = grad.sum(0, dtype=bias_kind)
        return dx, dbias, None, None, None, *(None for _ in tensors)


def quant_linear(
    x: Tensor,
    weight: Quantized,
    bias: Tensor | None = None,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``x·dequantize(W)ᵀ + bias`` (..., out) with a frozen W.

    x (..., in), of any floating-point dtype, and W (out, in) are rounded to ``compute``, by default
    x's dtype; autocast does not change that. The bias (out,) is in ``compute``. The result is in
    ``dtype``, at least as wide; by default ``compute``. Backward may run more than once over a
    retained graph. Raises RuntimeError if shapes do not fit or the bias has another dtype.
    """
    w = Quantized(*weight)
    fixed, tensors = split(w)
    low = compute or x.dtype
    with torch.autocast(x.device.type, enabled=False):
        rows: Tensor = _QuantLinear.apply(  # type: ignore[no-untyped-call]
            x, bias, low, dtype or low, fixed, *tensors
        )
    return shaped(rows, x)


# ---------------------------------------------------------------------------------------------- OP


def unsupported(
    x: Tensor,
    weight: Quantized,
    bias: Tensor | None = None,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Why the op cannot take these arguments."""
    w = Quantized(*weight)
    out, into = w.shape
    reasons: list[str] = []
    if w.kind not in (*VALUES, "int8"):
        return [f"the weight is of kind {w.kind}"]
    reasons += not_floating("x", x)
    if x.shape[-1] != into:
        reasons.append(f"x has {x.shape[-1]} features, the weight {into}")
    low = compute or x.dtype
    if bias is not None and bias.dtype != low:
        reasons.append(f"the bias is {bias.dtype}, the input {low}")
    reasons += loses_precision(dtype, low, "the product")
    bits = w.packed.numel() * w.packed.element_size() * 8
    if bits < out * into * (8 if w.kind == "int8" else 4):
        reasons.append(f"{bits} bits are too few for {out} x {into} values")
    if (w.absmax_8bit is None) != (w.absmax_offset is None):
        reasons.append("the scales of scales are not complete")
    return reasons + on_several_devices(x, bias, *w)


def _example(m: Maker, bias: bool = False, kind: str = "nf4", nested: bool = True) -> Any:
    weight = example_of_quantized(m, m.sizes.inner, m.sizes.hidden, kind, nested)
    return m.x(m.sizes.hidden), weight, m.weight(m.sizes.inner, mean=0.0) if bias else None


OP = Op(
    "quant_linear",
    reference,
    quant_linear,
    unsupported,
    example=_example,
    variants={
        "fp4": lambda m: _example(m, True, "fp4", False),
        "int8": lambda m: _example(m, True, "int8"),
    },
)
