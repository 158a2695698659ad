"""Removing nodes that do nothing, or nothing new, so that no pattern needs to know them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from . import facts
from .canon import canonical
from .effects import Effects, has_effect, switches_mode


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
        removed += _merge_casts(inner)
        inner.recompile()
    return removed


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


def _merge_casts(module: fx.GraphModule) -> int:
    """Make equal casts of one value once; returns how many went."""
    # not those to fewer bits whose gradients are wanted: these are added up behind the casts, with
    # more bits
    graph, effects, removed = module.graph, Effects(module), 0
    targets = [t for n, targets in effects.writes.items() if n.graph is graph for t in targets]
    if not all(facts.memories(t) for t in targets):
        return 0
    mode, written, leaving = effects.modes, effects.last_writes[graph], effects.returned
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
        if written.keys() & facts.memories(canon.args[0]):
            continue
        if facts.memories(node) & (written.keys() | leaving):
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
