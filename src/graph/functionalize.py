"""Turning writes in place into values, where that is exact, so that patterns can see them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..kernels.captured import KNOWS_MARK_DIRTY
from ..kernels.linear.formula import assigned, is_new
from ..kernels.moe.moe_experts import inverse_permutation
from . import facts
from .canon import canonical
from .cleanup import prune
from .effects import Effects, is_opaque, modes, needs_gradient, writes
from .opaque.autograd_functions import is_wrapped


def require_marked_writes(effects: Effects) -> None:
    """Refuse a graph of a PyTorch that forgets ``ctx.mark_dirty``: NotImplementedError."""
    # Its gradients would be wrong. That version (2.11) also loses the gradient of a function that
    # returns what it has made twice: there, what it has written to is a separate output.
    if KNOWS_MARK_DIRTY:
        return
    for inner in effects.graphs:
        for node in filter(is_wrapped, inner.graph.nodes):
            if any(map(needs_gradient, effects.writes.get(node, ()))):
                raise NotImplementedError(
                    f"an autograd function writes to its input: PyTorch {torch.__version__} does "
                    "not capture that"
                )
            if _returns_twice(node):
                raise NotImplementedError(
                    f"an autograd function writes to its output: PyTorch {torch.__version__} loses "
                    "its gradient"
                )


def _returns_twice(call: fx.Node) -> bool:
    body = facts.body(call.args[0])
    if body is None:
        return True
    outputs: Any = body.graph.output_node().args[0]
    seen: set[int] = set()
    for node in outputs[0]:
        memory = facts.memories(node) if isinstance(node, fx.Node) else set()
        if memory & seen:
            return True
        seen |= memory
    return False


def remove_writes(module: fx.GraphModule) -> int:
    """Turn some writes in place into values, exactly, so that patterns can see them.

    ``inverse = empty_like(order); inverse[order] = arange(n)`` with the order of a sort;
    ``y += b``, ``y.masked_fill_(mask, 0)``, ``silu(y, inplace=True)`` of a fresh y with one name;
    what LLM.int8() writes: a scaled cast of its integers, and a weight to where it is already; and
    parts of a fresh tensor of constant sizes, as codes are unpacked.

    Changes ``module`` and the graphs nested in it in place; returns how many writes went.
    """
    removed = 0
    for inner in facts.nested(module):
        for node in list(inner.graph.nodes):
            removed += (
                _inverts(node) or _assigns(node) or _changes(node) or _scales(node) or _stays(node)
            )
        inner.recompile()
    return removed


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
        permutation = graph.call_function(inverse_permutation, (order,))
    permutation.meta.update(inverse.meta)
    graph.erase_node(node)
    inverse.replace_all_uses_with(permutation)
    prune(graph, [inverse, places])
    return True


def _assigns(node: fx.Node) -> bool:
    """Replace ``y[slices] = value``, of a fresh y of constant sizes, by a value for later nodes."""
    if node.target is not operator.setitem or node.users:
        return False
    y, index, value = node.args
    is_known = is_new(y) or getattr(y, "target", None) is assigned
    t, v = facts.tensor(y), facts.tensor(value)
    if not isinstance(y, fx.Node) or not is_known or t is None or v is None:
        return False
    constant = all(type(s) is int for s in (*t.shape, *v.shape)) and not v.requires_grad
    places = index if isinstance(index, tuple) else (index,)
    if not constant or not all(i is Ellipsis or isinstance(i, slice) for i in places):
        return False
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    if _has_alias(y, node, order):
        return False
    earlier = {n for n in y.users if order[n] < order[node]}
    with node.graph.inserting_before(node):
        after = node.graph.call_function(assigned, (y, index, value))
    after.meta.update({k: v for k, v in node.meta.items() if k != "example_value"})
    after.meta["example_value"] = _value_of(after)
    y.replace_all_uses_with(after, delete_user_cb=lambda u: u not in (after, node, *earlier))
    node.graph.erase_node(node)
    return True


def _changes(node: fx.Node) -> bool:
    """Replace ``y.add_(b)``, ``y += b``, ``relu(y, True)`` ... by a value that later nodes use."""
    # only for a fresh y that has no other name, and where the value has y's dtype and layout
    y = node.args[0] if node.args else None
    if not isinstance(y, fx.Node) or writes(node) != (y,):
        return False
    names = _only_names(y)
    if not _is_fresh(names[-1]):
        return False
    mode = modes(node.graph)  # a write keeps y's history under no_grad; a new value would have none
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    if mode[node] != mode[y] or _has_alias(names[-1], node, order, names):
        return False
    new_node = _as_value(node)
    before, after = facts.tensor(y), None if new_node is None else facts.tensor(new_node)
    if new_node is None or before is None or after is None or not _is_alike(before, after):
        if new_node is not None:
            node.graph.erase_node(new_node)
        return False
    earlier = {n for n in y.users if order.get(n, -1) < order[node]}
    for old in (node, y):
        old.replace_all_uses_with(
            new_node, delete_user_cb=lambda user: user not in (new_node, node, *earlier)
        )
    node.graph.erase_node(node)
    prune(node.graph, [new_node])
    return True


_OPERATORS = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ipow: operator.pow,
}  # fmt: skip
_METHODS = (
    "add", "sub", "mul", "div", "pow", "neg", "rsqrt", "sqrt", "reciprocal", "tanh", "sigmoid",
    "exp", "abs", "sin", "cos", "relu", "masked_fill", "clamp",
)  # fmt: skip
_FUNCTIONS = (F.relu, F.silu)
"""Functions that change each element by itself, and draw no random numbers: what they write is,
bit for bit, what they would return."""


def _as_value(node: fx.Node) -> fx.Node | None:
    """The same operation as one that returns a value, put before ``node``; None of others."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    op = node.op
    if node.op == "call_method" and str(target).removesuffix("_") in _METHODS:
        target = str(target).removesuffix("_")
    elif target in _OPERATORS:
        target = _OPERATORS[target]
    elif target in _FUNCTIONS:
        args, kwargs = args[:1], {}
    else:
        return None
    with node.graph.inserting_before(node):
        new_node = node.graph.create_node(op, target, args, kwargs)
    new_node.meta.update({k: v for k, v in node.meta.items() if k != "example_value"})
    new_node.meta["example_value"] = _value_of(new_node)
    return new_node


def _value_of(node: fx.Node) -> Any:
    """What ``node`` gives for the example values of its arguments; None where it cannot run."""
    args: Any = fx.node.map_arg(node.args, facts.value)
    kwargs: Any = fx.node.map_arg(node.kwargs, facts.value)
    call: Any = node.target
    if node.op == "call_method":
        call, args = getattr(args[0], str(node.target)), args[1:]
    try:
        return call(*args, **kwargs)
    except Exception:  # whatever an operator says of what it does not take
        return None


def _is_alike(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and str(a.shape) == str(b.shape)
    return same and str(a.stride()) == str(b.stride())


def _scales(node: fx.Node) -> bool:
    """Replace ``n.to(dtype).mul_(s)`` of integers n by ``n.to(dtype).mul(s).to(dtype)``."""
    # both multiply in the wider dtype of the two and round once
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
        cast = graph.call_method("to", (product, before.dtype))
    product.meta.update({**node.meta, "example_value": before * scale})
    cast.meta.update(node.meta)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
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


def _is_fresh(y: fx.Node) -> bool:
    """Whether ``y`` is new memory: from an operation that is known, and no view of its inputs."""
    # a part of several values is, if they do not share their memory
    memory, holder = facts.storage(y), y
    if y.target is operator.getitem and isinstance(y.args[0], fx.Node):
        source = facts.value(y.args[0])
        if isinstance(source, (tuple, list)):
            holder = y.args[0]
            if sum(facts.memory(t) == memory for t in source if isinstance(t, Tensor)) != 1:
                return False
    if memory is None or holder.op not in ("call_function", "call_method") or is_opaque(holder):
        return False
    if isinstance(holder.target, torch._ops.HigherOrderOperator):
        return False
    inputs = holder.all_input_nodes
    if any(facts.value(n) is None for n in inputs):
        return False
    return all(memory not in facts.memories(n) for n in inputs)


def _only_names(y: fx.Node) -> list[fx.Node]:
    """``y``, and what it is a view of, as long as nobody else reads that."""
    names = [y]
    while (of := names[-1]).op == "call_method" and of.target in ("view", "reshape"):
        source = of.args[0]
        if not isinstance(source, fx.Node) or set(source.users) != {of}:
            break
        names.append(source)
    return names


def _has_alias(
    y: fx.Node, last: fx.Node, order: dict[fx.Node, int], names: Sequence[fx.Node] = ()
) -> bool:
    """Whether a node before ``last`` may hold the memory of ``y``; ``names`` are known to."""
    memory = facts.storage(y)
    holder = y.args[0] if y.target is operator.getitem else None
    for node in y.graph.nodes:
        if order[node] >= order[last]:
            break
        if node is y or node is holder or node in names:
            continue
        unknown = facts.value(node) is None and y in node.all_input_nodes
        if unknown or memory in facts.memories(node):
            return True
    return False
