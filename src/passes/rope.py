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
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


class Rope(Rule):
    """``x * cos + rotate(x) * sin``, on the whole head or on its first dimensions."""

    name = op = "rope"

    def patterns(
        self, p: Builder, x: Pattern, cos: Pattern, sin: Pattern, freqs: Pattern
    ) -> Iterable[Any]:
        """Phi-3 splits off the part that is not rotated; the spellings begin with their layout."""
        start, stop, end = p.var("start"), p.var("stop"), p.var("end")
        rotary = p.slice(x, -1, start, stop)

        def halves(part: Any) -> Any:
            return p.cat((-p.half(part, 1), p.half(part, 0)), -1)

        def opposite(part: Any) -> Any:
            return p.cat((p.half(part, 1), -p.half(part, 0)), -1)

        def pairs(part: Any) -> Any:
            stacked = p.stack((-p.every_other(part, 1), p.every_other(part, 0)), -1)
            return p.reshape(stacked, p.anything)

        for layout, rotate in (("halves", halves), ("pairs", pairs), ("halves inverse", opposite)):

            def rotated(part: Any, rotate: Any = rotate) -> Any:
                wide = p.maybe_cast(part)
                turned = p.either(rotate(wide), p.cast(rotate(part)))
                return p.maybe_cast(wide * cos + turned * sin)

            yield f"{layout} partial", p.cat((rotated(rotary), p.slice(x, -1, stop, end)), -1)
            yield layout, rotated(x)

        for layout, member, name in (
            ("pairs_to_halves", p.every_other, p.half),
            ("halves", p.half, p.half),
        ):
            for spelling, c, s in (
                (f"{layout} parts", (cos, cos), (sin, sin)),
                (f"{layout} tables", *((name(t, 0), name(t, 1)) for t in (cos, sin))),
            ):
                wide = p.maybe_cast(x)
                x1, x2 = member(wide, 0), member(wide, 1)
                first, second = x1 * c[0] - x2 * s[0], x2 * c[1] + x1 * s[1]
                yield spelling, p.maybe_cast(p.cat((first, second), -1))

        complex_x = p.view_as_complex(p.reshape(p.maybe_cast(x), p.anything))
        turned = p.view_as_real(complex_x * freqs)
        yield "pairs complex", p.maybe_cast(p.reshape(turned, p.anything))

    def check(self, m: Match) -> None:
        """The parts cover the head; cos and sin fit and need no gradient."""
        full = facts.size(m.x, -1)
        m.require(full is not None, "the head size is not static", m.x)
        if m.get("stop") is not None:
            m.require((m.start, m.end) == (0, full), "the parts do not cover the head", m.x)
        width = m.get("stop", full)
        for name in ("cos", "sin", "freqs"):
            if name not in m.captures:
                continue
            t = facts.tensor(getattr(m, name))
            m.require(t is not None, f"{name} is not a tensor")
            if t is None:
                continue
            m.require(not t.requires_grad, f"{name} needs a gradient")
            halved = name == "freqs" or m.spelling.endswith("parts")
            wide = width // 2 if halved else width
            m.require(t.dim() > 0 and t.shape[-1] == wide, f"{name} does not fit")
            m.require(t.is_complex() is (name == "freqs"), f"{name} has dtype {t.dtype}")
        m.require(facts.ndim(m.root) == facts.ndim(m.x), "returns another shape", m.root)
        m.require(facts.dtype(m.root) in (facts.dtype(m.x), _promoted(m)), "another dtype", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op on one tensor; ``RopePair`` joins those that share cos and sin."""
        width = m.get("stop", facts.size(m.x, -1))
        tables = (m.freqs, None) if m.get("freqs") is not None else (m.cos, m.sin)
        words = m.spelling.split(" ")
        call = ops.rope([m.x], *tables, width, words[0], "inverse" in words)
        rotated, kind = ops.item(call, 0), facts.dtype(m.root)
        return rotated if kind == _promoted(m) else ops.cast(rotated, kind)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """A ``cat((-b, a))`` or ``stack`` of such that nothing claimed."""
        for node in graph.nodes:
            canon = canonical(node)
            if canon is None or canon.name not in ("cat", "stack") or len(canon.args[0]) != 2:
                continue
            members = [canonical(t) for t in canon.args[0]]
            if any(c is not None and c.name == "neg" for c in members):
                yield node, "a rotated half that looks like a rotary embedding"


class RopePair(Rule):
    """Two rotations by the same cos and sin become one call."""

    name = op = "rope"
    absorbs = ("rope",)
    outputs = ("other",)

    def patterns(
        self, p: Builder, q: Pattern, cos: Pattern, sin: Pattern, width: Pattern, layout: Pattern,
        inverse: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """The partner is found by ``find``: it is no part of this node's formula."""
        yield p.item(p.rope((q,), cos, sin, width, layout, inverse), 0)

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
                    or canon.args[1:] != (m.cos, m.sin, m.width, m.layout, m.inverse)
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
        call = ops.rope([m.q, m.k], m.cos, m.sin, m.width, m.layout, m.inverse)
        return ops.item(call, 0), ops.item(call, 1)


def _promoted(m: Match) -> Any:
    x, table = facts.dtype(m.x), facts.dtype(m.get("freqs", m.get("cos")))
    if x is None or table is None:
        return None
    return torch.promote_types(x, table.to_real() if table.is_complex else table)
