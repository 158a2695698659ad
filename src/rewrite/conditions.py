"""Conditions on every match, whatever its rule: no effects, one mode, no lost alias."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import facts
from ..graph.effects import draws, modes, needs_gradient, switches_mode, writes
from ..graph.fakes import unpacks_itself
from .rule import Declined, Match


def require_pure(
    graph: fx.Graph,
    m: Match,
    interior: tuple[fx.Node, ...],
    inputs: tuple[fx.Node, ...],
    order: dict[fx.Node, int],
) -> None:
    """Decline what has effects, or reads or makes a value written to before its last node."""
    # A rewrite makes values: it would drop a write or a draw of random numbers, or make it twice.
    first, last = order[interior[0]], order[interior[-1]]
    inside = set(interior)
    touched = dict.fromkeys((*inputs, *interior))
    for node in graph.nodes:
        if not first <= order[node] <= last:
            continue
        m.require(not (node in inside and draws(node)), f"{node.name} draws random numbers", node)
        for target in writes(node):
            memory = facts.memories(target)
            hit = next((n for n in touched if n is target or memory & facts.memories(n)), None)
            where = "in the formula" if node in inside else "between the nodes of the formula"
            m.require(
                hit is None and node not in inside,
                f"{target.name} is written to by {node.name}, {where}",
                node,
            )


def require_one_mode(
    graph: fx.Graph, m: Match, interior: tuple[fx.Node, ...], place: fx.Node
) -> tuple[tuple[Any, ...], ...]:
    """The autocasts' arguments around ``place``; declines nodes that run in another mode."""
    switches = [n for n in graph.nodes if switches_mode(n)]
    if not switches:
        return ()
    mode = modes(graph)
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in interior:
        if mode[node] == mode[place] or _is_indifferent(node, mode, place):
            continue
        begin, end = sorted((order[node], order[place]))
        switch = next(n for n in switches if begin <= order[n] < end)
        reason = f"{switch.name} switches gradients or autocast between the nodes of the formula"
        raise Declined(reason, node)
    return tuple(n.args for n in mode[place][1:] if "autocast" in str(n.target))


def _is_indifferent(node: fx.Node, mode: Any, place: fx.Node) -> bool:
    # What has no gradient is the same with gradients switched on and off.
    same = tuple(mode[node][1:]) == tuple(mode[place][1:])
    return same and not any(map(needs_gradient, node.all_input_nodes))


def require_plain(m: Match, inputs: tuple[fx.Node, ...]) -> None:
    """Decline what reads tensors of a class that has its own operations: ours do not know them."""
    for node in inputs:
        t = facts.value(node)
        own = f"{node.name}, a {type(t).__name__}, has its own operations"
        m.require(not unpacks_itself(t), own, node)


def require_unshared(m: Match, inputs: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]) -> None:
    """Decline where an output shares memory with an input, or with another output."""
    # A rewrite's outputs share none: who writes into one would not reach the other.
    owners = {memory: n for n in inputs for memory in facts.memories(n)}
    for node in outputs:
        owner = next((owners[s] for s in facts.memories(node) if s in owners), None)
        m.require(
            owner is None,
            f"{node.name} lies in the memory of {owner.name if owner else ''}",
            node,
        )
        owners |= dict.fromkeys(facts.memories(node), node)


_backends: Any = torch.backends  # 2026-11-27: torch does not type all of it
_BACKENDS = _backends, _backends.cuda.matmul, _backends.mkldnn.matmul
"""Where the precision of fp32 products is set."""

_CASTING = "cpu", "cuda", "xpu", "mps"
_SUMS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)
"""Settings of the precision in which a GPU adds up products of 16 bits."""


def settings_around() -> tuple[Any, ...]:
    """The settings of the process that change results: autocast, precision, determinism.

    A graph is captured, and its rewrites are verified, under the settings that it runs under.
    """
    return (
        *((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _CASTING),
        *(b.fp32_precision for b in _BACKENDS),
        *(getattr(_backends.cuda.matmul, name) for name in _SUMS),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )
