"""Removing nodes that do nothing, so that no pattern needs to know them."""

from __future__ import annotations

from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..graph.edit import is_inplace


def remove_noops(module: fx.GraphModule) -> int:
    """Remove casts to the dtype that a tensor has, and dropouts that drop nothing.

    Both return their very input in eager PyTorch, so that this changes nothing, aliasing included.
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
        for node in list(inner.graph.nodes):
            if _is_noop(node):
                node.replace_all_uses_with(node.args[0])
                inner.graph.erase_node(node)
                gone += 1
        inner.recompile()
    return gone


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
