"""RMSNorm: its spellings, and its fusions with the residual add before and the linears after.

Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
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
from .roots import is_variance, over_root, square, under_root

_CONSTANT = (int, float)


class RMSNorm(Rule):
    """``x / rms(x) * w``, in every spelling that transformers has."""

    name = op = "rms_norm"

    def patterns(self, p: Builder, x: Pattern, w: Pattern, eps: Pattern) -> Iterable[Any]:
        """Gemma rounds after ``1 + w``, OLMo-2 after ``w``, Llama before ``w``."""
        h = p.maybe_cast(x)
        rows = p.either(h, x)  # the root's alone may be wide (CPM-Ant)
        squares = square(p, h)
        n = over_root(p, rows, p.mean(squares, -1, keepdim=True) + eps)
        offset = p.maybe_cast(w) + 1
        yield "offset", p.maybe_cast(n * offset)
        yield "inner", w * p.cast(n)
        yield "outer", p.cast(p.maybe_cast(w) * n)
        yield "inner", w * n
        yield "bare", p.maybe_cast(n)
        yield "torch", p.torch_rms_norm(x, p.anything, w, eps)
        yield "l2", p.maybe_cast(over_root(p, rows, p.sum(squares, -1, keepdim=True) + eps))

    def check(self, m: Match) -> None:
        """One weight per feature, a constant eps, nothing rounded more than we would."""
        m.require(isinstance(m.eps, _CONSTANT) or m.eps is None, "eps is not a constant", m.eps)
        m.require(facts.tensor(m.x) is not None, "x is not a tensor", m.x)
        if m.get("w") is not None:
            m.require(facts.ndim(m.w) == 1, "the weight is not one vector per feature", m.w)
            m.require(facts.size(m.w, 0) == facts.size(m.x, -1), "the weight does not fit x", m.w)
        if m.spelling == "l2":
            m.require(bool(facts.size(m.x, -1)), "the number of features is not constant", m.x)
        if m.spelling == "torch":
            shape = canonical(m.root)
            dims = shape.args[1] if shape is not None else ()
            m.require(len(dims) == 1, "normalises over more than the last dimension")

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; the spelling says where it rounds. A cast before or after it adapts the dtype."""
        dtype, out = facts.dtype(m.x), facts.dtype(m.root)
        x = m.x if _returned(m, dtype) is out else ops.as_dtype(m.x, _wider(dtype, out))
        result = self._norm(m, x, ops)
        return result if _returned(m, facts.dtype(x)) is out else ops.cast(result, out)

    def _norm(self, m: Match, x: Any, ops: Emit) -> fx.Node:
        eps = m.eps
        if eps is None:  # torch's default: the epsilon of the input's dtype
            eps = torch.finfo(facts.dtype(m.x) or torch.float32).eps
        if m.spelling == "l2":  # the sum of squares is their mean, times the number of features
            features = facts.size(m.x, -1) or 1
            return ops.rms_norm(x, None, eps / features, features**-0.5, "outer")
        rounding = "inner" if m.spelling == "inner" else "outer"
        offset = 1.0 if m.spelling == "offset" else 0.0
        return ops.rms_norm(x, m.get("w"), float(eps), offset, rounding)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """A root of a mean of squares that no spelling claimed."""
        for node in graph.nodes:
            mean = under_root(node)
            if mean is not None and not is_variance(mean):
                yield node, "a root that looks like a norm's"


def _wider(a: torch.dtype | None, b: torch.dtype | None) -> torch.dtype | None:
    return torch.promote_types(a, b) if a and b else a


def _returned(m: Match, kind: torch.dtype | None) -> torch.dtype | None:
    return _wider(kind, facts.dtype(m.w)) if m.spelling == "inner" else kind


class AddRMSNorm(Rule):
    """The residual add and the norm after it; both values stay available."""

    name = op = "add_rms_norm"
    outputs = ("total",)

    def patterns(
        self, p: Builder, a: Pattern, b: Pattern, w: Pattern, eps: Pattern,
        offset: Pattern, rounding: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """``norm(a + b)``; the sum is the next residual."""
        yield p.rms_norm(p.capture("total", p.add(a, b)), w, eps, offset, rounding)

    def check(self, m: Match) -> None:
        """Two tensors of one shape, of whatever dtypes: the sum is in the wider one."""
        a, b = facts.tensor(m.a), facts.tensor(m.b)
        m.require(a is not None and b is not None, "adds a constant")
        if a is not None and b is not None:
            m.require(a.shape == b.shape, "the add broadcasts", m.total)

    def rewrite(self, m: Match, ops: Emit) -> tuple[fx.Node, fx.Node]:
        """The normed sum, then the sum."""
        pair = ops.add_rms_norm(m.a, m.b, m.w, m.eps, m.offset, m.rounding)
        return ops.item(pair, 1), ops.item(pair, 0)


class RMSNormLinear(Rule):
    """A norm that only feeds linears: the normed tensor need not be stored."""

    name = op = "rms_norm_linear"

    def patterns(
        self, p: Builder, x: Pattern, w: Pattern, eps: Pattern, offset: Pattern,
        rounding: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """Every user of the norm is a plain linear."""
        norm = p.rms_norm(x, w, eps, offset, rounding)
        yield p.fan_out(norm, p.linear(norm, p.var("weight"), p.var("bias")))

    def check(self, m: Match) -> None:
        """Matrices; linears of another dtype run under autocast, which the op knows."""
        for user in m.users:
            m.require(facts.ndim(user["weight"]) == 2, "a linear's weight is not a matrix")

    def rewrite(self, m: Match, ops: Emit) -> tuple[fx.Node, ...]:
        """One op with one output per linear."""
        weights = [u["weight"] for u in m.users]
        biases = [u["bias"] for u in m.users]
        block = ops.rms_norm_linear(m.x, m.w, m.eps, m.offset, m.rounding, weights, biases)
        return tuple(ops.item(block, i) for i in range(len(weights)))
