"""Weights that a formula computes from frozen tensors: any library's format, in its own words.

GPTQ (Frantar et al., 2022), AWQ (Lin et al., 2023), HQQ (Badri & Shaji, 2023), FP8 and integers
with scales of rows, groups or blocks, the microscaling formats (Rouhani et al., 2023): a weight is
shifted, masked, looked up, gathered, reshaped and scaled. The formula is cut out of a model's graph
as a small graph from the stored tensors to the matrix (out, in), and run whenever a product needs
the matrix: its values are those of the library, bit for bit.

Of a stack (experts, ., .), one matrix is the formula of a part of each stacked tensor.

A part of the matrix, some of its rows or of its columns, takes a part of each operand. Which one is
worked out backwards, node by node, as an interval of one dimension; an operation that is not known
here gets all of its operands, and the part is taken from its result.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ..op import Maker
from .quantized import FORMATS, Quantized, WeightFormat

_META = "formula"
"""Where a node of a formula keeps its shape and dtype."""


class Span(NamedTuple):
    """The interval of one dimension of a value that is needed; of the others, everything."""

    dim: int
    start: int
    stop: int


Spans = dict[fx.Node, Span | None]
"""Of each node that is needed, what of it; None: all."""


def assigned(base: Tensor, index: Any, value: Any) -> Tensor:
    """``base`` with ``base[index] = value``, as a value."""
    result = base.clone()
    result[index] = value
    return result


# -- what is a formula -----------------------------------------------------------------------------
_EACH = frozenset(
    ("and_", "or_", "xor", "inv", "invert", "rshift", "lshift", "mul", "sub", "add", "truediv",
     "floordiv", "neg", "mod", "__and__", "__or__", "__xor__", "__rshift__", "__lshift__",
     "__invert__", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not",
     "bitwise_right_shift", "bitwise_left_shift", "multiply", "subtract", "div", "divide",
     "remainder", "abs", "where", "clamp", "clamp_min", "clamp_max", "eq", "ne", "lt", "gt", "le",
     "ge", "ldexp", "to", "_to_copy", "float", "half", "bfloat16", "double", "int", "long", "short",
     "char", "byte", "bool", "pow", "__pow__", "__rpow__", "rpow", "exp2", "contiguous", "clone",
     "detach", "logical_and", "logical_or")
)  # fmt: skip
_SHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"))
_MOVES = frozenset(("t", "transpose", "permute", "swapaxes", "adjoint", "movedim"))
_NEW = frozenset(("zeros", "empty", "ones"))
_WHOLE = frozenset(
    ["arange", "tensor", "full", "cumsum", "gather", "expand_as", "repeat", "tile", "flip", "roll"]
)
"""Operations that a formula may have, but that take all of their operands."""
_OTHERS = frozenset(
    ("getitem", "index_select", "cat", "stack", "expand", "broadcast_to", "repeat_interleave",
     "assigned", "getattr")
)  # fmt: skip
KNOWN = _EACH | _SHAPES | _MOVES | _NEW | _WHOLE | _OTHERS
"""The names of operations that a formula may have: none draws, and none writes."""


def name_of(node: fx.Node) -> str:
    """The name of an operation, the same for methods, functions and operators."""
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._opname)
    return str(getattr(target, "__name__", target))


def register(graph: fx.Graph) -> str:
    """The format, a key of ``FORMATS``, of the matrix (out, in) that ``graph`` returns.

    Its nodes have their shape and dtype in ``meta``: see ``described``. Equal formulas have one
    format, in every process.
    """
    kind = _named_by(graph)
    if kind not in FORMATS:
        formula = Formula(graph)
        FORMATS[kind] = WeightFormat(
            formula.reference,
            formula.misfits,
            lambda m, out, into, kind: formula.example(m, kind),
            part=formula.part,
            cuts=tuple(dim for dim in (0, 1) if formula.can_be_cut(dim)),
            is_formula=True,
        )
    return kind


def register_expert(graph: fx.Graph) -> tuple[str, tuple[int, ...]] | None:
    """The format of each matrix of the stack (E, out, in) that ``graph`` returns.

    Also how many rows of each tensor, along its first dimension, are one expert's; 0 where all of
    it is every expert's. None where the matrices are not computed in the same way, each from its
    own rows.
    """
    expert = _Expert(graph)
    if expert.rows is None:
        return None
    kind = f"expert of {_named_by(graph)}"
    if kind not in FORMATS:
        FORMATS[kind] = WeightFormat(
            expert.reference, lambda w: [], lambda m, out, into, kind: expert.example(m, kind)
        )
    return kind, expert.rows


def _named_by(graph: fx.Graph) -> str:
    text = "\n".join(f"{n.format_node()} {n.meta.get(_META)}" for n in graph.nodes)
    return f"formula {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def fresh(graph: fx.Graph, name: str, shape: Sequence[int], **kind: Any) -> fx.Node:
    """A call for a new tensor, however it was made: "zeros_like" and the like become "zeros"."""
    bare = name.removeprefix("new_").removesuffix("_like")
    return graph.call_function(getattr(torch, bare), (list(shape),), kind)


def is_new(node: Any) -> bool:
    """Whether a node is a call for a new tensor: of any numbers, zeros or ones."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return name_of(node).removeprefix("new_").removesuffix("_like") in _NEW


def described(node: fx.Node, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
    """``node`` of a formula, which knows the shape and dtype of its value."""
    node.meta[_META] = tuple(shape), dtype
    return node


def _shape(node: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta[_META][0]
    return shape


class Formula:
    """A graph from stored tensors to the matrix (out, in)."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.inputs = graph.find_nodes(op="placeholder")
        self.result: Any = graph.output_node().args[0]
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        self._spans = functools.cache(self._worked_out)

    def reference(self, w: Quantized, dtype: torch.dtype) -> Tensor:
        """The matrix, computed in the formula's dtypes."""
        return self._run(w, dict.fromkeys((*self.inputs, *self.nodes))).to(dtype)

    def part(self, w: Quantized, dtype: torch.dtype, dim: int, start: int, stop: int) -> Tensor:
        """Rows or columns of it."""
        return self._run(w, self._spans(dim, start, stop)).to(dtype)

    def misfits(self, w: Quantized) -> list[str]:
        """Tensors that are not as the formula has them."""
        if len(w.tensors) != len(self.inputs):
            return [f"{len(w.tensors)} tensors for a formula of {len(self.inputs)}"]
        pairs = zip(w.tensors, self.inputs, strict=True)
        return [
            f"{node.name} is {None if t is None else (tuple(t.shape), t.dtype)}"
            for t, node in pairs
            if t is None or (tuple(t.shape), t.dtype) != node.meta[_META]
        ]

    def example(self, m: Maker, kind: str) -> Quantized:
        """Random tensors for the formula; what it looks up by is zero."""
        tensors = []
        for node in self.inputs:
            shape, dtype = node.meta[_META]
            if dtype.is_floating_point:
                t = m.normal(*shape, dtype=torch.float32).abs().add_(0.1).to(dtype)
            elif math.prod(shape) * dtype.itemsize * 8 >= math.prod(_shape(self.result)):
                t = m.integers(256, *shape, dtype=torch.uint8).to(dtype)
            else:
                t = torch.zeros(shape, dtype=dtype, device=m.device)
            tensors.append(t)
        return Quantized(tuple(tensors), _shape(self.result), 0, kind)  # type: ignore[arg-type]

    def can_be_cut(self, dim: int) -> bool:
        """Whether a part along ``dim`` takes less than all of what the formula computes."""
        size = _shape(self.result)[dim]
        spans = self._spans(dim, size // 8, max(size // 4, 1))
        whole = (math.prod(_shape(n)) for n in self.nodes if n in spans and spans[n] is None)
        return max(whole, default=0) * 4 <= math.prod(_shape(self.result))

    # -- running --

    def _run(self, w: Quantized, spans: Spans) -> Tensor:
        values: dict[fx.Node, Any] = {}
        for node, t in zip(self.inputs, w.tensors, strict=True):
            span = spans.get(node)
            values[node] = t
            if span is not None and t is not None and tuple(t.shape) == _shape(node):
                values[node] = t.narrow(span[0], *_extent(span))
        last = {n: user for user in self.nodes for n in user.all_input_nodes}
        for node in self.nodes:
            if node not in spans:
                continue
            values[node] = _computed(node, spans, values)
            for n in node.all_input_nodes:
                if last[n] is node and n in values and n is not self.result:
                    del values[n]
        result: Tensor = values[self.result]
        return result

    def _worked_out(self, dim: int, start: int, stop: int) -> Spans:
        spans: Spans = {self.result: Span(dim, start, stop)}
        for node in reversed(self.graph.nodes):
            if node not in spans:
                continue
            its = spans[node]
            if its is not None and _extent(its) == (0, _shape(node)[its.dim]):
                its = spans[node] = None
            if node.op == "placeholder":
                continue
            for operand, span in _needed(node, its):
                spans[operand] = _merged(spans[operand], span) if operand in spans else span
        return spans


class _Expert(Formula):
    """A graph from stacked tensors to a stack of matrices (E, out, in), as that of one matrix.

    It is given the rows of one expert, and runs as it would for the first.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self._first = self._spans(0, 0, 1)
        self.rows = self._rows_of_each()

    def reference(self, w: Quantized, dtype: torch.dtype) -> Tensor:
        """One expert's matrix."""
        return self._run(w, self._first)[0].to(dtype)

    def _rows_of_each(self) -> tuple[int, ...] | None:
        if _shape(self.result)[0] < 2 or not self._is_alike(self._first):
            return None
        for number in (1, _shape(self.result)[0] - 1):
            spans = self._spans(0, number, number + 1)
            if spans.keys() != self._first.keys():
                return None
            for node, span in spans.items():
                first = self._first[node]
                if (span is None) is not (first is None):
                    return None
                if span is None or first is None:
                    continue
                size = first.stop
                its = Span(first.dim, number * size, (number + 1) * size)
                if first.start or span != its:
                    return None
        spans = self._first
        if any(s is not None and s.dim for n in self.inputs if (s := spans.get(n))):
            return None
        return tuple(s.stop if (s := spans.get(n)) else 0 for n in self.inputs)

    def _is_alike(self, spans: Spans) -> bool:
        # Whether nothing but the inputs' rows depends on the expert's number: neither a part of a
        # whole value, nor a constant that differs along the experts.
        for node, span in spans.items():
            if span is None or node.op == "placeholder" or is_new(node):
                continue
            needed = dict(_needed(node, span))
            if node.all_input_nodes == [] or set(needed) != set(node.all_input_nodes):
                return False
            if name_of(node) not in _EACH and _cover(node, span) is None:
                return False
            if any(wanted and spans[n] is None for n, wanted in needed.items()):
                return False
            if name_of(node) == "assigned":
                places = _indices(node.args[1], len(_shape(node)))
                if places is None or places[span.dim] != slice(None):
                    return False
        return True


def _extent(span: Span) -> tuple[int, int]:
    return span.start, span.stop - span.start


def _merged(a: Span | None, b: Span | None) -> Span | None:
    if a is None or b is None or a.dim != b.dim:
        return None
    return Span(a.dim, min(a.start, b.start), max(a.stop, b.stop))


# -- which part of each operand a part takes -------------------------------------------------------
def _operands(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def _needed(node: fx.Node, span: Span | None) -> list[tuple[fx.Node, Span | None]]:
    if span is None:
        return [(n, None) for n in _operands(node)]
    name = name_of(node)
    if name in _EACH:
        return [(n, _aligned(n, node, span)) for n in _operands(node)]
    cover = _cover(node, span)
    if cover is None:
        return [(n, None) for n in _operands(node)]
    return cover.operands


def _aligned(operand: fx.Node, node: fx.Node, span: Span) -> Span | None:
    """What of an operand is needed that is broadcast to ``node``."""
    dim = span.dim - len(_shape(node)) + len(_shape(operand))
    if dim < 0 or _shape(operand)[dim] != _shape(node)[span.dim]:
        return None
    return Span(dim, span.start, span.stop)


class _Cover(NamedTuple):
    """How a part of a value is computed."""

    operands: list[tuple[fx.Node, Span | None]]
    # of the operands' parts, which it is called with in the place of the nodes
    run: Callable[[Callable[[Any], Any]], Tensor]
    start: int = 0  # where in the result the part begins


def _computed(node: fx.Node, spans: Spans, values: dict[fx.Node, Any]) -> Any:
    span = spans[node]

    def value(n: Any, wanted: Span | None) -> Any:
        # what is there may be more than is wanted
        there = spans[n]
        if wanted is None or there == wanted:
            return values[n]
        first = 0 if there is None else there.start
        return values[n].narrow(wanted.dim, wanted.start - first, wanted.stop - wanted.start)

    if span is None:
        return _call(node, node.args, node.kwargs, lambda n: values[n])
    if name_of(node) in _EACH:
        return _call(node, node.args, node.kwargs, lambda n: value(n, _aligned(n, node, span)))
    cover = _cover(node, span)
    if cover is None:
        whole = _call(node, node.args, node.kwargs, lambda n: values[n])
        return whole.narrow(span.dim, *_extent(span))
    wanted = dict(cover.operands)
    result = cover.run(lambda n: value(n, wanted[n]))
    length = span.stop - span.start
    if result.shape[span.dim] == length:
        return result
    return result.narrow(span.dim, cover.start, length)


def _named(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _call(node: fx.Node, args: Any, kwargs: Any, value: Callable[[Any], Any]) -> Any:
    args, kwargs = fx.node.map_arg((args, kwargs), value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def _cover(node: fx.Node, span: Span) -> _Cover | None:
    name = name_of(node)
    if name in _SHAPES or (name == "getitem" and _only_adds_axes(node)):
        return _of_shape(node, span)
    if name in _MOVES or name == "getattr":
        return _of_move(node, span)
    if name in _NEW:
        shape = _resized(node, span)
        return _Cover([], lambda v: _call(node, (shape,), node.kwargs, v))
    rule = _RULES.get(name)
    return None if rule is None else rule(node, span)


def _resized(node: fx.Node, span: Span) -> list[int]:
    shape = list(_shape(node))
    shape[span.dim] = span.stop - span.start
    return shape


def _of_shape(node: fx.Node, span: Span) -> _Cover | None:
    # A dimension before which as many values lie as before one of the operand: the interval is one
    # of the same values there, or covered by one.
    x: Any = node.args[0]
    before, after = _shape(x), _shape(node)
    if node.meta[_META][1] is not x.meta[_META][1]:  # other bits
        if before != after:
            return None
        dtype = node.meta[_META][1]
        return _Cover([(x, span)], lambda v: v(x).view(dtype))
    ahead = math.prod(after[: span.dim])
    dims = [d for d in range(len(before)) if math.prod(before[:d]) == ahead]
    if not dims:
        return None
    dim = max(dims, key=lambda d: (before[d] > 1, d))
    each, its = math.prod(after[span.dim + 1 :]), math.prod(before[dim + 1 :])
    start, stop = span.start * each // its, -(-span.stop * each // its)
    if start * its % each or stop * its % each:
        return None
    shape = list(after)
    shape[span.dim] = (stop - start) * its // each
    return _Cover(
        [(x, Span(dim, start, stop))],
        lambda v: v(x).reshape(shape),
        span.start - start * its // each,
    )


def _of_move(node: fx.Node, span: Span) -> _Cover | None:
    x: Any = node.args[0]
    if name_of(node) == "getattr" and node.args[1] not in ("T", "mT"):
        return None
    order: Any = torch.empty([2] * len(_shape(x)), device="meta")
    marks = {stride: d for d, stride in enumerate(order.stride())}
    moved = _call(node, node.args, node.kwargs, lambda n: order)
    dim = marks[moved.stride()[span.dim]]
    wanted = Span(dim, span.start, span.stop)
    return _Cover([(x, wanted)], lambda v: _call(node, node.args, node.kwargs, v))


def _of_expand(node: fx.Node, span: Span) -> _Cover:
    x: Any = node.args[0]
    return _Cover([(x, _aligned(x, node, span))], lambda v: v(x).expand(_resized(node, span)))


def _of_cat(node: fx.Node, span: Span) -> _Cover | None:
    tensors: Any = node.args[0]
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    stacks = name_of(node) == "stack"
    dim = dim % len(_shape(node))
    if len(set(tensors)) < len(tensors):
        return None
    if dim != span.dim:
        its = span.dim - (stacks and dim < span.dim)
        wanted = Span(its, span.start, span.stop)
        join: Any = torch.stack if stacks else torch.cat
        return _Cover([(t, wanted) for t in tensors], lambda v: join([v(t) for t in tensors], dim))
    if stacks:
        return None
    operands: list[tuple[fx.Node, Span | None]] = []
    first = 0
    for t in tensors:
        size = _shape(t)[dim]
        start, stop = max(span.start - first, 0), min(span.stop - first, size)
        if start < stop:
            operands.append((t, Span(dim, start, stop)))
        first += size
    return _Cover(operands, lambda v: torch.cat([v(t) for t, _ in operands], dim))


def _of_repeat_interleave(node: fx.Node, span: Span) -> _Cover | None:
    arguments: dict[str, Any] = _named(node, "x", "repeats", "dim")
    x, times, dim = (arguments.get(n) for n in ("x", "repeats", "dim"))
    if type(times) is not int or type(dim) is not int or not isinstance(x, fx.Node):
        return None
    dim = dim % len(_shape(node))
    wanted, first = span, 0
    if dim == span.dim:
        wanted = Span(dim, span.start // times, -(-span.stop // times))
        first = span.start - wanted.start * times
    return _Cover([(x, wanted)], lambda v: v(x).repeat_interleave(times, dim), first)


def _indices(index: Any, rank: int) -> list[Any] | None:
    """One index for each dimension, of those that are slices, numbers and tensors."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is None or isinstance(i, (bool, list)) for i in index):
        return None
    if Ellipsis in [i for i in index if not isinstance(i, fx.Node)]:
        at = next(j for j, i in enumerate(index) if i is Ellipsis)
        index = (*index[:at], *[slice(None)] * (rank - len(index) + 1), *index[at + 1 :])
    return [*index, *[slice(None)] * (rank - len(index))]


def _only_adds_axes(node: fx.Node) -> bool:
    index: Any = node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    plain = all(i is None or i is Ellipsis or i == slice(None) for i in index
                if not isinstance(i, fx.Node))  # fmt: skip
    return plain and not any(isinstance(i, fx.Node) for i in index) and None in index


def _constant(node: fx.Node) -> Tensor | None:
    """The value, on the CPU, of what is computed from no input."""
    values: dict[fx.Node, Any] = {}
    behind, stack = [], [node]
    while stack:
        n = stack.pop()
        if n.op == "placeholder":
            return None
        behind.append(n)
        stack += n.all_input_nodes
    with _disable_current_modes():
        for n in reversed(behind):
            if n not in values:
                values[n] = _call(n, n.args, n.kwargs, values.__getitem__)
        result: Tensor = values[node].cpu()
    return result


def _of_index(node: fx.Node, span: Span) -> _Cover | None:
    if name_of(node) == "index_select":
        names = _named(node, "x", "dim", "index")
        x: Any = names["x"]
        places = [slice(None)] * len(_shape(x))
        places[names["dim"]] = names["index"]
        index: list[Any] | None = places
    else:
        x = node.args[0]
        index = _indices(node.args[1], len(_shape(x)))
    if index is None:
        return None
    tensors = [i for i in index if isinstance(i, fx.Node)]
    if len(tensors) > 1 or (tensors and any(isinstance(i, int) for i in index)):
        return None
    if any(t.meta[_META][1] in (torch.bool, torch.uint8) for t in tensors):  # a mask
        return None
    # the dimension of x, or of the tensor of indices, that is that of the span
    d = seen = 0
    for d, i in enumerate(index):  # noqa: B007  # 2026-11-30: used after the loop
        width = 0 if isinstance(i, int) else len(_shape(i)) if isinstance(i, fx.Node) else 1
        if seen <= span.dim < seen + width:
            break
        seen += width
    operands: list[tuple[fx.Node, Span | None]]
    if isinstance(i, fx.Node):
        rows = _constant(i) if len(_shape(i)) == 1 else None
        if rows is not None:  # an order, of which a part may lie together
            numbers = rows[span.start : span.stop] % _shape(x)[d]
            first, end = int(numbers.min()), int(numbers.max()) + 1
            numbers = numbers - first
            return _Cover(
                [(x, Span(d, first, end))],
                lambda v: v(x).index_select(d, numbers.to(v(x).device)),
            )
        operands = [(x, None), (i, Span(span.dim - seen, span.start, span.stop))]
        return _Cover(operands, lambda v: v(x)[tuple(v(j) if j is i else j for j in index)])
    first, _, step = i.indices(_shape(x)[d])
    if step < 1:
        return None
    wanted = Span(d, first + span.start * step, first + (span.stop - 1) * step + 1)
    operands = [(x, wanted), *((t, None) for t in tensors)]
    rest = [slice(None, None, step) if e == d else j for e, j in enumerate(index)]
    return _Cover(
        operands, lambda v: v(x)[tuple(v(j) if isinstance(j, fx.Node) else j for j in rest)]
    )


def _of_assigned(node: fx.Node, span: Span) -> _Cover | None:
    base, index, value = _named(node, "base", "index", "value").values()
    places = _indices(index, len(_shape(base)))
    if places is None or not all(isinstance(i, slice) for i in places):
        return None
    first, end, step = places[span.dim].indices(_shape(base)[span.dim])
    count = len(range(first, end, step))
    start = min(max(-(-(span.start - first) // step), 0), count)
    stop = min(max(-(-(span.stop - first) // step), start), count)
    operands: list[tuple[Any, Span | None]] = [(base, span)]
    its: Span | None = None
    if isinstance(value, fx.Node):
        dim = span.dim - len(_shape(base)) + len(_shape(value))
        if dim >= 0 and _shape(value)[dim] == count:
            its = Span(dim, start, stop)
        operands.append((value, its))
    offset = first + start * step - span.start
    there = list(places)
    there[span.dim] = slice(offset, offset + (stop - start - 1) * step + 1, step)
    alone = len(base.users) == 1 and name_of(base) in ("assigned", *_NEW)

    def run(v: Callable[[Any], Any]) -> Tensor:
        result: Tensor = v(base) if alone else v(base).clone()
        if stop > start:
            result[tuple(there)] = v(value) if isinstance(value, fx.Node) else value
        return result

    return _Cover(operands, run)


_RULES: dict[str, Callable[[fx.Node, Span], _Cover | None]] = {
    "expand": _of_expand,
    "broadcast_to": _of_expand,
    "cat": _of_cat,
    "stack": _of_cat,
    "repeat_interleave": _of_repeat_interleave,
    "getitem": _of_index,
    "index_select": _of_index,
    "assigned": _of_assigned,
}
