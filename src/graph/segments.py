"""Attention for each segment of a row, captured as one node however many segments there are.

Towers of pictures lay the patches of all pictures in one row, split it by lengths that they read
from a tensor of boundaries, call attention for each piece, and join the results. A tracer can
follow that for one number of pictures at most. So a captured block is given the boundaries as an
object. All that it can do is to lead to a split by lengths: that gives a few *pieces*, of sizes
that differ, which stand for all. Where the same attention of each of them is joined in their order,
``join_segments`` takes it for that of the row, within segments. Whatever else is done with
boundaries, pieces or lists of pieces ends the capture.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv

from ..kernels.attention.segment_attention import segment_attention_reference
from . import facts
from .canon import canonical
from .opaque.functions import MARK
from .signatures import names_in


class Boundaries:
    """Where segments begin and end, in place of a tensor of them."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __getitem__(self, index: slice) -> _Bounds:
        parts = index.start, index.stop, index.step
        if parts == (1, None, None):
            return _Bounds(self.values, True)
        if parts == (None, -1, None):
            return _Bounds(self.values, False)
        raise NotImplementedError("boundaries are read in another way than for lengths")


class _Bounds:
    def __init__(self, values: Tensor, is_end: bool) -> None:
        self.values, self.is_end = values, is_end

    def __sub__(self, other: _Bounds) -> _Lengths:
        if self.is_end and not other.is_end and self.values is other.values:
            return _Lengths(self.values)
        raise NotImplementedError("boundaries are read in another way than for lengths")


class _Lengths:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def tolist(self) -> _Pieces:
        return _Pieces(self.values)


class _Pieces:
    """Lengths as a list, with which nothing can be done but to split a tensor."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> tuple[Tensor, ...]:
        if function is not torch.split:
            raise NotImplementedError("lengths are used in another way than for a split")
        return _split(*args, **(kwargs or {}))


COUNT = 3
"""How many pieces stand for all: then the first, the last and the one before are told apart."""


def _split(
    tensor: Tensor, split_size_or_sections: _Pieces, dim: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    boundaries = split_size_or_sections.values
    return (
        piece(tensor, boundaries, dim, 0),
        piece(tensor, boundaries, dim, 1),
        piece(tensor, boundaries, dim, 2),
    )


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]  # 2026-11-29: no types
def piece(row: Tensor, boundaries: Tensor, dim: int, index: int) -> Tensor:
    """One of the segments of ``row``; of sizes that differ, and add up to the row's."""
    size = row.shape[dim]
    first, second = (size + 3) // 5, (3 * size + 1) // 7  # which nobody else's sizes are
    ends = 0, first, first + second, size
    return row.narrow(dim, ends[index], ends[index + 1] - ends[index])


def splits_by_lengths(function: Any) -> bool:
    """Whether the code of ``function``, or of what it wraps, may split by lengths from a tensor."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and _splits(code):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


@functools.cache
def _splits(code: types.CodeType) -> bool:  # a function may hold the model that it was made for
    return {"split", "tolist"} <= names_in(code)


def with_boundaries(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with whole numbers in one row as boundaries."""
    return tuple(map(_as_boundaries, args)), {k: _as_boundaries(v) for k, v in kwargs.items()}


def _as_boundaries(value: Any) -> Any:
    # a row of one number or none has no lengths
    is_row = isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] > 1
    return Boundaries(value) if is_row and value.dtype in (torch.int32, torch.int64) else value


# -------------------------------------------------------------------------------- in the code


class _Uses:
    """What a function does with lengths that it reads from a tensor, and with pieces.

    How many pieces there are, and which one is at hand, need leave no trace in a graph. So the
    source must say that lists of them only go, each piece in its turn, to ``torch.cat``.
    """

    # kinds: "lengths"; "pieces", something made of each piece; "rows", several of these; "zipped"
    def __init__(self, function: ast.FunctionDef) -> None:
        self.nodes = list(ast.walk(function))
        self.kinds: dict[str, str] = {}
        self.known: set[ast.AST] = set()
        self.empty: dict[str, ast.Name] = {}  # names of lists that a loop may fill
        self.stores: set[ast.AST] = set()  # where names get what they are known to be
        self.returns_pieces = False
        self.is_plain = self._is_plain()

    def _is_plain(self) -> bool:
        never = ast.NamedExpr, ast.Global, ast.Nonlocal
        statements = [n for n in self.nodes if isinstance(n, (ast.Assign, ast.For, *never))]
        # in the order of the source, as a name is assigned before it is read
        for n in sorted(statements, key=lambda n: n.lineno):
            if isinstance(n, ast.Assign):
                is_plain = self._take_assignment(n)
            else:
                is_plain = isinstance(n, ast.For) and self._take_loop(n)
            if not is_plain:
                return False
        for node in self.nodes:
            if _calls(node, "torch", "cat", "concat", "concatenate") and node.args:
                self.kind(node.args[0])
            elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                kinds = [self.kind(e) for e in node.value.elts]
                self.returns_pieces |= kinds[-1] == "pieces"
                if any(kinds[:-1]) or kinds[-1] not in (None, "pieces"):
                    return False
            elif isinstance(node, ast.Compare) and self._is_none(node):
                self.known.add(node.left.value)  # type: ignore[attr-defined]
        names = [n for n in self.nodes if isinstance(n, ast.Name) and n.id in self.kinds]
        others = [n for n in names if not _is_read(n) and n not in self.stores]
        return (
            not any(isinstance(n, ast.arg) and n.arg in self.kinds for n in self.nodes)
            and all(self._exclude(n, m) for n in others for m in self.stores if _same(n, m))
            and all(n in self.known for n in self.nodes if self.is_source(n))
        )

    def _exclude(self, one: ast.AST, other: ast.AST) -> bool:
        """Whether two places are in the two branches of one condition."""
        for n in self.nodes:
            if isinstance(n, ast.If):
                then, otherwise = ({m for s in b for m in ast.walk(s)} for b in (n.body, n.orelse))
                if (one in then and other in otherwise) or (other in then and one in otherwise):
                    return True
        return False

    def _take_assignment(self, n: ast.Assign) -> bool:
        target, value = n.targets[0], n.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        if all(isinstance(v, ast.List) and not v.elts for _, v in pairs):
            self.empty.update({t.id: t for t, _ in pairs if isinstance(t, ast.Name)})
            return True
        kind = self.kind(value)
        if kind is None:
            return True
        if len(n.targets) > 1 or not isinstance(target, ast.Name):
            return False
        self.stores.add(target)
        return self.kinds.setdefault(target.id, kind) == kind

    def _take_loop(self, loop: ast.For) -> bool:
        """Whether a loop over pieces makes the same of each; another loop is none of ours."""
        if self.kind(loop.iter) is None:
            return True
        if self.kind(loop.iter) not in ("pieces", "zipped") or loop.orelse:
            return False
        outer = [n for n in self.nodes if isinstance(n, (ast.For, ast.While)) and n is not loop]
        if any(loop in ast.walk(n) for n in outer):
            return False
        inside, made = set(ast.walk(loop)), set(_names(loop.target))
        own = made | {n.id for n in _all_names(loop) if not _is_read(n)}
        for n in loop.body:
            if any(m.id in own - made for m in _all_names(n) if _is_read(m)):
                return False  # of the piece before
            if isinstance(n, ast.Assign) and all(map(_names, n.targets)):
                made.update(name for t in n.targets for name in _names(t))
                continue
            call = n.value if isinstance(n, ast.Expr) else None
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                return False
            of = call.func.value
            if call.func.attr != "append" or not isinstance(of, ast.Name):
                return False
            if of.id not in self.empty or of.id in self.kinds:
                return False
            self.kinds[of.id] = "pieces"
            self.stores.add(self.empty[of.id])
            self.known.add(of)
        # what is left of the last piece is not read
        again = {
            name: m.end_lineno or m.lineno
            for block in self._blocks_with(loop)
            for m in reversed(block[block.index(loop) + 1 :])
            if isinstance(m, ast.Assign) and len(m.targets) == 1
            for name in _names(m.targets[0])
        }
        end = loop.end_lineno or loop.lineno
        later = (n for n in self.nodes if isinstance(n, ast.Name) and n not in inside)
        return all(
            n.id not in own
            or n.lineno < loop.lineno
            or not _is_read(n)
            or (n.id in again and n.lineno > again[n.id] > end)
            for n in later
        )

    def _blocks_with(self, statement: ast.stmt) -> list[list[ast.stmt]]:
        fields = (getattr(n, f, None) for n in self.nodes for f in ("body", "orelse", "finalbody"))
        return [f for f in fields if isinstance(f, list) and statement in f]

    def _is_none(self, n: ast.AST) -> bool:
        """Whether ``n`` asks if what is made of the first piece is None: it is of all, or none."""
        return (
            isinstance(n, ast.Compare)
            and isinstance(n.ops[0], (ast.Is, ast.IsNot))
            and isinstance(n.comparators[0], ast.Constant)
            and n.comparators[0].value is None
            and isinstance(n.left, ast.Subscript)
            and isinstance(n.left.slice, ast.Constant)
            and n.left.slice.value == 0
            and isinstance(n.left.value, ast.Name)
            and self.kinds.get(n.left.value.id) == "pieces"
        )

    def is_source(self, n: ast.AST) -> bool:
        """Whether lengths or pieces come from here: then it is known where they go."""
        if isinstance(n, ast.Name):
            return _is_read(n) and n.id in self.kinds
        return isinstance(n, ast.Attribute) and n.attr == "tolist"

    def kind(self, n: ast.AST) -> str | None:
        kind = self._kind(n)
        if kind is not None:
            self.known.add(n)
        return kind

    def _kind(self, n: ast.AST) -> str | None:
        if isinstance(n, ast.Name):
            return self.kinds.get(n.id)
        if isinstance(n, ast.Call):
            return self._kind_of_call(n)
        if isinstance(n, ast.IfExp) and self._is_none(n.test):
            kinds = {self.kind(n.body), self.kind(n.orelse)}
            return "pieces" if kinds == {None, "pieces"} else None
        if isinstance(n, (ast.List, ast.Tuple)):
            each = [self.kind(e) for e in n.elts]
            return "rows" if each and set(each) == {"pieces"} else None
        if isinstance(n, (ast.ListComp, ast.GeneratorExp)) and len(n.generators) == 1:
            loop = n.generators[0]
            if loop.ifs or loop.is_async:
                return None
            over, each_kind = self.kind(loop.iter), self.kind(n.elt)
            if over is None:
                return "rows" if each_kind == "pieces" else None
            return "pieces" if over in ("pieces", "zipped") and each_kind is None else None
        return None

    def _kind_of_call(self, n: ast.Call) -> str | None:
        if isinstance(n.func, ast.Attribute) and n.func.attr == "tolist" and not n.args:
            self.known.add(n.func)
            return "lengths"
        if _calls(n, "torch", "split") and len(n.args) > 1:
            return "pieces" if self.kind(n.args[1]) == "lengths" else None
        if _calls(n, None, "zip"):
            if len(n.args) == 1 and isinstance(n.args[0], ast.Starred):
                return "zipped" if self.kind(n.args[0].value) == "rows" else None
            each = [self.kind(a) for a in n.args]
            return "zipped" if each and set(each) == {"pieces"} else None
        if _calls(n, None, "list", "tuple") and len(n.args) == 1:
            kind = self.kind(n.args[0])
            return kind if kind in ("pieces", "rows") else None
        return None


def _calls(n: ast.AST, module: str | None, *names: str) -> TypeGuard[ast.Call]:
    """Whether ``n`` calls one of these functions, of a module or of Python."""
    if not isinstance(n, ast.Call):
        return False
    f = n.func
    if module is None:
        return isinstance(f, ast.Name) and f.id in names
    if not isinstance(f, ast.Attribute) or f.attr not in names:
        return False
    return isinstance(f.value, ast.Name) and f.value.id == module


def _names(target: ast.AST) -> list[str]:
    """The names that an assignment to ``target`` binds; none if it does anything else."""
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    names = [p.id for p in parts if isinstance(p, ast.Name)]
    return names if len(names) == len(parts) else []


def _all_names(n: ast.AST) -> Iterator[ast.Name]:
    return (m for m in ast.walk(n) if isinstance(m, ast.Name))


@functools.cache
def _source(code: types.CodeType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    first = tree.body[0] if len(tree.body) == 1 else None
    return first if isinstance(first, ast.FunctionDef) else None


@functools.cache
def _uses(code: types.CodeType) -> _Uses | None:
    function = _source(code)
    return None if function is None else _Uses(function)


@functools.cache
def _drops_second(code: types.CodeType) -> bool:
    """Whether a function takes the first of two results of a module, and never the second."""
    function = _source(code)
    if function is None or any(n.id == "_" for n in _all_names(function) if _is_read(n)):
        return False
    assigns = (n for n in ast.walk(function) if isinstance(n, ast.Assign))
    return any(
        isinstance(n.value, ast.Call)
        and isinstance(n.value.func, ast.Attribute)
        and [_names(t)[1:] for t in n.targets] == [["_"]]
        for n in assigns
    )


def _same(one: ast.AST, other: ast.AST) -> bool:
    return isinstance(one, ast.Name) and isinstance(other, ast.Name) and one.id == other.id


def _is_read(n: ast.Name) -> bool:
    return isinstance(n.ctx, ast.Load)


def _require_plain_code() -> None:
    """Raise where lists of pieces may be used otherwise than to join what is made of each."""
    traced = torch._guards.TracingContext.get_traced_code() or []  # type: ignore[no-untyped-call]
    traced = [c for c in traced if c.co_filename != __file__]
    inner = {i for c in traced for i in c.co_consts if isinstance(i, types.CodeType)}
    readers = [c for c in traced if "tolist" in names_in(c) and c not in inner]
    uses = [_uses(c) for c in readers]
    is_plain = bool(uses) and all(u is not None and u.is_plain for u in uses)
    if is_plain and any(u is not None and u.returns_pieces for u in uses):
        # a list, of as many as are traced
        is_plain = traced[0] not in readers and any(map(_drops_second, traced))
    if not is_plain:
        raise NotImplementedError("lists of pieces may be used in another way than to join them")


# ------------------------------------------------------------------------------- in the graph


def join_segments(module: fx.GraphModule) -> None:
    """Turn attention of pieces into attention within segments, in ``module`` and graphs in it.

    Raises:
        NotImplementedError: something else is done with a piece.
    """
    for inner in facts.nested(module):
        if any(n.target is piece for n in inner.graph.nodes):
            _require_plain_code()
            _join(inner.graph)
            inner.recompile()


def _require_any_length(node: fx.Node) -> None:
    """Raise where a branch was taken by the length of a piece, other than whether it has any."""
    row, whole = facts.tensor(node.args[0]), facts.tensor(node)
    at = node.args[2]
    size = None if row is None or whole is None else row.shape[at]  # type: ignore[index]
    if not isinstance(size, torch.SymInt) or whole is None:
        raise NotImplementedError("a row of one length only")
    length = whole.shape[at]  # type: ignore[index]
    own = length.node.expr.atoms(FloorDiv) - size.node.expr.atoms(FloorDiv)  # type: ignore[union-attr]
    for guard in size.node.shape_env.guards:
        if own & guard.expr.atoms(FloorDiv) and not all(
            guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, n)) == True  # noqa: E712
            for n in _LENGTHS
        ):
            raise NotImplementedError("what is done with a piece depends on its length")


_LENGTHS = 10, 11, 13, 24, 64, 1000, 123457


@dataclass(frozen=True)
class _Part:
    """What is made of a piece."""

    index: int
    boundaries: fx.Node
    at: int  # the dimension of its positions, from the end
    formula: tuple[Any, ...]  # equal where the same is made of two pieces


def _join(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is piece:
            _require_any_length(node)
    parts: dict[fx.Node, _Part] = {}
    joined: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is piece:
            row, boundaries, dim, index = node.args
            rank = facts.ndim(row)
            if rank is None:
                raise NotImplementedError(f"{node.name} has no known rank")
            at = dim - rank if dim >= 0 else dim
            parts[node] = _Part(index, boundaries, at, (row, at))
        elif any(n in parts for n in node.all_input_nodes) and facts.tensor(node) is not None:
            canon = canonical(node)
            if canon is not None and canon.name == "cat":
                joined[node] = _first_of_all(node, canon.args, parts)
            else:
                parts[node] = _made_of_parts(node, parts)
    for node in reversed(graph.nodes):  # sizes that nothing reads
        is_left = node.op != "output" and not node.users and node not in parts
        if is_left and any(n in parts for n in node.all_input_nodes):
            graph.erase_node(node)
    if any(user not in parts and user not in joined for n in parts for user in n.users):
        raise NotImplementedError("a piece is read for something else than to be joined")
    _make_whole(joined, parts)
    for node in reversed(parts):
        if not node.users:
            graph.erase_node(node)


def _first_of_all(cat: fx.Node, args: tuple[Any, ...], parts: dict[fx.Node, _Part]) -> fx.Node:
    """What is made of the first piece, where all are joined in their order."""
    found = [parts.get(n) for n in args[0]]
    first = found[0]
    if first is None or first.at != args[1]:
        raise NotImplementedError(f"{cat.name} does not join pieces along their positions")
    if found != [dataclasses.replace(first, index=i) for i in range(COUNT)]:
        raise NotImplementedError(f"{cat.name} does not join what is made of all pieces alike")
    return args[0][0]  # type: ignore[no-any-return]


def _made_of_parts(node: fx.Node, parts: dict[fx.Node, _Part]) -> _Part:
    canon = canonical(node)
    name, args = (canon.name, canon.args) if canon is not None else ("", ())
    part = parts.get(args[0]) if args else None
    if part is not None:
        if name == "sdpa" and args[3] is None and args[4] == 0 and args[5] is False:
            of_each = [parts.get(n) for n in args[:3]]
            same = {(p.index, p.boundaries, p.at) for p in of_each if p is not None}
            scale = args[6]
            if (
                None not in of_each
                and len(same) == 1
                and part.at == -2
                and (scale is None or isinstance(scale, (int, float)))
            ):
                formulas = (p.formula for p in of_each if p is not None)
                return dataclasses.replace(part, formula=(name, *formulas, scale))
        elif name == "transpose":
            swapped = {args[1]: args[2], args[2]: args[1]}
            at = swapped.get(part.at, part.at)
            return dataclasses.replace(part, at=at, formula=(name, part.formula, *args[1:]))
        elif name == "reshape" and facts.shape_text(node) == facts.shape_text(args[0]):
            return part  # the same tensor
        elif name in ("contiguous", "cast"):
            return dataclasses.replace(part, formula=(name, part.formula, *args[1:]))
    raise NotImplementedError(f"{node.name} is no attention within segments")


def _make_whole(joined: dict[fx.Node, fx.Node], parts: dict[fx.Node, _Part]) -> None:
    """Make of rows what has been made of their first pieces."""
    same = {n for n, part in parts.items() if any(parts.get(i) is part for i in n.all_input_nodes)}
    for node in [n for n, part in parts.items() if part.index == 0]:
        canon = canonical(node)
        args: tuple[Any, ...] = canon.args if canon is not None else ()
        if node in same:
            node.replace_all_uses_with(args[0])
            continue
        if node.target is piece:
            row: Any = node.args[0]
            node.replace_all_uses_with(row)
            continue
        values = fx.map_arg((node.args, dict(node.kwargs)), facts.value)
        call = node.target if callable(node.target) else getattr(values[0][0], str(node.target))
        inputs = values[0] if callable(node.target) else values[0][1:]
        was = facts.tensor(node)
        whole = call(*inputs, **values[1])
        if was is None or whole.dtype != was.dtype or whole.requires_grad != was.requires_grad:
            raise NotImplementedError(f"{node.name} is made otherwise of a row")
        if canon is not None and canon.name == "sdpa":
            node.target, node.kwargs = segment_attention_reference, {}
            node.args = (*args[:3], parts[node].boundaries, args[6])
        node.meta["example_value"] = whole
    for cat, first in joined.items():
        cat.replace_all_uses_with(first)
        cat.graph.erase_node(cat)


setattr(segment_attention_reference, MARK, segment_attention_reference)
"""No compiler goes into it, which would unroll it."""
