"""Deferring the logits that a graph returns beside the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..graph.canon import canonical
from ..graph.edit import prune
from ..graph.effects import writes
from ..lazy import LazyLogits

_CHAIN = ("mul", "div", "tanh", "cast", "contiguous")


def defer_logits(module: fx.GraphModule) -> int:
    """Make returned logits lazy, where the loss does not need them any more.

    A returned value is logits when it is a projection (and scalings, soft cap and casts of it)
    that reads the same rows or the same head as a ``linear_cross_entropy`` of this graph, and
    when nothing but the graph's output uses it.

    Args:
        module: the graph after the rules; changed in place.

    Returns:
        How many outputs became lazy.
    """
    graph = module.graph
    heads = {
        c.args[1] for n in graph.nodes if (c := canonical(n)) and c.name == "linear_cross_entropy"
    }
    output = next(reversed(graph.nodes))
    written = {m for n in graph.nodes for t in writes(n) for m in facts.memories(t)}
    made = 0
    for node in dict.fromkeys(output.all_input_nodes):
        chain = _logits_chain(node, heads)
        if not chain or any(u is not output and u not in chain for n in chain for u in n.users):
            continue
        if any(facts.memories(n) & written for c in chain for n in (c, *c.all_input_nodes)):
            continue
        _defer(module, node, chain, made)
        prune(graph, reversed(chain))
        made += 1
    if made:
        graph.lint()
        module.recompile()
    return made


def _logits_chain(node: fx.Node, heads: set[Any]) -> list[fx.Node]:
    """The nodes from the projection to ``node``, or nothing when they are no logits."""
    chain: list[fx.Node] = []
    while True:
        canon = canonical(node)
        if canon is None:
            return []
        chain.append(node)
        if canon.name == "linear":
            return chain[::-1] if canon.args[1] in heads else []
        inner = [a for a in canon.args if isinstance(a, fx.Node)]
        if canon.name not in _CHAIN or len(inner) != 1:
            return []
        node = inner[0]


def _defer(module: fx.GraphModule, node: fx.Node, chain: list[fx.Node], index: int) -> None:
    body = fx.Graph()
    inputs = list(dict.fromkeys(i for n in chain for i in n.all_input_nodes if i not in chain))
    env = {n: body.placeholder(f"input_{i}") for i, n in enumerate(inputs)}
    for n in chain:
        env[n] = body.node_copy(n, lambda a: env[a])
    body.output(env[node])
    name = f"lazy_logits_{index}"
    module.add_submodule(name, fx.GraphModule({}, body))
    linear = canonical(chain[0])
    rows, head = (linear.args[0], linear.args[1]) if linear else (None, None)
    with module.graph.inserting_after(node):
        body_node = module.graph.get_attr(name)
    with module.graph.inserting_after(body_node):
        lazy = module.graph.call_function(
            lazy_logits, (body_node, rows, head, facts.dtype(node), *inputs)
        )
    lazy.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    node.replace_all_uses_with(lazy, delete_user_cb=lambda user: user.op == "output")


def lazy_logits(
    body: fx.GraphModule, rows: Tensor, head: Tensor, dtype: torch.dtype, *inputs: Tensor
) -> LazyLogits:
    """The stand-in: ``body(*inputs)`` when it is read.

    Args:
        body: computes the logits.
        rows: (..., H), what the head projects; gives shape and device.
        head: (V, H), the head's weight.
        dtype: the logits' dtype.
        inputs: what ``body`` takes.
    """
    grad, device = torch.is_grad_enabled(), rows.device.type
    casting, narrow = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    needs = grad and any(t.requires_grad for t in inputs if isinstance(t, Tensor))

    def compute() -> Tensor:
        # as where the logits belong: with the gradients and the autocast of the forward pass
        with torch.set_grad_enabled(grad), torch.autocast(device, narrow, casting):
            result: Tensor = body(*inputs)
        return result

    return LazyLogits(compute, (*rows.shape[:-1], head.shape[0]), dtype, rows.device, needs)
