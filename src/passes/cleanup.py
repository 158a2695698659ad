"""Removing nodes that do nothing new, so that no pattern needs to know them."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..graph.edit import is_inplace, prune
from ..kernels.moe_experts import inverse_permutation


def remove_noops(module: fx.GraphModule) -> int:
    """Remove dead nodes, needless casts, repeated casts, and dropouts that drop nothing.

    All are exact: casts to a tensor's own dtype and such dropouts return their very input in eager
    PyTorch, and a cast made twice gives the same numbers twice. A graph that writes in place is
    left alone.

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
        casts: dict[tuple[object, ...], fx.Node] = {}
        for node in list(inner.graph.nodes):
            canon = canonical(node)
            same = node.args[0] if _is_noop(node) else None
            if same is None and canon is not None and canon.name == "cast":
                same = casts.setdefault(canon.args, node)
            if isinstance(same, fx.Node) and same is not node:
                node.replace_all_uses_with(same)
                inner.graph.erase_node(node)
                gone += 1
        inner.recompile()
    return gone


def remove_writes(module: fx.GraphModule) -> int:
    """Turn some writes in place into values, exactly, so that patterns can see them.

    ``inverse = empty_like(order); inverse[order] = arange(n)`` with the order of a sort; and
    ``y.add_(b)``, ``y.masked_fill_(mask, 0)``, ``y.clamp_(max=n)`` of a fresh y without views.

    Args:
        module: the captured graph; it and the graphs nested in it are changed in place.

    Returns:
        How many writes went.
    """
    gone = 0
    for inner in facts.nested(module):
        for node in list(inner.graph.nodes):
            gone += _inverts(node) or _changes(node)
        inner.recompile()
    return gone


def _inverts(node: fx.Node) -> bool:
    """Replace the inversion of a permutation that ends with ``node``, if it is one."""
    if node.target is not operator.setitem or node.users:
        return False
    inverse, order, places = node.args
    if not isinstance(inverse, fx.Node) or not isinstance(order, fx.Node):
        return False
    if not isinstance(places, fx.Node):
        return False
    fresh = inverse.target in (torch.empty_like, torch.zeros_like) and inverse.args == (order,)
    sort = canonical(order)
    first_use = next(iter(inverse.users), None)
    if not fresh or first_use is not node or sort is None or sort.name != "item":
        return False
    inner = canonical(sort.args[0])
    if inner is None or inner.name != "sort" or sort.args[1] != 1 or facts.ndim(order) != 1:
        return False
    if places.target is not torch.arange or len(places.args) != 1 or "step" in places.kwargs:
        return False
    n, length = facts.tensor(places), facts.tensor(order)
    if n is None or length is None or str(n.shape[0]) != str(length.shape[0]):
        return False
    if not n.dtype == length.dtype == facts.dtype(inverse):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        made = graph.call_function(inverse_permutation, (order,))
    made.meta.update(inverse.meta)
    graph.erase_node(node)
    inverse.replace_all_uses_with(made)
    prune(graph, [inverse, places])
    return True


_FRESH = ("grouped_mm", "linear", "matmul", "index", "item")
_WRITES = ("add_", "masked_fill_", "clamp_")


def _changes(node: fx.Node) -> bool:
    """Replace ``y.add_(b)`` and the like by ``y.add(b)``, for a fresh y without views."""
    if node.op != "call_method" or node.target not in _WRITES or not node.args:
        return False
    y = node.args[0]
    made_by, before = canonical(y), facts.tensor(y)
    if not isinstance(y, fx.Node) or made_by is None or before is None:
        return False
    memory = facts.storage(y)
    sources = [n for i in y.all_input_nodes for n in (i, *i.all_input_nodes)]
    if made_by.name not in _FRESH or memory in [facts.storage(n) for n in sources]:
        return False
    for operand in node.all_input_nodes[1:]:
        t = facts.tensor(operand)
        if t is None or t.dtype not in (before.dtype, torch.bool):
            return False
        if node.target == "add_" and str(t.shape) != str(before.shape):
            return False
    graph = node.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    earlier = {n for n in y.users if order[n] < order[node]}
    if any(facts.storage(n) == memory for n in earlier):
        return False
    with graph.inserting_before(node):
        made = graph.call_method(str(node.target)[:-1], node.args, node.kwargs)
    made.meta.update(node.meta)
    for old in (node, y):
        old.replace_all_uses_with(
            made, delete_user_cb=lambda user: user not in (made, node, *earlier)
        )
    graph.erase_node(node)
    prune(graph, [made])
    return True


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
