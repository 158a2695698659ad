"""Changing graphs: what switches a mode, and removing what is dead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .effects import has_effect


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
    result = {}
    for node in graph.nodes:
        result[node] = (grad, *entered)
        if not switches_mode(node):
            continue
        name = getattr(node.target, "__name__", "")
        if "set_grad_enabled" in name:
            grad = node.args[0]
        elif name.startswith("_exit_") and entered and node.args[:1] == entered[-1:]:
            entered = entered[:-1]
        else:  # entered, or something that is not known to be undone
            entered = (*entered, node)
    return result


def prune(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Erase those of ``nodes`` that nobody uses any more, and what only they used; returns them.

    ``nodes`` are in reverse graph order. Other dead nodes stay: in a captured graph a node without
    users may switch a mode (autocast, gradients, vmap) and is not dead at all. Nor is what writes
    or draws random numbers.
    """
    erased: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop(0)
        if node in erased or node.users or node.op in ("placeholder", "output"):
            continue
        if has_effect(node) or switches_mode(node):
            continue
        queue += [n for n in node.all_input_nodes if n.op in ("call_function", "call_method")]
        graph.erase_node(node)
        erased.add(node)
    return erased
