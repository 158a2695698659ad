"""Scaled dot-product attention, with the repetition of key and value heads undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..kernels.op import starts_of
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


class Attention(Rule):
    """``scaled_dot_product_attention``, with grouped heads repeated or not, without dropout."""

    name = op = "attention"
    optional = True  # it is for what PyTorch's kernel is slow with

    def patterns(
        self, p: Builder, q: Pattern, k: Pattern, v: Pattern, mask: Pattern, causal: Pattern,
        scale: Pattern, gqa: Pattern, first: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """Transformers repeats heads by unsqueeze, expand, reshape; others pass enable_gqa."""
        seen = p.either(p.sample_mask(first, p.anything), mask)

        def repeated(x: Any) -> Any:
            return p.reshape(p.expand(p.unsqueeze(x, -3), p.anything), p.anything)

        yield "repeated", p.sdpa(q, repeated(k), repeated(v), seen, 0.0, causal, scale, gqa)
        yield "plain", p.sdpa(q, k, v, seen, 0.0, causal, scale, gqa)

    def check(self, m: Match) -> None:
        """Four dimensions, constant settings."""
        tensors = [facts.tensor(t) for t in (m.q, m.k, m.v)]
        m.require(all(t is not None and t.dim() == 4 for t in tensors), "not 4-dimensional", m.q)
        m.require(isinstance(m.causal, bool), "is_causal is not a constant", m.root)
        m.require(m.scale is None or isinstance(m.scale, (int, float)), "scale is not a constant")

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op over the heads as they were projected, cast as autocast casts them."""
        scale, kind = None if m.scale is None else float(m.scale), facts.dtype(m.root)
        q, k, v, mask = (ops.as_dtype(n, kind) for n in (m.q, m.k, m.v, m.get("mask")))
        return ops.attention(q, k, v, scale, m.causal, m.get("first", mask))

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """First keys of samples."""
        return _first_keys(generator, shape) if node is m.get("first") else None


def _first_keys(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Those (B, 1, T, 1) of samples that begin anywhere."""
    begins = torch.rand(shape, generator=generator) < 0.3
    return starts_of(begins.flatten(1)).view(shape)


class WrittenOutAttention(Rule):
    """The formula of attention, with sinks and a softcap or without them, without dropout.

    A sink may stand in a column that joins the softmax and is dropped, or in a gate of the output:
    ``sigmoid(logsumexp(scores) - sink)`` is the share of the softmax that the sink leaves.
    """

    name = op = "attention"
    optional = True

    def patterns(
        self, p: Builder, q: Pattern, k: Pattern, v: Pattern, mask: Pattern, scale: Pattern,
        softcap: Pattern, sinks: Pattern, stop: Pattern, first: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """As transformers' eager functions and their like have it."""

        def repeated(x: Any) -> Any:
            return p.either(p.reshape(p.expand(p.unsqueeze(x, -3), p.anything), p.anything), x)

        def softmax(x: Any) -> Any:
            shifted = p.either(x - p.item(p.max(x, -1, True), 0), x)
            return p.softmax(shifted, -1, p.anything)

        product = p.matmul(p.maybe_cast(q), p.transpose(p.maybe_cast(repeated(k)), -2, -1))
        scaled = p.either(product * scale, product)
        bounded = p.either(p.tanh(scaled / softcap) * softcap, scaled)
        seen = p.either(p.sample_mask(first, p.anything), mask)
        scores = p.either(bounded + seen, bounded)
        logits = p.capture("logits", p.reshape(sinks, p.anything))
        joined = p.maybe_cast(p.cat((scores, p.expand(logits, p.anything)), -1))

        share = p.sigmoid(p.maybe_cast(p.logsumexp(scores, -1) - logits))
        attended = p.matmul(p.maybe_cast(softmax(scores)), repeated(v))
        yield "gate", attended * p.maybe_cast(p.unsqueeze(share, -1))
        kept = p.slice(softmax(joined), -1, 0, stop)
        yield "column", p.matmul(p.maybe_cast(kept), repeated(v))
        yield "no sink", attended

    def check(self, m: Match) -> None:
        """Four dimensions, constant factors, a mask of floats, a sink for each head."""
        q, k, v = (facts.tensor(t) for t in (m.q, m.k, m.v))
        m.require(all(t is not None and t.dim() == 4 for t in (q, k, v)), "not 4-dimensional", m.q)
        for name in ("scale", "softcap"):
            factor = m.get(name, 1.0)
            m.require(isinstance(factor, (int, float)), f"the {name} is not a constant", m.root)
        mask = facts.tensor(m.get("mask"))
        is_additive = mask is not None and mask.dim() == 4 and mask.is_floating_point()
        m.require(is_additive or m.get("mask") is None, "what is added is no mask", m.get("mask"))
        logits = facts.tensor(m.get("logits"))
        if logits is not None and q is not None:
            of_heads = tuple(logits.shape) == (1, q.shape[1], 1, 1)[: logits.dim()]
            m.require(of_heads, "sinks are not one of each head", m.logits)
        if m.spelling == "column":
            m.require(m.stop in (-1, facts.size(m.k, -2)), "drops other columns", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op over the heads as they were projected, cast as autocast casts them."""
        kind, softcap = facts.dtype(m.root), m.get("softcap")
        q, k, v = (ops.as_dtype(n, kind) for n in (m.q, m.k, m.v))
        softcap = None if softcap is None else float(softcap)
        options = m.get("first", m.get("mask")), None, m.get("sinks"), softcap
        return ops.attention(q, k, v, float(m.get("scale", 1.0)), False, *options)

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """A mask that hides keys, as masks do."""
        if node is m.get("first"):
            return _first_keys(generator, shape)
        if node is not m.get("mask"):
            return None
        hidden = torch.rand(shape, generator=generator) < 0.3
        dtype = facts.dtype(node) or torch.float32
        return torch.zeros(shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


class SegmentAttention(Rule):
    """A call for each segment of a row, captured whole (``attend_apart``)."""

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
