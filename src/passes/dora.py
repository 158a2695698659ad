"""LoRA linears whose outputs are rescaled by a learnt magnitude (Liu et al., "DoRA", 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import facts
from ..kernels.linear.projections import Linear
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match
from .quant_linear import OfLinears


class DoRALinear(OfLinears):
    """``factor * (W x + scale * B(A(x))) + b``, ``factor = magnitude / norm(W + scale * B A)``.

    PEFT writes it as ``y + (factor - 1) * (y - b) + factor * B(A(x)) * scale`` with the output y of
    the base layer; after dropout, with a second product of W in place of ``y - b``.
    """

    name = op = "lora_linear"
    inner_may_stay = True  # the cast of x that the adapters of one input share

    def patterns(
        self, p: Builder, x: Pattern, w: Pattern, bias: Pattern, a: Pattern, b: Pattern,
        scale: Pattern, magnitude: Pattern, dropped: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """The norm is made of the whole of B·A, which is made from an identity matrix."""
        # GPT-2 keeps the transposed weight and multiplies rows: ``Conv1D``
        columns = p.var("columns", lambda v: isinstance(v, fx.Node))
        rows = p.capture("product", p.addmm(bias, p.reshape(x, p.anything), columns))
        eye = p.eye(*[p.anything] * 6)
        whole = p.detach(p.maybe_cast(p.transpose(p.linear(p.linear(eye, a), b), -2, -1)))
        # a quantized weight is dequantized for the norm
        packed = p.capture("product", p.quant_linear(x, w, bias, p.var("compute"), p.anything))
        stored = p.either(p.clone(p.maybe_cast(packed), p.anything), p.maybe_cast(packed))
        dense = p.var("dense", lambda v: isinstance(v, fx.Node))
        for matrix in (w, columns, dense):
            row_wise = matrix is not columns
            wide = p.maybe_cast(matrix)
            weight, again = (wide if row_wise else p.transpose(wide, -2, -1) for _ in range(2))
            norm = p.capture("norm", p.linalg_norm(weight + whole * scale, p.anything, 1))
            factor = p.reshape(magnitude / p.detach(p.maybe_cast(norm)), p.anything)
            plain = p.capture("product", p.linear(x, w, bias))
            conv = p.reshape(rows, p.anything)
            base: Pattern = plain if matrix is w else stored if row_wise else conv
            narrow = p.linear(p.linear(p.maybe_cast(x), a), b)
            excess = factor - 1
            kinds = [("bias", base, base - bias, narrow)]
            kinds += [("plain", base, base, narrow)] if row_wise else []
            other = p.linear(p.linear(dropped, a), b)
            kinds += [("dropout", base, p.linear(dropped, again), other)]
            for spelling, y, inner, update in kinds:
                yield spelling, p.maybe_cast(y + (excess * inner + factor * update * scale))

    def check(self, m: Match) -> None:
        """A constant scale, matrices, a result in the product's dtype, nothing used outside."""
        self.require_alone(m)
        m.require(isinstance(m.scale, (int, float)), "the scale is not a constant", m.scale)
        x, result, magnitude = (facts.tensor(n) for n in (m.x, m.root, m.magnitude))
        m.pass_over(m.spelling == "plain" and m.bias is not None)
        weight = facts.tensor(m.get("dense", m.get("columns", m.get("w"))))
        if x is None or result is None or magnitude is None or weight is None:
            m.require(False, "an operand is not a tensor")
            return
        m.require(weight.dim() == 2, "the weight is not a matrix", m.root)
        product, norm = facts.dtype(m.product), facts.dtype(m.norm)
        same = result.dtype is product
        m.require(same, f"returns {result.dtype} from a product in {product}", m.root)
        wide = product is not None and norm is not None
        wide = wide and torch.promote_types(product, norm) is norm  # type: ignore[arg-type]
        m.require(wide, f"a norm in {norm} for a product in {product}", m.norm)
        m.require(x.dim() > 1 and magnitude.dim() == 1, "the magnitude is no vector", m.root)
        m.require(tuple(facts.value(m.norm).shape) == tuple(magnitude.shape), "another norm")

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """A LoRA linear without bias and a rescaling; after dropout, a rescaling of its parts."""
        weight: Any = m.get("w") if m.get("columns") is None else ops.method("t", m.columns)
        scale, wide, kind = float(m.scale), facts.dtype(m.norm), facts.dtype(m.product)
        compute = m.get("compute") if isinstance(weight, tuple) else None
        norm = ops.dora_row_norms(m.get("dense", weight), m.a, m.b, scale, wide)
        factor = ops.call(torch.div, m.magnitude, norm)
        if m.spelling != "dropout":
            # the sum of both products is not rounded: it is to be multiplied
            sum_in = None if wide is kind else wide
            linear = Linear(weight, None, m.a, m.b, scale, compute=compute, dtype=sum_in)
            total = ops.lora_linear(m.x, linear)
            total.meta["example_value"] = facts.value(m.root).to(wide)
            return ops.dora(total, factor, m.get("bias"), None, 1.0, kind)
        if isinstance(weight, tuple):
            base = ops.quant_linear(m.x, weight, m.bias, compute, kind)
        else:
            base = ops.call(F.linear, m.x, weight, m.bias)
        # as wide as in eager: in the base's dtype the second product would cost precision
        cast_weight, dtype = m.get("dense", weight), facts.dtype(m.dropped)
        if facts.dtype(cast_weight) is not dtype:
            cast_weight = ops.cast(cast_weight, dtype)
        product = ops.call(F.linear, m.dropped, cast_weight)
        update = ops.call(F.linear, ops.call(F.linear, m.dropped, m.a), m.b)
        return ops.dora(product, factor, base, update, scale, kind)
