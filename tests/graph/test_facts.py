"""What is known of a node: dtype, sizes, memory, the graphs inside, and whose code made it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fusewright.graph import facts

from ..rewrite.faults import graph_of
from ..rewrite.graphs import trace


def _node(value: Any, **meta: Any) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta.update(meta, example_value=value)
    return node


X = torch.randn(2, 3, 4)


def test_values() -> None:
    node = _node(X)
    assert facts.value(node) is facts.tensor(node) is X
    assert (facts.dtype(node), facts.ndim(node)) == (torch.float32, 3)
    assert facts.storage(node) == facts.storage(_node(X.mT)) != facts.storage(_node(X.clone()))
    assert (facts.value(3), facts.value(_node(3)), facts.value(_node((X, 1)))) == (3, 3, (X, 1))
    for other in (3, _node(3), _node((X, X)), fx.Graph().placeholder("x")):
        assert facts.tensor(other) is None
        assert facts.dtype(other) is facts.ndim(other) is facts.storage(other) is None
        assert facts.size(other, 0) is None
    later = fx.Graph().placeholder("x")
    later.meta["val"] = X  # where export leaves it
    assert facts.tensor(later) is X


@pytest.mark.parametrize(
    ("dim", "size"), [(0, 2), (1, 3), (2, 4), (-1, 4), (-3, 2), (3, None), (-4, None), (7, None)]
)
def test_sizes(dim: int, size: int | None) -> None:
    assert facts.size(_node(X), dim) == size


def test_a_size_that_the_graph_does_not_know() -> None:
    node = graph_of("glu").graph.find_nodes(op="placeholder")[-1]
    assert [facts.size(node, d) for d in range(3)] == [None, None, 16]
    # one that met a constant is known from then on
    rows = facts.value(node).shape[0]
    assert rows == 2
    assert facts.size(node, 0) == 2


def test_a_size_that_follows_from_others() -> None:
    """Of ``view(-1, 8)``: PyTorch writes a formula of the rows, which a product sets equal to 8."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return x.view(-1, 8) @ w

    found: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        found.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    for rows in (4, 6, 10):
        compiled(torch.randn(rows, 4), torch.randn(8, 3))
    assert len(found) == 2  # one for 4 rows, one for any number
    view, product = (node for node in found[1].graph.nodes if node.op.startswith("call"))
    assert type(facts.value(view).shape[1]) is torch.SymInt
    assert [facts.size(view, d) for d in (0, 1)] == [None, 8]
    assert [facts.size(product, d) for d in (0, 1)] == [None, 3]
    assert "Eq" not in str(facts.value(product).shape)  # nothing was set equal by asking


def test_memories() -> None:
    y = torch.randn(2)
    assert facts.memories(_node((X, [X.mT, y], 3))) == {facts.memory(X), facts.memory(y)}
    assert facts.memories(_node(3)) == set()


def test_the_real_tensor_of_the_call() -> None:
    class Forgotten:
        @property
        def example(self) -> Any:
            raise AssertionError("it is gone")

    w = nn.Parameter(X)
    assert facts.real(_node(X, grapharg=SimpleNamespace(example=w))) is w
    assert facts.real(_node(X, grapharg=SimpleNamespace(example=X))) is X
    for other in (_node(X), _node(X, grapharg=Forgotten()), 3):
        assert facts.real(other) is None
    for value in (3, X.to_sparse().to_dense().as_subclass(_Kind)):
        assert facts.real(_node(X, grapharg=SimpleNamespace(example=value))) is None


class _Kind(Tensor):
    """Another class of tensors: its values may be packed, or elsewhere."""


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("L['x']", True),
        ("L['args'][0]", True),
        ("L['kwargs']['x'][1]", True),
        ("L['self'].weight", False),
        ("L['self']._modules['a']._parameters['weight']", False),
        ("G['x']", False),
    ],
)
def test_what_stands_for_an_argument(name: str, argument: bool) -> None:
    for given in (name, lambda: name):  # torch 2.11 has a method there
        source = SimpleNamespace(name=given)
        assert facts.is_argument(_node(X, grapharg=SimpleNamespace(source=source))) is argument
    assert facts.is_argument(_node(X))


def test_text() -> None:
    assert facts.shape_text(_node(X.bfloat16())) == "bf16[2, 3, 4]"
    assert facts.shape_text(_node(X.long())) == "i64[2, 3, 4]"
    assert facts.shape_text(_node(X)) == "f32[2, 3, 4]"
    assert facts.shape_text(_node(5)) == "5"


# -------------------------------------------------------------------------------- graphs in graphs


def _within(*bodies: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.get_attr(f"body_{i}") for i in range(len(bodies))]
    for node in nodes:
        x = graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (node, x))
    graph.output(x)
    return fx.GraphModule({f"body_{i}": b for i, b in enumerate(bodies)}, graph)


def test_nested_graphs_come_outer_first() -> None:
    leaf, other = trace(lambda x: x + 1, (2,)), trace(lambda x: x * 2, (2,))
    middle = _within(leaf)
    outer = _within(middle, other)
    assert list(facts.nested(outer)) == [outer, middle, leaf, other]
    assert list(facts.nested(outer, {middle})) == [outer, other]
    assert list(facts.nested(leaf)) == [leaf]
    seen: set[fx.GraphModule] = set()
    visited = []
    for graph in facts.nested(outer, seen):
        visited.append(graph)
        if graph is middle:
            seen.add(other)  # what comes into it before its turn comes is left out
    assert visited == [outer, middle, leaf]


def test_what_has_left_the_outer_graph_is_not_visited() -> None:
    leaf = trace(lambda x: x + 1, (2,))
    outer = _within(leaf)
    visited = []
    for graph in facts.nested(outer):
        visited.append(graph)
        if graph is outer:
            call = next(n for n in outer.graph.nodes if n.op == "call_function")
            node = call.args[0]
            call.replace_all_uses_with(call.args[1])
            outer.graph.erase_node(call)
            outer.graph.erase_node(node)
    assert visited == [outer]


def test_bodies_of_calls() -> None:
    leaf, other = trace(lambda x: x + 1, (2,)), trace(lambda x: x * 2, (2,))
    outer = _within(leaf, other)
    first, second = (n for n in outer.graph.nodes if n.op == "call_function")
    assert facts.bodies(outer.graph, {first.name}) == {leaf}
    assert facts.bodies(outer.graph, {second.name, first.name}) == {leaf, other}
    assert facts.bodies(outer.graph, {"body_1"}) == {other}
    assert facts.bodies(outer.graph, {"x"}) == set()


def test_what_is_no_body() -> None:
    leaf = trace(lambda x: x + 1, (2,))
    outer = _within(leaf)
    node = outer.graph.find_nodes(op="get_attr")[0]
    assert facts.body(node) is leaf
    assert facts.body(3) is None
    graph = outer.graph
    assert facts.body(graph.call_function(torch.neg, (node,))) is None
    outer.weight = nn.Parameter(X)
    assert facts.body(graph.get_attr("weight")) is None
    assert facts.body(graph.call_module("body_0", ())) is None
    assert facts.body(graph.placeholder("body_0")) is None
    assert facts.body(graph.create_node("get_attr", "body_0.x")) is None


# -------------------------------------------------------------------------------------- whose code


def _made(*paths: str, graph: fx.Graph | None = None) -> fx.Node:
    graph = fx.Graph() if graph is None else graph
    node = graph.call_function(torch.ones, (2,))
    node.meta["nn_module_stack"] = {str(i): (path, object) for i, path in enumerate(paths)}
    return node


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("L['self'].mlp.act", "mlp.act"),
        ("L['self']", ""),
        ("L['self']._modules['layers']._modules['0'].mlp", "layers.0.mlp"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ('L["fn"].forward.__self__.norm', "norm"),
        ("L['args'][0].mlp", "mlp"),
    ],
)
def test_paths(path: str, home: str) -> None:
    assert facts.home(_made("L['self']", path)) == home


def test_no_path() -> None:
    assert facts.home(_node(X)) == ""
    plain = _node(X, nn_module_stack={"a": "L['self'].mlp"})
    assert facts.home(plain) == "mlp"


@pytest.mark.parametrize(
    ("paths", "home"),
    [
        (["a.b.c", "a.b.d"], "a.b"),
        (["a.b", "a.b.c.d"], "a.b"),
        (["a.b.c", "a.b"], "a.b"),
        (["a.b", "c.b"], ""),
        (["a.x.c", "a.y.c"], "a"),
        (["a.b", "a.b"], "a.b"),
        (["a.b.c", "a.b.c", "a.d"], "a"),
        (["b.a.c", "a.a.c"], ""),
        ([], ""),
    ],
)
def test_the_innermost_module_that_holds_all(paths: list[str], home: str) -> None:
    graph = fx.Graph()
    nodes = [_made(f"L['self'].{p}", graph=graph) for p in paths]
    assert facts.common_home([graph.placeholder("x"), *nodes]) == home
