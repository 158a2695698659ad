"""Which inputs of a graph each of its outputs depends on."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ...graph import facts
from ...graph.effects import writes
from ...memory.levels import CHECKPOINT

_Found = frozenset[int] | tuple[frozenset[int], ...]


def inputs_of_outputs(module: fx.GraphModule) -> list[frozenset[int]] | None:
    """For each output the numbers of the inputs it is made of; checkpoints are followed.

    A set may be too large and is never too small. None where a node writes into another one, which
    nothing in the graph says.
    """
    graphs = list(facts.nested(module))
    if any(writes(node) for graph in graphs for node in graph.graph.nodes):
        return None
    return _of_outputs(module)


def _of_outputs(module: fx.GraphModule) -> list[frozenset[int]]:
    sets: dict[fx.Node, _Found] = {}
    inputs = 0
    for node in module.graph.nodes:
        if node.op == "placeholder":
            sets[node] = frozenset({inputs})
            inputs += 1
        elif node.op == "output":
            result = node.args[0]
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            return [_of_value(value, sets) for value in outputs]
        else:
            sets[node] = _of_node(node, sets)
    return []


def _of_node(node: fx.Node, found: dict[fx.Node, _Found]) -> _Found:
    if node.target is operator.getitem:
        whole = found.get(node.args[0])  # type: ignore[arg-type]  # 2026-11-28: it is a node
        if isinstance(whole, tuple) and isinstance(node.args[1], int):
            return whole[node.args[1]]
    # a reentrant one gives zeros for a gradient that is missing, in eager mode too
    if node.target is CHECKPOINT and node.kwargs.get("use_reentrant") is False:
        inner, *operands = node.args
        body = facts.body(inner)
        if body is not None and len(body.graph.find_nodes(op="placeholder")) == len(operands):
            each = [_of_value(value, found) for value in operands]
            sets = (frozenset[int]().union(*(each[i] for i in of)) for of in _of_outputs(body))
            return tuple(sets)
    return _of_value([node.args, node.kwargs], found)


def _of_value(value: Any, found: dict[fx.Node, _Found]) -> frozenset[int]:
    """Of all nodes inside an argument."""
    sets: list[frozenset[int]] = []

    def add(node: fx.Node) -> fx.Node:
        of = found.get(node, frozenset())
        sets.extend(of if isinstance(of, tuple) else (of,))
        return node

    fx.node.map_arg(value, add)
    return frozenset[int]().union(*sets)
