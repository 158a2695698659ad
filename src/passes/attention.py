"""Scaled dot-product attention on the CPU, with the repetition of key and value heads undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..kernels.attention import attention as op
from ..rewrite.match.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


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
        given = [facts.tensor(t) for t in (m.q, m.k, m.v, m.mask)]
        kind = facts.dtype(m.root)
        *tensors, mask = (_as(t, kind) for t in given)
        m.require(all(t is not None and t.dim() == 4 for t in tensors), "not 4-dimensional", m.q)
        m.require(isinstance(m.causal, bool), "is_causal is not a constant", m.root)
        m.require(m.scale is None or isinstance(m.scale, (int, float)), "scale is not a constant")
        reasons = op.OP.unsupported(*tensors, m.scale, m.causal, mask)
        m.leave(bool(reasons), "; ".join(reasons))

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op over the heads as they were projected, cast as autocast casts them."""
        scale, kind = None if m.scale is None else float(m.scale), facts.dtype(m.root)
        q, k, v, mask = (ops.as_dtype(n, kind) for n in (m.q, m.k, m.v, m.mask))
        return ops.attention(q, k, v, scale, m.causal, mask)


def _as(t: Tensor | None, kind: torch.dtype | None) -> Tensor | None:
    """As autocast casts an operand: attention returns what it computes in."""
    return t if t is None or kind is None or not t.is_floating_point() else t.to(kind)
