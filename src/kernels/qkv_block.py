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

from . import lora_linear, quant_linear, quant_lora_linear
from .linears import Constants, Weight, cast_as_autocast, flat, linears, lists, wanted
from .op import Cost, Op
from .projections import backward, narrow, widen
from .second import absent, differentiable, gradients, require_kept

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
) -> tuple[Tensor, ...]:
    """Define the op: each linear by itself, PEFT's casts included."""
    each = zip(weights, biases, lora_as, lora_bs, scales, lora_biases, strict=True)
    return tuple(projection(x, *arguments) for arguments in each)


def projection(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    lora_bias: Tensor | None,
) -> Tensor:
    """One linear, with its adapter if there is one."""
    adapter = (lora_a, lora_b, scale, None, lora_bias)
    packed, adapted = not isinstance(weight, Tensor), lora_a is not None
    base = quant_linear.reference if packed else F.linear
    both = quant_lora_linear.reference if packed else lora_linear.reference
    result: Tensor = both(x, weight, bias, *adapter) if adapted else base(x, weight, bias)  # type: ignore[arg-type]
    return result


# -- cpu -------------------------------------------------------------------------------------------

# ``projections.narrow``, ``widen`` and ``backward``: matmuls of the libraries.

# -- triton ----------------------------------------------------------------------------------------

# The rank update of ``lora_linear``, through ``projections``.

# -- autograd --------------------------------------------------------------------------------------


def _again(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    shape, constants, _ = ctx.options
    x, *saved = ctx.saved_tensors
    constants, count = Constants(*constants), len(constants[0])
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]
    if all(g is None for g in grads):
        return (None,) * len(ctx.needs_input_grad)
    for_b = any(need.lora_b for need in wanted(needed[1:], count))
    require_kept(x is not None or not for_b, "qkv_block", "B is trained and A is not")
    like = next(g for g in grads if g is not None)

    def formula(x: Tensor, *tensors: Any) -> list[Tensor]:
        outs = reference(x, *lists(tensors, constants, x.dtype))
        return [out.reshape(-1, out.shape[-1]) for out in outs]

    inputs = absent(shape, like) if x is None else x, *saved[count:]
    dx, *rest = gradients(formula, inputs, needed, grads)
    return dx, None, None, *rest


class _QKVBlock(torch.autograd.Function):
    """Keeps the input for the weight gradients that are wanted, and nothing of an output's size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, constants: tuple[Any, ...], keep: str, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        layers = linears(tensors, Constants(*constants))
        hs = narrow(rows, layers)
        need_x, needs = ctx.needs_input_grad[0], wanted(ctx.needs_input_grad[3:], len(layers))
        by_h = [need.lora_b for need in needs]
        by_x = [need.weight or need.lora_a for need in needs]
        recompute = keep == "input" and any(by_h)
        ctx.save_for_backward(
            x if any(by_x) or recompute else None,
            *(h if w and not recompute else None for h, w in zip(hs, by_h, strict=True)),
            *tensors,
        )
        ctx.options = x.shape, constants, recompute
        ctx.set_materialize_grads(False)
        outs = tuple(widen(rows, layer, h) for layer, h in zip(layers, hs, strict=True))
        if not need_x:
            pairs = zip(outs, needs, strict=True)
            ctx.mark_non_differentiable(*(out for out, need in pairs if not any(need)))
        return outs  # rows: a view made in here could not be written to in place by the model

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        shape, constants, recompute = ctx.options
        x, *saved = ctx.saved_tensors
        rows = x if x is None else x.reshape(-1, x.shape[-1])
        count = len(constants[0])
        hs, layers = saved[:count], linears(saved[count:], Constants(*constants))
        if recompute:
            hs = narrow(rows, layers)
        need_x, needs = ctx.needs_input_grad[0], wanted(ctx.needs_input_grad[3:], count)
        dx, found = backward(rows, layers, hs, grads, need_x, needs)
        rest = [None] * (len(saved) - 5 * count)  # the other halves of quantized weights
        dx = dx if dx is None else dx.view(shape)
        return dx, None, None, *(g for d in found for g in d), *rest


def qkv_block(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scales: Sequence[float],
    lora_biases: Sequence[Tensor | None],
    keep: str = "all",
) -> tuple[Tensor, ...]:
    """``x·Wᵢᵀ + bᵢ + scaleᵢ·(x·Aᵢᵀ·Bᵢᵀ + lora_biasᵢ)`` for each i.

    Adapters may have another dtype than the base, as in ``lora_linear``; under autocast every
    operand is cast as autocast casts a linear layer's (over quantized weights, the adapter's alone,
    as in ``quant_lora_linear``). Backward may run more than once over a
    retained graph.

    Args:
        x: (..., in).
        weights: (out_i, in) each, in x's dtype, frozen or trainable; or each a frozen
            ``Quantized``, or a tuple of its fields.
        biases: (out_i,) or None each.
        lora_as: (r_i, in), or None for a linear without an adapter.
        lora_bs: (out_i, r_i) in the dtype of A, or None.
        scales: what each adapter's output is multiplied by.
        lora_biases: (out_i,), the bias of B, or None each.
        keep: ``"all"`` keeps x and the rank-wide ``x·Aᵢᵀ`` for backward, ``"input"`` x alone.

    Returns:
        One (..., out_i) for each linear, in x's dtype.

    Raises:
        ValueError: an unknown ``keep``, lists of different lengths, or some weights quantized and
            some not.
        RuntimeError: the shapes do not fit, or x and a weight differ in dtype.
    """
    if keep not in KEEPS:
        raise ValueError(f"keep is {keep!r}, not one of {', '.join(KEEPS)}")
    tensors, constants = flat(weights, biases, lora_as, lora_bs, scales, lora_biases)
    cast = cast_as_autocast(x, tensors, constants)
    if cast is None:
        return _apply(keep, constants, x, *tensors)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(keep, constants, *cast)


def _apply(keep: str, constants: Constants, x: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    outs = _QKVBlock.apply(x, tuple(constants), keep, *tensors)  # type: ignore[no-untyped-call]
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


# -- cost ------------------------------------------------------------------------------------------


def cost(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scales: Sequence[float],
    lora_biases: Sequence[Tensor | None],
    keep: str = "all",
) -> Cost:
    """Bytes and FLOPs of one call; x is counted as kept once."""
    rows = x.numel() // x.shape[-1]
    tensors, constants = flat(weights, biases, lora_as, lora_bs, scales, lora_biases)
    layers = linears(tensors, constants)
    trained = [t for t in (*weights, *lora_as) if isinstance(t, Tensor)]
    for_x = any(t.requires_grad for t in trained)
    for_h = [
        a for a, b in zip(lora_as, lora_bs, strict=True)
        if a is not None and b is not None and b.requires_grad
    ]  # fmt: skip
    recompute = keep == "input" and bool(for_h)
    narrow_bytes = 0 if recompute else sum(rows * a.shape[0] * a.element_size() for a in for_h)
    return Cost(
        bytes_read=x.nbytes + sum(t.nbytes for t in tensors if t is not None),
        bytes_written=rows * sum(layer.weight.shape[0] for layer in layers) * x.element_size(),
        flops=2 * rows * sum(layer.numel() for layer in layers),
        bytes_saved=x.nbytes * (for_x or recompute) + narrow_bytes,
    )


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
) -> list[str]:
    """Say why the op cannot take these arguments, which are those of ``qkv_block``."""
    reasons = [] if keep in KEEPS else [f"keep is {keep!r}, not one of {', '.join(KEEPS)}"]
    if len({isinstance(w, Tensor) for w in weights}) > 1:
        reasons.append("some of the weights are quantized, some are not")
    each = zip(weights, biases, lora_as, lora_bs, scales, lora_biases, strict=True)
    for i, arguments in enumerate(each):
        reasons += [f"linear {i}: {reason}" for reason in _unsupported(x, *arguments)]
    return reasons


def _unsupported(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    lora_bias: Tensor | None,
) -> list[str]:
    if (lora_a is None) != (lora_b is None) or (lora_a is None and lora_bias is not None):
        return ["a part of the adapter is missing"]
    plain = isinstance(weight, Tensor)
    out = weight.shape[0] if isinstance(weight, Tensor) else weight[2][0]
    if lora_a is None or lora_b is None:  # judged as one with an adapter of rank 0
        lora_a, lora_b = x.new_empty(0, x.shape[-1]), x.new_empty(out, 0)
    judge: Any = lora_linear.unsupported if plain else quant_lora_linear.unsupported
    found: list[str] = judge(x, weight, bias, lora_a, lora_b, scale, None, lora_bias)
    return found


OP = Op("qkv_block", reference, qkv_block, cost, unsupported)
