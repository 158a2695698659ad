"""Findings of the engine in a graph, near misses included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from ..graph import facts
from ..report import Figures
from .matcher import Trace
from .rule import Rule


@dataclass
class Finding:
    """One formula of one graph, before it is known which modules run the graph.

    The fields become those of ``report.Site``; ``home`` is relative to the captured module. The
    status ``"left"`` is no gap: the formula is better off as it is.
    """

    rule: str
    op: str
    status: str
    home: str
    reason: str = ""
    figures: Figures = field(default_factory=Figures)
    formulas: int = 1
    node: str = ""
    claimed: frozenset[str] = field(default_factory=frozenset)


def missed(graph: fx.Graph, rules: Sequence[Rule], recorded: list[Finding]) -> list[Finding]:
    """The formulas that look like a rule's but that no spelling claimed, with the nearest miss."""
    findings: list[Finding] = []
    refused = {(f.rule, name) for f in recorded if f.status == "refused" for name in f.claimed}
    for rule in rules:
        for node, why in rule.suspects(graph):
            if (rule.name, node.name) in refused:
                continue
            trace = Trace()
            for root in _around(node):
                for _ in rule.find(root, trace):
                    pass
            reason = why
            if trace.reason and node in trace.nodes:
                reason = f"{why}; the nearest spelling stopped: {trace.reason}"
            findings.append(
                Finding(
                    rule.name,
                    rule.op,
                    "missed",
                    facts.home(node),
                    reason,
                    node=node.name,
                    claimed=frozenset((node.name,)),
                )
            )
    return findings


def outside(findings: list[Finding], done: Finding) -> list[Finding]:
    """``findings`` without refusals of ``done``'s formula, matched with another node around it."""
    return [f for f in findings if f.status == "rewritten" or not f.claimed & done.claimed]


def _around(node: fx.Node, steps: int = 6) -> list[fx.Node]:
    nodes, edge = [node], [node]
    for _ in range(steps):
        edge = list(dict.fromkeys(u for n in edge for u in n.users if u not in nodes))
        nodes += edge
    return [n for n in nodes if n.op in ("call_function", "call_method")]
