"""What is known about a node's value without running it: dtype, shape, strides, gradient need.

TorchDynamo leaves a fake tensor, a number or a symbolic size in ``meta["example_value"]``; this is
the only place that reads it.
"""

from __future__ import annotations

import functools
import operator
import re
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def value(node: Any) -> Any:
    """The example value of a node (fake tensor, number, SymInt, tuple), or the constant itself."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def tensor(node: Any) -> Tensor | None:
    """The example value when it is a tensor, else None."""
    v = value(node)
    return v if isinstance(v, Tensor) else None


def real(node: Any) -> Tensor | None:
    """The tensor behind a placeholder in the call that is being captured, else None."""
    # TorchDynamo knows it while its backend runs, and forgets it afterwards
    argument = node.meta.get("grapharg") if isinstance(node, fx.Node) else None
    try:
        example = getattr(argument, "example", None)
    except AssertionError:  # it has been forgotten
        return None
    return example if type(example) in (Tensor, torch.nn.Parameter) else None


_ARGUMENT = re.compile(r"""L\[[^]]+\](\[[^]]+\])*""")


def is_argument(node: fx.Node) -> bool:
    """Whether a placeholder is an argument of the captured call, or an item of one."""
    # others are what an object holds: a module's parameter, or its buffer; what TorchDynamo says
    # nothing of is an argument
    source = getattr(node.meta.get("grapharg"), "source", None)
    name: Any = getattr(source, "name", None)
    name = name() if callable(name) else name  # torch 2.11 has a method there
    return not isinstance(name, str) or _ARGUMENT.fullmatch(name) is not None


def dtype(node: Any) -> torch.dtype | None:
    """The dtype of a node's tensor, else None."""
    t = tensor(node)
    return None if t is None else t.dtype


def ndim(node: Any) -> int | None:
    """The rank of a node's tensor, else None."""
    t = tensor(node)
    return None if t is None else t.dim()


def storage(node: Any) -> int | None:
    """What tells memory apart: equal for a tensor and its views; None for what is no tensor."""
    t = tensor(node)
    return None if t is None else memory(t)


def memories(node: Any) -> set[int]:
    """The memory of every tensor among a node's values: of one that has several, too."""
    return set(_memories(value(node)))


def _memories(found: Any) -> Iterator[int]:
    if isinstance(found, (tuple, list)):
        for part in found:
            yield from _memories(part)
    elif isinstance(found, Tensor):
        yield memory(found)


def memory(t: Tensor) -> int:
    """What tells the memory of ``t`` from that of others: equal for its views."""
    return int(t.untyped_storage()._cdata)


def size(node: Any, dim: int) -> int | None:
    """The static size of one dimension, or None when it is symbolic or unknown."""
    t = tensor(node)
    if t is None or not -t.dim() <= dim < t.dim():
        return None
    s: Any = t.shape[dim]
    return _known(s) if isinstance(s, torch.SymInt) else int(s)


def _known(size: torch.SymInt) -> int | None:
    """The only value that a symbolic size can have, else None."""
    node = size.node
    # one that was set equal to a constant keeps its old type
    known: int | None = node.maybe_as_int()
    expression = getattr(node, "expr", None)  # a nested tensor's sizes have none
    if known is not None or expression is None or expression.is_symbol or not node.has_hint():
        return known
    # ``x.view(-1, 128)`` has ``32*(s//(s//4))`` columns, which guards set equal to 128 in a product
    return int(node.hint) if statically_known_true(size == node.hint) else None


def shape_text(node: Any) -> str:
    """``bf16[s0, s1, 576]``, for reasons and printed graphs."""
    t = tensor(node)
    if t is None:
        return str(value(node))
    kind = str(t.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
    return f"{kind}[{', '.join(str(s) for s in t.shape)}]"


def nested(module: fx.GraphModule, out: Container[Any] = ()) -> Iterator[fx.GraphModule]:
    """``module`` and every graph inside it (checkpointed bodies and the like), outer first."""
    # what has left the outer graph or come into ``out``, before its turn comes, is not visited
    yield module
    for node in list(module.graph.nodes):
        inner = body(node)
        if inner is not None and not node._erased and inner not in out:
            yield from nested(inner, out)


def bodies(graph: fx.Graph, names: Container[str]) -> set[fx.GraphModule]:
    """The graphs that the nodes of these names refer to or are called with."""
    nodes = (n for n in graph.nodes if n.name in names)
    candidates = (body(part) for n in nodes for part in (n, *n.all_input_nodes))
    return {b for b in candidates if b is not None}


def captured_name(node: fx.Node) -> str:
    """The name of the captured node whose value ``node`` has: its own, unless it replaced one."""
    name: str = node.meta.get("fusewright_replaces", node.name)
    return name


def body(node: Any) -> fx.GraphModule | None:
    """The graph that a node refers to (of a checkpointed part, an autograd function), or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or "." in str(node.target):
        return None
    attribute = getattr(node.graph.owning_module, str(node.target), None)
    return attribute if isinstance(attribute, fx.GraphModule) else None


def home(node: fx.Node) -> str:
    """The path, inside the captured module, of the module whose code made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        name = entry[0] if isinstance(entry, tuple) else str(entry)
        path = name
    return _clean(path)


def common_home(nodes: list[fx.Node]) -> str:
    """The innermost module path that holds all of ``nodes``."""
    computed = [n for n in nodes if n.op not in ("placeholder", "get_attr")]
    paths = [home(n).split(".") for n in computed if not _is_homeless(n)]
    if not paths:
        return ""
    shared = paths[0]
    for path in paths[1:]:
        keep = 0
        while keep < min(len(shared), len(path)) and shared[keep] == path[keep]:
            keep += 1
        shared = shared[:keep]
    return ".".join(p for p in shared if p)


def _is_homeless(node: fx.Node) -> bool:
    """Whether a node is a captured autograd function, or its result, which have no module noted."""
    call = node.args[0] if node.target is operator.getitem else node
    wrapped = getattr(call, "target", None) is torch.ops.higher_order.autograd_function_apply
    return wrapped and not node.meta.get("nn_module_stack")


def _clean(path: str) -> str:
    """Turn Dynamo's ``L['self']._modules['a']._modules['0'].b`` into ``a.0.b``."""
    # the first part is the argument that holds the captured module, whatever it is called
    text = re.sub(r"""^L\[(['"])\w+\1\](\[\d+\])?""", "", path)
    for old, new in (
        (".forward.__self__", ""),
        ("._modules['", "."), ("_modules['", "."), ("']", ""), ("[", "."), ("]", ""), ("'", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    return text.strip(".")


class _Kept(threading.local):
    """What ``kept`` functions have found of the nodes of one graph."""

    graph: fx.Graph | None = None

    def __init__(self) -> None:
        self.found: dict[tuple[Any, fx.Node], Any] = {}


_kept = _Kept()
_T = TypeVar("_T")


def kept(find: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """Let ``find``, a function of a node, look at it once as long as its graph stays the same."""

    @functools.wraps(find)
    def looked_up(node: Any) -> _T:
        if not isinstance(node, fx.Node) or node.graph is not _kept.graph:
            return find(node)
        key = find, node
        if key not in _kept.found:
            _kept.found[key] = find(node)
        result: _T = _kept.found[key]
        return result

    return looked_up


@contextmanager
def unchanged(graph: fx.Graph | None) -> Iterator[None]:
    """Say that ``graph`` stays the same, except under ``changing``; of None nothing is kept."""
    before = _kept.graph, _kept.found
    _kept.graph, _kept.found = graph, {}
    try:
        yield
    finally:
        _kept.graph, _kept.found = before


@contextmanager
def changing() -> Iterator[None]:
    """Say that the graph that was said to stay the same changes: what was found is forgotten."""
    _kept.found.clear()
    with unchanged(None):
        yield
