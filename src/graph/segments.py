"""Attention for each segment of a row, captured as one node however many segments there are.

Towers of pictures lay the patches of all pictures in one row, split it by lengths that they read
from a tensor of boundaries, call attention for each piece, and join the results. A tracer can
follow that for one number of pictures at most. So a captured block is given the boundaries as an
object. All that it can do is to lead to a split by lengths: that gives one *piece*, which stands
for all. ``join_segments`` takes the attention of such pieces for that of the row, within segments.
Whatever else is done with boundaries or pieces ends the capture.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, fx

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
    ) -> tuple[Tensor]:
        if function is not torch.split:
            raise NotImplementedError("lengths are used in another way than for a split")
        return _split(*args, **(kwargs or {}))


def _split(tensor: Tensor, split_size_or_sections: _Pieces, dim: int = 0) -> tuple[Tensor]:
    return (piece(tensor, split_size_or_sections.values, dim),)


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]  # 2026-11-29: no types
def piece(row: Tensor, boundaries: Tensor, dim: int) -> Tensor:
    """A segment of ``row``, any of them; of the size of all."""
    return row.view_as(row)


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


# ------------------------------------------------------------------------------- in the graph


def join_segments(module: fx.GraphModule) -> None:
    """Turn attention of pieces into attention within segments, in ``module`` and graphs in it.

    Raises:
        NotImplementedError: something else is done with a piece.
    """
    for inner in facts.nested(module):
        pieces = [n for n in inner.graph.nodes if n.target is piece]
        if not pieces:
            continue
        _join(inner.graph)
        for node in pieces:
            node.replace_all_uses_with(node.args[0])
            inner.graph.erase_node(node)
        inner.recompile()


def _join(graph: fx.Graph) -> None:
    # of each value of a piece: where its positions are, and the boundaries
    rows: dict[fx.Node, tuple[int, Any]] = {}
    for node in list(graph.nodes):
        if node.target is piece:
            row, boundaries, dim = node.args
            rank = facts.ndim(row)
            rows[node] = (dim - rank if rank is not None and dim >= 0 else dim), boundaries
        elif any(n in rows for n in node.all_input_nodes):
            _follow(node, rows)


def _follow(node: fx.Node, rows: dict[fx.Node, tuple[int, Any]]) -> None:
    """Note where the positions of ``node``, which is made of pieces, are."""
    canon = canonical(node)
    name, args = (canon.name, canon.args) if canon is not None else ("", ())
    if name == "cat" and len(args[0]) == 1 and rows[args[0][0]][0] == args[1]:
        return  # the pieces are joined
    if name == "sdpa" and args[3] is None and args[4] == 0 and args[5] is False:
        of_each = {rows.get(n) for n in args[:3]}
        if len(of_each) == 1 and (found := of_each.pop()) is not None and found[0] == -2:
            node.target, node.kwargs = segment_attention_reference, {}
            node.args = (*args[:3], found[1], args[6])
            rows[node] = found
            return
    if name == "transpose" and args[0] in rows:
        at, boundaries = rows[args[0]]
        swapped = {args[1]: args[2], args[2]: args[1]}
        rows[node] = swapped.get(at, at), boundaries
        return
    is_same = name in ("contiguous", "cast") or (
        name == "reshape" and facts.shape_text(node) == facts.shape_text(args[0])
    )
    if not is_same or args[0] not in rows:
        raise NotImplementedError(f"{node.name} is no attention within segments")
    rows[node] = rows[args[0]]


setattr(segment_attention_reference, MARK, segment_attention_reference)
"""No compiler goes into it, which would unroll it."""
