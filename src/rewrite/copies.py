"""Copies of tensors that our ops keep for backward and the graph writes into afterwards.

Eager PyTorch often keeps something else: of a norm over bf16 its fp32 copy, of a sigmoid or a relu
the result. There, model code may write into the norm's input or the gate at once
(``x += f(norm(x))``), and where our op keeps that very tensor, backward would refuse it.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import fx

from ..graph import facts
from ..graph.effects import Effects
from ..graph.signatures import is_builtin


def copy_what_is_written(effects: Effects, open_to_writes: bool = False) -> int:
    """Give each op of ours a copy of what it may keep and the graph writes into later, in place.

    An op may keep each of its inputs, and the outputs that ``Op.saved_outputs`` names. Nested
    graphs are changed too. With ``open_to_writes``, the graph's results, and those inputs that it
    writes into, may be written into by its caller. Returns how many copies are made.
    """
    copies, mode, last_writes = 0, effects.modes, effects.last_writes
    leaving = effects.returned if open_to_writes else set()
    for inner in effects.graphs:
        order = {n: i for i, n in enumerate(inner.graph.nodes)}
        # memory -> place of the last write into it
        last = {memory: order[n] for memory, n in last_writes[inner.graph].items()}
        if inner is effects.module:
            placeholders = inner.graph.find_nodes(op="placeholder")
            inputs = {m for n in placeholders for m in facts.memories(n)}
            # what the graph lets alone is copied by who calls it
            left = leaving - inputs | (inputs & last.keys() if open_to_writes else set())
            last.update(dict.fromkeys(left, order[inner.graph.output_node()]))
        if not last:
            continue
        for node in list(order):
            if mode[node][0] and _may_keep(node):
                copies += _copy_inputs(node, last, order[node])
                copies += _copy_outputs(node, last, order[node])
        inner.graph.lint()
        inner.recompile()
    return copies


def _may_keep(node: fx.Node) -> bool:
    # a rule may also emit PyTorch's functions, which keep what they keep in eager mode
    by_rule = "fusewright_rule" in node.meta and node.op == "call_function"
    is_op = by_rule and not is_builtin(node.target)
    return is_op and any(map(_needs_grad, node.all_input_nodes))


def _needs_grad(node: fx.Node) -> bool:
    t = facts.tensor(node)
    return t is None or t.requires_grad


def _copy_inputs(node: fx.Node, last: dict[int, int], place: int) -> int:
    sources = [n for n in node.all_input_nodes if _is_written_after(n, last, place)]
    for source in sources:
        with node.graph.inserting_before(node):
            copy = _copied(source)
        node.replace_input_with(source, copy)
    return len(sources)


def _copy_outputs(node: fx.Node, last: dict[int, int], place: int) -> int:
    indices = getattr(node.meta.get("fusewright_op"), "saved_outputs", ())
    if facts.tensor(node) is None:
        items = [u for u in node.users if u.target is operator.getitem and u.args[1] in indices]
    else:  # it is the only output
        items = [node] if indices else []
    sources = [u for u in items if _is_written_after(u, last, place)]
    for source in sources:
        with node.graph.inserting_after(source):
            copy = _copied(source)
        source.replace_all_uses_with(copy, delete_user_cb=functools.partial(operator.is_not, copy))
    return len(sources)


def _is_written_after(node: fx.Node, last: dict[int, int], place: int) -> bool:
    return any(last.get(m, -1) > place for m in facts.memories(node))


def _copied(node: fx.Node) -> fx.Node:
    copy = node.graph.call_method("clone", (node,))
    copy.meta.update(node.meta)
    value: Any = facts.value(node)
    copy.meta["example_value"] = value.clone() if value is not None else None
    return copy
