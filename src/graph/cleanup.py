"""Removing nodes that do nothing new, so that no pattern needs to know them."""

from __future__ import annotations

from torch import fx

from . import facts
from .canon import canonical
from .edit import modes, prune
from .effects import has_effect, writes


def remove_noops(module: fx.GraphModule) -> int:
    """Remove dead nodes, needless casts, repeated casts, and dropouts that drop nothing.

    All are exact: casts to a tensor's own dtype and such dropouts return their very input in eager
    PyTorch, and a cast made twice in one mode (gradients, autocast) gives the same numbers twice.
    Two casts remain two tensors where a write could tell: in the graph, or by whoever gets one.

    Changes ``module`` and the graphs nested in it in place; returns how many nodes went.
    """
    removed = 0
    for inner in facts.nested(module):
        removed += len(prune(inner.graph, [n for n in reversed(inner.graph.nodes) if _is_dead(n)]))
        for node in list(inner.graph.nodes):
            if _is_noop(node):
                node.replace_all_uses_with(node.args[0])
                inner.graph.erase_node(node)
                removed += 1
        removed += _merge_casts(inner.graph)
        inner.recompile()
    return removed


def _merge_casts(graph: fx.Graph) -> int:
    """Make equal casts of one value once; returns how many went."""
    # not those to fewer bits whose gradients are wanted: these are added up behind the casts, with
    # more bits
    mode, removed = modes(graph), 0
    targets = [t for n in graph.nodes for t in writes(n)]
    if not all(facts.memories(t) for t in targets):
        return 0
    written = {m for t in targets for m in facts.memories(t)}
    output = graph.output_node()
    leaving = {m for n in output.all_input_nodes for m in facts.memories(n)}
    casts: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        canon = canonical(node)
        if canon is None or canon.name != "cast":
            continue
        before, after = facts.tensor(canon.args[0]), facts.tensor(node)
        if before is None or after is None:
            continue
        if after.requires_grad and after.element_size() < before.element_size():
            continue
        if facts.memories(canon.args[0]) & written or facts.memories(node) & (written | leaving):
            continue
        first = casts.setdefault((canon.args, mode[node]), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            removed += 1
    return removed


def _is_dead(node: fx.Node) -> bool:
    """Whether a node has no users and only computes (mode switches have no users either)."""
    asks_size = node.op == "call_method" and node.target in ("size", "dim", "numel", "stride")
    return not node.users and (asks_size or canonical(node) is not None) and not has_effect(node)


def _is_noop(node: fx.Node) -> bool:
    canon = canonical(node)
    if canon is None or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if canon.name == "cast":
        only_dtype = "copy" not in node.kwargs and len(node.args) <= 2
        return only_dtype and facts.dtype(node) == facts.dtype(node.args[0])
    if canon.name == "dropout":
        return canon.args[1] == 0.0 or canon.args[2] is False
    return False
