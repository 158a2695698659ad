"""The language-model loss: projection to the vocabulary and cross entropy as one unit.

Only readers of ``outputs.logits`` need the logits then: ``compiler/logits`` serves them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..graph.canon import canonical
from ..kernels.linear.projections import Linear
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


def _capped_head(p: Builder, x: Pattern, w: Pattern, bias: Pattern, cap: Pattern) -> Pattern:
    """The logits before the last cast: linear, factor or scale, soft cap."""
    # BART and its like have the bias in a buffer of shape (1, classes)
    added = p.capture("added", p.add(p.linear(x, w, None), bias))
    adapter = [p.var(f"head_{part}") for part in Linear._fields[2:]]
    linear = p.either(p.linear(x, w, bias), added, p.lora_linear(x, [w, bias, *adapter]))
    factor = p.var("factor", lambda v: isinstance(v, fx.Node))
    raw = p.either(p.mul(p.maybe_cast(linear), factor), p.either(p.contiguous(linear), linear))
    scale = p.var("scale", lambda v: isinstance(v, (int, float)))
    divided = p.capture("divided", p.div(raw, scale))
    scaled = p.either(p.mul(raw, scale), divided, raw)
    return p.either(p.tanh(scaled / cap) * cap, p.tanh(raw / cap) * cap, scaled)


def is_bias(value: Any, weight: Any) -> bool:
    """Whether ``value`` is one number for each row of ``weight``, of shape (..., classes)."""
    sizes = [facts.size(value, d) for d in range(facts.ndim(value) or 0)]
    return bool(sizes) and sizes[-1] == facts.size(weight, 0) and all(n == 1 for n in sizes[:-1])


class _Head(Rule):
    """The logits alone, without a loss; only for finding them."""

    name = op = "linear_logprob"

    def patterns(
        self, p: Builder, x: Pattern, w: Pattern, bias: Pattern, cap: Pattern
    ) -> Iterable[Any]:
        yield p.maybe_cast(_capped_head(p, x, w, bias, cap))


HEAD = _Head()
"""Finds the parts of a head whose logits are not read by a loss."""


class LinearCrossEntropy(Rule):
    """Linear, scale, soft cap, cast, flatten and cross entropy, as far as there are any.

    The nodes up to the logits may also feed ``outputs.logits``: they are kept for it.
    """

    name = op = "linear_cross_entropy"
    inner_may_stay = True

    def patterns(
        self, p: Builder, x: Pattern, w: Pattern, bias: Pattern, labels: Pattern,
        ignore: Pattern, reduction: Pattern, smoothing: Pattern, cap: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """Granite divides the logits, Cohere multiplies, Gemma-2 caps and OPT copies them."""

        # A ``factor`` is a scale that is learnt. Transformers shifts the labels; older code, and
        # much of what comes with checkpoints, cuts off the last logits.
        def dense(logits: Any) -> Any:
            return p.either(p.contiguous(logits), logits)

        capped = _capped_head(p, x, w, bias, cap)

        def loss(logits: Any) -> Any:
            flat = dense(p.either(p.reshape(logits, p.anything), logits))
            return p.cross_entropy(flat, labels, None, None, ignore, None, reduction, smoothing)

        yield "loss", loss(p.maybe_cast(capped))
        yield "cast last", loss(p.cast(p.either(p.reshape(capped, p.anything), capped)))
        shifted = dense(p.slice(p.maybe_cast(capped), -2, p.var("start"), p.var("stop")))
        yield "shifted", loss(dense(p.maybe_cast(shifted)))
        yield "shifted, cast last", loss(p.cast(p.reshape(shifted, p.anything)))

    def check(self, m: Match) -> None:
        """One class index per row, mean or sum, constant settings."""
        m.require(m.reduction in ("mean", "sum"), f"reduction={m.reduction!r}", m.root)
        m.require(isinstance(m.ignore, int), "ignore_index is not a constant", m.root)
        m.require(isinstance(m.smoothing, (int, float)), "label_smoothing is not a constant")
        target = facts.tensor(m.labels)
        m.require(target is not None and not target.is_floating_point(), "labels are not indices")
        m.require(facts.ndim(m.labels) == 1, "labels are not one per row", m.labels)
        m.require(facts.ndim(m.w) == 2, "the head is not a matrix", m.w)
        m.require(
            m.bias is None or is_bias(m.bias, m.w), "what is added is not one per class", m.root
        )
        m.require(
            facts.dtype(m.root) in (torch.float32, torch.float64)
            or facts.dtype(m.x) is facts.dtype(m.root),
            "the loss has an unexpected dtype",
            m.root,
        )
        m.require(
            facts.dtype(m.x) is not torch.float64 or facts.dtype(m.root) is torch.float64,
            "the model computes the loss of its float64 logits in float32, and the op in float64",
            m.root,
        )
        factor = facts.tensor(m.get("factor"))
        m.require(factor is None or factor.numel() == 1, "the logits' factor is no scalar", m.root)
        m.require(factor is None or m.bias is None, "a bias inside a learnt factor", m.root)
        adapted = m.get("head_lora_b") is not None
        m.require(not adapted or factor is None, "an adapter inside a learnt factor", m.root)
        narrow = m.get("head_x_lora")
        known = narrow is None or facts.size(narrow, -1) is not None
        m.require(known, "several adapters of the head have an input of their own", m.root)
        wide = m.get("head_dtype")
        m.require(wide is None, "the adapted logits are wider than the head's", m.root)
        m.require(
            factor is None or facts.dtype(m.x) is not torch.float16,
            "the logits' factor is learnt: multiplied into float16 rows it may leave their range",
            m.root,
        )
        if m.get("cap") is not None:
            m.require(isinstance(m.cap, (int, float)), "the soft cap is not a constant", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """The loss alone; logits that someone reads are computed by the nodes that stay."""

        def rows(t: Any) -> Any:
            if m.spelling.startswith("shifted"):  # those whose logits would be cut off are no rows
                t = ops.part(t, (..., slice(m.start, m.stop), slice(None)))
            return ops.method("reshape", t, -1, facts.size(t, -1)) if facts.ndim(t) != 2 else t

        x = rows(m.x)
        if m.get("factor") is not None:
            x = ops.cast(ops.call(torch.mul, x, m.factor), facts.dtype(m.x))
        scale = float(m.get("scale", 1.0))
        if m.get("divided") is not None:
            scale = 1.0 / scale
        cap = None if m.get("cap") is None else float(m.cap)
        bias = m.bias
        if m.get("added") is not None:
            bias = ops.method("reshape", bias, -1)
        adapter: tuple[Any, ...] = ()
        if m.get("head_lora_b") is not None:
            by = 1.0 if m.head_scale is None else m.head_scale
            narrow = x if m.head_x_lora is None else rows(m.head_x_lora)
            if m.head_lora_a is not None:  # the op keeps the rows as narrow as they are
                narrow = ops.lora_linear(narrow, Linear(m.head_lora_a))
            narrow = ops.call(torch.mul, narrow, by) if by != 1.0 else narrow
            adapter = (narrow, m.head_lora_b)
            if m.head_lora_bias is not None:
                added = ops.call(torch.mul, m.head_lora_bias, by)
                bias = added if bias is None else ops.call(torch.add, bias, added)
                bias = ops.cast(bias, facts.dtype(m.w))
        loss = ops.linear_cross_entropy(
            x, m.w, bias, m.labels, m.ignore, m.reduction, float(m.smoothing), cap, scale, *adapter
        )
        if facts.dtype(m.root) not in (torch.float32, torch.float64):
            loss = ops.cast(loss, facts.dtype(m.root))
        return loss

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Labels: class indices, about a third of them ignored."""
        if node is not m.labels:
            return None
        classes = facts.size(m.w, 0) or 2
        labels = torch.randint(0, classes, shape, generator=generator)
        ignored = torch.rand(shape, generator=generator) < 0.3
        return torch.where(ignored, m.ignore, labels)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """Any cross entropy that is left."""
        for node in graph.nodes:
            canon = canonical(node)
            if canon is not None and canon.name == "cross_entropy":
                yield node, "a cross entropy whose logits are stored"
