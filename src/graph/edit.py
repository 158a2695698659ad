"""Changing graphs: what switches a mode, and removing what is dead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from . import facts
from .effects import has_effect, writes


def switches_mode(node: fx.Node) -> bool:
    """Whether what follows the node runs in another mode: gradients, autocast, inference, vmap."""
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return (
        name.startswith(("_enter_", "_exit_"))
        or "set_grad_enabled" in name
        or name.endswith(("_increment_nesting", "_decrement_nesting", "_hooks_disable"))
    )


def modes(graph: fx.Graph) -> dict[fx.Node, tuple[Any, ...]]:
    """The mode in which each node runs: gradients on or off, and what was entered and not left.

    Two nodes of a graph with equal modes run alike, whatever was switched between them. The graph
    begins in the mode in which it is captured.
    """
    grad: Any = torch.is_grad_enabled()
    entered: tuple[Any, ...] = ()
    found = {}
    for node in graph.nodes:
        found[node] = (grad, *entered)
        if not switches_mode(node):
            continue
        name = getattr(node.target, "__name__", "")
        if "set_grad_enabled" in name:
            grad = node.args[0]
        elif name.startswith("_exit_") and entered and node.args[:1] == entered[-1:]:
            entered = entered[:-1]
        else:  # entered, or something that is not known to be undone
            entered = (*entered, node)
    return found


def prune(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Erase those of ``nodes`` that nobody uses any more, and what only they used.

    Other dead nodes stay: in a captured graph a node without users may switch a mode (autocast,
    gradients, vmap) and is not dead at all. Nor is what writes or draws random numbers.

    Args:
        graph: changed in place.
        nodes: in reverse graph order.

    Returns:
        The erased nodes.
    """
    gone: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop(0)
        if node in gone or node.users or node.op in ("placeholder", "output"):
            continue
        if has_effect(node) or switches_mode(node):
            continue
        queue += [n for n in node.all_input_nodes if n.op in ("call_function", "call_method")]
        graph.erase_node(node)
        gone.add(node)
    return gone


def needs_gradient(node: fx.Node) -> bool:
    """Whether a node's value, or a part of it, needs a gradient."""
    found = facts.value(node)
    values = found if isinstance(found, (tuple, list)) else (found,)
    return any(isinstance(t, Tensor) and t.requires_grad for t in values)


def inputs_without_gradient(module: fx.GraphModule) -> list[int]:
    """The inputs that need a gradient and get none: what is used under ``no_grad`` alone.

    Eager mode does not know of them.
    """
    graph = module.graph
    mode = modes(graph)
    reached = {graph.output_node()}
    for node in reversed(graph.nodes):
        passes = (node in reached and node.target not in _DETACH) or writes(node)
        if passes and (node.op == "output" or mode[node][0]):
            reached.update(node.all_input_nodes)
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    return [i for i, n in inputs if needs_gradient(n) and n not in reached]


_DETACH = ("detach", torch.detach, Tensor.detach)
