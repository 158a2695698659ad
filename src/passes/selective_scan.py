"""Scans of state-space models, captured whole (``graph/opaque/functions.py``), become ops.

So do short convolutions, where samples share rows.

Gu & Dao, "Mamba", 2023; Dao & Gu, "Transformers are SSMs", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..kernels.op import starts_of
from ..kernels.scan import selective_scan
from ..kernels.scan.ssd_chunks import work_dtype
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


class SelectiveScan(Rule):
    """A call of a selective scan from a zero state, whose last state is not used."""

    name = op = "selective_scan"

    def patterns(
        self, p: Builder, u: Pattern, delta: Pattern, a: Pattern, b: Pattern, c: Pattern,
        d: Pattern, z: Pattern, bias: Pattern, softplus: Pattern, last: Pattern, segments: Pattern,
        others: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """The leaf: spellings of the formula inside it do not matter."""
        yield p.scan_call(u, delta, a, b, c, d, z, bias, softplus, last, segments, others)

    def check(self, m: Match) -> None:
        """No arguments or results that the op does not support."""
        require_known(m, m.others)
        m.require(m.last in (False, None), "the last state is asked for", m.root)
        m.require(isinstance(m.softplus, bool), "delta_softplus is not a constant", m.root)
        values = [facts.tensor(t) for t in (m.u, m.delta, m.a, m.b, m.c)]
        m.require(all(v is not None for v in values), "an input is not a tensor", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; a cast where the call returns another dtype."""
        given = m.u, m.delta, m.a, m.b, m.c, m.d, m.z, m.bias, m.softplus
        out = ops.selective_scan(*given, *([] if m.segments is None else [m.segments]))
        d, z = facts.tensor(m.d), facts.tensor(m.z)
        u, kind = facts.tensor(m.u), facts.dtype(m.root)
        return (
            out
            if u is None or selective_scan.output_dtype(u, d, z) is kind
            else ops.cast(out, kind)
        )

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Decays: A is negative, and so that states live for some steps; steps are positive."""
        if node is m.segments:
            return sample_segments(shape, generator)
        if node is m.a or (node is m.delta and not m.softplus):
            values = 0.05 + torch.rand(shape, generator=generator)
            return (-values if node is m.a else values).to(facts.dtype(node))
        return None


class ChunkedScan(Rule):
    """A call of the chunked scan with one decay per head, from a zero state."""

    name = op = "selective_scan"

    def patterns(
        self, p: Builder, x: Pattern, dt: Pattern, a: Pattern, b: Pattern, c: Pattern,
        d: Pattern, z: Pattern, bias: Pattern, softplus: Pattern, limit: Pattern,
        first: Pattern, last: Pattern, segments: Pattern, others: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """The leaf; in which chunks it computes makes no difference."""
        yield p.chunk_scan_call(
            x, dt, a, b, c, p.anything, d, z, bias, softplus, limit, first, last, segments, others
        )

    def check(self, m: Match) -> None:
        """No arguments or results that the op does not support."""
        require_known(m, m.others)
        m.require(m.last in (False, None), "the last state is asked for", m.root)
        m.require(m.first is None, "the scan starts from a given state", m.root)
        m.require(m.z is None, "the gate is inside the call", m.root)
        m.require(isinstance(m.softplus, bool), "dt_softplus is not a constant", m.root)
        constant = isinstance(m.limit, (tuple, list)) and len(m.limit) == 2
        m.require(
            constant and all(isinstance(v, (int, float)) for v in m.limit),
            "dt_limit is not a constant",
            m.root,
        )
        values = [facts.tensor(t) for t in (m.x, m.dt, m.a, m.b, m.c)]
        m.require(all(v is not None for v in values), "an input is not a tensor", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; a cast where the call returns another dtype."""
        limit = tuple(float(v) for v in m.limit)
        given = m.x, m.dt, m.a, m.b, m.c, m.d, m.bias, m.softplus, limit
        out = ops.ssd(*given, *([] if m.segments is None else [m.segments]))
        x, kind = facts.tensor(m.x), facts.dtype(m.root)
        return out if x is None or work_dtype(x) is kind else ops.cast(out, kind)

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Negative A and, without a softplus, positive steps."""
        if node is m.segments:
            return sample_segments(shape, generator)
        if node is m.a or (node is m.dt and not m.softplus):
            values = 0.05 + torch.rand(shape, generator=generator)
            return (-values if node is m.a else values).to(facts.dtype(node))
        return None


class ShortConvolution(Rule):
    """A causal convolution of each channel over a few positions, of rows with several segments."""

    name = op = "short_conv"

    def patterns(
        self, p: Builder, x: Pattern, weight: Pattern, bias: Pattern, activation: Pattern,
        segments: Pattern, others: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """The leaf, which there is in such rows only."""
        yield p.short_conv_call(x, weight, bias, activation, segments, others)

    def check(self, m: Match) -> None:
        """No arguments that the op does not support."""
        require_known(m, m.others)
        m.require(m.activation in _ACTIVATIONS, f"the activation {m.activation}", m.root)
        values = [facts.tensor(t) for t in (m.x, m.weight, m.segments)]
        m.require(all(v is not None for v in values), "an input is not a tensor", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; a cast where the call returns another dtype."""
        out = ops.short_conv(m.x, m.weight, m.bias, m.segments, m.activation is not None)
        x, kind = facts.dtype(m.x), facts.dtype(m.root)
        return out if x is kind else ops.cast(out, kind)

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Where segments begin."""
        return sample_segments(shape, generator) if node is m.segments else None


_ACTIVATIONS = (None, "silu", "swish")


def sample_segments(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where the segment of each position begins, some of which are one position long."""
    return starts_of(torch.rand(shape, generator=generator) < 0.4)


def require_known(m: Match, others: tuple[tuple[str, Any], ...]) -> None:
    """Decline arguments beyond the convention (packed sequences, say) that ask for something."""
    names = ", ".join(name for name, _ in others)
    m.require(not others, f"the call also passes {names}", m.root)
