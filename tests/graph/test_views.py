"""The canonical view of each operation, argument by argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusewright.graph.canon import Canon, canonical, is_cast_of
from fusewright.graph.opaque.functions import leaf

from ..capturing import capture
from ..rewrite.faults import of_any_size
from ..rewrite.graphs import last, named, trace

A, W, V = (2, 3, 8), (5, 8), (8,)
X, Y, M = "x", "y", "w"


def _plain(value: Any) -> Any:
    """Nodes by name, lists as tuples."""
    if isinstance(value, fx.Node):
        return value.name
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _traced(fn: Callable[..., Any]) -> fx.Node:
    """What ``fn`` returns, over x and y (2, 3, 8), w (5, 8) and v (8)."""
    return last(trace(lambda x, y, w, v: fn(x, y, w, v), A, A, W, V))


def _view(fn: Callable[..., Any]) -> Any:
    canon = canonical(_traced(fn))
    return canon and (canon.name, *_plain(canon.args))


VIEWS: list[tuple[Callable[..., Any], tuple[Any, ...] | None]] = [
    # reductions
    (lambda x, y, w, v: x.mean(-1), ("mean", X, -1, False, None)),
    (lambda x, y, w, v: x.mean((0, 1)), ("mean", X, (0, 1), False, None)),
    (lambda x, y, w, v: x.sum([1]), ("sum", X, -2, False, None)),
    (lambda x, y, w, v: torch.sum(x, 0, keepdim=True), ("sum", X, -3, True, None)),
    (lambda x, y, w, v: x.sum(), ("sum", X, None, False, None)),
    (lambda x, y, w, v: x.cumsum(1), ("cumsum", X, -2, None)),
    (lambda x, y, w, v: x.var(), ("variance", X, None, 1, False)),
    (lambda x, y, w, v: x.var(False), ("variance", X, None, 0, False)),
    (lambda x, y, w, v: x.var(1), ("variance", X, -2, 1, False)),
    (lambda x, y, w, v: x.var([2]), ("variance", X, -1, 1, False)),
    (lambda x, y, w, v: x.var((0, 1)), ("variance", X, (0, 1), 1, False)),
    (lambda x, y, w, v: x.var(-1, False, True), ("variance", X, -1, 0, True)),
    (lambda x, y, w, v: x.var(-1, correction=None), ("variance", X, -1, 1, False)),
    (lambda x, y, w, v: x.var(-1, correction=2), ("variance", X, -1, 2, False)),
    (lambda x, y, w, v: torch.var(input=x, dim=0, unbiased=False), ("variance", X, -3, 0, False)),
    # joining
    (lambda x, y, w, v: torch.cat([x, y]), ("cat", (X, Y), -3)),
    (lambda x, y, w, v: torch.cat([x], 1), ("cat", (X,), -2)),
    (lambda x, y, w, v: torch.stack([x, y], 1), ("stack", (X, Y), -3)),
    # dimensions
    (lambda x, y, w, v: x.transpose(0, -1), ("transpose", X, -3, -1)),
    (lambda x, y, w, v: x.transpose(2, 1), ("transpose", X, -2, -1)),
    (lambda x, y, w, v: x.unsqueeze(0), ("unsqueeze", X, -4)),
    (lambda x, y, w, v: torch.unsqueeze(x, -1), ("unsqueeze", X, -1)),
    (lambda x, y, w, v: w.T, ("transpose", M, -2, -1)),
    (lambda x, y, w, v: w.mT, ("transpose", M, -2, -1)),
    (lambda x, y, w, v: w.t(), ("transpose", M, -2, -1)),
    (lambda x, y, w, v: torch.t(w), ("transpose", M, -2, -1)),
    (lambda x, y, w, v: torch.t(input=w), ("transpose", M, -2, -1)),
    (lambda x, y, w, v: v.t(), None),
    (lambda x, y, w, v: v.T, None),
    (lambda x, y, w, v: x.mT, None),
    (lambda x, y, w, v: w.real, None),
    # products
    (lambda x, y, w, v: x @ w.T, ("linear", X, M, None)),
    (lambda x, y, w, v: torch.matmul(x, w.transpose(0, 1)), ("linear", X, M, None)),
    (lambda x, y, w, v: x @ y.mT, ("matmul", X, "getattr_1")),
    (lambda x, y, w, v: x @ y.transpose(1, 2), ("matmul", X, "transpose")),
    (lambda x, y, w, v: x @ v.unsqueeze(-1), ("matmul", X, "unsqueeze")),
    (lambda x, y, w, v: x @ v, ("matmul", X, "v")),
    # casts
    (lambda x, y, w, v: x.to(torch.float16), ("cast", X, torch.float16)),
    (lambda x, y, w, v: x.double(), ("cast", X, torch.float64)),
    (lambda x, y, w, v: x.half().type_as(y), ("cast", "half", torch.float32)),
    (lambda x, y, w, v: x.to("meta"), ("cast", X, torch.float32)),
    (lambda x, y, w, v: x.to(torch.half, memory_format=torch.preserve_format),
     ("cast", X, torch.float16)),
    (lambda x, y, w, v: x.to(torch.half, memory_format=torch.contiguous_format), None),
    # powers
    (lambda x, y, w, v: x.square(), ("pow", X, 2)),
    (lambda x, y, w, v: torch.square(input=x), ("pow", X, 2)),
    # shapes
    (lambda x, y, w, v: x.view(6, 8), ("reshape", X, (6, 8))),
    (lambda x, y, w, v: x.flatten(0, 1), ("reshape", X, (6, 8))),
    (lambda x, y, w, v: torch.reshape(input=x, shape=(6, 8)), ("reshape", X, (6, 8))),
    (lambda x, y, w, v: torch.flatten(input=x), ("reshape", X, (48,))),
    (lambda x, y, w, v: x.reshape_as(y.view(6, 8)), ("reshape", X, (6, 8))),
    (lambda x, y, w, v: x.view(torch.int32), None),
    (lambda x, y, w, v: w.expand(2, 5, 8), ("expand", M, (2, 5, 8))),
    (lambda x, y, w, v: v.expand_as(w), ("expand", "v", (5, 8))),
    # slices
    (lambda x, y, w, v: x[..., :4], ("slice", X, -1, 0, 4)),
    (lambda x, y, w, v: x[1:], ("slice", X, -3, 1, 2)),
    (lambda x, y, w, v: x[:, 1:], ("slice", X, -2, 1, 3)),
    (lambda x, y, w, v: x[:, :, 2:-1], ("slice", X, -1, 2, 7)),
    (lambda x, y, w, v: x[:1, ...], ("slice", X, -3, 0, 1)),
    (lambda x, y, w, v: x[0:, ..., :2], ("slice", X, -1, 0, 2)),
    (lambda x, y, w, v: x[:, ..., 1:3], ("slice", X, -1, 1, 3)),
    (lambda x, y, w, v: x[..., 1:2, :], ("slice", X, -2, 1, 2)),
    (lambda x, y, w, v: x[..., ::1], ("slice", X, -1, 0, 8)),
    (lambda x, y, w, v: x[:], None),
    (lambda x, y, w, v: x[1:, :4], None),
    (lambda x, y, w, v: x[0], None),
    (lambda x, y, w, v: x[:, 0], None),
    (lambda x, y, w, v: x[..., 1::2], ("stride", X, -1, 1, 2)),
    (lambda x, y, w, v: x[..., ::2], ("stride", X, -1, 0, 2)),
    (lambda x, y, w, v: x[:, 0::3], ("stride", X, -2, 0, 3)),
    (lambda x, y, w, v: x[..., 2::2], None),
    (lambda x, y, w, v: x[..., :6:2], None),
    # new dimensions
    (lambda x, y, w, v: x[:, None], ("unsqueeze", X, -3)),
    (lambda x, y, w, v: x[None], ("unsqueeze", X, -4)),
    (lambda x, y, w, v: x[:, :, None, :], ("unsqueeze", X, -2)),
    (lambda x, y, w, v: x[:, None, :, None], None),
    (lambda x, y, w, v: x[None, 1:], None),
    (lambda x, y, w, v: x[..., None], None),
    # rows by number, and masks
    (lambda x, y, w, v: w[v.long()], ("index", M, "long")),
    (lambda x, y, w, v: w[v.int()], ("index", M, "int_1")),
    # parts
    (lambda x, y, w, v: x.chunk(2, -1)[1], ("slice", X, -1, 4, 8)),
    (lambda x, y, w, v: x.chunk(2, 2)[0], ("slice", X, -1, 0, 4)),
    (lambda x, y, w, v: torch.chunk(x, chunks=2, dim=1)[1], ("slice", X, -2, 2, 3)),
    (lambda x, y, w, v: torch.chunk(input=x, chunks=2, dim=1)[1], ("slice", X, -2, 2, 3)),
    (lambda x, y, w, v: x.chunk(2)[1], ("slice", X, -3, 1, 2)),
    (lambda x, y, w, v: x.split(3, dim=-1)[2], ("slice", X, -1, 6, 8)),
    (lambda x, y, w, v: x.split([1, 2], 1)[1], ("slice", X, -2, 1, 3)),
    (lambda x, y, w, v: torch.split(tensor=x, split_size_or_sections=2, dim=2)[1],
     ("slice", X, -1, 2, 4)),
    (lambda x, y, w, v: x.split_with_sizes((3, 5), -1)[1], ("slice", X, -1, 3, 8)),
    (lambda x, y, w, v: x.chunk(2, -1)[-1], ("item", "chunk", -1)),
    (lambda x, y, w, v: x.topk(2)[0], ("item", "topk", 0)),
    (lambda x, y, w, v: torch.topk(x, 2)[1], ("item", "topk", 1)),
    # what is not known, or does not fit
    (lambda x, y, w, v: torch.cumprod(x, 0), None),
    (lambda x, y, w, v: x, None),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_views(number: int) -> None:
    fn, expected = VIEWS[number]
    found = _view(fn)
    assert repr(found) == repr(expected)  # 0 is not False


def test_what_a_view_looks_through_belongs_to_it() -> None:
    def via(fn: Callable[..., Any]) -> list[str]:
        canon = canonical(_traced(fn))
        return [] if canon is None else [n.name for n in canon.via]

    assert via(lambda x, y, w, v: x @ w.T) == ["getattr_1"]
    assert via(lambda x, y, w, v: x.chunk(2, -1)[0]) == ["chunk"]
    assert via(lambda x, y, w, v: x[..., :4]) == []


def test_var_mean() -> None:
    module = trace(lambda x: torch.var_mean(x, 0, correction=0)[0], A)
    canon = canonical(named(module, "var_mean"))
    assert canon is not None
    assert (canon.name, *_plain(canon.args)) == ("var_mean", "x", -3, 0, False)


def test_sizes_that_the_graph_does_not_know() -> None:
    def views(fn: Callable[[Tensor], Tensor]) -> Any:
        module = capture(fn, of_any_size(torch.randn(4, 6, 8), 1))
        calls = [n for n in module.graph.nodes if n.op.startswith("call")]
        canon = canonical(calls[-1])
        return canon and (canon.name, *_plain(canon.args[1:]))

    assert views(lambda x: x[:, 1:]) == ("slice", -2, 1, None)
    assert views(lambda x: x[:, :3]) == ("slice", -2, 0, 3)
    assert views(lambda x: x[:, 1:-1]) == ("slice", -2, 1, -1)
    assert views(lambda x: x[..., 4:]) == ("slice", -1, 4, 8)
    assert views(lambda x: x[:, : x.shape[1] - 1]) is None  # a bound that is computed
    assert views(lambda x: x.chunk(2, 1)[1]) == ("item", 1)
    assert views(lambda x: x.chunk(2, 2)[1]) == ("slice", -1, 4, 8)


def test_nodes_of_which_nothing_is_known() -> None:
    module = trace(lambda x, w: (x.to(torch.half), x.view(6, 8), w.t(), x.mean(0), x[0]), A, W)
    names = ("to", "view", "t", "mean")
    for name in names:
        assert canonical(named(module, name)) is not None
    for node in module.graph.nodes:
        node.meta.pop("example_value", None)
    for name in names[:3]:
        assert canonical(named(module, name)) is None
    assert canonical(named(module, "mean")) == Canon("mean", (named(module, "x"), 0, False, None))
    item = canonical(named(module, "getitem"))
    assert item == Canon("item", (named(module, "x"), 0))


def test_a_result_of_which_nothing_is_known() -> None:
    module = trace(lambda x: x[:, None], A)
    node = named(module, "getitem")
    del node.meta["example_value"]
    assert canonical(node) is None


def test_a_dimension_that_is_computed() -> None:
    module = trace(lambda x: x.chunk(2, -1)[0], A)
    chunk = named(module, "chunk")
    chunk.args = (*chunk.args[:2], named(module, "x"))
    canon = canonical(named(module, "getitem"))
    assert canon is not None
    assert canon.name == "item"


def test_a_move_to_another_device_is_no_cast() -> None:
    module = trace(lambda x: x.to("meta"), A)
    node = named(module, "to")
    node.args[0].meta["example_value"] = torch.empty(A)
    assert canonical(node) is None


def test_a_mask_is_no_row_number() -> None:
    module = trace(lambda w, v: w[v.long()], W, V)
    named(module, "long").meta["example_value"] = torch.ones(V, dtype=torch.bool)
    assert canonical(named(module, "getitem")) is None


def test_constants_and_inputs_have_no_view() -> None:
    module = trace(lambda x: x + 1, A)
    assert canonical(3) is None
    assert canonical(named(module, "x")) is None
    assert canonical(named(module, "output")) is None
    assert canonical(fx.Graph().call_function(torch.add, (1,))) is None  # too few arguments
    assert canonical(fx.Graph().call_method("var", ())) is None


def test_casts_of_a_node() -> None:
    module = trace(lambda x: (x.half() + x, x.half().double()), A)
    x, half = named(module, "x"), named(module, "half")
    assert is_cast_of(half, x)
    assert not is_cast_of(half, half)
    assert not is_cast_of(named(module, "add"), x)
    assert not is_cast_of(named(module, "double"), x)
    assert not is_cast_of(x, x)


def test_a_scan_that_is_captured_whole() -> None:
    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
             delta_bias: Any = None, delta_softplus: bool = False) -> Any:  # fmt: skip
        raise AssertionError("not run here")

    graph = fx.Graph()
    inputs = [graph.placeholder(n) for n in "uvabc"]
    canon = canonical(graph.call_function(leaf(scan), (*inputs,), {"delta_softplus": True}))
    assert canon is not None
    assert canon.name == "scan_call"
    assert _plain(canon.args[:5]) == tuple("uvabc")
    # no gate, no bias, ..., no segments
    assert _plain(canon.args[5:]) == (None, None, None, True, False, None, ())
