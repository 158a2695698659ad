"""A node of a graph that stays the same is looked at once, and again when the graph has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusewright.graph import canon, facts
from fusewright.graph.cleanup import remove_noops
from fusewright.graph.functionalize import remove_writes
from fusewright.passes import PIPELINE
from fusewright.rewrite import engine
from fusewright.rewrite.engine import Fuel, apply
from fusewright.rewrite.op_table import TABLE

from ..capturing import capture, rewritten


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _layers(number: int) -> fx.GraphModule:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(number):
            x = x + _norm(x, w).tanh().sin().cos().exp()
        return x

    return capture(fn, torch.randn(2, 6, 16), torch.randn(16))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[fx.Node]:
    """The nodes whose operation is looked up, once for each time."""
    made: list[fx.Node] = []
    before = canon.product

    def noted(node: fx.Node) -> Any:
        made.append(node)
        return before(node)

    monkeypatch.setattr(canon, "product", noted)
    return made


def test_rules_look_at_each_node_once(looks: list[fx.Node]) -> None:
    """Not once for each rule, nor for each pattern that may begin there."""
    graph = _layers(4)
    remove_writes(graph)
    remove_noops(graph)
    nodes, own = len(graph.graph.nodes), graph.graph
    looks.clear()
    apply(graph, PIPELINE, TABLE, None, Fuel(0))  # no rewrite, after which they would look again
    of_graph = [n for n in looks if n.graph is own]
    assert nodes // 2 < len(of_graph) <= nodes


def test_a_rewrite_is_seen_by_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """While rules run, what is kept of a node is what there is to be seen of it."""
    graph, found = _layers(2), engine.missed
    seen: list[str] = []

    def compared(graph: fx.Graph, *rest: Any) -> Any:
        for node in graph.nodes:
            view = canon.canonical(node)
            assert view == canon.canonical.__wrapped__(node)  # type: ignore[attr-defined]
            seen.extend(() if view is None else (view.name,))
        return found(graph, *rest)

    monkeypatch.setattr(engine, "missed", compared)
    assert {"rms_norm", "add_rms_norm"} <= set(
        rewritten(apply(graph, PIPELINE, TABLE, None, Fuel()))
    )
    assert "tanh" in seen


def test_nothing_is_kept_of_a_graph_that_changes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.mul, (x, 2))

    def second() -> Any:
        found = canon.canonical(node)
        return None if found is None else found.args[1]

    with facts.unchanged(graph):
        assert second() == 2
        with facts.changing():
            node.args = (x, 3)
            assert second() == 3
            node.args = (x, 4)
            assert second() == 4
        assert second() == 4
        with facts.unchanged(fx.Graph()):
            node.args = (x, 5)
            assert second() == 5
    node.args = (x, 6)
    assert second() == 6
