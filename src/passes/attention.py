"""Scaled dot-product attention, with the repetition of key and value heads undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ..graph import facts
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


class Attention(Rule):
    """``scaled_dot_product_attention``, with grouped heads repeated or not, without dropout."""

    name = op = "attention"
    optional = True  # it is for what PyTorch's kernel is slow with

    def patterns(
        self, p: Builder, q: Pattern, k: Pattern, v: Pattern, mask: Pattern, causal: Pattern,
        scale: Pattern, gqa: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """Transformers repeats heads by unsqueeze, expand, reshape; others pass enable_gqa."""

        def repeated(x: Any) -> Any:
            return p.reshape(p.expand(p.unsqueeze(x, -3), p.anything), p.anything)

        yield "repeated", p.sdpa(q, repeated(k), repeated(v), mask, 0.0, causal, scale, gqa)
        yield "plain", p.sdpa(q, k, v, mask, 0.0, causal, scale, gqa)

    def check(self, m: Match) -> None:
        """Four dimensions, constant settings."""
        tensors = [facts.tensor(t) for t in (m.q, m.k, m.v)]
        m.require(all(t is not None and t.dim() == 4 for t in tensors), "not 4-dimensional", m.q)
        m.require(isinstance(m.causal, bool), "is_causal is not a constant", m.root)
        m.require(m.scale is None or isinstance(m.scale, (int, float)), "scale is not a constant")

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op over the heads as they were projected, cast as autocast casts them."""
        scale, kind = None if m.scale is None else float(m.scale), facts.dtype(m.root)
        q, k, v, mask = (ops.as_dtype(n, kind) for n in (m.q, m.k, m.v, m.mask))
        return ops.attention(q, k, v, scale, m.causal, mask)
