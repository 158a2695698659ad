"""A LoRA adapter over a quantized linear layer (Dettmers et al., "QLoRA", 2023).

``y = x·dequantize(W)ᵀ + b + scale·(z·Aᵀ)·Bᵀ``: the products of ``quant_linear`` with the adapter
added in their accumulator, and the adapter's own part as in ``lora_linear``. Eager PEFT also
clones the base layer's output, and casts input and update when the adapter is wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..matmul import mm
from ..op import Maker, Op
from ..second_order import absent, differentiable, gradients, require_saved
from . import quant_linear
from .casts import autocast
from .linears import Linear, example_of_linear, parts
from .products import Rows, beside, gradient_of_a, gradient_of_b, narrow_copy, scaled_mm, shaped
from .quant_products import join, product, split
from .quantized import Quantized

# ------------------------------------------------------------------------------------- reference


def reference(x: Tensor, linear: Linear, x_lora: Tensor | None = None) -> Tensor:
    """PEFT's layer, cast for cast: the base in ``compute``, the adapter in its own dtype."""
    weight, bias, lora_a, lora_b, scale, lora_bias, compute, dtype = parts(linear)
    result = quant_linear.reference(x, Quantized(*weight), bias, compute, dtype)
    z = (x if x_lora is None else x_lora).to(lora_a.dtype)
    adapter = F.linear(F.linear(z, lora_a), lora_b, lora_bias) * scale
    out: Tensor = (result + adapter).to(result.dtype)
    return out


# -------------------------------------------------------------------------- cpu, triton, autograd


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    z, h, lora_a, lora_b, *tensors = ctx.saved_tensors
    is_kept = z is not None or h is None
    require_saved(is_kept, "quant_lora_linear", "B is trained and A is not")
    own_input, (shape, dtype, read_dtype, compute) = ctx.z_like is not None, ctx.like
    w = join(ctx.fixed, tuple(tensors))
    x = z if z is not None and not own_input else absent(shape, grad, read_dtype)
    z = absent(ctx.z_like[0], grad, ctx.z_like[1]) if own_input and z is None else z
    bias, lora_bias = (
        None if kind is None else absent(w.shape[:1], grad, kind) for kind in ctx.bias_dtypes
    )

    def formula(x: Any, bias: Any, a: Any, b: Any, _: Any, z: Any, lora_bias: Any) -> Tensor:
        z = z if own_input else None
        layer = Linear(w, bias, a, b, ctx.scale, lora_bias, compute, grad.dtype)
        y = reference(x, layer, z)
        return y.reshape(grad.shape)

    inputs, needed = (x, bias, lora_a, lora_b, None, z, lora_bias), ctx.needs_input_grad
    dx, *rest = gradients(formula, inputs, (needed[0], *needed[2:]), (grad,))
    return dx if dx is None else dx.to(dtype), None, *rest


class _QuantLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, copy: Tensor | None, bias: Tensor | None, lora_a: Tensor,
        lora_b: Tensor, scale: float, x_lora: Tensor | None, lora_bias: Tensor | None,
        dtype: torch.dtype, compute: torch.dtype, fixed: Any, *tensors: Any,
    ) -> Tensor:  # fmt: skip
        # ``copy`` is x in another dtype, or None: ``products.narrow_copy``.
        ctx.set_materialize_grads(False)
        source = x if copy is None else copy
        rows = Rows(source.reshape(-1, x.shape[-1]))
        z = rows if x_lora is None else Rows(x_lora.reshape(-1, x_lora.shape[-1]))
        ctx.bias_dtypes = tuple(None if b is None else b.dtype for b in (bias, lora_bias))
        if lora_bias is not None and dtype is compute:
            bias = (lora_bias * scale if bias is None else bias + lora_bias * scale).to(dtype)
        # the scale goes onto the narrow factor, where it costs nothing and serves dB too
        h = scaled_mm(z.beside(lora_a), lora_a.t(), scale)
        w = join(fixed, tensors)
        y = product(rows.to(compute), w, bias=bias, left=h, right=lora_b.t(), dtype=dtype)
        if lora_bias is not None and dtype is not compute:
            y = y.add_(lora_bias * scale)
        _, _, _, w_a, w_b, *_ = ctx.needs_input_grad
        adapter_input = source if x_lora is None else x_lora
        ctx.save_for_backward(
            adapter_input if w_a else None, h if w_b else None, lora_a, lora_b, *tensors
        )
        ctx.scale, ctx.fixed, ctx.like = scale, fixed, (x.shape, x.dtype, source.dtype, compute)
        ctx.z_like = None if x_lora is None else (x_lora.shape, x_lora.dtype)
        return y  # rows: a view made in here could not be written to in place by the model

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        z, h, lora_a, lora_b, *tensors = ctx.saved_tensors
        w_x, _, w_bias, w_a, _, _, w_z, w_lora_bias, *_ = ctx.needs_input_grad
        shape, dtype, _, compute = ctx.like
        own_input = ctx.z_like is not None
        wide = beside(dy, lora_b)
        dx = dbias = dz = dlora_bias = t = None
        if w_a or w_z or (w_x and not own_input):
            t = scaled_mm(wide, lora_b, ctx.scale, of_right=True)
        if w_x:
            left, right = (None, None) if own_input else (t, lora_a)
            w, low = join(ctx.fixed, tuple(tensors)), dy.to(compute)
            dx = product(low, w, transposed=True, left=left, right=right, dtype=dtype).view(shape)
        if w_z and t is not None:
            z_shape, z_dtype = ctx.z_like
            dz = mm(t.to(z_dtype), lora_a.to(z_dtype)).view(z_shape)
        rows = None if z is None else z.reshape(-1, z.shape[-1])
        da = gradient_of_a(rows, t) if rows is not None and t is not None else None
        db = gradient_of_b(h, wide) if h is not None else None
        if w_bias:
            dbias = dy.sum(0, dtype=ctx.bias_dtypes[0])
        if w_lora_bias:
            exact = torch.promote_types(wide.dtype, torch.float32)
            dlora_bias = wide.sum(0, dtype=exact).mul_(ctx.scale).to(ctx.bias_dtypes[1])
        rest = [None] * (3 + len(tensors))
        return dx, None, dbias, da, db, None, dz, dlora_bias, *rest


def quant_lora_linear(x: Tensor, linear: Linear, x_lora: Tensor | None = None) -> Tensor:
    """Compute ``x·dequantize(W)ᵀ + bias + scale·(z·Aᵀ·Bᵀ + lora_bias)``, z being ``x_lora`` or x.

    W is frozen; it and x are rounded to ``linear.compute`` for the base's product. Gradients of the
    adapter are computed in its dtype. Autocast casts the adapter's operands, as it does for linear
    layers, and leaves the base alone. Backward may run more than once over a retained graph.

    x and ``x_lora``, the adapter's input (x after dropout), are (..., in), W is (out, in), and the
    bias is in ``compute`` or None; the result (..., out) is in ``linear.dtype``, or else in
    ``compute``. Raises RuntimeError if shapes do not fit or the bias has another dtype.
    """
    weight, bias, lora_a, lora_b, scale, lora_bias, compute, dtype = parts(linear)
    w, device, low = Quantized(*weight), x.device.type, compute or x.dtype
    fixed, tensors = split(w)
    operands = [lora_a, lora_b, x_lora, lora_bias]
    adapter: list[Any] = autocast(device, operands) or operands  # type: ignore[assignment]
    with torch.autocast(device, enabled=False):
        copy = narrow_copy(x, (low, *(() if x_lora is not None else (adapter[0].dtype,))))
        rows: Tensor = _QuantLoraLinear.apply(  # type: ignore[no-untyped-call]
            x, copy, bias, *adapter[:2], scale, *adapter[2:], dtype or low, low, fixed, *tensors
        )
    return shaped(rows, x)


# ---------------------------------------------------------------------------------------------- OP


def unsupported(x: Tensor, linear: Linear, x_lora: Tensor | None = None) -> list[str]:
    """Why the op cannot take these arguments."""
    weight, bias, lora_a, lora_b, _, _, compute, dtype = parts(linear)
    reasons = quant_linear.unsupported(x, weight, bias, compute, dtype)
    w = Quantized(*weight)
    if lora_a.dtype != lora_b.dtype:
        reasons.append(f"A is {lora_a.dtype}, B is {lora_b.dtype}")
    if lora_a.ndim != 2 or lora_b.ndim != 2:
        reasons.append("A or B is not a matrix")
    elif lora_a.shape != (lora_b.shape[1], w.shape[1]) or lora_b.shape[0] != w.shape[0]:
        reasons.append(
            f"the shapes do not chain: W {tuple(w.shape)}, A {tuple(lora_a.shape)}, "
            f"B {tuple(lora_b.shape)}"
        )
    return reasons


def _example(m: Maker) -> tuple[Any, ...]:
    return m.x(m.sizes.hidden), example_of_linear(m, m.sizes.inner, m.sizes.hidden, quantized=True)


def _example_with_dropout(m: Maker) -> tuple[Any, ...]:
    linear = example_of_linear(m, m.sizes.inner, m.sizes.hidden, quantized=True, bias=True)
    lora_bias = m.adapter(m.sizes.inner)
    return m.x(m.sizes.hidden), linear._replace(lora_bias=lora_bias), m.x(m.sizes.hidden)


OP = Op(
    "quant_lora_linear",
    reference,
    quant_lora_linear,
    unsupported,
    rule="lora_linear",
    example=_example,
    variants={"dropout": _example_with_dropout},
)
