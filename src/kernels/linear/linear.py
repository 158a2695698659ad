"""Linear layers on one input: with LoRA adapters or without, over plain or quantized weights.

    yᵢ = x·Wᵢᵀ + bᵢ + scaleᵢ·(zᵢ·Aᵢᵀ·Bᵢᵀ + b'ᵢ)

Eager PEFT (Hu et al., "LoRA", 2021; Dettmers et al., "QLoRA", 2023) reads the input three times for
each layer and writes three tensors of the output's size, twice that in fp32 when the adapter is in
fp32 over a bf16 base (its default); each of several layers sends back a gradient of the input's
size, which autograd adds up. Here the adapter's product is accumulated into the base layer's
output by the matmul itself, ``dY·B`` is computed once for both ``dX`` and ``dA``, the rank-wide
``x·Aᵀ`` is kept rather than recomputed, and the gradient of the input is one tensor into which
every product is accumulated. A quantized weight's only copy of full precision lives while a product
runs.

Three ops, which rules match one by one, are entries of one autograd function: ``lora_linear`` (one
layer with an adapter), ``quant_linear`` (one without, over a quantized weight) and ``qkv_block``
(several on one input).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..captured import capturable, mark_frozen
from ..matmul import through_fp32
from ..op import Maker, Op, loses_precision, on_several_devices
from ..second_order import absent, differentiable, gradients, require_saved
from .products import Rows, on_cpu, shaped
from .projections import (
    MIXED,
    WIDTH,
    Constants,
    Grads,
    Linear,
    backward,
    forward,
    linears,
    narrow_copy_for,
    rows_of,
    through_a,
    unflattened,
    wanted,
    with_operands,
)
from .quantized import FORMATS, Quantized, dequantize_reference, example_of_quantized

KEEPS = ("all", "input")
"""What may be kept for backward: the input and the rank-wide products, or the input alone."""


# -- reference -------------------------------------------------------------------------------------
def reference(x: Tensor, linear: Linear) -> Tensor:
    """One linear, cast for cast as in PEFT's layers and bitsandbytes'.

    x and a quantized weight are rounded to ``compute`` before they are used; the adapter runs in
    its own dtype.
    """
    weight, bias, lora_a, lora_b, scale, lora_bias, x_lora, compute, dtype = linear
    if isinstance(weight, Tensor):
        result = F.linear(x.to(weight.dtype), weight, bias)
    else:
        low = x.to(compute or x.dtype)
        result = F.linear(low, dequantize_reference(Quantized(*weight), low.dtype), bias)
    result = result if dtype is None else result.to(dtype)
    if lora_b is None:
        return result
    z = (x if x_lora is None else x_lora).to(lora_b.dtype)
    h = z if lora_a is None else F.linear(z, lora_a)
    adapter = F.linear(h, lora_b, lora_bias) * scale
    return (result + adapter).to(result.dtype)


def quant_linear_reference(
    x: Tensor, weight: Quantized, bias: Tensor | None = None, compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """A quantized linear without an adapter."""
    return reference(x, Linear(weight, bias, compute=compute, dtype=dtype))


def qkv_block_reference(
    x: Tensor, layers: Sequence[Linear], keep: str = "all"
) -> tuple[Tensor, ...]:
    """Each linear by itself."""
    return tuple(reference(x, linear) for linear in layers)


# -- cpu and triton --------------------------------------------------------------------------------
# ``projections``: matmuls of the libraries and the kernels of ``lora_linear_triton``; over
# quantized weights those of ``quant_linear_triton``.


# -- autograd --------------------------------------------------------------------------------------
def _saved(ctx: Any, absent: Callable[..., Tensor]) -> tuple[Any, list[Any], list[Any]]:
    """x, the rank-wide products and the tensors of ``flat``, as far as forward has kept them.

    ``absent`` (shape, dtype) makes what takes the place of others: only their dtypes count.
    """
    x, *saved = ctx.saved_tensors  # once: a checkpoint does not give them a second time
    count = len(ctx.constants[0])
    tensors = saved[count:]
    for i, shape, dtype in ctx.unsaved:
        tensors[i] = absent(shape, dtype)
    return x, saved[:count], tensors


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    like, constants = next(g for g in grads if g is not None), Constants(*ctx.constants)
    x, _, tensors = _saved(ctx, lambda shape, dtype: absent(shape, like, dtype))
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
    for i, need in enumerate(wanted(needed[1:], len(constants.scales))):
        z = WIDTH * i + _X_LORA
        is_kept = x is not None if tensors[z] is None else all(j != z for j, _, _ in ctx.unsaved)
        require_saved(is_kept or not need.lora_b, ctx.name, "B is trained and A is not")

    def formula(x: Tensor, *tensors: Any) -> list[Tensor]:
        return [rows_of(reference(x, layer)) for layer in unflattened(tensors, constants)]

    shape, dtype, read_dtype = ctx.like
    inputs = absent(shape, like, read_dtype) if x is None else x, *tensors
    dx, *rest = gradients(formula, inputs, needed, grads)
    return dx if dx is None else dx.to(dtype), None, None, None, None, *rest


_BIAS, _LORA_BIAS, _X_LORA = (Grads._fields.index(name) for name in ("bias", "lora_bias", "x_lora"))


@capturable
class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, copy: Tensor | None, constants: tuple[Any, ...], keep: str, name: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # ``copy`` is x in another dtype, or None: ``products.narrow_copy``.
        ctx.set_materialize_grads(False)
        source = x if copy is None else copy
        rows, layers = Rows(rows_of(source)), linears(tensors, constants)
        outs, hs = forward(rows, layers)
        need_x, needs = ctx.needs_input_grad[0], wanted(ctx.needs_input_grad[5:], len(layers))
        recompute = keep == "input" and any([need.lora_b for need in needs])
        keeps_x, saved_hs, saved, unsaved = False, [], list(tensors), []
        for i, (layer, need, h) in enumerate(zip(layers, needs, hs, strict=True)):
            keeps_z = need.lora_a or (need.lora_b and (recompute or layer.lora_a is None))
            keeps_x = keeps_x or need.weight or (keeps_z and layer.x_lora is None)
            saved_hs.append(h if need.lora_b and not recompute else None)
            dispensable = [(_BIAS, layer.bias), (_LORA_BIAS, layer.lora_bias)]
            if not need_x and isinstance(layer.weight, Tensor):
                dispensable.append((0, layer.weight))
            if not keeps_z:
                dispensable.append((_X_LORA, layer.x_lora))
            for slot, t in dispensable:
                if t is not None:
                    saved[WIDTH * i + slot] = None
                    unsaved.append((WIDTH * i + slot, t.shape, t.dtype))
        ctx.save_for_backward(source if keeps_x else None, *saved_hs, *saved)
        ctx.constants, ctx.name, ctx.unsaved = constants, name, unsaved
        ctx.like, ctx.recompute = (x.shape, x.dtype, source.dtype), recompute
        mark_frozen(ctx, outs, (not need_x and not any(need) for need in needs))
        # rows: a view made in here could not be written to in place by the model
        return tuple(outs)

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        def absent(shape: Any, dtype: torch.dtype) -> Tensor:
            like = next(g for g in grads if g is not None)
            return like.new_empty((), dtype=dtype).expand(shape)

        source, hs, tensors = _saved(ctx, absent)
        rows = None if source is None else Rows(rows_of(source))
        layers = linears(tensors, ctx.constants)
        if ctx.recompute:
            hs = through_a(rows, layers)
        shape, dtype, _ = ctx.like
        need_x, needs = ctx.needs_input_grad[0], wanted(ctx.needs_input_grad[5:], len(layers))
        one = len(layers) == 1  # whose gradient of x is a sum of two: they are rounded as eager's
        dx, layer_grads = backward(rows, layers, hs, grads, need_x, needs, dtype, one)
        dx = dx if dx is None else dx.view(shape)
        # the other halves of quantized weights
        rest = [None] * (len(tensors) - WIDTH * len(layers))
        return dx, None, None, None, None, *[g for each in layer_grads for g in each], *rest


def _apply(x: Tensor, layers: Sequence[Linear], keep: str, name: str) -> tuple[Tensor, ...]:
    def run(tensors: list[Tensor | None], constants: Constants) -> tuple[Tensor, ...]:
        copy = narrow_copy_for(x, tensors, constants, len(layers))
        options = tuple(constants), keep, name
        outs = _Linears.apply(x, copy, *options, *tensors)  # type: ignore[no-untyped-call]
        return tuple([shaped(out, x) for out in outs])

    return with_operands(run, layers, x)


def _is_plain_sum(x: Tensor, linear: Linear) -> bool:
    # Whether two products of one dtype are all: PyTorch's own derivative keeps no more than ours
    # would, and calls less (0.1 to 0.2 ms a layer, 5% of one with 512 rows and features).
    b, z = linear.lora_b, linear.x_lora
    if linear.lora_a is not None or linear.lora_bias is not None or b is None or z is None:
        return False
    if not on_cpu(x) or through_fp32(x) or torch.is_autocast_enabled("cpu"):
        return False
    others = (linear.weight, b, z, *(t for t in (linear.bias,) if t is not None))
    same = all(isinstance(t, Tensor) and t.dtype is x.dtype for t in others)
    return same and linear.dtype in (None, x.dtype)


def lora_linear(x: Tensor, linear: Linear) -> Tensor:
    """Compute ``x·Wᵀ + bias + scale·(z·Aᵀ·Bᵀ + lora_bias)``, z being ``linear.x_lora`` or x.

    Without A it is ``scale·(z·Bᵀ + lora_bias)``: z (..., r) is what some other formula made of x.

    Adapters may have another dtype than the base (fp32 over bf16 is PEFT's default): their
    gradients are then computed in that dtype, while the base's product runs in the weight's, and
    that with a quantized weight, which is frozen, in ``linear.compute``. Under autocast every
    operand is cast first, as autocast casts a linear layer's; over quantized weights the adapter's
    alone. The gradients of x are summed in x's dtype. Backward may run more than once over a
    retained graph.

    x (..., in) is cast to the weight's dtype, and to the adapter's; ``x_lora`` (..., in), the
    adapter's input (x after dropout), may have any floating dtype. The result (..., out) is in
    ``linear.dtype``, or else in the product's. Raises RuntimeError if shapes do not fit.
    """
    if _is_plain_sum(x, linear):
        weight, bias, _, b, scale, _, z, *_ = linear
        rows = F.linear(rows_of(x), weight, bias)  # type: ignore[arg-type]
        return shaped(rows.addmm_(rows_of(z), b.t(), alpha=scale), x)  # type: ignore[arg-type,union-attr]
    return _apply(x, (linear,), "all", "lora_linear")[0]


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
    retained graph. Raises RuntimeError if shapes do not fit.
    """
    linear = Linear(weight, bias, compute=compute, dtype=dtype)
    return _apply(x, (linear,), "all", "quant_linear")[0]


def qkv_block(x: Tensor, layers: Sequence[Linear], keep: str = "all") -> tuple[Tensor, ...]:
    """The outputs (..., outᵢ) of several linears on x (..., in), each as of ``lora_linear``.

    Args:
        x: (..., in).
        layers: the linears (outᵢ, in), all quantized or none, of one ``compute`` and one ``dtype``.
        keep: ``"all"`` keeps x and the rank-wide ``x·Aᵢᵀ`` for backward, ``"input"`` x alone.

    Raises:
        ValueError: an unknown ``keep``, or linears that differ in what they must have in common.
        RuntimeError: the shapes do not fit.
    """
    if keep not in KEEPS:
        raise ValueError(f"keep is {keep!r}, not one of {', '.join(KEEPS)}")
    return _apply(x, [linear.with_one_bias() for linear in layers], keep, "qkv_block")


# -- OP --------------------------------------------------------------------------------------------
def unsupported(x: Tensor, linear: Linear) -> list[str]:
    """Why the ops cannot take this linear on ``x``."""
    weight, bias, lora_a, lora_b, _, lora_bias, x_lora, compute, dtype = linear
    no_input = lora_a is None and x_lora is None
    parts = (lora_a, lora_bias, x_lora) if lora_b is None else (None,)
    if any(t is not None for t in parts) or (lora_b is not None and no_input):
        return ["a part of the adapter is missing"]
    operands: tuple[Tensor | None, ...] = (x, bias, lora_a, lora_b, lora_bias, x_lora)
    low, reasons = compute or x.dtype, []
    stored: tuple[Tensor | None, ...] = ()
    if isinstance(weight, Tensor):
        low, stored, operands = weight.dtype, (weight,), (*operands, weight)
    else:
        w = Quantized(*weight)
        if w.kind not in FORMATS:
            return [f"the weight is of kind {w.kind}"]
        stored = w.tensors
        reasons += FORMATS[w.kind].misfits(w)
        if bias is not None and bias.dtype != low:
            reasons.append(f"the bias is {bias.dtype}, the input {low}")
    matrices = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    wrong = {n: t.ndim for n, t in matrices.items() if isinstance(t, Tensor) and t.ndim != 2}
    reasons += [f"{name} has {count} dimensions instead of 2" for name, count in wrong.items()]
    if any(t is not None and not t.is_floating_point() for t in operands):
        reasons.append("an operand is not of a floating-point dtype (a quantized weight?)")
    reasons += loses_precision(dtype, low, "the product")
    if lora_a is not None and lora_b is not None and lora_a.dtype != lora_b.dtype:
        reasons.append(f"A is {lora_a.dtype}, B is {lora_b.dtype}")
    reasons += on_several_devices(*operands, *stored)
    return reasons or _unfit_shapes(x, linear)


def _unfit_shapes(x: Tensor, linear: Linear) -> list[str]:
    (out, into), a, b, z = linear.shape(), linear.lora_a, linear.lora_b, linear.x_lora
    if x.shape[-1] != into:
        return [f"x has {x.shape[-1]} features, the weight {into}"]
    read = into if a is not None or b is None else b.shape[1]
    if z is not None and z.shape != (*x.shape[:-1], read):
        return [f"the adapter's input is {tuple(z.shape)}, x {tuple(x.shape)}"]
    if a is None and b is not None and b.shape[0] != out:
        return [f"B is {tuple(b.shape)}, the weight {(out, into)}"]
    if a is None or b is None or (a.shape, b.shape[0]) == ((b.shape[1], into), out):
        return []
    shapes = f"W {(out, into)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
    return [f"the shapes do not chain: x {tuple(x.shape)}, {shapes}"]


def _quant_linear_unsupported(
    x: Tensor, weight: Quantized, bias: Tensor | None = None, compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:  # fmt: skip
    return unsupported(x, Linear(weight, bias, compute=compute, dtype=dtype))


def qkv_block_unsupported(x: Tensor, layers: Sequence[Linear], keep: str = "all") -> list[str]:
    """Why ``qkv_block`` cannot take these arguments."""
    reasons = [] if keep in KEEPS else [f"keep is {keep!r}, not one of {', '.join(KEEPS)}"]
    if len({linear.is_quantized() for linear in layers}) > 1:
        reasons.append(MIXED)
    for i, linear in enumerate(layers):
        reasons += [f"linear {i}: {reason}" for reason in unsupported(x, linear)]
    return reasons


def example_of_linear(
    m: Maker, out: int, into: int, quantized: bool = False, bias: bool = False, lora: bool = True
) -> Linear:
    """A linear layer (out, in) for examples."""
    weight = example_of_quantized(m, out, into) if quantized else m.weight(out, into)
    base_bias = m.weight(out, mean=0.0) if bias else None
    if not lora:
        return Linear(weight, base_bias)
    a, b = m.adapter(m.sizes.rank, into), m.adapter(out, m.sizes.rank)
    return Linear(weight, base_bias, a, b, 2.0)


def _example(m: Maker, quantized: bool = False) -> tuple[Any, ...]:
    return m.x(m.sizes.hidden), example_of_linear(m, m.sizes.inner, m.sizes.hidden, quantized)


def _example_with_dropout(m: Maker, quantized: bool = False) -> tuple[Any, ...]:
    linear = example_of_linear(m, m.sizes.inner, m.sizes.hidden, quantized, bias=True)
    lora_bias, x = m.adapter(m.sizes.inner), m.x(m.sizes.hidden)
    return x, linear._replace(lora_bias=lora_bias, x_lora=m.x(m.sizes.hidden))


def _example_without_a(m: Maker, quantized: bool = False, bias: bool = True) -> tuple[Any, ...]:
    x, linear = _example_with_dropout(m, quantized)
    h = m.x(m.sizes.rank).detach().to(m.adapters).requires_grad_()
    linear = linear if bias else linear._replace(lora_bias=None)
    return x, linear._replace(lora_a=None, x_lora=h)


def _example_of_format(m: Maker, kind: str, bias: bool = True) -> tuple[Any, ...]:
    weight = example_of_quantized(m, m.sizes.inner, m.sizes.hidden, kind)
    return m.x(m.sizes.hidden), weight, m.weight(m.sizes.inner, mean=0.0) if bias else None


def _example_of_several(m: Maker, keep: str = "all", **kind: bool) -> tuple[Any, ...]:
    counts, s = (m.sizes.heads, m.sizes.kv_heads, m.sizes.kv_heads), m.sizes
    layers = [example_of_linear(m, n * s.head_dim, s.hidden, **kind) for n in counts]
    return m.x(s.hidden), layers, keep


LORA_LINEAR = Op(
    "lora_linear",
    reference,
    lora_linear,
    unsupported,
    example=_example,
    variants={
        "dropout": _example_with_dropout,
        "quantized": lambda m: _example(m, quantized=True),
        "quantized-dropout": lambda m: _example_with_dropout(m, quantized=True),
        "narrow": _example_without_a,
        "narrow-plain": lambda m: _example_without_a(m, bias=False),
        "quantized-narrow": lambda m: _example_without_a(m, quantized=True),
    },
)
QUANT_LINEAR = Op(
    "quant_linear",
    quant_linear_reference,
    quant_linear,
    _quant_linear_unsupported,
    example=lambda m: _example_of_format(m, "nf4", bias=False),
    variants={
        kind: functools.partial(_example_of_format, kind=kind) for kind in FORMATS if kind != "nf4"
    },
)
QKV_BLOCK = Op(
    "qkv_block",
    qkv_block_reference,
    qkv_block,
    qkv_block_unsupported,
    example=_example_of_several,
    variants={
        "input": lambda m: _example_of_several(m, "input", bias=True),
        "plain": lambda m: _example_of_several(m, lora=False, bias=True),
        "quantized": lambda m: _example_of_several(m, quantized=True),
    },
)
