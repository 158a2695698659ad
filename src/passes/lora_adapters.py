"""Several LoRA adapters on one linear, as one whose rank is the sum of theirs.

Σ scaleᵢ·(x·Aᵢᵀ)·Bᵢᵀ = (x·Aᵀ)·Bᵀ,   A = [A₁; A₂; …],   B = [scale₁·B₁, scale₂·B₂, …]
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..graph import facts
from ..rewrite.match.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match

MOST = 8
"""How many adapters on one linear are looked for."""


class Adapter(NamedTuple):
    """The parts of one adapter: nodes, and a constant scale.

    Attributes:
        a: (r, in).
        b: (out, r).
        scale: of its output.
        bias: (out,), of B, or None.
        x: its own input (after dropout), or None.
    """

    a: Any
    b: Any
    scale: Any
    bias: Any
    x: Any


def with_more(p: Builder, total: Pattern, x: Pattern, count: int) -> Pattern:
    """``total`` and ``count`` further adapters, added one after the other."""
    for i in range(2, count + 2):
        a, b, scale, bias, own = (p.var(f"{part}_{i}") for part in Adapter._fields)
        narrow = p.either(p.linear(p.maybe_cast(x), a), p.linear(own, a))
        total = p.maybe_cast(p.linear(narrow, b, bias) * scale) + total
    return total


def adapters(m: Match) -> list[Adapter]:
    """The adapters of a match, in the order in which the model adds them."""
    first = Adapter(m.a, m.b, m.scale, m.lora_bias, m.get("x_lora"))
    found = [
        Adapter(*(m.get(f"{part}_{i}") for part in Adapter._fields))
        for i in range(2, MOST + 1)
        if m.get(f"a_{i}") is not None
    ]
    return [first, *found]


def check(m: Match, given: Sequence[Adapter]) -> None:
    """What an adapter must be, and several must have in common."""
    ranks = 0
    for one in given:
        m.require(isinstance(one.scale, (int, float)), "the scale is not a constant", one.scale)
        for name, matrix in (("a", one.a), ("b", one.b)):
            m.require(facts.ndim(matrix) == 2, f"{name} is not a matrix", m.root)
        ranks += facts.size(one.a, 0) or 0
    # only what goes in counts: a gate of one feature may have a wider adapter
    wide = facts.size(m.x, -1)
    m.require(wide is not None and 0 < ranks <= wide, "the update is not of low rank", m.root)
    if len(given) > 1:
        kinds = {facts.dtype(t) for one in given for t in (one.a, one.b)}
        m.require(len(kinds) == 1, "the adapters have several dtypes", m.root)
        own = any(one.x is not None for one in given)
        m.require(not own, "several adapters have dropout of their own", m.root)


def joined(given: Sequence[Adapter], ops: Emit) -> Adapter:
    """One adapter for all of them; a scale that they do not share goes onto the B's."""
    if len(given) == 1:
        return given[0]._replace(scale=float(given[0].scale))
    scales = {float(one.scale) for one in given}
    scale = scales.pop() if len(scales) == 1 else 1.0

    def scaled(t: Any, by: Any) -> Any:
        return t if float(by) == scale else ops.computed(operator.mul, t, float(by))

    biases = [scaled(one.bias, one.scale) for one in given if one.bias is not None]
    bias = biases[0] if biases else None
    for other in biases[1:]:
        bias = ops.computed(operator.add, bias, other)
    a = ops.computed(torch.cat, [one.a for one in given], 0)
    b = ops.computed(torch.cat, [scaled(one.b, one.scale) for one in given], 1)
    return Adapter(a, b, scale, bias, None)
