"""Removing nodes that do nothing new, so that no pattern needs to know them."""

from __future__ import annotations

from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..graph.edit import is_inplace, modes, prune


def remove_noops(module: fx.GraphModule) -> int:
    """Remove dead nodes, needless casts, repeated casts, and dropouts that drop nothing.

    All are exact: casts to a tensor's own dtype and such dropouts return their very input in eager
    PyTorch, and a cast made twice in one mode (gradients, autocast) gives the same numbers twice.
    A graph that writes in place is left alone.

    Args:
        module: the captured graph; it and the graphs nested in it are changed in place.

    Returns:
        How many nodes went.
    """
    gone = 0
    for inner in facts.nested(module):
        if any(is_inplace(n) for n in inner.graph.nodes):
            continue
        gone += len(prune(inner.graph, [n for n in reversed(inner.graph.nodes) if _is_dead(n)]))
        casts: dict[object, fx.Node] = {}
        mode = modes(inner.graph)
        for node in list(inner.graph.nodes):
            canon = canonical(node)
            same = node.args[0] if _is_noop(node) else None
            if same is None and canon is not None and canon.name == "cast":
                same = casts.setdefault((canon.args, mode[node]), node)
            if isinstance(same, fx.Node) and same is not node:
                node.replace_all_uses_with(same)
                inner.graph.erase_node(node)
                gone += 1
        inner.recompile()
    return gone


def _is_dead(node: fx.Node) -> bool:
    """Whether a node has no users and only computes (mode switches have no users either)."""
    asks_size = node.op == "call_method" and node.target in ("size", "dim", "numel", "stride")
    return not node.users and (asks_size or canonical(node) is not None)


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
