"""Products with a stored weight, as libraries' layers leave them in a captured graph.

Those of bitsandbytes are calls of one of its operators, alone or in an autograd function that
TorchDynamo has captured; their state (scales, offset, codes) comes in as inputs of the graph. Of
all other libraries, the weight is a formula (``kernels/linear/formula.py``) of inputs of the graph
that are not trained, and that hold it in few bits.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...kernels.linear.formula import (
    KNOWN,
    described,
    fresh,
    is_new,
    name_of,
    register,
    register_expert,
)
from .. import facts
from .autograd_functions import forward

PARAMS = ("x", "bias", "tensors", "shape", "blocksize", "kind")
"""The canonical arguments; from ``tensors`` on the fields of ``kernels.quantized.Quantized``."""

_GEMM = ("A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit",
         "absmax_code", "absmax_offset")  # fmt: skip
Found = tuple[tuple[Any, ...], tuple[fx.Node, ...]]
"""The arguments, and the further nodes that belong to the operation."""


def product(node: fx.Node) -> Found | None:
    """The arguments of a product with a quantized weight; None for any other node."""
    if _name(node) == "bitsandbytes.gemm_4bit.default":
        return _four_bits(node)
    return (node.target in LINEAR and _eight_bits(node)) or _by_formula(node) or _wrapped(node)


LINEAR = (F.linear, torch._C._nn.linear)


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def _four_bits(node: fx.Node) -> Found | None:
    arguments = dict(zip(_GEMM, node.args, strict=False)) | node.kwargs
    shape = arguments.get("shapeB", ())
    if not isinstance(shape, Iterable) or any(n not in _GEMM for n in arguments):
        return None
    packed, views = _behind_views(arguments["B"])
    tensors = packed, arguments["absmax"], *(arguments.get(n) for n in _GEMM[-3:])
    tail = tuple(shape), arguments["blocksize"], arguments["quant_type"]
    return (arguments["A"], arguments.get("bias"), tensors, *tail), views


def _eight_bits(node: fx.Node) -> Found | None:
    """``linear(x, integers.to(dtype) * (absmax[:, None] / 127), bias)``."""
    if len(node.args) != 3:
        return None
    x, weight, bias = node.args
    cast: Any
    rounded = _method(weight, "to")
    scaled = _method(weight if rounded is None else rounded.args[0], "mul")
    wide, factor = scaled.args if scaled is not None and len(scaled.args) == 2 else (None, None)
    cast, per_row = _method(wide, "to"), _method(factor, "mul")
    column = None if per_row is None else _method(per_row.args[0], "unsqueeze")
    if cast is None or per_row is None or column is None or column.args[1:] not in ((1,), (-1,)):
        return None
    chain: tuple[Any, ...] = (rounded, scaled, cast, per_row, column)
    integers = cast.args[0]
    if getattr(getattr(integers, "target", None), "__name__", "") == "_get_data_attr":
        chain, integers = (*chain, integers), integers.args[0]
    parts, dtype = facts.tensor(integers), facts.dtype(weight)
    if parts is None or parts.dtype is not torch.int8 or parts.dim() != 2:
        return None
    if per_row.args[1] != 1.0 / 127.0 or dtype is not facts.dtype(wide):
        return None
    size, absmax = tuple(parts.shape), column.args[0]
    nodes = tuple(n for n in chain if n is not None)
    return (x, bias, (integers, absmax), size, size[1], "int8"), nodes


def _method(node: Any, name: str) -> fx.Node | None:
    """``node`` where it is a call of this method."""
    is_call = isinstance(node, fx.Node) and node.op == "call_method" and node.target == name
    return node if is_call else None


def _behind_views(node: Any) -> tuple[Any, tuple[fx.Node, ...]]:
    """What a weight was before bitsandbytes gave it its normal shape."""
    views: tuple[fx.Node, ...] = ()
    while isinstance(node, fx.Node) and node.target in ("view", "reshape"):
        views, node = (*views, node), node.args[0]
    return node, views


def _wrapped(node: fx.Node) -> Found | None:
    """The product that is the whole forward of an autograd function."""
    inner = forward(node)
    match = None if inner is None else product(inner.result)
    if inner is None or match is None:
        return None
    outside = inner.outside(*match)
    if outside is None:
        return None
    (x, bias, tensors, *rest), nodes = outside
    packed, views = _behind_views(tensors[0])
    return (x, bias, (packed, *tensors[1:]), *rest), (*nodes, *views)


# --- weights by formula ---------------------------------------------------------------------------
_PRODUCTS = frozenset(("matmul", "mm", "__matmul__"))
_VIEWS = frozenset(("view", "reshape"))
_LONGEST = 400
"""Nodes of the longest formula: 3-bit codes over three words take about 40."""


class Stored(NamedTuple):
    """A weight (out, in) by formula; where that is not known, all but ``unknown`` is empty."""

    tensors: tuple[fx.Node, ...] = ()  # inputs of the graph
    nodes: tuple[fx.Node, ...] = ()  # of the formula
    shape: tuple[int, int] = (0, 0)
    kind: str = ""
    unknown: str = ""


class StoredStack(NamedTuple):
    """A stack of matrices (E, out, in) by formula."""

    tensors: tuple[fx.Node, ...]  # inputs of the graph
    nodes: tuple[fx.Node, ...]  # of the formula
    rows: tuple[int, ...]  # of each tensor, one expert's; 0: all of it is every expert's
    shape: tuple[int, int]  # (out, in)
    kind: str  # of one matrix


def stored(weight: Any, transposed: bool = False) -> Stored | None:
    """The formula of a matrix (out, in), with ``transposed`` (in, out); None for any other."""
    t = facts.tensor(weight)
    formula = _formula(weight, 2)
    if t is None or formula is None or isinstance(formula, str):
        return None if formula is None else Stored(unknown=str(formula))
    inputs, nodes, graph, result = formula
    shape = (t.shape[0], t.shape[1])
    if transposed:
        shape = t.shape[1], t.shape[0]
        result = described(graph.call_method("t", (result,)), shape, t.dtype)
    graph.output(result)
    return Stored(inputs, nodes, shape, register(graph))


def stored_stack(weight: Any) -> StoredStack | None:
    """The formula of a stack of matrices, each of which is computed by itself; else None."""
    formula = _formula(weight, 3)
    if formula is None or isinstance(formula, str):
        return None
    inputs, nodes, graph, result = formula
    graph.output(result)
    expert = register_expert(graph)
    _, out, into = result.meta["formula"][0]
    return None if expert is None else StoredStack(inputs, nodes, expert[1], (out, into), expert[0])


_Parts = tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], fx.Graph, fx.Node]
"""The inputs of a formula, its nodes, a graph of copies of them without output, the result."""


def _formula(weight: Any, dims: int) -> _Parts | str | None:
    # a string: the name of the operation that is not known
    t = facts.tensor(weight)
    if t is None or t.dim() != dims or not t.is_floating_point() or not _is_constant(t):
        return None
    if weight.op not in ("call_function", "call_method"):
        return None
    nodes = _behind(weight)
    inputs = [n for n in nodes if _is_input(n)]
    if not inputs or not _are_packed(inputs, t.numel()):
        return None
    unknown = next((n for n in nodes if n not in inputs and not _is_known(n)), None)
    if unknown is not None:
        return name_of(unknown)
    graph, env = fx.Graph(), {}
    for i, node in enumerate(nodes):
        value: Any = facts.tensor(node)
        if node in inputs:
            env[node] = graph.placeholder(f"t{i}")
        elif is_new(node):
            kind = {"dtype": value.dtype, "device": value.device}
            env[node] = fresh(graph, name_of(node), value.shape, **kind)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = graph.create_node(node.op, node.target, args, kwargs, f"v{i}")
        described(env[node], value.shape, value.dtype)
    return tuple(inputs), tuple(n for n in nodes if n not in inputs), graph, env[weight]


def unknown_formula(node: fx.Node) -> str:
    """What is not known in the formula of the weight that ``node`` multiplies with, or nothing."""
    if node.op not in ("call_function", "call_method") or len(node.args) < 2:
        return ""
    is_product = node.target in LINEAR or name_of(node) in _PRODUCTS
    weight = stored(node.args[1]) if is_product else None
    return "" if weight is None else weight.unknown


def inner_tensor(weight: Any, name: str) -> Tensor:
    """What a tensor subclass holds under a name."""
    result: Tensor = getattr(weight, name)
    return result


def real_input(node: fx.Node) -> Tensor | None:
    """The tensor behind an input of a formula in the call that is being captured, else None."""
    if node.target is not inner_tensor:
        return facts.real(node)
    weight: Any = node.args[0]
    whole = getattr(weight.meta.get("grapharg"), "example", None)
    return None if whole is None else inner_tensor(whole, str(node.args[1]))


def _is_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") or node.target is inner_tensor


def _is_constant(t: Tensor) -> bool:
    return not t.requires_grad and all(type(s) is int for s in t.shape)


def _is_known(node: fx.Node) -> bool:
    # autocast widens powers on a GPU, and no formula is run under it
    widened = "pow" in name_of(node) and torch.is_autocast_enabled("cuda")
    is_tensor = isinstance(facts.value(node), Tensor)
    return is_tensor and not widened and (is_new(node) or name_of(node) in KNOWN)


def _behind(weight: fx.Node) -> list[fx.Node]:
    """What a value is computed from, in order; nothing where that depends on sizes of the call."""
    nodes: dict[fx.Node, None] = {}
    stack = [(weight, False)]
    while stack:
        node, done = stack.pop()
        if done:
            nodes[node] = None
        if done or node in nodes:
            continue
        t = facts.tensor(node)
        if len(nodes) + len(stack) > 4 * _LONGEST or t is None or not _is_constant(t):
            return []
        stack.append((node, True))
        if _is_input(node):
            continue
        stack += [(n, False) for n in reversed(node.all_input_nodes)]
    return list(nodes) if len(nodes) <= _LONGEST else []


def _are_packed(inputs: list[fx.Node], elements: int) -> bool:
    """Whether tensors hold a matrix in few bits, and none of them holds it in more."""
    tensors = [t for n in inputs if (t := facts.tensor(n)) is not None]
    wide = [t for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    codes = [t for t in tensors if not (t.is_floating_point() and t.dtype.itemsize > 1)]
    bits = max((8 * t.numel() * t.dtype.itemsize for t in codes), default=0)
    return bits >= elements and all(2 * t.numel() <= elements for t in wide)


def _by_formula(node: fx.Node) -> Found | None:
    """``linear(x, formula, bias)``, ``x @ formula``, and what libraries do around the product."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = name_of(node)
    if node.target in LINEAR:
        names = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        x, weight, bias = (names.get(n) for n in ("input", "weight", "bias"))
        found = stored(weight)
    elif name in _PRODUCTS and len(node.args) == 2:
        (x, weight), bias = node.args, None
        found = stored(weight, transposed=True)
    elif name == "addmm" and len(node.args) == 3 and not node.kwargs:
        bias, x, weight = node.args
        found = stored(weight, transposed=True) if facts.ndim(bias) == 1 else None
    elif name in _VIEWS:
        return _of_rows(node)
    elif node.target in (operator.add, torch.add) or name == "add":
        return _with_bias(node)
    else:
        return None
    rows = facts.tensor(x)
    if found is None or not found.kind or rows is None or not rows.is_floating_point():
        return None
    return (x, bias, found.tensors, found.shape, 0, found.kind), found.nodes


def _of_rows(node: fx.Node) -> Found | None:
    """``(x.view(-1, in) @ W).view(..., out)``."""
    inner: Any = node.args[0]
    is_product = isinstance(inner, fx.Node) and name_of(inner) in (*_PRODUCTS, "add", "linear")
    match = _by_formula(inner) if is_product and set(inner.users) == {node} else None
    if match is None:
        return None
    (rows, *rest), nodes = match
    if not isinstance(rows, fx.Node) or name_of(rows) not in _VIEWS or facts.ndim(rows) != 2:
        return None
    x: Any = rows.args[0]
    before, after = facts.tensor(x), facts.tensor(node)
    if before is None or after is None or before.dtype is not facts.dtype(rows):
        return None
    shape = [*before.shape[:-1], facts.size(inner, -1)]
    if list(map(str, shape)) != list(map(str, after.shape)):
        return None
    if str(before.shape[-1]) != str(facts.tensor(rows).shape[-1]):  # type: ignore[union-attr]
        return None
    return (x, *rest), (inner, rows, *nodes)


def _with_bias(node: fx.Node) -> Found | None:
    """A product without a bias, and one that is added to it."""
    if len(node.args) != 2 or node.kwargs:
        return None
    inner, bias = node.args
    if not isinstance(inner, fx.Node) or facts.ndim(bias) != 1 or set(inner.users) != {node}:
        return None
    match = _by_formula(inner)
    if match is None or match[0][1] is not None or facts.dtype(bias) is not facts.dtype(inner):
        return None
    (x, _, *rest), nodes = match
    return (x, bias, *rest), (inner, *nodes)


# --- 4-bit layers whose weights were made anew get their quantization states back -----------------
#
# FSDP puts a plain parameter into a layer each time that it gathers one. bitsandbytes' own forward
# finds that out and mends it; a captured graph does not run that code, and TorchDynamo cannot.


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a layer of bitsandbytes that knows the state of its weight."""
    return "quant_state" in module.__dict__ and type(module).__module__.startswith("bitsandbytes.")


def restore_states(layers: Iterable[Any]) -> None:
    """Give each weight the state that its layer has, as bitsandbytes does before it multiplies."""
    for layer in layers:
        if getattr(layer.weight, "quant_state", None) is None and layer.quant_state is not None:
            from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

            fix_4bit_weight_quant_state_from_module(layer)
