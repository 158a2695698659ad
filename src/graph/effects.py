"""What a node does besides giving its value: writes into memory, random draws, or anything.

Read from the schema of the operator that the node calls, with its arguments in their places: a
keyword's name alone says nothing (``F.relu(g, True)`` writes), and neither does a function's.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from . import facts
from .canon import canonical
from .opaque.functions import is_leaf
from .signatures import (
    Parameter,
    bound,
    defaults,
    is_builtin,
    is_torch,
    module_of,
    name_of,
    overloads,
    packet,
)


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes into whose memory ``node`` writes; for an opaque one, all tensors it is given."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return ()
    if is_opaque(node):
        candidates: Iterable[Any] = node.all_input_nodes
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        candidates = _written_within(node)
    else:
        candidates = _written(node)
    return tuple(dict.fromkeys(n for n in _nodes(candidates) if _may_be_tensor(n)))


def draws(node: fx.Node) -> bool:
    """Whether ``node`` takes numbers from a random generator, or changes its state."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(draws(n) for body in _bodies(node) for n in body.graph.nodes)
    if not _may_draw(node.op, node.target):
        return False
    bindings = bound(node)
    return not bindings or any(_is_active(node, each) for each in bindings)


def is_opaque(node: fx.Node) -> bool:
    """Whether nothing is known of what ``node`` does besides giving its value."""
    if node.op == "call_module":
        return True
    if node.op != "call_function" or "fusewright_rule" in node.meta or is_leaf(node.target):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return not _bodies(node)
    ours = module_of(node.target).partition(".")[0] == __name__.partition(".")[0]
    return not ours and not is_builtin(node.target) and canonical(node) is None


def has_effect(node: fx.Node) -> bool:
    """Whether ``node`` does something besides giving its value, so that it is never dead."""
    return is_opaque(node) or bool(writes(node)) or draws(node)


def _written(node: fx.Node) -> Iterator[Any]:
    """The arguments of a known function that it writes into; nodes, or lists of them."""
    if _named_as_write(node):
        yield from node.args[:1] or list(node.kwargs.values())[:1]
    yield node.kwargs.get("out")
    for binding in bound(node):
        yield from (value for p, value in binding.items() if p.written)
        by_name = {p.name: value for p, value in binding.items()}
        if by_name.get("inplace", False) is not False:
            yield next(iter(binding.values()))
        if by_name.get("max_norm") is not None:  # an embedding shortens the rows that it reads
            yield by_name.get("weight")
        # operators that keep statistics do not say so in their schema
        by_default = {**defaults(node.target), **by_name}
        flags = (by_default.get(flag, True) for flag in ("training", "use_input_stats"))
        if all(flag is not False for flag in flags):
            yield from (v for name, v in by_name.items() if name.startswith("running_"))


_IN_PLACE = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor",
    "lshift", "rshift", "concat",
)  # fmt: skip
_OPERATORS = {
    operator.setitem, operator.delitem, *(getattr(operator, f"i{name}") for name in _IN_PLACE)
}  # fmt: skip
_DUNDERS = {"__setitem__", "__delitem__", *(f"__i{name}__" for name in _IN_PLACE)}


def _named_as_write(node: fx.Node) -> bool:
    """Whether it is ``+=`` or the like, or its name says that it writes into the first argument."""
    # so does every method and function of PyTorch whose name ends in an underscore, those without a
    # schema too (``requires_grad_``, the functions of ``nn.init``)
    if node.op == "call_function" and node.target in _OPERATORS:
        return True
    name = name_of(node.target)
    ends = name.endswith("_") and not name.endswith("__") and not name.startswith("_")
    is_torch = node.op == "call_method" or module_of(node.target).partition(".")[0] == "torch"
    return (ends and is_torch) or (node.op == "call_method" and name in _DUNDERS)


@functools.cache
def _may_draw(op: str, target: Any) -> bool:
    """Whether the function draws at least with some arguments."""
    # of one in Python, the names in its code say which operators it may call
    operators = overloads(op, target)
    if operators:
        return any(_is_seeded(o) for o in operators)
    if module_of(target) == "torch.random":
        return True
    code = getattr(target, "__code__", None)
    if code is None or not is_torch(target):
        return False
    packets = (packet(name) for name in _code_names(code))
    return any(_is_seeded(getattr(p, o)) for p in packets if p is not None for o in p.overloads())


def _code_names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_code_names(c) for c in inner))


def _is_seeded(overload: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in overload.tags


def _is_active(node: fx.Node, given: Mapping[Parameter, Any]) -> bool:
    """Whether a function that may draw does so: no dropout does in evaluation, or of nothing."""
    by_name = {p.name: value for p, value in given.items()}
    if any(by_name.get(flag) is False for flag in ("train", "training")):
        return False
    default = defaults(node.target)
    share = "p" if "dropout" in name_of(node.target) else "dropout_p"
    for name in (share, "dropout"):
        if name in by_name or name in default:
            return by_name.get(name, default.get(name)) != 0
    if "training" in default and "training" not in by_name:
        return default["training"] is not False
    return True


def _written_within(node: fx.Node) -> list[fx.Node]:
    """Which inputs of a node the graphs that it runs write into."""
    bodies = _bodies(node)
    if name_of(node.target) == "autograd_function_apply":
        bodies = bodies[:1]  # the other one is its backward, which has other inputs
    memory = set()
    for body in bodies:
        inner = {m for n in body.graph.find_nodes(op="placeholder") for m in facts.memories(n)}
        targets = (t for n in body.graph.nodes for t in writes(n))
        memory |= {m for t in targets for m in facts.memories(t)} & inner
    inputs = [n for n in node.all_input_nodes if facts.body(n) is None]
    return [n for n in inputs if memory & facts.memories(n)] or (inputs if memory else [])


def _bodies(node: fx.Node) -> list[fx.GraphModule]:
    return [body for n in node.all_input_nodes if (body := facts.body(n)) is not None]


def _nodes(values: Iterable[Any]) -> Iterator[fx.Node]:
    for value in values:
        if isinstance(value, fx.Node):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _nodes(value)


def _may_be_tensor(node: fx.Node) -> bool:
    value = facts.value(node)
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor) or (value is None and facts.body(node) is None)
