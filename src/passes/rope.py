"""Rotary position embedding: its spellings, and one launch for q and k.

Su et al., "RoFormer", 2021; the half-split layout is GPT-NeoX's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..match.pattern import Builder, Pattern
from ..match.rule import Emit, Match, Rule


class Rope(Rule):
    """``x * cos + rotate_half(x) * sin``, on the whole head or on its first dimensions."""

    name = op = "rope"

    def patterns(self, p: Builder, x: Pattern, cos: Pattern, sin: Pattern) -> Iterable[Any]:
        """Phi-3's kind splits off the part that is not rotated; Llama's has none."""

        def rotated(part: Any) -> Any:
            half = p.cat((-p.half(part, 1), p.half(part, 0)), -1)
            return p.maybe_cast(part * cos + half * sin)

        start, stop, end = p.var("start"), p.var("stop"), p.var("end")
        rotary = p.slice(x, -1, start, stop)
        yield "partial", p.cat((rotated(rotary), p.slice(x, -1, stop, end)), -1)
        yield "whole", rotated(p.maybe_cast(x))

    def check(self, m: Match) -> None:
        """The parts cover the head; cos and sin fit and need no gradient."""
        full = facts.size(m.x, -1)
        m.require(full is not None, "the head size is not static", m.x)
        if m.spelling == "partial":
            m.require((m.start, m.end) == (0, full), "the parts do not cover the head", m.x)
        for name in ("cos", "sin"):
            t = facts.tensor(getattr(m, name))
            m.require(t is not None, f"{name} is not a tensor")
            if t is not None:
                m.require(not t.requires_grad, f"{name} needs a gradient")
                width = m.stop if m.spelling == "partial" else full
                m.require(t.dim() > 0 and t.shape[-1] == width, f"{name} does not fit")
        m.require(facts.dtype(m.root) in (facts.dtype(m.x), _promoted(m)), "another dtype", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op on one tensor; ``RopePair`` joins those that share cos and sin."""
        width = m.stop if m.spelling == "partial" else facts.size(m.x, -1)
        rotated = ops.item(_rotate(m, ops, [m.x], width), 0)
        kind = facts.dtype(m.root)
        return rotated if kind == _promoted(m) else ops.cast(rotated, kind)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """A ``cat((-b, a))`` that nothing claimed."""
        for node in graph.nodes:
            canon = canonical(node)
            if canon is None or canon.name != "cat" or len(canon.args[0]) != 2:
                continue
            first = canonical(canon.args[0][0])
            if first is not None and first.name == "neg":
                yield node, "a rotated half that looks like a rotary embedding"


class RopePair(Rule):
    """Two rotations by the same cos and sin become one call."""

    name = op = "rope"
    absorbs = ("rope",)
    outputs = ("other",)

    def patterns(
        self, p: Builder, q: Pattern, cos: Pattern, sin: Pattern, width: Pattern
    ) -> Iterable[Any]:
        """The partner is found by ``check``: it is no part of this node's formula."""
        yield p.item(p.rope((q,), cos, sin, width, False), 0)

    def find(self, node: fx.Node, trace: Any) -> Iterable[Match]:  # type: ignore[override]
        """Pair ``node`` with an earlier rotation by the same cos and sin."""
        for m in super().find(node, trace):
            for partner in m.cos.users:
                canon = canonical(partner)
                if (
                    canon is None
                    or canon.name != "rope"
                    or partner in m.nodes
                    or len(canon.args[0]) != 1
                    or canon.args[1:] != (m.cos, m.sin, m.width, False)
                    or len(partner.users) != 1
                ):
                    continue
                item = next(iter(partner.users))
                captures = {**m.captures, "k": canon.args[0][0]}
                yield Match(node, "pair", captures, (*m.nodes, partner, item), (node, item))

    def check(self, m: Match) -> None:
        """Nothing more: both were checked when they were recognised."""

    def rewrite(self, m: Match, ops: Emit) -> tuple[fx.Node, fx.Node]:
        """One op for both."""
        made = _rotate(m, ops, [m.q, m.k], m.width)
        return ops.item(made, 0), ops.item(made, 1)


def _promoted(m: Match) -> Any:
    """The dtype of a product of x and cos, in which the op returns."""
    x, cos = facts.dtype(m.x), facts.dtype(m.cos)
    return torch.promote_types(x, cos) if x is not None and cos is not None else None


def _rotate(m: Match, ops: Emit, tensors: list[fx.Node], width: Any) -> fx.Node:
    return ops.rope(tensors, m.cos, m.sin, width, False)
