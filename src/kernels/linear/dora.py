"""The ops of weight-decomposed adapters (Liu et al., "DoRA", 2024), besides the LoRA linear.

    y = factor ⊙ (x·Wᵀ + scale·(x·Aᵀ)·Bᵀ) + b,   factor = magnitude / ‖W + scale·B·A‖

The norm is one number per output, and a constant for backward, as in PEFT. PEFT makes the whole of
``B·A`` for it from an identity matrix, and then the whole sum; here a tile of rows at a time. It
keeps both products of an output's size for the gradient of the magnitude; here their sum.

Two ops: ``row_norms``, and ``rescaled``, which combines the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..captured import capturable
from ..launch import library_op
from ..op import Maker, Op
from ..second_order import absent, differentiable, gradients, require_saved
from .linear import example_of_linear


# -- reference -------------------------------------------------------------------------------------
def row_norms_reference(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """PEFT's formula, cast for cast: the update in the adapter's dtype, the sum in ``dtype``."""
    update = torch.mm(lora_b.detach(), lora_a.detach()).to(dtype)
    norms: Tensor = torch.linalg.norm(weight.detach().to(dtype) + scale * update, dim=1)
    return norms


def rescaled_reference(
    base: Tensor, factor: Tensor, rest: Tensor | None = None, update: Tensor | None = None,
    scale: float = 1.0, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """PEFT's formula: with an update the factor's excess over one goes onto the base."""
    total = factor * base if update is None else (factor - 1) * base + factor * update * scale
    return (total if rest is None else rest + total).to(dtype or base.dtype)


# -- cpu -------------------------------------------------------------------------------------------
_TILE = 8 << 20
"""Bytes of a tile; 16 times as many on a GPU, where a launch takes as long as reading them."""


def _row_norms(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    a, b = lora_a.to(wide), lora_b.to(wide)
    most = (_TILE if weight.device.type == "cpu" else 16 * _TILE) // wide.itemsize
    rows = max(1, most // max(1, weight.shape[1]))
    norms = [
        torch.linalg.vector_norm(torch.addmm(w.to(wide), part, a, alpha=scale), dim=1)
        for w, part in zip(weight.split(rows), b.split(rows), strict=True)
    ]
    return torch.cat(norms).to(dtype)


def _row_norms_fake(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=dtype)


# Opaque, so that a tracer does not unroll the tiles.
_row_norms_op = library_op(
    "dora_row_norms(Tensor weight, Tensor lora_a, Tensor lora_b, float scale, ScalarType dtype)"
    " -> Tensor",
    _row_norms,
    _row_norms_fake,
    lambda weight, lora_a, *_: 2 * weight.numel() * (lora_a.shape[0] + 2),
)


def row_norms(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """``‖W + scale·B·A‖`` (out,) of each row of W (out, in), with A (r, in) and B (out, r).

    Without a gradient. A ``dtype`` narrower than fp32 is rounded to at the end.
    """
    with torch.autocast(weight.device.type, enabled=False):
        tensors = weight.detach(), lora_a.detach(), lora_b.detach()
        result: Tensor = _row_norms_op(*tensors, scale, dtype)
    return result


# -- triton ----------------------------------------------------------------------------------------
# None: both are bound by memory, and the products before them have separate kernels.


# -- autograd --------------------------------------------------------------------------------------
def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    base, factor = ctx.saved_tensors
    shape, kind, rest_kind, update_kind = ctx.like
    needed = ctx.needs_input_grad
    require_saved(update_kind is None, "dora", "only the sum of two products is kept")
    require_saved(base is not None or not needed[0], "dora", "the magnitude is not trained")
    base = absent(shape, factor, kind) if base is None else base
    rest = None if rest_kind is None else absent(factor.shape, factor, rest_kind)

    def formula(base: Any, factor: Any, rest: Any) -> Tensor:
        return rescaled_reference(base, factor, rest, dtype=grad.dtype)

    return (*gradients(formula, (base, factor, rest), needed[:3], (grad,)), None, None, None)


@capturable
class _Rescaled(torch.autograd.Function):
    """Keeps the base, or its sum with the update, where the factor's gradient is needed."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, factor: Tensor, rest: Tensor | None, update: Tensor | None,
        scale: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        total = None
        if ctx.needs_input_grad[1]:
            total = base if update is None else base + update * scale
        ctx.save_for_backward(total, factor)
        kinds = (None if t is None else t.dtype for t in (rest, update))
        ctx.like, ctx.scale = (base.shape, base.dtype, *kinds), scale
        return rescaled_reference(base, factor, rest, update, scale, dtype)

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        total, factor = ctx.saved_tensors
        _, kind, rest_kind, update_kind = ctx.like
        w_base, w_factor, w_rest, w_update, *_ = ctx.needs_input_grad
        dbase = dfactor = drest = dupdate = None
        if w_base:
            dbase = (dy * (factor if update_kind is None else factor - 1)).to(kind)
        if w_factor:
            dfactor = (dy.to(factor.dtype) * total).flatten(0, -2).sum(0)
        if w_rest and update_kind is None:  # a bias
            drest = dy.flatten(0, -2).sum(0, dtype=rest_kind)
        elif w_rest:
            drest = dy.to(rest_kind)
        if w_update:
            dupdate = (dy * (factor * ctx.scale)).to(update_kind)  # no rounded result is scaled
        return dbase, dfactor, drest, dupdate, None, None


def rescaled(
    base: Tensor, factor: Tensor, rest: Tensor | None = None, update: Tensor | None = None,
    scale: float = 1.0, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Compute ``rest + factor·base``, or ``rest + (factor - 1)·base + factor·scale·update``.

    ``base`` and ``update`` are (..., out), of at least two dimensions; ``factor`` (out,) is at
    least as wide as ``base``. ``rest`` is a bias (out,), or with an update the base layer's output
    (..., out). The result (..., out) is in ``dtype``, by default ``base``'s.
    """
    with torch.autocast(base.device.type, enabled=False):
        result: Tensor = _Rescaled.apply(  # type: ignore[no-untyped-call]
            base, factor, rest, update, scale, dtype or base.dtype
        )
    return result


# -- OP --------------------------------------------------------------------------------------------
def row_norms_unsupported(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> list[str]:
    """Why ``row_norms`` cannot take these arguments."""
    fits = weight.ndim == 2 and (*lora_b.shape[:1], *lora_a.shape[1:]) == tuple(weight.shape)
    return [] if fits else [f"B·A does not fit the weight's {tuple(weight.shape)}"]


def rescaled_unsupported(
    base: Tensor, factor: Tensor, rest: Tensor | None = None, update: Tensor | None = None,
    scale: float = 1.0, dtype: torch.dtype | None = None,
) -> list[str]:  # fmt: skip
    """Why ``rescaled`` cannot take these arguments."""
    reasons = []
    if base.ndim < 2 or factor.shape != base.shape[-1:]:
        reasons.append(f"a factor of {tuple(factor.shape)} for {tuple(base.shape)}")
    if torch.promote_types(base.dtype, factor.dtype) is not factor.dtype:
        reasons.append(f"the factor is {factor.dtype}, narrower than {base.dtype}")
    return reasons


def _example_of_norms(m: Maker) -> tuple[Any, ...]:
    linear = example_of_linear(m, m.sizes.inner, m.sizes.hidden)
    weight, a, b = (t.detach() for t in (linear.weight, linear.lora_a, linear.lora_b))  # type: ignore[union-attr]
    return weight, a, b, linear.scale, m.dtype


def _example(m: Maker) -> tuple[Any, ...]:
    return m.x(m.sizes.inner), m.adapter(m.sizes.inner)


def _example_with_update(m: Maker) -> tuple[Any, ...]:
    base, factor = _example(m)
    update = m.x(m.sizes.inner).detach().to(m.adapters).requires_grad_()
    return base, factor, m.x(m.sizes.inner), update, 2.0


NORMS = Op(
    "dora_row_norms",
    row_norms_reference,
    row_norms,
    row_norms_unsupported,
    rule="lora_linear",
    example=_example_of_norms,
)
OP = Op(
    "dora",
    rescaled_reference,
    rescaled,
    rescaled_unsupported,
    rule="lora_linear",
    example=_example,
    variants={
        "bias": lambda m: (*_example(m), m.weight(m.sizes.inner, mean=0.0)),
        "update": _example_with_update,
    },
)
