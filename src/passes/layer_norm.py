"""LayerNorm: PyTorch's own, and written by hand.

Ba, Kiros & Hinton, "Layer Normalization", 2016.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule
from .roots import is_row, is_variance, over_root, square, under_root


class LayerNorm(Rule):
    """``(x - mean) / std * w + b``, with both, one or none of the parameters."""

    name = op = "layer_norm"

    def patterns(self, p: Builder, x: Pattern, b: Pattern, eps: Pattern) -> Iterable[Any]:
        """PyTorch's, perhaps between casts (OLMo), or Cohere's formula, which has no bias."""
        w = p.var("w", lambda node: is_row(node, 2))
        wide = p.maybe_cast(w), p.maybe_cast(b), eps, p.anything
        yield "torch", p.cast(p.torch_layer_norm(p.cast(x), p.anything, *wide))
        yield "torch", p.cast(p.torch_layer_norm(p.cast(x), p.anything, None, None, *wide[2:]))
        yield "torch", p.torch_layer_norm(x, p.anything, p.var("w"), b, eps, p.anything)
        h = p.maybe_cast(x)
        var_mean = p.var_mean(h, -1, 0, keepdim=True)
        mean = p.either(p.mean(h, -1, keepdim=True), p.item(var_mean, 1))
        second_mean = p.either(p.mean(h, -1, keepdim=True), p.item(var_mean, 1))
        var = p.either(
            p.mean(square(p, h - second_mean), -1, keepdim=True),
            p.variance(h, -1, 0, keepdim=True),
            p.item(var_mean, 0),
        )
        n = over_root(p, h - mean, var + eps)
        shift = p.maybe_cast(p.var("b", lambda node: is_row(node, 2)))
        yield "formula", p.maybe_cast(p.maybe_cast(w) * n + shift)
        yield "formula", p.maybe_cast(p.maybe_cast(w) * n)
        yield "formula", p.maybe_cast(n)

    def check(self, m: Match) -> None:
        """Over the last dimension, parameters that fit it, a constant eps, one rounding."""
        m.require(isinstance(m.eps, (int, float)), "eps is not a constant", m.eps)
        m.require(facts.tensor(m.x) is not None, "x is not a tensor", m.x)
        if m.spelling == "torch":
            m.require(_dims(m) == 1, "normalises over more than the last dimension")
        w, b = facts.tensor(m.get("w")), facts.tensor(m.get("b"))
        for node, t in ((m.get("w"), w), (m.get("b"), b)):
            if t is None:
                continue
            m.require(1 <= t.dim() <= 2, "a parameter is neither (D,) nor (heads, D)", node)
            fits = all(facts.size(node, -d) == facts.size(m.x, -d) for d in range(1, t.dim() + 1))
            m.require(fits, "a parameter does not fit x", node)
        if w is not None and b is not None:
            m.require(w.shape == b.shape, "weight and bias have different shapes", m.b)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; a cast before or after it where the formula returns another dtype than x's."""
        x, example = m.x, facts.tensor(m.x)
        # PyTorch's result is contiguous whatever x is, and later views count on that
        if m.spelling == "torch" and example is not None and not example.is_contiguous():
            x = ops.method("contiguous", x)
        dtype, out = facts.dtype(m.x), facts.dtype(m.root)
        wide = torch.promote_types(dtype, out) if dtype and out else dtype
        result = ops.layer_norm(ops.as_dtype(x, wide), m.get("w"), m.get("b"), float(m.eps))
        return result if wide is out else ops.cast(result, out)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """PyTorch's own that is left, and a root of a variance that no spelling claimed."""
        for node in graph.nodes:
            canon, mean = canonical(node), under_root(node)
            if canon is not None and canon.name == "torch_layer_norm":
                yield node, "a layer norm"
            elif mean is not None and is_variance(mean):
                yield node, "a root of a variance that looks like a norm"


def _dims(m: Match) -> int:
    operations = (canonical(n) for n in m.nodes)
    return next(
        len(c.args[1]) for c in operations if c is not None and c.name == "torch_layer_norm"
    )
