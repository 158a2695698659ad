"""How much memory a piece of a graph moves, read off its example values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from . import facts


def fused(inputs: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> float:
    """Bytes per token that one pass over ``inputs`` and ``outputs`` moves."""
    # only what grows with the batch counts: weights are read either way; a token is one element of
    # the symbolic dimensions
    return sum(_per_token(n) for n in (*inputs, *outputs))


def node_by_node(nodes: Iterable[fx.Node]) -> float:
    """Bytes per token that ``nodes`` move when each runs by itself; views move nothing."""
    return sum(fused(n.all_input_nodes, (n,)) for n in nodes if not _is_view(n))


def _per_token(node: fx.Node) -> float:
    t = facts.tensor(node)
    if t is None or all(type(s) is int for s in t.shape):
        return 0.0
    constant = 1
    for s in t.shape:
        constant *= s if type(s) is int else 1
    return float(constant * t.element_size())


def _is_view(node: fx.Node) -> bool:
    """Whether the node's value lies in the memory of an input, or is a mere number."""
    value = facts.value(node)
    if not isinstance(value, Tensor):  # an op with several outputs has no example
        return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    return facts.storage(node) in [facts.storage(i) for i in node.all_input_nodes]
