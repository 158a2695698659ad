"""What is drawn for verification: sizes, layouts, dtypes, and how large the values are."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusewright.rewrite import sample_inputs
from fusewright.rewrite.engine import Candidate
from fusewright.rewrite.rule import Match, Rule
from fusewright.rewrite.sample_inputs import (
    _EVEN,
    _SIZES,
    NORMAL,
    REGIMES,
    STANDS_FOR,
    SUBNORMAL,
    Layout,
    Regime,
    Sizes,
    UnitNormals,
    draws,
    is_static,
    is_weight,
    layout,
    regimes,
    sample,
    tokens,
)

from ..capturing import capture
from .faults import graph_of, of_any_size

NEAR_ZERO, LARGE, NEGATIVE = REGIMES
S = (4, 50, 40)


def _node(example: Any, real: Tensor | None = None, graph: fx.Graph | None = None) -> fx.Node:
    """An input of a graph, with what is known of it."""
    node = (fx.Graph() if graph is None else graph).placeholder("x")
    node.meta["example_value"] = example
    if real is not None:
        node.meta["grapharg"] = SimpleNamespace(example=real)
    return node


def _candidate(*nodes: fx.Node, rule: Rule | None = None) -> Candidate:
    rule = Rule() if rule is None else rule
    match = Match(nodes[0], "", {}, (), ())
    return Candidate(rule, match, nodes, (), (), {})


def _drawn(node: Any, regime: Regime = NORMAL, draw: int = 0) -> Any:
    """What is drawn for one input."""
    node = node if isinstance(node, fx.Node) else _node(node)
    return sample(_candidate(node), Sizes(False), draw, regime)[0]


def _is_about(t: Tensor, deviation: float, mean: float = 0.0) -> bool:
    held = t.double()
    near = abs(float(held.mean()) - mean) < 0.25 * deviation
    return near and 0.8 < float(held.std()) / deviation < 1.2


# ------------------------------------------------------------------------------------------ layouts

LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Layout]] = {
    "dense": (lambda x: x, Layout((0, 1, 2), frozenset(), frozenset(), False)),
    "turned": (lambda x: x.transpose(0, 2), Layout((2, 1, 0), frozenset(), frozenset(), False)),
    "broadcast": (
        lambda x: x[:1].expand(4, 50, 40),
        Layout((1, 2, 0), frozenset({0}), frozenset(), False),
    ),
    "part": (lambda x: x[..., 20:], Layout((0, 1, 2), frozenset(), frozenset({2}), False)),
    "part of rows": (lambda x: x[:, :2], Layout((0, 1, 2), frozenset(), frozenset({1}), False)),
    "apart": (lambda x: x[..., ::2], Layout((0, 1, 2), frozenset(), frozenset(), True)),
    "twice apart": (lambda x: x[..., ::3], Layout((0, 1, 2), frozenset(), frozenset(), True)),
    "one column": (lambda x: x[..., :1], Layout((0, 1, 2), frozenset(), frozenset(), True)),
    "one row": (lambda x: x[:, :1], Layout((0, 1, 2), frozenset(), frozenset({2}), False)),
    "pairs": (lambda x: x[:, :, :2], Layout((0, 1, 2), frozenset(), frozenset({2}), False)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_inputs_lie_in_memory_as_those_of_the_call(kind: str) -> None:
    make, expected = LAYOUTS[kind]
    example = make(torch.randn(S))
    assert layout(example) == expected
    found = _drawn(example)
    assert found.shape == example.shape
    assert layout(found) == expected
    assert _is_about(found, 1.0)
    # no wider than there is need to
    once = 1
    for size, stride in zip(found.shape, found.stride(), strict=True):
        once *= size if stride else 1
    gaps = 1 + (expected.apart or bool(expected.parts))
    assert found.untyped_storage().nbytes() == 4 * once * gaps


def test_a_part_has_something_before_it() -> None:
    assert _drawn(torch.randn(S)[..., :20]).storage_offset() > 0
    assert _drawn(torch.randn(S)).storage_offset() == 0
    apart = _drawn(torch.randn(S)[..., ::2])
    assert apart.stride(-1) == 2
    assert apart.storage_offset() == 1


# ------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_floats(dtype: torch.dtype) -> None:
    found = _drawn(torch.empty(S, dtype=dtype))
    assert found.dtype is dtype
    assert _is_about(found, 1.0)


def test_what_is_drawn_in_high_precision_has_it() -> None:
    found = _drawn(torch.empty(S, dtype=torch.float64))
    assert not torch.equal(found, found.float().double())


def test_other_numbers() -> None:
    mask = _drawn(torch.empty(S, dtype=torch.bool))
    assert mask.dtype is torch.bool
    assert 0.5 < float(mask.float().mean()) < 0.9
    turned = _drawn(torch.empty(S, dtype=torch.complex64))
    assert turned.dtype is torch.complex64
    assert turned.shape == S
    assert _is_about(turned.real, 1.0)
    assert _is_about(turned.imag, 1.0)
    for dtype in (torch.int64, torch.uint8):
        numbers = _drawn(torch.empty(S, dtype=dtype), NEGATIVE)
        assert numbers.dtype is dtype
        assert numbers.unique().tolist() == [0, 1]
    assert _drawn(3) == 3


def test_inputs_and_draws_differ_and_come_again() -> None:
    example = torch.empty(S)
    graph = fx.Graph()
    c = _candidate(*(_node(example, graph=graph) for _ in range(3)))
    made = [t for d in range(3) for t in sample(c, Sizes(False), d)]
    assert len({float(t.sum()) for t in made}) == 9
    again = [t for d in range(3) for t in sample(c, Sizes(False), d)]
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_a_rule_may_draw_itself() -> None:
    class Labels(Rule):
        def sample(
            self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
        ) -> Tensor | None:
            return torch.full(shape, 7.0)

    c = _candidate(_node(torch.empty(S)), rule=Labels())
    assert torch.equal(sample(c, Sizes(False), 0, NEGATIVE)[0], torch.full(S, 7.0))


# ----------------------------------------------------------------------------------------- weights


def test_weights_keep_products_near_one() -> None:
    assert _is_about(_drawn(torch.empty(30, 400)), 1 / 20)
    assert _is_about(_drawn(torch.empty(4000)), 1.0)
    assert _is_about(_drawn(nn.Parameter(torch.empty(S))), 1.0)
    assert _is_about(_drawn(nn.Parameter(torch.empty(30, 400)), NEGATIVE), 1 / 20)
    assert _is_about(_drawn(torch.empty(30, 400), LARGE), 1 / 20)


def test_weights_are_as_large_as_they_are() -> None:
    real = torch.full((30, 400), 1.0)
    real[3, 5] = -100
    assert _is_about(_drawn(_node(torch.empty(30, 400), real), LARGE), 128 / 4)
    assert _is_about(_drawn(_node(torch.empty(30, 400), real), NEGATIVE), 1 / 20)
    # what says nothing
    for nothing in (torch.zeros(30, 400), torch.full((30, 400), torch.inf)):
        assert _is_about(_drawn(_node(torch.empty(30, 400), nothing), LARGE), 1 / 20)


def test_a_learnt_factor_is_what_it_is() -> None:
    factor = _node(torch.empty(1), nn.Parameter(torch.tensor([0.07])))
    assert torch.equal(_drawn(factor, LARGE), torch.tensor([0.07]))
    assert not torch.equal(_drawn(factor, NEAR_ZERO), torch.tensor([0.07]))
    pair = _node(torch.empty(2), torch.tensor([3.0, 3.0]))
    assert not torch.equal(_drawn(pair, LARGE), torch.tensor([3.0, 3.0]))


def test_what_is_a_weight() -> None:
    assert is_weight(_node(torch.empty(3)))
    assert is_weight(_node(torch.empty(3, 4)))
    assert not is_weight(_node(torch.empty(2, 3, 4)))
    assert is_weight(_node(nn.Parameter(torch.empty(2, 3, 4))))
    assert not is_weight(_node(3))
    rows = graph_of("glu").graph.find_nodes(op="placeholder")[-1]
    assert not is_weight(rows)
    assert is_static(torch.empty(3, 4))
    assert is_static(torch.empty(3, 4, 5))
    assert not is_static(torch.empty(3))


# ------------------------------------------------------------------------------------- activations


def test_near_zero_with_a_row_of_zeros_and_one_of_equal_numbers() -> None:
    found = _drawn(torch.empty(S), NEAR_ZERO)
    assert not found[:, 0].any()
    assert torch.equal(found[:, 1].abs(), torch.full((4, 40), 1e-3))
    assert (found[:, 1] == found[:, 1, :1]).all()
    assert found[:, 1, 0].unique().numel() == 2  # of either sign
    assert _is_about(found[:, 2:], 1e-3)
    single = _drawn(torch.empty(4, 1, 40), NEAR_ZERO)
    assert not single.any()
    pair = _drawn(torch.empty(4, 2, 40), NEAR_ZERO)
    assert not pair[:, 0].any()
    assert (pair[:, 1].abs() == 1e-3).all()


def test_far_below_zero() -> None:
    found = _drawn(torch.empty(S), NEGATIVE)
    assert float(found.mean()) < -15
    assert 2 < float(found.std()) < 8
    assert _is_about(_drawn(torch.empty(S), Regime("one", 1.0, 3.0)), 1.0, 3.0)
    assert _is_about(_drawn(torch.empty(S), Regime("two", 2.0)), 2.0)


def test_gradients_near_zero_are_tried_in_half_precision() -> None:
    def tried(dtype: torch.dtype) -> tuple[Regime, ...]:
        return regimes(_candidate(_node(torch.empty(S, dtype=dtype))))

    assert tried(torch.float16) == (*REGIMES, SUBNORMAL)
    assert tried(torch.bfloat16) == tried(torch.float32) == REGIMES
    half = torch.finfo(torch.float16)
    assert half.smallest_normal / 2**10 < SUBNORMAL.upstream < half.smallest_normal


def test_what_is_broadcast_is_changed_once() -> None:
    found = _drawn(torch.empty(1, 50, 40).expand(S), Regime("two", 2.0, 1.0))
    assert found.stride(0) == 0
    assert _is_about(found, 2.0, 1.0)
    rows = _drawn(torch.empty(4, 1, 40).expand(S), NEAR_ZERO)
    assert not rows.any()  # each of its rows is the first


def test_large_is_as_large_as_at_the_first_call() -> None:
    example = torch.empty(S)
    # four standard deviations are about the largest of some thousand
    assert _is_about(_drawn(example, LARGE), 16 / 4)
    real = torch.ones(S)
    real[0, 0, 0] = -300
    assert _is_about(_drawn(_node(example, real), LARGE), 512 / 4)
    assert _is_about(_drawn(_node(example, torch.ones(S)), LARGE), 16 / 4)  # but not small
    assert _is_about(_drawn(_node(example, real * 1e-9), LARGE), 16 / 4)
    mask = torch.full(S, torch.finfo(torch.float32).min)
    for nothing in (mask, mask / 1.5, real[:0], torch.zeros(S), real.long(), real.to("meta")):
        assert _is_about(_drawn(_node(example, nothing), LARGE), 16 / 4)
    assert _is_about(_drawn(_node(example, mask / 2.0**100), LARGE), 2.0**28 / 4)


def test_large_in_a_narrow_dtype() -> None:
    half = torch.empty(S, dtype=torch.float16)
    real = torch.full(S, 30000.0, dtype=torch.float16)
    found = _drawn(_node(half, real), LARGE)
    assert found.isfinite().all()
    assert _is_about(found, torch.finfo(torch.float16).max / 16)
    tiny = torch.full(S, 300.0).to(torch.float8_e4m3fn)
    assert _is_about(_drawn(_node(half, tiny), LARGE), 16 / 4)


def test_what_is_made_inside_is_as_large_as_the_inputs_of_the_graph() -> None:
    def inside(*reals: Tensor) -> fx.Node:
        graph = fx.Graph()
        for real in reals:
            _node(torch.empty(real.shape), real, graph)
        node = graph.call_function(torch.neg, (next(iter(graph.nodes)),))
        node.meta["example_value"] = torch.empty(S)
        return node

    large, larger = torch.full(S, 100.0), torch.full(S, 200.0)
    weight = torch.full((30, 40), 1000.0)
    assert _is_about(_drawn(inside(large, larger, weight), LARGE), 256 / 4)
    assert _is_about(_drawn(inside(weight, large), LARGE), 128 / 4)
    assert _is_about(_drawn(inside(weight), LARGE), 16 / 4)
    own = inside(larger)
    own.meta["grapharg"] = SimpleNamespace(example=large)
    assert _is_about(_drawn(own, LARGE), 128 / 4)
    smaller = _node(torch.empty(S))
    smaller.meta[STANDS_FOR] = own
    assert _is_about(_drawn(smaller, LARGE), 128 / 4)


# -------------------------------------------------------------------------------- sizes and numbers


def test_sizes() -> None:
    assert len(set(_SIZES)) == len(set(_EVEN)) == 5
    assert all(n % 2 for n in _SIZES[:3])
    assert all(n % 2 == 0 for n in _EVEN)
    assert min(*_SIZES, *_EVEN) >= 2
    assert max(*_SIZES, *_EVEN) <= 12


def test_each_size_of_a_graph_becomes_one_number() -> None:
    seen: dict[str, Any] = {}

    def fn(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x.sum() + y.sum() + z.sum()

    x, y, z = torch.randn(4, 6, 8), torch.randn(6, 9, 8), torch.randn(10, 8)
    graph = capture(fn, *(of_any_size(t, 1) for t in (x, y)), of_any_size(z, 0))
    for node in graph.graph.find_nodes(op="placeholder"):
        if isinstance(value := node.meta["example_value"], Tensor):
            seen[str(node.target)[2]] = value.shape
    assert seen.keys() == set("xyz")
    small = Sizes(True)
    assert small.of(tuple(seen["x"])) == (5, 7, 8)
    assert small.of(tuple(seen["y"])) == (7, 3, 8)  # what was met as one number is one
    assert small.of(list(seen["z"])) == [2, 8]
    assert Sizes(True, even=True).of(tuple(seen["x"])) == (4, 8, 8)
    assert Sizes(False).of(tuple(seen["y"])) == (6, 9, 8)
    rows = seen["x"][0]
    assert small.of(rows * 2 + 1) == 11
    assert type(small.of(rows)) is int
    half = small.of(torch.sym_float(rows) / 2)
    assert (half, type(half)) == (2.5, float)
    assert small.of("text") == "text"


def test_sizes_that_were_met_as_one_number_agree_whatever_their_names() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    kinds = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x, y, z = (
        mode.from_tensor(torch.empty(n, 8), source=ConstantSource(f"t{i}"), symbolic_context=kinds)
        for i, n in enumerate((6, 6, 9))
    )
    assert str(x.shape[0]) != str(y.shape[0])
    small = Sizes(True)
    assert [small.of(tuple(t.shape)) for t in (x, y, z)] == [(5, 8), (5, 8), (7, 8)]


def test_small_results_are_judged_by_more_draws() -> None:
    def of(elements: int) -> tuple[int, ...]:
        return draws([torch.empty(1).expand(elements), 3])

    assert len(of(1 << 16)) == 2
    assert of(1 << 16)[0] < of(1 << 16)[1]
    assert of(1 << 17) == of(1 << 20) == of(1 << 16)[:1]
    assert of(1 << 21) < of(1 << 20)
    assert of(1 << 21)[0] > 1
    parts = draws([torch.empty(1).expand(1 << 16)] * 2)
    assert parts == of(1 << 17)


def test_tokens() -> None:
    assert tokens([torch.empty(2, 5, 8), torch.empty(30, 8)]) == 10
    assert tokens([torch.empty(2, 3, 5, 8)]) == 10  # heads are no tokens
    assert tokens([torch.empty(2, 5, 8), torch.empty(3, 7, 8)]) == 21
    assert tokens([torch.empty(3, 7, 8, dtype=torch.int64), 3, torch.empty(9)]) == 1
    experts = torch.empty(4, 64, 8)
    assert tokens([torch.empty(30, 8), experts], {(4, 64, 8)}) == 30  # rows, and weights


def test_gradients_from_behind_are_of_unit_size_but_in_one_regime() -> None:
    assert {r.upstream for r in (NORMAL, *REGIMES)} == {1.0}
    assert 0 < SUBNORMAL.upstream < 1e-3


@pytest.mark.parametrize("kept", [1 << 21, 0])
def test_normals_that_are_drawn_once_are_those_that_are_drawn_anew(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_inputs, "_CACHED", kept)
    node = _node(torch.zeros(6, 4), torch.ones(6, 4))
    normals = UnitNormals()
    for regime in (NORMAL, *REGIMES, NORMAL):  # each of which writes into what it was given
        for draw in (0, 1):
            candidate, sizes = _candidate(node), Sizes(True)
            (anew,) = sample(candidate, sizes, draw, regime)
            (again,) = sample(candidate, sizes, draw, regime, normals)
            assert torch.equal(again, anew)
    assert bool(normals) == bool(kept)
