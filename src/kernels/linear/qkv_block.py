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

from ..op import Maker, Op
from ..second_order import absent, differentiable, gradients, require_saved
from . import lora_linear, quant_linear, quant_lora_linear
from .linears import (
    MIXED,
    Constants,
    Linear,
    example_of_linear,
    linears,
    unflattened,
    wanted,
    with_operands,
)
from .products import Rows, is_wide, shaped
from .projections import backward, narrow, narrow_copy_for, widen
from .quantized import Quantized

KEEPS = ("all", "input")
"""What may be kept for backward: the input and the rank-wide products, or the input alone."""


# -- reference -------------------------------------------------------------------------------------
def reference(x: Tensor, given: Sequence[Linear], keep: str = "all") -> tuple[Tensor, ...]:
    """Define the op: each linear by itself, PEFT's casts included."""
    return tuple(projection(x, linear) for linear in given)


def projection(x: Tensor, linear: Linear) -> Tensor:
    """One linear, with its adapter if there is one."""
    weight, bias, lora_a, _, _, _, compute, dtype = linear
    if isinstance(weight, Tensor):
        if lora_a is not None:
            return lora_linear.reference(x, linear)
        out = F.linear(x.to(weight.dtype), weight, bias)
        return out if dtype is None else out.to(dtype)
    if lora_a is None:
        return quant_linear.reference(x, Quantized(*weight), bias, compute, dtype)
    return quant_lora_linear.reference(x, linear)


# -- cpu -------------------------------------------------------------------------------------------
# ``projections.narrow``, ``widen`` and ``backward``: matmuls of the libraries.

# -- triton ----------------------------------------------------------------------------------------
# The rank update of ``lora_linear``, through ``projections``.


# -- autograd --------------------------------------------------------------------------------------
def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    shape, dtype, read_dtype, constants, _ = ctx.options
    x, *saved = ctx.saved_tensors
    constants, count = Constants(*constants), len(constants[0])
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
    if all(g is None for g in grads):
        return (None,) * len(ctx.needs_input_grad)
    for_b = any(need.lora_b for need in wanted(needed[1:], count))
    require_saved(x is not None or not for_b, "qkv_block", "B is trained and A is not")
    like = next(g for g in grads if g is not None)

    def formula(x: Tensor, *tensors: Any) -> list[Tensor]:
        outs = reference(x, unflattened(tensors, constants))
        return [out.reshape(-1, out.shape[-1]) for out in outs]

    inputs = absent(shape, like, read_dtype) if x is None else x, *saved[count:]
    dx, *rest = gradients(formula, inputs, needed, grads)
    return dx if dx is None else dx.to(dtype), None, None, None, *rest


class _QKVBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, copy: Tensor | None, constants: tuple[Any, ...], keep: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # ``copy`` is x in another dtype, or None: ``products.narrow_copy``.
        source = x if copy is None else copy
        rows = Rows(source.reshape(-1, x.shape[-1]))
        layers = linears(tensors, constants)
        hs = narrow(rows, layers)
        needed = ctx.needs_input_grad
        need_x, needs = needed[0], wanted(needed[4:], len(layers))
        by_h = [need.lora_b for need in needs]
        by_x = [need.weight or need.lora_a for need in needs]
        recompute = keep == "input" and any(by_h)
        ctx.save_for_backward(
            source if any(by_x) or recompute else None,
            *(h if w and not recompute else None for h, w in zip(hs, by_h, strict=True)),
            *tensors,
        )
        ctx.options = x.shape, x.dtype, source.dtype, constants, recompute
        ctx.set_materialize_grads(False)
        outs = tuple(widen(rows, layer, h) for layer, h in zip(layers, hs, strict=True))
        if not need_x:
            pairs = zip(outs, needs, strict=True)
            ctx.mark_non_differentiable(*(out for out, need in pairs if not any(need)))
        return outs  # rows: a view made in here could not be written to in place by the model

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        shape, dtype, _, constants, recompute = ctx.options
        source, *saved = ctx.saved_tensors
        rows = None if source is None else Rows(source.reshape(-1, source.shape[-1]))
        count = len(constants[0])
        hs, layers = saved[:count], linears(saved[count:], constants)
        if recompute and rows is not None:
            hs = narrow(rows, layers)
        needed = ctx.needs_input_grad
        need_x, needs = needed[0], wanted(needed[4:], count)
        dx, layer_grads = backward(rows, layers, hs, grads, need_x, needs, dtype)
        rest = [None] * (len(saved) - 5 * count)  # the other halves of quantized weights
        dx = dx if dx is None else dx.view(shape)
        return dx, None, None, None, *(g for d in layer_grads for g in d), *rest


def qkv_block(x: Tensor, given: Sequence[Linear], keep: str = "all") -> tuple[Tensor, ...]:
    """``x·Wᵢᵀ + bᵢ + scaleᵢ·(x·Aᵢᵀ·Bᵢᵀ + lora_biasᵢ)`` (..., outᵢ) for each i, of x (..., in).

    x, adapters and bases may differ in dtype, as in ``lora_linear``; under autocast every operand
    is cast as autocast casts a linear layer's (over quantized weights, the adapter's alone, as in
    ``quant_lora_linear``). The gradients of x are summed in x's dtype. Backward may run more than
    once over a retained graph.

    Args:
        x: (..., in).
        given: the linears (outᵢ, in), all quantized or none, of one ``compute`` and one ``dtype``.
        keep: ``"all"`` keeps x and the rank-wide ``x·Aᵢᵀ`` for backward, ``"input"`` x alone.

    Raises:
        ValueError: an unknown ``keep``, or linears that differ in what they must have in common.
        RuntimeError: the shapes do not fit.
    """
    if keep not in KEEPS:
        raise ValueError(f"keep is {keep!r}, not one of {', '.join(KEEPS)}")

    def run(tensors: list[Tensor | None], constants: Constants) -> tuple[Tensor, ...]:
        copy = narrow_copy_for(linears(tensors, constants), x) if is_wide(x) else None
        outs = _QKVBlock.apply(x, copy, tuple(constants), keep, *tensors)  # type: ignore[no-untyped-call]
        return tuple(shaped(out, x) for out in outs)

    return with_operands(run, given, x)


# -- OP --------------------------------------------------------------------------------------------
def unsupported(x: Tensor, given: Sequence[Linear], keep: str = "all") -> list[str]:
    """Why the op cannot take these arguments."""
    reasons = [] if keep in KEEPS else [f"keep is {keep!r}, not one of {', '.join(KEEPS)}"]
    if len({linear.is_quantized() for linear in given}) > 1:
        reasons.append(MIXED)
    for i, linear in enumerate(given):
        reasons += [f"linear {i}: {reason}" for reason in _unsupported(x, linear)]
    return reasons


def _unsupported(x: Tensor, linear: Linear) -> list[str]:
    _, _, lora_a, lora_b, _, lora_bias, *_ = linear
    if (lora_a is None) != (lora_b is None) or (lora_a is None and lora_bias is not None):
        return ["a part of the adapter is missing"]
    if lora_a is None:  # judged as one with an adapter of rank 0
        none = x.new_empty(0, x.shape[-1]), x.new_empty(linear.shape()[0], 0)
        linear = linear._replace(lora_a=none[0], lora_b=none[1])
    if linear.is_quantized():
        return quant_lora_linear.unsupported(x, linear)
    return lora_linear.unsupported(x, linear)


def _example(m: Maker, keep: str = "all", **kind: bool) -> tuple[Any, ...]:
    counts, s = (m.sizes.heads, m.sizes.kv_heads, m.sizes.kv_heads), m.sizes
    layers = [example_of_linear(m, n * s.head_dim, s.hidden, **kind) for n in counts]
    return m.x(s.hidden), layers, keep


OP = Op(
    "qkv_block",
    reference,
    qkv_block,
    unsupported,
    example=_example,
    variants={
        "input": lambda m: _example(m, "input", bias=True),
        "plain": lambda m: _example(m, lora=False, bias=True),
        "quantized": lambda m: _example(m, quantized=True),
    },
)
