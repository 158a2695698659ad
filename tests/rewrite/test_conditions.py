"""What the engine asks of every match: no effects, one mode, memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusewright.rewrite.engine import Candidate, Fuel, Verdict, apply
from fusewright.rewrite.findings import Finding
from fusewright.rewrite.rule import Emit, Match, Rule

from .graphs import named, trace

S = (2, 3, 8)
_enter, _exit = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
BF16 = ("cpu", torch.bfloat16, True, None)


class Formula(Rule):
    """A pattern to be given, and a call of one function in its place."""

    name = op = "formula"

    def __init__(self, pattern: Callable[..., Any]) -> None:
        self.pattern = pattern

    def patterns(self, p: Any, x: Any, y: Any) -> Iterator[Any]:
        """The one of the test."""
        yield self.pattern(p, x, y)

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """Nothing that is run here."""
        return ops.call(_made, m.get("x"), m.get("y"))


def _made(x: Any, y: Any) -> Any:
    raise AssertionError("not run here")


def _chain(p: Any, x: Any, y: Any) -> Any:
    return p.exp(p.tanh(p.sigmoid(x))) * y


def _found(
    module: fx.GraphModule, pattern: Callable[..., Any] = _chain, seen: Any = None
) -> Finding:
    """What becomes of the one formula of a graph."""

    def verify(c: Candidate) -> Verdict:
        if seen is not None:
            seen.append(c)
        return Verdict()

    (found,) = apply(module, [Formula(pattern)], {}, verify, Fuel())
    return found


def _reason(fn: Callable[..., Any], pattern: Callable[..., Any] = _chain) -> str:
    found = _found(trace(fn, S, S), pattern)
    assert (found.status == "rewritten") is (found.reason == "")
    return found.reason


def _writing(where: int, into: str) -> Callable[[Tensor, Tensor], Any]:
    """The formula of ``_chain`` with a write before its node ``where`` (4: behind all)."""

    def fn(a: Tensor, b: Tensor) -> Any:
        values: dict[str, Any] = {"a": a, "b": b, "part": a[0], "other": torch.sin(a)}

        def step(number: int) -> None:
            if where == number:
                values[into].add_(1)

        step(0)
        values["s"] = torch.sigmoid(a)
        step(1)
        values["t"] = torch.tanh(values["s"])
        step(2)
        values["e"] = torch.exp(values["t"])
        step(3)
        result = values["e"] * b
        step(4)
        return result

    return fn


# ------------------------------------------------------------------------------------------ effects


@pytest.mark.parametrize("where", [1, 2, 3])
@pytest.mark.parametrize("into", ["a", "b"])
def test_a_write_into_an_input_between_the_nodes(where: int, into: str) -> None:
    reason = _reason(_writing(where, into))
    assert reason == f"{into} is written to by add_, between the nodes of the formula"


def test_a_write_into_a_view_of_an_input_between_the_nodes() -> None:
    reason = _reason(_writing(2, "part"))
    assert reason == "getitem is written to by add_, between the nodes of the formula"


def test_a_write_into_what_has_no_example_value() -> None:
    module = trace(_writing(2, "a"), S, S)
    for node in module.graph.nodes:
        del node.meta["example_value"]
    assert _found(module).reason == "a is written to by add_, between the nodes of the formula"


def test_a_write_into_a_value_of_the_formula() -> None:
    # a view of it, so that the value itself has no user outside
    class Loose(Formula):
        inner_may_stay = True

    def fn(a: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        s[0].add_(1)
        return torch.exp(torch.tanh(s)) * b

    (found,) = apply(trace(fn, S, S), [Loose(_chain)], {}, None, Fuel())
    assert found.reason == "getitem is written to by add_, between the nodes of the formula"


@pytest.mark.parametrize("where", [0, 4])
def test_a_write_before_or_behind_the_formula_does_no_harm(where: int) -> None:
    assert _reason(_writing(where, "a")) == ""


def test_a_write_into_something_else_does_no_harm() -> None:
    assert _reason(_writing(2, "other")) == ""


def test_a_write_of_the_formula_itself() -> None:
    reason = _reason(lambda a, b: F.relu(a, True) * b, lambda p, x, y: p.relu(x, True) * y)
    assert reason == "a is written to by relu, in the formula"


def test_a_draw_of_the_formula_itself() -> None:
    reason = _reason(
        lambda a, b: F.dropout(a, 0.1, True) * b, lambda p, x, y: p.dropout(x, 0.1, True) * y
    )
    assert reason == "dropout draws random numbers"


def test_a_draw_between_the_nodes_does_no_harm() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        d = F.dropout(b, 0.1, True)
        return torch.exp(torch.tanh(s)) * d

    assert _reason(fn) == ""


# -------------------------------------------------------------------------------------------- modes


def _switched(
    *places: tuple[str, Callable[..., Any], tuple[Any, ...]], grad: bool = True
) -> fx.GraphModule:
    """The formula with calls that switch modes, each before the node of a name."""
    module = trace(lambda a, b: torch.exp(torch.tanh(torch.sigmoid(a))) * b, S, S, grad=grad)
    made: list[fx.Node] = []
    for before, function, args in places:
        with module.graph.inserting_before(named(module, before)):
            given = tuple(made[0] if a == "the first" else a for a in args)
            made.append(module.graph.call_function(function, given))
    return module


_grad = torch._C._set_grad_enabled


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("before", ["tanh", "exp", "mul"])
def test_gradients_that_are_switched_between_the_nodes(before: str, on: bool) -> None:
    module = _switched(("sigmoid", _grad, (not on,)), (before, _grad, (on,)))
    switch = [n for n in module.graph.nodes if n.target is _grad][1]
    reason = _found(module).reason
    assert reason == (
        f"{switch.name} switches gradients or autocast between the nodes of the formula"
    )


def test_gradients_that_are_switched_where_there_are_none() -> None:
    """As libraries unpack their weights; a cast that is switched still counts."""
    places = ("sigmoid", _grad, (False,)), ("exp", _grad, (True,))
    assert _found(_switched(*places, grad=False)).status == "rewritten"
    places = ("sigmoid", _enter, BF16), ("exp", _exit, ("the first",))
    assert "switches gradients or autocast" in _found(_switched(*places, grad=False)).reason


def test_gradients_that_are_switched_where_the_new_nodes_would_stand() -> None:
    def fn(a: Tensor, b: Tensor) -> Any:
        s = torch.sigmoid(a)
        return s * b, s * torch.exp(b)

    def pattern(p: Any, x: Any, y: Any) -> Any:
        source = p.sigmoid(p.var("x"))
        return p.fan_out(source, source * y)

    module = trace(fn, S, S, grad=True)
    with module.graph.inserting_before(named(module, "mul_1")):
        switch = module.graph.call_function(_grad, (False,))
    reason = _found(module, pattern).reason
    assert reason.startswith(f"{switch.name} switches gradients")


def test_a_mode_that_is_the_same_again_at_the_end() -> None:
    # the nodes between run in another one
    module = _switched(("tanh", _grad, (False,)), ("exp", _grad, (True,)))
    assert "switches gradients" in _found(module).reason
    module = _switched(("tanh", _grad, (False,)), ("tanh", _grad, (True,)))
    assert _found(module).status == "rewritten"


def test_a_mode_that_holds_for_the_whole_formula() -> None:
    seen: list[Candidate] = []
    assert _found(_switched(("sigmoid", _grad, (False,))), seen=seen).status == "rewritten"
    assert seen[0].autocast == ()


def test_every_autocast_around_the_formula_is_known() -> None:
    outer = ("cpu", torch.float16, True, None)
    off = ("cpu", None, False, None)
    seen: list[Candidate] = []
    around = [("sigmoid", _enter, outer), ("sigmoid", _enter, BF16), ("output", _enter, off)]
    module = _switched(*around)
    assert _found(module, seen=seen).status == "rewritten"
    assert seen[0].autocast == (outer, BF16)


def test_an_autocast_that_has_ended_is_not_around_the_formula() -> None:
    seen: list[Candidate] = []
    module = _switched(("sigmoid", _enter, BF16), ("sigmoid", _exit, ("the first",)))
    assert _found(module, seen=seen).status == "rewritten"
    assert seen[0].autocast == ()


# ------------------------------------------------------------------------------------------- memory


def test_an_output_in_the_memory_of_an_input() -> None:
    reason = _reason(
        lambda a, b: torch.transpose(a, 0, 1).exp(), lambda p, x, y: p.transpose(x, -3, -2)
    )
    assert reason == "transpose lies in the memory of a"


def test_an_output_in_the_memory_of_another_output() -> None:
    class Two(Formula):
        outputs = ("inner",)

        def rewrite(self, m: Match, ops: Emit) -> Any:
            """Two values."""
            return ops.call(_made, m.x, None), ops.call(_made, m.x, None)

    def pattern(p: Any, x: Any, y: Any) -> Any:
        return p.transpose(p.capture("inner", p.tanh(x)), -3, -2)

    def fn(a: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(a)
        return torch.transpose(t, 0, 1), t

    def apart(a: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(a)
        return torch.exp(t), t

    (found,) = apply(trace(fn, S), [Two(pattern)], {}, None, Fuel())
    assert found.reason == "tanh lies in the memory of transpose"
    rule = Two(lambda p, x, y: p.exp(p.capture("inner", p.tanh(x))))
    (found,) = apply(trace(apart, S), [rule], {}, None, Fuel())
    assert found.status == "rewritten"
