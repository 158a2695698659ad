"""Several linears on one input, with or without LoRA adapters: the q, k and v of an attention.

One by one, each casts the input for its A, and each sends back a gradient of the input's size that
autograd adds up. Here the A's are one matmul, the input is cast once, and its gradient is one
tensor into which every product is accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import Op
from ..second_order import absent, differentiable, gradients, require_kept
from . import lora_linear, quant_linear, quant_lora_linear
from .linears import Constants, Weight, cast_as_autocast, flat, linears, lists, wanted
from .products import Rows, shaped
from .projections import backward, narrow, narrow_copy_for, widen
from .quantized import Quantized

KEEPS = ("all", "input")
"""What may be kept for backward: the input and the rank-wide products, or the input alone."""

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scales: Sequence[float],
    lora_biases: Sequence[Tensor | None],
    keep: str = "all",
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Define the op: each linear by itself, PEFT's casts included."""
    each = zip(weights, biases, lora_as, lora_bs, scales, lora_biases, strict=True)
    return tuple(
        projection(x, w, bias, a, b, scale, lora_bias, compute, dtype)
        for w, bias, a, b, scale, lora_bias in each
    )


def projection(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    lora_bias: Tensor | None,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One linear, with its adapter if there is one."""
    if isinstance(weight, Tensor):
        if lora_a is None or lora_b is None:
            out = F.linear(x.to(weight.dtype), weight, bias)
            return out if dtype is None else out.to(dtype)
        return lora_linear.reference(x, weight, bias, lora_a, lora_b, scale, None, lora_bias, dtype)
    if lora_a is None or lora_b is None:
        return quant_linear.reference(x, Quantized(*weight), bias, compute, dtype)
    return quant_lora_linear.reference(
        x, Quantized(*weight), bias, lora_a, lora_b, scale, None, lora_bias, dtype, compute
    )


# -- cpu -------------------------------------------------------------------------------------------

# ``projections.narrow``, ``widen`` and ``backward``: matmuls of the libraries.

# -- triton ----------------------------------------------------------------------------------------

# The rank update of ``lora_linear``, through ``projections``.

# -- autograd --------------------------------------------------------------------------------------


def _again(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    shape, dtype, read, constants, _ = ctx.options
    x, *saved = ctx.saved_tensors
    constants, count = Constants(*constants), len(constants[0])
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
    if all(g is None for g in grads):
        return (None,) * len(ctx.needs_input_grad)
    for_b = any(need.lora_b for need in wanted(needed[1:], count))
    require_kept(x is not None or not for_b, "qkv_block", "B is trained and A is not")
    like = next(g for g in grads if g is not None)

    def formula(x: Tensor, *tensors: Any) -> list[Tensor]:
        run: Any = reference
        outs = run(x, *lists(tensors, constants), "all", constants.compute, constants.dtype)
        return [out.reshape(-1, out.shape[-1]) for out in outs]

    inputs = absent(shape, like, read) if x is None else x, *saved[count:]
    dx, *rest = gradients(formula, inputs, needed, grads)
    return dx if dx is None else dx.to(dtype), None, None, None, *rest


class _QKVBlock(torch.autograd.Function):
    """Keeps the input for the weight gradients that are wanted, and nothing of an output's size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        copy: Tensor | None,
        constants: tuple[Any, ...],
        keep: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """``copy`` of x stands for it where there is one: ``products.narrow_copy``."""
        read = x if copy is None else copy
        rows = Rows(read.reshape(-1, x.shape[-1]))
        layers = linears(tensors, Constants(*constants))
        hs = narrow(rows, layers)
        need_x, needs = ctx.needs_input_grad[0], wanted(ctx.needs_input_grad[4:], len(layers))
        by_h = [need.lora_b for need in needs]
        by_x = [need.weight or need.lora_a for need in needs]
        recompute = keep == "input" and any(by_h)
        ctx.save_for_backward(
            read if any(by_x) or recompute else None,
            *(h if w and not recompute else None for h, w in zip(hs, by_h, strict=True)),
            *tensors,
        )
        ctx.options = x.shape, x.dtype, read.dtype, constants, recompute
        ctx.set_materialize_grads(False)
        outs = tuple(widen(rows, layer, h) for layer, h in zip(layers, hs, strict=True))
        if not need_x:
            pairs = zip(outs, needs, strict=True)
            ctx.mark_non_differentiable(*(out for out, need in pairs if not any(need)))
        return outs  # rows: a view made in here could not be written to in place by the model

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        shape, dtype, _, constants, recompute = ctx.options
        read, *saved = ctx.saved_tensors
        rows = None if read is None else Rows(read.reshape(-1, read.shape[-1]))
        count = len(constants[0])
        hs, layers = saved[:count], linears(saved[count:], Constants(*constants))
        if recompute and rows is not None:
            hs = narrow(rows, layers)
        need_x, needs = ctx.needs_input_grad[0], wanted(ctx.needs_input_grad[4:], count)
        dx, found = backward(rows, layers, hs, grads, need_x, needs, dtype)
        rest = [None] * (len(saved) - 5 * count)  # the other halves of quantized weights
        dx = dx if dx is None else dx.view(shape)
        return dx, None, None, None, *(g for d in found for g in d), *rest


def qkv_block(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scales: Sequence[float],
    lora_biases: Sequence[Tensor | None],
    keep: str = "all",
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """``x·Wᵢᵀ + bᵢ + scaleᵢ·(x·Aᵢᵀ·Bᵢᵀ + lora_biasᵢ)`` for each i.

    x, adapters and bases may have dtypes of their own, as in ``lora_linear``; under autocast every
    operand is cast as autocast casts a linear layer's (over quantized weights, the adapter's alone,
    as in ``quant_lora_linear``). What comes back to x is added up in x's dtype. Backward may run
    more than once over a retained graph.

    Args:
        x: (..., in).
        weights: (out_i, in) each, frozen or trainable; or each a frozen ``Quantized``, or a tuple
            of its fields.
        biases: (out_i,) or None each.
        lora_as: (r_i, in), or None for a linear without an adapter.
        lora_bs: (out_i, r_i) in the dtype of A, or None.
        scales: what each adapter's output is multiplied by.
        lora_biases: (out_i,), the bias of B, or None each.
        keep: ``"all"`` keeps x and the rank-wide ``x·Aᵢᵀ`` for backward, ``"input"`` x alone.
        compute: in which products with quantized weights run; None is x's dtype. Others run in the
            weight's.
        dtype: of the results, at least as wide; None is that of the products.

    Returns:
        One (..., out_i) for each linear, in ``dtype``.

    Raises:
        ValueError: an unknown ``keep``, lists of different lengths, or some weights quantized and
            some not.
        RuntimeError: the shapes do not fit.
    """
    if keep not in KEEPS:
        raise ValueError(f"keep is {keep!r}, not one of {', '.join(KEEPS)}")
    tensors, constants = flat(
        weights, biases, lora_as, lora_bs, scales, lora_biases, compute or x.dtype, dtype
    )
    device = x.device.type
    cast = cast_as_autocast(device, tensors, constants)
    if cast is None:
        return _apply(keep, constants, x, *tensors)
    with torch.autocast(device, enabled=False):
        return _apply(keep, constants, x, *cast)


def _apply(keep: str, constants: Constants, x: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    copy = narrow_copy_for(linears(tensors, constants), x)
    outs = _QKVBlock.apply(x, copy, tuple(constants), keep, *tensors)  # type: ignore[no-untyped-call]
    return tuple(shaped(out, x) for out in outs)


# -- OP --------------------------------------------------------------------------------------------


def unsupported(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scales: Sequence[float],
    lora_biases: Sequence[Tensor | None],
    keep: str = "all",
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Say why the op cannot take these arguments, which are those of ``qkv_block``."""
    reasons = [] if keep in KEEPS else [f"keep is {keep!r}, not one of {', '.join(KEEPS)}"]
    if len({isinstance(w, Tensor) for w in weights}) > 1:
        reasons.append("some of the weights are quantized, some are not")
    each = zip(weights, biases, lora_as, lora_bs, scales, lora_biases, strict=True)
    for i, (w, bias, a, b, scale, lora_bias) in enumerate(each):
        found = _unsupported(x, w, bias, a, b, scale, lora_bias, compute, dtype)
        reasons += [f"linear {i}: {reason}" for reason in found]
    return reasons


def _unsupported(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    lora_bias: Tensor | None,
    compute: torch.dtype | None,
    dtype: torch.dtype | None,
) -> list[str]:
    if (lora_a is None) != (lora_b is None) or (lora_a is None and lora_bias is not None):
        return ["a part of the adapter is missing"]
    out = weight.shape[0] if isinstance(weight, Tensor) else weight[2][0]
    if lora_a is None or lora_b is None:  # judged as one with an adapter of rank 0
        lora_a, lora_b = x.new_empty(0, x.shape[-1]), x.new_empty(out, 0)
    adapter = (lora_a, lora_b, scale, None, lora_bias, dtype)
    if isinstance(weight, Tensor):
        return lora_linear.unsupported(x, weight, bias, *adapter)
    return quant_lora_linear.unsupported(x, Quantized(*weight), bias, *adapter, compute)


OP = Op("qkv_block", reference, qkv_block, unsupported)
