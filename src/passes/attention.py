"""Scaled dot-product attention, with the repetition of key and value heads undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
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


class SegmentAttention(Rule):
    """A call for each segment of a row, captured whole (``graph/segments.py``)."""

    name, op = "attention", "segment_attention"
    optional = True

    def patterns(
        self, p: Builder, q: Pattern, k: Pattern, v: Pattern, boundaries: Pattern, scale: Pattern
    ) -> Iterable[Any]:
        """However the row was split, and the pieces joined."""
        yield p.split_attention(q, k, v, boundaries, scale)

    def check(self, m: Match) -> None:
        """A constant scale."""
        m.require(m.scale is None or isinstance(m.scale, (int, float)), "scale is not a constant")

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op, cast as autocast casts."""
        scale, kind = None if m.scale is None else float(m.scale), facts.dtype(m.root)
        q, k, v = (ops.as_dtype(n, kind) for n in (m.q, m.k, m.v))
        return ops.segment_attention(q, k, v, m.boundaries, scale)

    def fit(self, m: Match, values: Mapping[fx.Node, Any]) -> None:
        """Boundaries from 0 to the length of the row, with an empty segment where it is short."""
        time, bounds = values[m.q].shape[2], values[m.boundaries]
        count = bounds.shape[0] - 1
        bounds.copy_(torch.arange(count + 1).mul_(-(-time // count)).clamp_(max=time))
