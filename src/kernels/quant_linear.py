"""A linear layer whose frozen weight is quantized: ``y = x·dequantize(W)ᵀ + b``.

Its only copy of full precision lives while a product runs, in forward and again in backward, one
layer at a time (``mlp_block`` in tiles: all of its layers, while the op runs). The product is one
opaque op, so that no compiler finds the copy worth keeping. The same op adds the low-rank product
of an adapter (``quant_lora_linear.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from .launch import LIBRARY, library_op, use_triton
from .op import Cost, Op
from .products import accumulated, rank_update
from .quantized import VALUES, Quantized, dequantize, dequantize_reference
from .second import absent, differentiable, gradients

# ------------------------------------------------------------------------------------- reference


def reference(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """As ``bitsandbytes.matmul_4bit``: the weight is rounded to x's dtype before it is used."""
    return linear(x, dequantize_reference(Quantized(*weight), x.dtype), bias)


# ------------------------------------------------------------------------------------------- cpu


def _product(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, transposed: bool, bias: Tensor | None, left: Tensor | None, right: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = Quantized(
        packed, absmax, (out, into), blocksize, kind, absmax_8bit, absmax_code, absmax_offset
    )
    triton = use_triton(x, absmax)
    if triton and not transposed and _is_for_few(x, w):
        base: Tensor = _few(x, *w[:2], *w[5:], *w.shape, blocksize, kind, bias)
    else:
        matrix = dequantize(w, x.dtype)
        matrix = matrix if transposed else matrix.t()
        if left is not None and right is not None and x.dtype is dtype and not triton:
            return accumulated(bias, [x, left], [matrix, right])
        base = torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
    base = base.to(dtype)
    if left is None or right is None:
        return base
    if triton:
        updated: Tensor = rank_update(base, left, right)
        return updated
    return base.addmm_(left.to(dtype), right.to(dtype).contiguous())


def _product_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, transposed: bool, bias: Tensor | None, left: Tensor | None, right: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], into if transposed else out, dtype=dtype)


# 2026-11-25: torch.library is not typed
LIBRARY.define(  # type: ignore[no-untyped-call]
    "quant_product(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_8bit,"
    " Tensor? absmax_code, Tensor? absmax_offset, int out, int into, int blocksize, str kind,"
    " bool transposed, Tensor? bias, Tensor? left, Tensor? right, ScalarType dtype) -> Tensor"
)
LIBRARY.impl("quant_product", _product, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fusewright::quant_product", _product_fake, lib=LIBRARY)


def product(
    x: Tensor,
    w: Quantized,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x·Wᵀ + bias + left·right``, or with x·W, in ``dtype`` (default: x's); no autograd.

    Args:
        x: (N, in), or (N, out) if ``transposed``; its dtype is the one that W is rounded to.
        w: the weight (out, in).
        transposed: multiply with W instead of its transpose.
        bias: (out,) in x's dtype, or None.
        left: (N, r), or None.
        right: (r, out), or (r, in) if ``transposed``.
        dtype: of the result and the sum.
    """
    result: Tensor = torch.ops.fusewright.quant_product.default(
        x, *w[:2], *w[5:], *w.shape, w.blocksize, w.kind, transposed, bias, left, right,
        dtype or x.dtype,
    )  # fmt: skip
    return result


def _sum(
    xs: list[Tensor], weights: list[Tensor | None], sizes: list[int], kinds: list[str],
    lefts: list[Tensor], rights: list[Tensor],
) -> Tensor:  # fmt: skip
    total: Any = None
    for i, (x, kind) in enumerate(zip(xs, kinds, strict=True)):
        out, into, blocksize = sizes[3 * i : 3 * i + 3]
        own = weights[5 * i : 5 * i + 5]
        matrix = dequantize(join(((out, into), blocksize, kind), tuple(own)), x.dtype)
        total = torch.mm(x, matrix) if total is None else total.addmm_(x, matrix)
        del matrix  # before the next one is made
    for left, right in zip(lefts, rights, strict=True):
        if use_triton(total, left, right):
            total = rank_update(total, left, right)
        else:
            total.addmm_(left.to(total.dtype), right.to(total.dtype).contiguous())
    return cast(Tensor, total)


def _sum_fake(
    xs: list[Tensor], weights: list[Tensor | None], sizes: list[int], kinds: list[str],
    lefts: list[Tensor], rights: list[Tensor],
) -> Tensor:  # fmt: skip
    return xs[0].new_empty(xs[0].shape[0], sizes[1])


LIBRARY.define(  # type: ignore[no-untyped-call]
    "quant_sum_of_products(Tensor[] xs, Tensor?[] weights, int[] sizes, str[] kinds,"
    " Tensor[] lefts, Tensor[] rights) -> Tensor"
)
LIBRARY.impl("quant_sum_of_products", _sum, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fusewright::quant_sum_of_products", _sum_fake, lib=LIBRARY)


def sum_of_quantized(
    pairs: Sequence[tuple[Tensor, Quantized]], updates: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """``Σ xᵢ·Wᵢ + Σ leftⱼ·rightⱼ`` (N, in) in x's dtype, each added to those before; no autograd.

    Args:
        pairs: xᵢ (N, outᵢ) and the weight (outᵢ, in); one at least.
        updates: (N, r) and (r, in) each.
    """
    halves = [split(w) for _, w in pairs]
    result: Tensor = torch.ops.fusewright.quant_sum_of_products.default(
        [x for x, _ in pairs],
        [t for _, tensors in halves for t in tensors],
        [n for (shape, blocksize, _), _ in halves for n in (*shape, blocksize)],
        [kind for (_, _, kind), _ in halves],
        [left for left, _ in updates],
        [right for _, right in updates],
    )
    return result


# ---------------------------------------------------------------------------------------- triton

_FEW = 16
"""Rows of x up to which dequantizing inside the product is the cheaper way."""


def _is_for_few(x: Tensor, w: Quantized) -> bool:
    return x.shape[0] <= _FEW and w.kind != "int8" and w.shape[1] % w.blocksize == 0


def _few_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out)


_few = library_op(
    "quant_linear_few(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_8bit,"
    " Tensor? absmax_code, Tensor? absmax_offset, int out, int into, int blocksize, str kind,"
    " Tensor? bias) -> Tensor",
    "quant_linear:few",
    _few_fake,
)


# -------------------------------------------------------------------------------------- autograd


def _again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    w = join(ctx.fixed, ctx.saved_tensors)
    bias = None if ctx.bias_dtype is None else absent(w.shape[:1], grad)

    def formula(x: Tensor, bias: Tensor | None) -> Tensor:
        return reference(x, w, bias).reshape(grad.shape)

    return gradients(formula, (absent(ctx.shape, grad), bias), ctx.needs_input_grad, (grad,))


class _QuantLinear(torch.autograd.Function):
    """Keeps nothing but the packed weight, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, fixed: Any, *tensors: Any) -> Tensor:
        """``fixed`` and ``tensors`` are the two halves of the weight (``split``)."""
        ctx.save_for_backward(*tensors)
        ctx.fixed, ctx.shape = fixed, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x.reshape(-1, x.shape[-1]), join(fixed, tensors), bias=bias)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Dequantize once more for dX."""
        dx = dbias = None
        tensors = ctx.saved_tensors  # once: a checkpoint does not give them a second time
        if ctx.needs_input_grad[0]:
            dx = product(grad, join(ctx.fixed, tensors), transposed=True).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dbias = grad.sum(0, dtype=ctx.bias_dtype)
        return dx, dbias, None, *(None for _ in tensors)


def split(w: Quantized) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The constants of a weight, and its tensors."""
    return w[2:5], (*w[:2], *w[5:])


def join(fixed: tuple[Any, ...], tensors: tuple[Any, ...]) -> Quantized:
    """The weight again."""
    return Quantized(*tensors[:2], *fixed, *tensors[2:])


def quant_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """Compute ``x·dequantize(W)ᵀ + bias`` with a frozen W.

    W is rounded to x's dtype; autocast does not change that. Backward may run more than once over
    a retained graph.

    Args:
        x: (..., in), of any floating-point dtype.
        weight: (out, in), a ``Quantized`` or a tuple of its fields.
        bias: (out,) in x's dtype, or None.

    Returns:
        (..., out), in x's dtype.

    Raises:
        RuntimeError: the shapes do not fit, or x and ``bias`` differ in dtype.
    """
    w = Quantized(*weight)
    fixed, tensors = split(w)
    with torch.autocast(x.device.type, enabled=False):
        rows: Tensor = _QuantLinear.apply(x, bias, fixed, *tensors)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], w.shape[0])


# ------------------------------------------------------------------------------------ cost and OP


def cost(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Cost:
    """Bytes and FLOPs of one call; the arguments are those of ``quant_linear``."""
    w = Quantized(*weight)
    (out, into), rows = w.shape, x.numel() // x.shape[-1]
    return Cost(
        bytes_read=x.nbytes + w.nbytes() + (0 if bias is None else bias.nbytes),
        bytes_written=rows * out * x.element_size(),
        flops=2 * rows * out * into,
        bytes_saved=0,
    )


def unsupported(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> list[str]:
    """Say why the op cannot take these arguments, which are those of ``quant_linear``."""
    w = Quantized(*weight)
    (out, into), reasons = w.shape, []
    if w.kind not in (*VALUES, "int8"):
        return [f"the weight is of kind {w.kind}"]
    if not x.is_floating_point():
        reasons.append(f"x is {x.dtype}, not floating-point")
    if x.shape[-1] != into:
        reasons.append(f"x has {x.shape[-1]} features, the weight {into}")
    if bias is not None and bias.dtype != x.dtype:
        reasons.append(f"the bias is {bias.dtype}, the input {x.dtype}")
    bits = w.packed.numel() * w.packed.element_size() * 8
    if bits < out * into * (8 if w.kind == "int8" else 4):
        reasons.append(f"{bits} bits are too few for {out} x {into} values")
    if (w.absmax_8bit is None) != (w.absmax_offset is None):
        reasons.append("the scales of scales are not complete")
    if len({t.device for t in (x, bias, *w) if isinstance(t, Tensor)}) > 1:
        reasons.append("the operands are on several devices")
    return reasons


OP = Op("quant_linear", reference, quant_linear, cost, unsupported)
