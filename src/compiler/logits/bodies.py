"""The parts of a graph that make logits and losses, and their copies as separate graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx

from ...graph import facts
from ...graph.canon import canonical
from ...graph.opaque.autograd_functions import is_wrapped

_CHAIN = ("mul", "div", "tanh", "cast", "contiguous")


def logits_chain(node: fx.Node, heads: set[Any] | None) -> list[fx.Node]:
    """The nodes from the projection to ``node``, or nothing when they are no logits."""
    # the projection is by one of ``heads``; where these are not known, one to a larger dimension
    chain: list[fx.Node] = []
    while True:
        canon = canonical(node)
        if canon is None:
            return []
        chain.append(node)
        if canon.name == "linear":
            is_ours = _widens(canon.args[1]) if heads is None else canon.args[1] in heads
            return chain[::-1] if is_ours else []
        inner = [a for a in canon.args if isinstance(a, fx.Node)]
        if canon.name not in _CHAIN or len(inner) != 1:
            return []
        node = inner[0]


def _widens(weight: Any) -> bool:
    rows, columns = facts.size(weight, 0), facts.size(weight, 1)
    return rows is not None and columns is not None and rows > columns


def descendants(node: fx.Node) -> set[fx.Node]:
    """All nodes that are computed from a node."""
    result: set[fx.Node] = set()
    queue = [node]
    while queue:
        new = [u for u in queue.pop().users if u not in result]
        result.update(new)
        queue += new
    return result


def logits_graph(chain: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """The logits as a graph of their inputs, and these inputs."""
    body = fx.Graph()
    # an autograd function's, whose numbers are no tensors to save
    operands = _own_function(chain[0])
    first = chain[0].all_input_nodes if operands is None else [a for a in operands if a is not None]
    later = (i for n in chain[1:] for i in n.all_input_nodes if i not in chain)
    inputs = list(dict.fromkeys([*first, *later]))
    env = {n: body.placeholder(f"input_{i}") for i, n in enumerate(inputs)}
    for n in chain:
        if operands is not None and n is chain[0]:
            args = tuple(None if a is None else env[a] for a in operands)
            env[n] = body.call_function(F.linear, args)
            continue
        env[n] = body.node_copy(n, lambda a: env[a])
    body.output(env[chain[-1]])
    return body, inputs


def _own_function(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of a linear that is an autograd function; None for any other linear."""
    canon = canonical(node)
    return canon.args if canon is not None and any(map(is_wrapped, canon.via)) else None


def loss_graph(
    root: fx.Node, logits: fx.Node, present: Mapping[str, fx.Node]
) -> tuple[fx.Graph, list[str]]:
    """The loss as a graph of the logits and of nodes that there still are, and their names."""
    body, inside = fx.Graph(), descendants(logits)
    env = {logits: body.placeholder("logits")}
    nodes, queue = {root}, [root]
    inputs: list[fx.Node] = []
    while queue:
        for n in queue.pop().all_input_nodes:
            if n in nodes or n is logits:
                continue
            nodes.add(n)
            if n.op == "placeholder" or (n not in inside and n.name in present):
                inputs.append(n)
            else:
                queue.append(n)
    for i, n in enumerate(inputs):
        env[n] = body.placeholder(f"input_{i}")
    for n in root.graph.nodes:
        if n in nodes and n not in env:
            env[n] = body.node_copy(n, lambda a: env[a])
    body.output(env[root])
    return body, [n.name for n in inputs]


def history_is_small(chain: list[fx.Node]) -> bool:
    """Whether the history of the logits keeps nothing of their size."""
    return all(
        (c := canonical(n)) is not None and c.name != "tanh" and len(n.all_input_nodes) == 1
        for n in chain[1:]
    )
