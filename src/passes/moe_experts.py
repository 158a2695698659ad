"""Routed experts: the sorted, grouped matmuls of a mixture-of-experts layer.

Shazeer et al., "Outrageously large neural networks", 2017.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..graph.canon import canonical
from ..kernels.moe.moe_experts import Update, moe_route
from ..rewrite.matcher import State, Trace, match
from ..rewrite.pattern import Builder, Pattern, Var
from ..rewrite.rule import Emit, Match, Rule
from ..rewrite.sample_inputs import STANDS_FOR


class MoEExperts(Rule):
    """Sort by expert, gather, project, activate, project, weigh, put back in order, add up.

    The two ends are patterns. The nodes between the projections (``m.body``) may be anything: a
    gated unit, with or without clamps, that was rewritten before or not. They are kept.
    """

    name = op = "moe_experts"

    def patterns(
        self, p: Builder, h: Pattern, ids: Pattern, active: Pattern, weights: Pattern,
        down: Pattern, down_bias: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """From the second projection to the sum of each token's experts."""
        order, ordered, offsets = _sorting(p, ids)
        product = _projection(p, p.maybe_cast(h), down, down_bias, ordered, offsets)
        scale = p.unsqueeze(p.index(weights, order), -1)
        scaled = product * scale
        back = p.index(scaled, p.inverse_permutation(order))
        yield p.maybe_cast(p.sum(p.reshape(back, p.var("shape")), -2))

    def find(self, node: fx.Node, trace: Trace) -> Iterator[Match]:
        """A match of the pattern, and of the first projection that ``m.h`` is computed from."""
        for m in super().find(node, trace):
            for source, ends in _first_projections(m, trace):
                body = _between(source, m.h)
                outside = [
                    tuple(fx.node.map_arg(a, lambda n: n) for a in (n.args, n.kwargs)) for n in body
                ]
                captures = {**m.captures, **ends.captures}
                captures |= {"source": source, "body": tuple(body), "arguments": tuple(outside)}
                sums = [n for name in ("up", "down") for n in _take_apart(name, captures)]
                nodes = dict.fromkeys((*m.nodes, *ends.nodes, *body, *sums))
                yield Match(node, "", captures, tuple(nodes), (node,))

    def check(self, m: Match) -> None:
        """Static expert sizes, one dtype, nothing between the projections that mixes rows."""
        x, up, down = (facts.tensor(t) for t in (m.x, m.up, m.down))
        m.require(facts.ndim(m.x) == 2 and facts.ndim(m.ids) == 1, "x or the routing has no rows")
        m.require(facts.ndim(m.weights) == 1, "the routing weights are not one per pair")
        m.require(type(m.active) is int, "the number of active experts is not static", m.root)
        m.require(len(m.shape) == 3 and m.shape[1] == m.active, "sums over something else", m.root)
        if x is None or up is None or down is None:
            m.require(False, "an operand is not a tensor", m.root)
            return
        m.require(x.dtype == up.dtype == down.dtype, "several dtypes", m.root)
        m.require(facts.dtype(m.h) == down.dtype, "the activation changes the dtype", m.h)
        m.require(facts.dtype(m.root) == x.dtype, f"returns {facts.dtype(m.root)}", m.root)
        experts = facts.size(m.up, 0)
        m.require(experts is not None and experts == facts.size(m.down, 0), "experts differ")
        m.require((m.bins, m.top) == (experts, (experts or 0) - 1), "counts other experts", m.root)
        m.require(m.get("limit", experts) == experts, "hides other experts", m.root)
        for _, _, scale in (*m.up_updates, *m.down_updates):
            m.require(isinstance(scale, (int, float)), "the scale is not a constant", scale)
        rows = str(up.shape[0] if (t := facts.tensor(m.source)) is None else t.shape[0])
        inside = {m.source, *m.body}
        for node in m.body:
            for source in node.all_input_nodes:
                t = facts.tensor(source)
                m.require(
                    source in inside or t is None or t.dim() < 2 or str(t.shape[0]) != rows,
                    f"{node.name} reads rows of {source.name} between the projections",
                    node,
                )
            t = facts.tensor(node)
            m.require(
                t is None or (t.dim() == 2 and str(t.shape[0]) == rows),
                f"{node.name} is not one row per pair",
                node,
            )

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """Route once, project, the nodes between as they were, project and add up."""
        routing = ops.call(moe_route, m.ids, facts.size(m.up, 0))
        order, where, offsets = (ops.item(routing, i) for i in range(3))
        by_expert = (order, where, offsets, m.active)
        up, up_update = _joined(m, "up", ops)
        down, down_update = _joined(m, "down", ops)
        new = {m.source: ops.moe_up(m.x, up, m.get("up_bias"), *by_expert, up_update)}
        new[m.source].meta["example_value"] = facts.value(m.source)
        for node, arguments in zip(m.body, m.arguments, strict=True):
            args, kwargs = fx.node.map_arg(arguments, lambda n: new.get(n, n))
            new[node] = ops.copy(node, args, kwargs)
        biased = m.weights, down, m.get("down_bias")
        return ops.moe_down(new[m.h], *biased, *by_expert, down_update)

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Experts by number; where the formula knows of them, some that are not here."""
        # of many experts most have no token; of the few in a smaller formula, a third has none
        if node is not m.ids:
            return None
        experts = facts.size(m.up, 0) or 1
        numbers = torch.arange(experts)
        if facts.size(m.up.meta.get(STANDS_FOR), 0) not in (None, experts):
            numbers = numbers[torch.randperm(experts, generator=generator)[experts // 3 :]]
        if m.get("limit") is not None:
            numbers = torch.cat([numbers, torch.tensor([experts])])
        return numbers[torch.randint(0, len(numbers), shape, generator=generator)]

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """A grouped matmul that is left."""
        for node in graph.nodes:
            canon = canonical(node)
            if canon is not None and canon.name == "grouped_mm":
                yield node, "a grouped matmul that looks like routed experts"


def _sorting(p: Builder, ids: Pattern) -> tuple[Any, Any, Any]:
    """The order of the pairs by expert, their sorted experts, the ends of the groups."""
    sort = p.sort(ids, p.anything, False, p.anything)
    ordered = p.item(sort, 0)
    counts = p.histc(p.maybe_cast(ordered), p.var("bins"), 0, p.var("top"))
    return p.item(sort, 1), ordered, p.cumsum(counts, -1, p.anything)


def _first_projection() -> Pattern:
    p = Builder()
    order, ordered, offsets = _sorting(p, Var("ids"))
    rows = _of_local_experts(p, p.index(Var("x"), p.floordiv(order, Var("active"))), ordered)
    return _projection(p, p.maybe_cast(rows), Var("up"), Var("up_bias"), ordered, offsets)


def _projection(
    p: Builder, x: Any, weight: Pattern, bias: Pattern, ordered: Any, offsets: Any
) -> Pattern:
    product = p.grouped_mm(x, weight, offsets)
    numbers = p.either(p.clamp(ordered, None, p.var("top")), ordered)
    return _of_local_experts(p, p.either(product + p.index(bias, numbers), product), ordered)


def _of_local_experts(p: Builder, rows: Any, ordered: Any) -> Pattern:
    # ``rows``, or those of experts that are not here (expert parallelism) set to zero.
    elsewhere = p.unsqueeze(p.ge(ordered, p.var("limit")), -1)
    return p.either(p.masked_fill(rows, elsewhere, 0.0), rows)


_FIRST = _first_projection()


def _first_projections(m: Match, trace: Trace) -> Iterator[tuple[fx.Node, State]]:
    captured = State({k: v for k, v in m.captures.items() if k in _SHARED})
    visited, edge = {m.h}, [m.h]
    while edge and len(visited) < _REACH:
        node = edge.pop(0)
        projection = next(match(_FIRST, node, captured, trace), None)
        if projection is not None:
            yield node, projection
            return
        fresh = [n for n in node.all_input_nodes if n not in visited and n.op.startswith("call_")]
        visited.update(fresh)
        edge += fresh


# -- stacks with low-rank updates ------------------------------------------------------------------
def _take_apart(name: str, captures: dict[str, Any]) -> tuple[fx.Node, ...]:
    """Capture what the weight ``name`` is the sum of, if it is; return the nodes of the sum."""
    weight = captures[name]
    canon = canonical(weight)
    is_turned = canon is not None and canon.name == "transpose" and canon.args[1:] == (-2, -1)
    node = canon.args[0] if canon is not None and is_turned else weight
    total = canonical(node)
    if total is None or total.name != "updated_stack":
        captures[f"{name}_updates"] = ()
        return ()
    base, *updates = total.args
    captures |= {
        name: base,
        f"{name}_updates": tuple(zip(*updates, strict=True)),
        f"{name}_is_turned": is_turned,
    }
    return (weight, node)[not is_turned :]


def _joined(m: Match, name: str, ops: Emit) -> tuple[Any, Update | None]:
    """The weight (E, in, out), and its updates as one, whose rank is the sum of theirs."""
    weight, updates = m.captures[name], m.captures[f"{name}_updates"]
    if not updates:
        return weight, None

    def laid_out(t: Any) -> Any:
        return ops.method("transpose", t, -2, -1) if m.captures[f"{name}_is_turned"] else t

    scales = {float(s) for _, _, s in updates}
    dtype: Any = facts.dtype(weight)
    dtypes: list[Any] = [facts.dtype(t) for left, right, _ in updates for t in (left, right)]
    if any(torch.promote_types(t, dtype) is not dtype for t in dtypes):
        # wider ones stay so: rounded factors would get gradients that are rounded more than eager's
        dtype = torch.promote_types(dtype, torch.float32)
    scale = scales.pop() if len(scales) == 1 else 1.0
    into, out = [], []
    for left, right, s in updates:
        a, b = (right, left) if m.captures[f"{name}_is_turned"] else (left, right)
        if float(s) != scale:
            b = ops.computed(operator.mul, b, float(s))
        into.append(ops.as_dtype(laid_out(a), dtype))
        out.append(ops.as_dtype(laid_out(b), dtype))
    factors: Any = (
        parts[0] if len(parts) == 1 else ops.computed(torch.cat, parts, dim)
        for parts, dim in ((into, 2), (out, 1))
    )
    low, high = factors
    return laid_out(weight), Update(low, high, scale)


_SHARED = ("ids", "active", "bins", "top", "limit")
"""Captures that the two projections have in common."""

_REACH = 60
"""How many nodes there may be between the two projections."""


def _between(source: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes on the paths from ``source`` to ``last``, in graph order, without ``source``."""
    below: set[fx.Node] = {source}
    for node in source.graph.nodes:
        if any(n in below for n in node.all_input_nodes):
            below.add(node)
        if node is last:
            break
    nodes, edge = set(), [last]
    while edge:
        node = edge.pop()
        if node in below and node is not source and node not in nodes:
            nodes.add(node)
            edge += node.all_input_nodes
    return [n for n in source.graph.nodes if n in nodes]
