"""Scaled dot-product attention on the CPU, with the repetition of key and value heads undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ..graph import facts
from ..kernels import attention as op
from ..match.pattern import Builder, Pattern
from ..match.rule import Emit, Match, Rule


class Attention(Rule):
    """``scaled_dot_product_attention``, with grouped heads repeated or not, without dropout."""

    name = op = "attention"

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
        """Whatever the op itself says that it cannot take, or not faster than PyTorch."""
        tensors = [facts.tensor(t) for t in (m.q, m.k, m.v)]
        m.require(all(t is not None and t.dim() == 4 for t in tensors), "not 4-dimensional", m.q)
        m.require(isinstance(m.causal, bool), "is_causal is not a constant", m.root)
        m.require(m.scale is None or isinstance(m.scale, (int, float)), "scale is not a constant")
        reasons = op.OP.unsupported(*tensors, m.scale, m.causal, facts.tensor(m.mask))
        m.leave(bool(reasons), "; ".join(reasons))

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op over the heads as they were projected."""
        scale = None if m.scale is None else float(m.scale)
        return ops.attention(m.q, m.k, m.v, scale, m.causal, m.mask)
