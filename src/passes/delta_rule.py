"""Calls of the delta rule, captured whole (``graph/opaque/functions.py``), become ops.

Yang et al., "Gated Delta Networks", 2024; Kimi Team, "Kimi Linear", 2025.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule
from .selective_scan import require_known, sample_segments


class GatedDeltaRule(Rule):
    """A call with one decay per head, in chunks or step by step."""

    name = op = "gated_delta_rule"
    rank = 3  # of the decays

    def patterns(
        self, p: Builder, q: Pattern, k: Pattern, v: Pattern, g: Pattern, beta: Pattern,
        state: Pattern, last: Pattern, l2norm: Pattern, segments: Pattern, others: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """The leaf, of whose results the outputs are used, or the state, too."""
        call = p.delta_rule_call(q, k, v, g, beta, state, last, l2norm, segments, others)
        yield p.fan_out(call, p.item(call, p.var("index")))

    def check(self, m: Match) -> None:
        """No arguments that the op does not support."""
        m.pass_over(facts.ndim(m.g) != self.rank)
        # in which chunks it computes makes no difference
        require_known(m, tuple(pair for pair in m.others if pair[0] != "chunk_size"))
        m.require(isinstance(m.l2norm, bool), "use_qk_l2norm_in_kernel is not a constant", m.root)
        values = [facts.tensor(t) for t in (m.q, m.k, m.v, m.g, m.beta)]
        m.require(all(t is not None for t in values), "an input is not a tensor", m.root)

    def rewrite(self, m: Match, ops: Emit) -> tuple[fx.Node, ...]:
        """One op; casts where the call returns other dtypes."""
        options = m.state, m.l2norm, *([] if m.segments is None else [m.segments])
        pair = getattr(ops, self.op)(m.q, m.k, m.v, m.g, m.beta, *options)
        wide = torch.promote_types(facts.dtype(m.q) or torch.float32, torch.float32)
        made = facts.dtype(m.q), wide
        results = []
        for user, node in zip(m.users, m.outputs, strict=True):
            item, kind = ops.item(pair, user["index"]), facts.dtype(node)
            results.append(item if made[user["index"]] is kind else ops.cast(item, kind))
        return tuple(results)

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Decays below 1, some far below; rates from 0 to 1; keys that are not too long."""
        if node is m.segments:
            return sample_segments(shape, generator)
        if node is m.g or node is m.beta:
            drawn = torch.rand(shape, generator=generator)
            return (drawn if node is m.beta else drawn.pow(4).mul(-8)).to(facts.dtype(node))
        if node is m.k and not m.l2norm:
            drawn = torch.randn(shape, generator=generator).div(shape[-1] ** 0.5)
            return drawn.to(facts.dtype(node))
        return None


class KDA(GatedDeltaRule):
    """A call with a decay for each feature of the key."""

    name = op = "kda"
    rank = 4
