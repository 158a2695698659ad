"""A linear layer with a LoRA adapter (Hu et al. 2021): ``y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ``.

Eager PEFT reads the input three times and writes three tensors of the output's size, twice that in
fp32 when the adapter is in fp32 over a bf16 base (its default). Here the adapter's product is
accumulated into the base layer's output by the matmul itself, ``dY·B`` is computed once for both
``dX`` and ``dA``, and the rank-wide ``x·Aᵀ`` is kept rather than recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..matmul import mm
from ..op import Maker, Op, loses_precision, on_several_devices
from ..second_order import absent, differentiable, gradients, require_saved
from .casts import autocast
from .linears import Linear, example_of_linear, parts
from .products import (
    Rows,
    adapted_product,
    beside,
    gradient_of_a,
    gradient_of_b,
    narrow_copy,
    scaled_mm,
    shaped,
)

# ------------------------------------------------------------------------------------- reference


def reference(x: Tensor, linear: Linear, x_lora: Tensor | None = None) -> Tensor:
    """PEFT's LoRA layer, cast for cast: the adapter runs in its own dtype."""
    weight, bias, lora_a, lora_b, scale, lora_bias, _, dtype = parts(linear)
    result = F.linear(x.to(weight.dtype), weight, bias)
    result = result if dtype is None else result.to(dtype)
    z = (x if x_lora is None else x_lora).to(lora_a.dtype)
    adapter = F.linear(F.linear(z, lora_a), lora_b, lora_bias) * scale
    out: Tensor = (result + adapter).to(result.dtype)
    return out


# ------------------------------------------------------------------------------------------- cpu


def _forward(
    x: Rows, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float,
    z: Rows, lora_bias: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (N, out) and ``scale·z·Aᵀ`` (N, r) in the adapter's dtype; x and z are (N, in)."""
    if lora_bias is not None:
        bias = (lora_bias * scale if bias is None else bias + lora_bias * scale).to(weight.dtype)
    # the scale goes onto the narrow factor, where it costs nothing and serves dB too
    h = scaled_mm(z.beside(lora_a), lora_a.t(), scale)
    low = x.to(weight.dtype)
    return adapted_product(low, weight.t(), bias, h, lora_b.t(), dtype), h


# ---------------------------------------------------------------------------------------- triton

# The rank update, in ``products.adapted_product``; the wide product, in ``products.scaled_mm`` and
# in the gradients of A and B.


# -------------------------------------------------------------------------------------- autograd


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, z, _, weight, lora_a, lora_b = ctx.saved_tensors
    needed, own_input = ctx.needs_input_grad, ctx.z_like is not None
    x = z if x is None and not own_input else x
    is_kept = (z if own_input else x) is not None
    require_saved(is_kept or not needed[5], "lora_linear", "B is trained and A is not")
    shape, dtype, read_dtype = ctx.x_like
    x = absent(shape, weight, read_dtype) if x is None else x
    z = absent(ctx.z_like[0], weight, ctx.z_like[1]) if own_input and z is None else z
    bias, lora_bias = (
        None if kind is None else absent(weight.shape[:1], weight, kind) for kind in ctx.bias_dtypes
    )

    def formula(x: Any, weight: Any, bias: Any, a: Any, b: Any, s: Any, z: Any, lb: Any) -> Tensor:
        z = z if own_input else None
        layer = Linear(weight, bias, a, b, ctx.scale, lb, dtype=grad.dtype)
        out = reference(x, layer, z)
        return out.reshape(grad.shape)

    inputs = x, weight, bias, lora_a, lora_b, None, z, lora_bias
    dx, *rest = gradients(formula, inputs, (needed[0], *needed[2:]), (grad,))
    return dx if dx is None else dx.to(dtype), None, *rest


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, copy: Tensor | None, weight: Tensor, bias: Tensor | None,
        lora_a: Tensor, lora_b: Tensor, scale: float, x_lora: Tensor | None,
        lora_bias: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        # ``copy`` is x in another dtype, or None: ``products.narrow_copy``.
        ctx.set_materialize_grads(False)
        source = x if copy is None else copy
        rows = Rows(source.reshape(-1, x.shape[-1]))
        z = rows if x_lora is None else Rows(x_lora.reshape(-1, x_lora.shape[-1]))
        y, h = _forward(rows, weight, bias, lora_a, lora_b, scale, z, lora_bias, dtype)
        _, _, w_weight, _, w_a, w_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            source if w_weight else None,
            (source if x_lora is None else x_lora) if w_a else None,
            h if w_b else None,
            weight,
            lora_a,
            lora_b,
        )
        ctx.scale, ctx.x_like = scale, (x.shape, x.dtype, source.dtype)
        ctx.bias_dtypes = tuple(None if b is None else b.dtype for b in (bias, lora_bias))
        ctx.z_like = None if x_lora is None else (x_lora.shape, x_lora.dtype)
        return y  # rows: a view made in here could not be written to in place by the model

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, z, h, weight, lora_a, lora_b = ctx.saved_tensors
        w_x, _, w_weight, w_bias, w_a, w_b, _, w_z, w_lora_bias, _ = ctx.needs_input_grad
        own_input = ctx.z_like is not None
        dy = grad.to(weight.dtype)
        # fp32 adapters get fp32 gradients, if need be by a cast
        wide = dy if lora_b.dtype is weight.dtype else beside(grad, lora_b)
        dx = dweight = dbias = da = db = dz = dlora_bias = t = None
        if w_a or w_z or (w_x and not own_input):
            t = scaled_mm(wide, lora_b, ctx.scale, of_right=True)
        if w_x:
            shape, dtype, _ = ctx.x_like
            if t is None or own_input:
                dx = mm(dy, weight).to(dtype)
            else:
                dx = adapted_product(dy, weight, None, t, lora_a, dtype)
            dx = dx.view(shape)
        if w_z and t is not None:
            shape, dtype = ctx.z_like
            dz = mm(t.to(dtype), lora_a.to(dtype)).view(shape)
        if w_weight:
            dweight = mm(dy.t(), x.reshape(-1, x.shape[-1]).to(dy.dtype))
        if w_a and t is not None:
            da = gradient_of_a(z.reshape(-1, z.shape[-1]), t)
        if w_b:
            db = gradient_of_b(h, wide)
        if w_bias:
            dbias = dy.sum(0, dtype=ctx.bias_dtypes[0])
        if w_lora_bias:
            exact = torch.promote_types(wide.dtype, torch.float32)
            dlora_bias = wide.sum(0, dtype=exact).mul_(ctx.scale).to(ctx.bias_dtypes[1])
        return dx, None, dweight, dbias, da, db, None, dz, dlora_bias, None


def lora_linear(x: Tensor, linear: Linear, x_lora: Tensor | None = None) -> Tensor:
    """Compute ``x·Wᵀ + bias + scale·(z·Aᵀ·Bᵀ + lora_bias)``, z being ``x_lora`` or x.

    Adapters may have another dtype than the base (fp32 over bf16 is PEFT's default): their
    gradients are then computed in that dtype, while the base's product runs in the weight's. Under
    autocast every operand is cast first, as autocast casts a linear layer's. The gradients of x are
    summed in x's dtype. Backward may run more than once over a retained graph.

    x (..., in) is cast to the weight's dtype, and to the adapter's; ``x_lora`` (..., in), the
    adapter's input (x after dropout), may have any floating dtype. The weight (out, in) is a plain
    one. The result (..., out) is in ``linear.dtype``, or else in the weight's. Raises RuntimeError
    if shapes do not fit.
    """
    weight, bias, lora_a, lora_b, scale, lora_bias, _, dtype = parts(linear)
    device = x.device.type
    args: Any = autocast(device, (weight, bias, lora_a, lora_b, x_lora, lora_bias))
    if args is None:
        adapter = (lora_a, lora_b, scale, x_lora, lora_bias)
        return _apply(x, weight, bias, *adapter, dtype or weight.dtype)
    with torch.autocast(device, enabled=False):
        return _apply(x, *args[:4], scale, *args[4:], dtype or args[0].dtype)


def _apply(x: Tensor, *args: Any) -> Tensor:
    weight, _, lora_a, _, _, x_lora, *_ = args
    copy = narrow_copy(x, (weight.dtype, *((lora_a.dtype,) if x_lora is None else ())))
    rows: Tensor = _LoraLinear.apply(x, copy, *args)  # type: ignore[no-untyped-call]
    return shaped(rows, x)


# ---------------------------------------------------------------------------------------------- OP


def unsupported(x: Tensor, linear: Linear, x_lora: Tensor | None = None) -> list[str]:
    """Why the op cannot take these arguments."""
    weight, bias, lora_a, lora_b, _, lora_bias, _, dtype = parts(linear)
    named = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "x_lora": x_lora}
    tensors = [t for t in (x, bias, lora_bias, *named.values()) if t is not None]
    reasons = [
        f"{name} has {t.ndim} dimensions instead of 2"
        for name, t in named.items()
        if t is not None and t.ndim != 2 and name != "x_lora"
    ]
    if any(not t.is_floating_point() for t in tensors):
        reasons.append("an operand is not of a floating-point dtype (a quantized weight?)")
    reasons += loses_precision(dtype, weight.dtype, "the weight")
    if lora_a.dtype != lora_b.dtype:
        reasons.append(f"A is {lora_a.dtype}, B is {lora_b.dtype}")
    reasons += on_several_devices(*tensors)
    if not reasons and (
        lora_a.shape != (lora_b.shape[1], x.shape[-1])
        or weight.shape != (lora_b.shape[0], x.shape[-1])
    ):
        reasons.append(
            f"the shapes do not chain: x {tuple(x.shape)}, W {tuple(weight.shape)}, "
            f"A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}"
        )
    return reasons


def _example(m: Maker) -> tuple[Any, ...]:
    return m.x(m.sizes.hidden), example_of_linear(m, m.sizes.inner, m.sizes.hidden)


def _example_with_dropout(m: Maker) -> tuple[Any, ...]:
    linear = example_of_linear(m, m.sizes.inner, m.sizes.hidden, bias=True)
    lora_bias = m.adapter(m.sizes.inner)
    return m.x(m.sizes.hidden), linear._replace(lora_bias=lora_bias), m.x(m.sizes.hidden)


OP = Op(
    "lora_linear",
    reference,
    lora_linear,
    unsupported,
    example=_example,
    variants={"dropout": _example_with_dropout},
)
