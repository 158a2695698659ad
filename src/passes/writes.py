"""Turning writes in place into values, where that is exact, so that patterns can see them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..graph.canon import canonical
from ..graph.edit import modes, prune
from ..kernels.moe_experts import inverse_permutation


def remove_writes(module: fx.GraphModule) -> int:
    """Turn some writes in place into values, exactly, so that patterns can see them.

    ``inverse = empty_like(order); inverse[order] = arange(n)`` with the order of a sort;
    ``y.add_(b)``, ``y.masked_fill_(mask, 0)``, ``y.clamp_(max=n)`` of a fresh y without views; and
    what LLM.int8() writes: a scaled cast of its integers, and a weight to where it is already.

    Args:
        module: the captured graph; it and the graphs nested in it are changed in place.

    Returns:
        How many writes went.
    """
    gone = 0
    for inner in facts.nested(module):
        for node in list(inner.graph.nodes):
            gone += _inverts(node) or _changes(node) or _scales(node) or _stays(node)
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


_FRESH = ("grouped_mm", "linear", "matmul", "index")
_WRITES = ("add_", "masked_fill_", "clamp_")


def _changes(node: fx.Node) -> bool:
    """Replace ``y.add_(b)`` and the like by ``y.add(b)``, for a fresh y that has no other name."""
    if node.op != "call_method" or node.target not in _WRITES or not node.args:
        return False
    y, graph = node.args[0], node.graph
    before = facts.tensor(y)
    if not isinstance(y, fx.Node) or before is None or not _is_fresh(y):
        return False
    for operand in node.all_input_nodes[1:]:
        t = facts.tensor(operand)
        if t is None or t.dtype not in (before.dtype, torch.bool):
            return False
        if node.target == "add_" and str(t.shape) != str(before.shape):
            return False
    mode = modes(graph)  # a write keeps y's history under no_grad, and a new value would have none
    order = {n: i for i, n in enumerate(graph.nodes)}
    if mode[node] != mode[y] or _has_alias(y, node, order):
        return False
    earlier = {n for n in y.users if order[n] < order[node]}
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


def _scales(node: fx.Node) -> bool:
    """Replace ``n.to(dtype).mul_(s)`` of integers n by ``n.to(dtype).mul(s).to(dtype)``.

    Both multiply in the wider dtype of the two and round once.
    """
    y = node.args[0] if node.target == "mul_" and node.op == "call_method" else None
    if not isinstance(y, fx.Node) or len(node.args) != 2 or set(y.users) != {node}:
        return False
    before, scale = facts.tensor(y), facts.tensor(node.args[1])
    integers = facts.dtype(y.args[0]) if y.target == "to" and y.args else None
    if before is None or scale is None or integers is None or integers.is_floating_point:
        return False
    if not (before.is_floating_point() and 0 < scale.dim() <= before.dim()):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        product = graph.call_method("mul", node.args)
        made = graph.call_method("to", (product, before.dtype))
    product.meta.update({**node.meta, "example_value": before * scale})
    made.meta.update(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    graph.erase_node(node)
    return True


def _stays(node: fx.Node) -> bool:
    """Remove ``w.set_(v)`` where w lies in the memory of v already, in the same way."""
    if getattr(node.target, "__name__", "") != "set_" or len(node.args) != 2:
        return False
    w, v = (facts.tensor(a) for a in node.args)
    if w is None or v is None or facts.memory(w) != facts.memory(v):
        return False
    same = w.shape == v.shape and w.stride() == v.stride() and w.dtype == v.dtype
    counts = [u for u in node.users if "lower_version_count" in getattr(u.target, "__name__", "")]
    if not same or w.storage_offset() != v.storage_offset() or len(counts) != len(node.users):
        return False
    for user in counts:
        if user.users:
            return False
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _sort_of(y: fx.Node) -> fx.Node | None:
    """The sort that ``y`` is a result of, or None."""
    item = canonical(y)
    source = canonical(item.args[0]) if item is not None and item.name == "item" else None
    return item.args[0] if item and source is not None and source.name == "sort" else None


def _is_fresh(y: fx.Node) -> bool:
    """Whether ``y`` is a new tensor: a product, a gathering, a result of a sort."""
    made_by = canonical(y)
    return made_by is not None and (made_by.name in _FRESH or _sort_of(y) is not None)


def _has_alias(y: fx.Node, last: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a node before ``last`` may hold the memory of ``y``, alone or among other values."""
    own, holder = facts.storage(y), _sort_of(y)
    for node in y.graph.nodes:
        if order[node] >= order[last]:
            break
        if node is y or node is holder:
            continue
        value = facts.value(node)
        if (value is None and y in node.all_input_nodes) or own in _memories(value):
            return True
    return False


def _memories(value: Any) -> Iterator[Any]:
    """The memory of every tensor in ``value``."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _memories(part)
    elif isinstance(value, Tensor):
        yield facts.memory(value)
