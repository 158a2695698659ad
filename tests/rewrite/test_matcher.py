"""The matcher: what a pattern takes, what it does not, and what it says of the nearest miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusewright.rewrite.matcher import State, Trace, match, same
from fusewright.rewrite.pattern import Anything, Builder, FanOut, Literal, Pattern, Var, lift, roots
from fusewright.rewrite.rule import Emit, Match, Rule

from .graphs import last, named, trace

p = Builder()
X, Y = Var("x"), Var("y")
S = (2, 3, 8)


def _find(
    pattern: Pattern, fn: Callable[..., Any], *shapes: tuple[int, ...], trace_: Trace | None = None
) -> list[State]:
    found = match(pattern, last(trace(fn, *(shapes or (S, S)))), State(), trace_ or Trace())
    return list(found)


def _captured(state: State) -> dict[str, Any]:
    return {k: v.name if isinstance(v, fx.Node) else v for k, v in state.captures.items()}


def test_a_variable_captures_what_it_meets() -> None:
    (found,) = _find(X - Y, lambda a, b: a - b)
    assert _captured(found) == {"x": "a", "y": "b"}
    assert [n.name for n in found.nodes] == ["sub"]


def test_operands_of_commutative_operations_match_in_either_order() -> None:
    pattern = Var("x") * p.sigmoid(Var("y"))
    for fn in (lambda a, b: a * torch.sigmoid(b), lambda a, b: torch.sigmoid(b) * a):
        assert _captured(_find(pattern, fn)[0]) == {"x": "a", "y": "b"}


def test_operands_of_others_do_not() -> None:
    assert not _find(X - p.sigmoid(Y), lambda a, b: torch.sigmoid(b) - a)
    assert len(_find(X - p.sigmoid(Y), lambda a, b: a - torch.sigmoid(b))) == 1


def test_both_orders_are_tried_once_each() -> None:
    assert len(_find(X * Y, lambda a, b: a * b)) == 2
    assert len(_find(X * Y, lambda a, b: a * a)) == 1


def test_a_variable_that_comes_twice_is_one_thing() -> None:
    assert _find(X * p.sigmoid(X), lambda a, b: a * torch.sigmoid(a))
    assert not _find(X * p.sigmoid(X), lambda a, b: a * torch.sigmoid(b))


def test_a_pattern_object_that_comes_twice_is_one_node() -> None:
    h = p.sigmoid(X)
    shared: Callable[..., Tensor] = lambda a, b: (s := torch.sigmoid(a)) * torch.tanh(s)  # noqa: E731
    assert _find(h * p.tanh(h), shared)
    twice: Callable[..., Tensor] = lambda a, b: torch.sigmoid(a) * torch.tanh(torch.sigmoid(a))  # noqa: E731
    assert not _find(h * p.tanh(h), twice)


def test_constants_match_by_value_and_not_by_type_of_number() -> None:
    assert _find(X**2, lambda a, b: a**2.0)
    assert _find(X**2.0, lambda a, b: a.pow(2))
    assert not _find(X**2, lambda a, b: a**3)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (2, 2.0, True),
        (1, True, False),
        (True, True, True),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float16, False),
        (torch.float32, "float32", False),
        ("mean", "mean", True),
        ("mean", "sum", False),
        (None, None, True),
        (None, 0, False),
        ((1, 2), (1, 2), True),
        ((1, 2), [1, 2], False),
    ],
)
def test_what_counts_as_the_same_constant(a: Any, b: Any, equal: bool) -> None:
    assert same(a, b) is equal
    assert same(b, a) is equal


def test_nodes_are_the_same_by_identity_only() -> None:
    module = trace(lambda a, b: torch.sigmoid(a) + torch.sigmoid(a), S, S)
    one, two = named(module, "sigmoid"), named(module, "sigmoid_1")
    assert same(one, one)
    assert not same(one, two)
    assert not same(one, "sigmoid")
    assert not same(2, one)


def test_an_alternative_that_leads_nowhere_is_left_for_the_next() -> None:
    pattern = (p.sigmoid(X) | X) * X
    assert _captured(_find(pattern, lambda a, b: a * a)[0]) == {"x": "a"}
    (found,) = _find(pattern, lambda a, b: torch.sigmoid(a) * a)
    assert {n.name for n in found.nodes} == {"mul", "sigmoid"}


def test_a_cast_may_be_there_or_not() -> None:
    pattern = p.tanh(p.maybe_cast(X))
    assert _captured(_find(pattern, lambda a, b: torch.tanh(a))[0]) == {"x": "a"}
    found = _find(pattern, lambda a, b: torch.tanh(a.to(torch.float64)))
    assert _captured(found[0]) == {"x": "a"}
    assert {n.name for n in found[0].nodes} == {"tanh", "to"}


def test_a_cast_to_one_dtype_is_no_other() -> None:
    pattern = p.cast(X, torch.float64)
    assert _find(pattern, lambda a, b: a.double())
    assert not _find(pattern, lambda a, b: a.half())


def test_a_condition_on_a_variable() -> None:
    small = Var("eps", lambda v: isinstance(v, float) and v < 1)
    assert _captured(_find(X + small, lambda a, b: a + 0.5)[0]) == {"x": "a", "eps": 0.5}
    assert not _find(X + small, lambda a, b: a + 2.0)


def test_anything_captures_nothing_and_may_differ_each_time() -> None:
    (found, *_) = _find(Anything() * p.sigmoid(Anything()), lambda a, b: a * torch.sigmoid(b))
    assert _captured(found) == {}
    assert p.anything is p.anything
    assert _find(p.anything * p.sigmoid(p.anything), lambda a, b: a * torch.sigmoid(b))


def test_an_equal_literal_may_stand_in_two_places() -> None:
    two = Literal(2)
    assert _find((X + two) * two, lambda a, b: (a + 2) * 2)
    assert not _find((X + two) * two, lambda a, b: (a + 2) * 3)


def test_lists_match_item_by_item() -> None:
    pattern = p.cat((X, Y), -1)
    assert _captured(_find(pattern, lambda a, b: torch.cat([a, b], dim=-1))[0]) == {
        "x": "a",
        "y": "b",
    }
    near = Trace()
    assert not _find(pattern, lambda a, b: torch.cat([a, b, a], dim=-1), trace_=near)
    assert near.reason == "2 items expected"
    assert not _find(pattern, lambda a, b: torch.cat([a, b], dim=1))


def test_a_named_node_is_captured() -> None:
    inner = p.capture("inner", p.sigmoid(X))
    (found,) = _find(p.tanh(inner), lambda a, b: torch.tanh(torch.sigmoid(a)))
    assert _captured(found) == {"inner": "sigmoid", "x": "a"}


@pytest.mark.parametrize(
    ("index", "fn", "hits"),
    [
        (0, lambda a, b: a[..., :4], True),
        (1, lambda a, b: a[..., :4], False),
        (1, lambda a, b: a[..., 4:], True),
        (0, lambda a, b: a[..., 4:], False),
        (0, lambda a, b: a[..., :3], False),
        (0, lambda a, b: a[..., 1:4], False),
        (1, lambda a, b: a[..., 4:7], False),
        (0, lambda a, b: a[:, :1], False),
        (1, lambda a, b: a[..., ::2], False),
        (0, lambda a, b: a[..., ::2], False),
    ],
)
def test_halves(index: int, fn: Callable[..., Tensor], hits: bool) -> None:
    assert bool(_find(p.half(X, index), fn)) is hits


def test_half_of_an_odd_size_is_none() -> None:
    assert not _find(p.half(X, 0), lambda a: a[..., :3], (2, 7))
    assert _find(p.half(X, 0), lambda a: a[..., :3], (2, 6))


@pytest.mark.parametrize(
    ("index", "fn", "hits"),
    [
        (0, lambda a, b: a[..., ::2], True),
        (1, lambda a, b: a[..., 1::2], True),
        (1, lambda a, b: a[..., ::2], False),
        (0, lambda a, b: a[..., 1::2], False),
        (0, lambda a, b: a[..., ::4], False),
        (0, lambda a, b: a[..., :4], False),
    ],
)
def test_every_other_feature(index: int, fn: Callable[..., Tensor], hits: bool) -> None:
    assert bool(_find(p.every_other(X, index), fn)) is hits


def test_a_half_takes_the_node_that_it_looks_through() -> None:
    (found,) = _find(p.half(X, 1), lambda a, b: a.chunk(2, -1)[1])
    assert {n.name for n in found.nodes} == {"getitem", "chunk"}


def test_the_nearest_miss_is_the_attempt_that_came_furthest() -> None:
    near = Trace()
    pattern = p.tanh(p.sigmoid(p.exp(X)) * Y)
    assert not _find(pattern, lambda a, b: torch.tanh(torch.sigmoid(torch.sin(a)) * b), trace_=near)
    assert near.reason == "sin (sin) where exp is expected"
    assert near.node.name == "sin"
    assert near.depth == 3
    assert {n.name for n in near.nodes} == {"tanh", "mul", "sigmoid"}


@pytest.mark.parametrize(
    ("pattern", "fn", "reason"),
    [
        (p.tanh(X) + 1, lambda a, b: torch.tanh(a) + 2, "2 where 1 is expected"),
        (p.tanh(p.exp(X)), lambda a, b: torch.tanh(a), "input (a) where exp is expected"),
        (p.tanh(p.exp(X)), lambda a, b: torch.tanh(torch.erf(a)), "erf (erf) where exp"),
        (p.tanh(p.exp(X)), lambda a, b: torch.tanh(a.erf()), "erf (erf) where exp"),
        (
            p.sigmoid(X) - p.tanh(X),
            lambda a, b: a.sigmoid() - b.tanh(),
            "input (b) where input (a) was seen before",
        ),
        (p.sigmoid(X) - p.tanh(Var("x")), lambda a, b: a.sigmoid() - b.tanh(), "is not the x seen"),
        (p.tanh(p.half(X, 0)), lambda a, b: a[..., 4:].tanh(), "is not half 0 of a tensor"),
        (p.tanh(p.every_other(X, 1)), lambda a, b: a.tanh(), "is not every other feature 1"),
        (p.tanh(X) + Var("e", lambda v: False), lambda a, b: a.tanh() + 1, "1 cannot be e"),
    ],
)
def test_the_reason_of_a_miss(pattern: Pattern, fn: Callable[..., Tensor], reason: str) -> None:
    near = Trace()
    assert not _find(pattern, fn, trace_=near)
    assert reason in near.reason


def test_a_shallower_miss_does_not_replace_a_deeper_one() -> None:
    module = trace(lambda a, b: torch.tanh(a), S, S)
    near, node = Trace(), last(module)
    near.note(State(nodes=(node,)), "deep", lambda: "deep")
    near.note(State(), "shallow", lambda: "shallow")
    near.note(State(nodes=(node,)), "equal", lambda: "equal")
    assert (near.reason, near.depth, near.nodes) == ("deep", 1, (node,))


def test_the_reason_of_an_attempt_that_is_not_kept_is_not_made() -> None:
    def made() -> str:
        raise AssertionError("made")

    Trace().note(State(), "shallow", made)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (p.tanh(X), {"tanh"}),
        (p.tanh(X) | p.sigmoid(X) | p.half(X, 0), {"tanh", "sigmoid", "slice", "stride"}),
        (FanOut(p.tanh(X), X), {"tanh"}),
        (p.tanh(X) | X, None),
        (X, None),
    ],
)
def test_the_operations_at_the_root_of_a_pattern(pattern: Pattern, names: set[str] | None) -> None:
    assert roots(pattern) == names


def test_a_state_is_extended_and_never_changed() -> None:
    module = trace(lambda a, b: torch.tanh(a), S, S)
    first, node = State(), last(module)
    second = first.with_capture("x", 1).with_seen(X, 1).with_nodes(node)
    assert (first.captures, first.seen, first.nodes) == ({}, {}, ())
    assert second.captures == {"x": 1}
    assert second.seen == {id(X): 1}
    assert second.nodes == (node,)
    assert second.with_nodes(node) is second


def test_a_fan_out_stands_at_the_top_only() -> None:
    pattern = p.tanh(p.fan_out(X, Y))
    with pytest.raises(TypeError, match="FanOut may only stand at the top"):
        _find(pattern, lambda a, b: torch.tanh(a))


class Fans(Rule):
    """Every linear that reads one input."""

    name, op = "fans", "fans"

    def patterns(self, b: Builder, w: Any) -> Any:
        source = b.sigmoid(b.var("x"))
        yield b.fan_out(source, b.linear(source, w, None))

    def rewrite(self, m: Match, ops: Emit) -> Any:
        raise AssertionError("not rewritten here")


def _fans(fn: Callable[..., Any]) -> list[Match]:
    module = trace(fn, S, (4, 8), (5, 8))
    return list(Fans().find(named(module, "sigmoid"), Trace()))


def _linear(x: Any, w: Any) -> Any:
    return torch.nn.functional.linear(x, w)


def test_a_fan_out_takes_all_users() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        return _linear(s, w), _linear(s, v)

    (found,) = _fans(fn)
    assert [u["w"].name for u in found.users] == ["w", "v"]
    assert found.x.name == "x"
    assert found.users[0]["source"].name == "sigmoid"
    assert {n.name for n in found.nodes} == {"sigmoid", "linear", "linear_1"}
    assert [n.name for n in found.outputs] == ["linear", "linear_1"]
    assert "x" not in found.users[0]


def test_a_fan_out_with_another_user_is_none() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        return _linear(s, w), s + 1

    assert not _fans(fn)


def test_a_fan_out_without_users_is_none() -> None:
    module = trace(lambda x, w, v: (torch.sigmoid(x), w)[1], S, (4, 8), (5, 8))
    assert not list(Fans().find(named(module, "sigmoid"), Trace()))


def test_patterns_say_what_they_do_not_know() -> None:
    with pytest.raises(AttributeError, match="no canonical operation is named 'rsqr'"):
        p.rsqr(X)
    with pytest.raises(TypeError, match="not 3 arguments"):
        p.sigmoid(X, Y, X)


def test_lifting() -> None:
    assert lift(X) is X
    assert isinstance(lift(2), Literal)
    assert [type(i) for i in lift((X, 2)).items] == [Var, Literal]
    assert isinstance(-X, Pattern)
    assert (2 * X).name == "mul"
    assert (2 + X).name == "add"
    assert isinstance(p.fan_out(X, Y), FanOut)
