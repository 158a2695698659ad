"""The engine: what becomes of a graph, and of the account, when rules are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusewright.report import Figures
from fusewright.rewrite.engine import Candidate, Fuel, Verdict, apply
from fusewright.rewrite.findings import Finding
from fusewright.rewrite.matcher import Trace
from fusewright.rewrite.rule import Emit, Match, Rule

from .graphs import named, trace

S = (2, 3, 8)


def gated(x: Tensor, y: Tensor) -> Tensor:
    """The op of ``Gate``."""
    return torch.sigmoid(x) * y


def twice(x: Tensor) -> Tensor:
    """The op of ``Twice``."""
    return torch.tanh(torch.tanh(x))


class Gate(Rule):
    """``sigmoid(x) * y``."""

    name, op = "gate", "gated"

    def patterns(self, p: Any, x: Any, y: Any) -> Iterator[Any]:
        """One spelling; y may be the other operand."""
        yield p.capture("inner", p.sigmoid(x)) * y

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """Its op."""
        return ops.gated(m.x, m.y)


class Twice(Rule):
    """``tanh(tanh(x))``."""

    name, op = "twice", "twice"

    def patterns(self, p: Any, x: Any) -> Iterator[Any]:
        """One spelling."""
        yield p.tanh(p.tanh(x))

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """Its op."""
        return ops.twice(m.x)


TABLE: dict[str, Callable[..., Any]] = {"gated": gated, "twice": twice}


def _applied(
    module: fx.GraphModule,
    *rules: Rule,
    verify: Callable[[Candidate], Verdict] | None = None,
    fuel: int | None = None,
) -> list[Finding]:
    return apply(module, rules, TABLE, verify, Fuel(fuel))


def _calls(module: fx.GraphModule) -> list[str]:
    """The names of what a graph calls, in order."""
    calls = (n for n in module.graph.nodes if n.op.startswith("call"))
    return [n.target if isinstance(n.target, str) else n.target.__name__ for n in calls]


def _told(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    return [(f.rule, f.status, f.node) for f in findings]


# ------------------------------------------------------------------------------- what is rewritten


def test_a_formula_becomes_its_op() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.sigmoid(a) * b) + a

    module = trace(fn, S, S)
    (found,) = _applied(module, Gate())
    assert _calls(module) == ["exp", "gated", "add"] or _calls(module) == ["gated", "exp", "add"]
    assert (found.rule, found.op, found.status, found.reason) == ("gate", "gated", "rewritten", "")
    assert found.node == "mul"
    assert found.claimed == {"sigmoid", "mul", "gated"}
    a, b = torch.randn(S), torch.randn(S)
    assert torch.equal(module(a, b), fn(a, b))


def test_every_formula_is_found_and_told_in_the_order_of_the_graph() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        first = torch.sigmoid(a) * b
        return torch.sigmoid(first) * torch.tanh(torch.tanh(a))

    module = trace(fn, S, S)
    found = _applied(module, Gate(), Twice())
    assert _told(found) == [
        ("gate", "rewritten", "mul"), ("gate", "rewritten", "mul_1"),
        ("twice", "rewritten", "tanh_1"),
    ]  # fmt: skip
    a, b = torch.randn(S), torch.randn(S)
    assert torch.equal(module(a, b), fn(a, b))


def test_what_a_rewrite_consumed_is_not_matched_again() -> None:
    class Any_(Twice):
        def patterns(self, p: Any, x: Any) -> Iterator[Any]:
            yield p.tanh(p.tanh(x))
            yield p.tanh(x)

    module = trace(lambda a: torch.tanh(torch.tanh(a)), S)
    assert _told(_applied(module, Any_())) == [("twice", "rewritten", "tanh_1")]
    assert _calls(module) == ["twice"]


def test_a_formula_is_rewritten_once_however_often_it_matches() -> None:
    # both operands may be the gate
    seen: list[Candidate] = []

    def verify(c: Candidate) -> Verdict:
        seen.append(c)
        return Verdict()

    module = trace(lambda a, b: torch.sigmoid(a) * torch.sigmoid(b), S, S)
    assert len(_applied(module, Gate(), verify=verify)) == 1
    assert len(seen) == 1
    assert _calls(module) == ["sigmoid", "gated"]


def test_new_nodes_take_over_where_they_come_from() -> None:
    module = trace(lambda a, b: torch.sigmoid(a) * b, S, S)
    old = named(module, "mul").meta
    example, home = old["example_value"], {"k": ("L['self'].mlp", object)}
    for node in module.graph.nodes:
        node.meta.update(nn_module_stack=home, stack_trace="model.py, line 3")
    (found,) = _applied(module, Gate())
    new = named(module, "gated").meta
    assert new["example_value"] is example
    assert (new["nn_module_stack"], new["stack_trace"]) == (home, "model.py, line 3")
    assert found.home == "mlp"


def test_fuel() -> None:
    assert all(Fuel().take() for _ in range(3))
    limited = Fuel(2)
    assert [limited.take() for _ in range(4)] == [True, True, False, False]


def test_no_more_rewrites_than_there_is_fuel() -> None:
    seen: list[Candidate] = []

    def verify(c: Candidate) -> Verdict:
        seen.append(c)
        return Verdict()

    module = trace(lambda a, b: torch.sigmoid(torch.sigmoid(a) * torch.sigmoid(b)) * b, S, S)
    found = _applied(module, Gate(), fuel=1, verify=verify)
    assert [f.status for f in found] == ["refused", "rewritten"]
    assert found[0].reason == "FUSEWRIGHT_FUEL is used up"
    assert len(seen) == 2  # the other way to match it is not verified for nothing
    assert "gated" in _calls(module)


# ---------------------------------------------------------------------------- what is not, and why


class Choosy(Gate):
    """``Gate``, with a check to be given."""

    def __init__(self, check: Callable[[Match], None]) -> None:
        self.says = check

    def check(self, m: Match) -> None:
        """What the test says."""
        self.says(m)


def _fail(m: Match) -> None:
    raise ValueError("of mine")


@pytest.mark.parametrize(
    ("check", "told"),
    [
        (lambda m: m.require(False, "no"), [("refused", "no")]),
        (lambda m: m.leave(True, "better so"), [("left", "better so")]),
        (lambda m: m.pass_over(True), []),
        (_fail, [("refused", "the rule's check failed: ValueError: of mine")]),
    ],
)
def test_what_a_check_says(check: Callable[[Match], None], told: list[tuple[str, str]]) -> None:
    module = trace(lambda a, b: torch.sigmoid(a) * b, S, S)
    found = _applied(module, Choosy(check))
    assert [(f.status, f.reason) for f in found] == told
    assert _calls(module) == ["sigmoid", "mul"]


@pytest.mark.parametrize("how", ["require", "pass_over"])
def test_another_way_to_match_is_tried(how: str) -> None:
    def check(m: Match) -> None:
        right = m.x.name == "b"
        m.require(right, "not b") if how == "require" else m.pass_over(not right)

    module = trace(lambda a, b: torch.sigmoid(a) * torch.sigmoid(b), S, S)
    assert [f.status for f in _applied(module, Choosy(check))] == ["rewritten"]
    assert [n.name for n in named(module, "gated").args] == ["b", "sigmoid"]


def test_the_first_reason_of_a_formula_is_told() -> None:
    def check(m: Match) -> None:
        m.require(False, f"x is {m.x.name}")

    module = trace(lambda a, b: torch.sigmoid(a) * torch.sigmoid(b), S, S)
    assert [f.reason for f in _applied(module, Choosy(check))] == ["x is a"]


def test_what_verification_refuses_stays() -> None:
    module = trace(lambda a, b: torch.sigmoid(a) * b, S, S)
    (found,) = _applied(module, Gate(), verify=lambda c: Verdict("wrong by far"))
    assert (found.status, found.reason) == ("refused", "wrong by far")
    assert _calls(module) == ["sigmoid", "mul"]


def test_one_refusal_for_formulas_that_share_a_node() -> None:
    class Never(Twice):
        def check(self, m: Match) -> None:
            m.require(False, "never")

    def fn(a: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(torch.tanh(a).exp().tanh().tanh().tanh()))

    # of five in a row the last two, and then the two before them
    assert [f.node for f in _applied(trace(fn, S), Never())] == ["tanh_3", "tanh_5"]


def test_a_value_that_is_used_outside() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        return torch.exp(s * b) + torch.tanh(s) + torch.sin(s)

    module = trace(fn, S, S)
    (found,) = _applied(module, Gate())
    assert found.reason == "sigmoid inside the formula is also used by tanh"
    assert "gated" not in _calls(module)

    class Stays(Gate):
        inner_may_stay = True

    (found,) = _applied(module, Stays())
    assert found.status == "rewritten"
    assert sorted(_calls(module)) == sorted(
        ["sigmoid", "gated", "exp", "tanh", "sin", "add", "add"]
    )
    a, b = torch.randn(S), torch.randn(S)
    assert torch.equal(module(a, b), fn(a, b))


class Both(Gate):
    """``Gate`` that returns the sigmoid, too."""

    outputs = ("inner",)

    def __init__(self, returned: Callable[[fx.Node, fx.Node], Any] = lambda y, s: (y, s)) -> None:
        self.returned = returned

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """Both values, of one call each."""
        s = ops.call(torch.sigmoid, m.x)
        return self.returned(ops.call(gated, m.x, m.y), s)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_rule_with_two_outputs(kind: Callable[[Any], Any]) -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        return s * b - torch.tanh(s)

    module = trace(fn, S, S)
    (found,) = _applied(module, Both(lambda y, s: kind([y, s])))
    assert found.status == "rewritten"
    assert {n.name for n in named(module, "tanh").all_input_nodes} <= set(found.claimed)
    a, b = torch.randn(S), torch.randn(S)
    assert torch.equal(module(a, b), fn(a, b))


@pytest.mark.parametrize(("returned", "count"), [(lambda y, s: y, 1), (lambda y, s: (y, s, y), 3)])
def test_a_rewrite_returns_as_many_values_as_there_are_outputs(
    returned: Callable[[fx.Node, fx.Node], Any], count: int
) -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        return s * b - torch.tanh(s)

    message = f"gate.rewrite returned {count} values for 2 outputs"
    with pytest.raises(RuntimeError, match=message):
        _applied(trace(fn, S, S), Both(returned))


# ------------------------------------------------------------------------------------ where it goes


class Products(Rule):
    """Every product that a sigmoid is a factor of."""

    name, op = "products", "products"

    def patterns(self, p: Any, y: Any) -> Iterator[Any]:
        """All users of one sigmoid."""
        source = p.sigmoid(p.var("x"))
        yield p.fan_out(source, source * y)

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """One call for each."""
        return tuple(ops.call(gated, m.x, u["y"]) for u in m.users)


def test_the_replacement_stands_behind_the_last_input() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        first = s * b
        later = torch.exp(b)
        return first - s * later

    module = trace(fn, S, S)
    (found,) = _applied(module, Products())
    assert found.status == "rewritten", found.reason
    assert _calls(module) == ["exp", "gated", "gated", "sub"]
    a, b = torch.randn(S), torch.randn(S)
    assert torch.equal(module(a, b), fn(a, b))


@pytest.mark.parametrize("between", [torch.exp, lambda x: torch.exp(torch.sin(x))])
def test_an_output_that_an_input_is_made_of(between: Callable[[Any], Any]) -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        return s * between(s * b)

    module = trace(fn, S, S)
    (found,) = _applied(module, Products())
    assert found.reason == "an output is used before the last input exists"
    assert "gated" not in _calls(module)


def test_a_formula_without_inputs_at_the_beginning() -> None:
    class Eye(Rule):
        name = op = "eye"

        def patterns(self, p: Any) -> Iterator[Any]:
            yield p.eye(3)

        def rewrite(self, m: Match, ops: Emit) -> Any:
            return ops.call(torch.diag, torch.ones(3))

    graph = fx.Graph()
    eye = graph.call_function(torch.eye, (3,))
    graph.output(graph.call_function(torch.exp, (eye,)))
    module = fx.GraphModule({}, graph)
    (found,) = _applied(module, Eye())
    assert found.status == "rewritten", found.reason
    assert _calls(module) == ["diag", "exp"]


# -------------------------------------------------------------------------------- the verification


def test_a_candidate_holds_the_formula_and_its_replacement() -> None:
    seen: list[Candidate] = []

    def verify(c: Candidate) -> Verdict:
        seen.append(c)
        x, y = torch.randn(S), torch.randn(S)
        for graph, calls in ((c.original(), ["sigmoid", "mul"]), (c.replacement(), ["gated"])):
            part = fx.GraphModule({}, graph)
            assert _calls(part) == calls
            (out,) = part(x, y)
            assert torch.equal(out, gated(x, y))
            shapes = [n.meta["example_value"].shape for n in graph.find_nodes(op="placeholder")]
            assert shapes == [S, S]
        return Verdict(None, Figures(error=0.25))

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.sigmoid(torch.sin(a)) * b)

    module = trace(fn, S, S)
    (found,) = _applied(module, Gate(), verify=verify)
    (c,) = seen
    assert [n.name for n in c.inputs] == ["sin", "b"]
    assert [n.name for n in c.interior] == ["sigmoid", "mul"]
    assert [n.name for n in c.outputs] == ["mul"]
    assert found.figures == replace(Figures(error=0.25), moved_before=0.0, moved_after=0.0)


# ------------------------------------------------------------------------------------- the account


class Outer(Rule):
    """``exp`` of what ``Gate`` made."""

    name, op = "outer", "gated"
    absorbs = ("gate",)

    def patterns(self, p: Any, x: Any) -> Iterator[Any]:
        """The exponential of anything."""
        yield p.exp(x)

    def find(self, node: fx.Node, trace: Trace) -> Iterator[Match]:
        """With the calls of ``gated`` that it reads, and those behind them."""
        for m in super().find(node, trace):
            inside = [node]
            for n in inside:
                inside += [i for i in n.all_input_nodes if i.target in (gated, twice)]
            if len(inside) > 1:
                yield Match(node, "", m.captures, tuple(inside), (node,))

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """All of it in one call."""
        ends = [i for n in m.nodes for i in n.all_input_nodes if i not in m.nodes]
        return ops.call(_all_of_it, *dict.fromkeys(ends))


def _all_of_it(*tensors: Tensor) -> Tensor:
    return tensors[0]


def test_a_rewrite_of_a_rewrite_takes_its_place() -> None:
    def verify(c: Candidate) -> Verdict:
        if c.rule.name == "gate":
            return Verdict(None, Figures(saved_before=100.0, saved_after=40.0))
        return Verdict(None, Figures(saved_before=50.0, saved_after=10.0))

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.sigmoid(a) * b) + torch.sigmoid(b) * a

    found = _applied(trace(fn, S, S), Gate(), Outer(), verify=verify)
    assert _told(found) == [("gate", "rewritten", "mul_1"), ("outer", "rewritten", "exp")]
    assert [f.formulas for f in found] == [1, 1]
    # what stood first kept 60 bytes more than what this one replaced
    assert (found[1].figures.saved_before, found[1].figures.saved_after) == (110.0, 10.0)


def test_a_rewrite_counts_all_that_it_joins() -> None:
    module = trace(lambda a, b: torch.exp(torch.sigmoid(torch.sigmoid(a) * b) * b), S, S)
    found = _applied(module, Gate(), Outer())
    assert [(f.rule, f.formulas) for f in found] == [("outer", 2)]
    assert _calls(module) == ["_all_of_it"]


def test_a_rewrite_that_absorbs_nothing_counts_itself() -> None:
    module = trace(lambda a: torch.exp(torch.tanh(torch.tanh(a))), S)
    found = _applied(module, Twice(), Outer())
    # a site of a rule that is not to be absorbed stays in the account, though its nodes are gone
    assert [(f.rule, f.formulas) for f in found] == [("twice", 1), ("outer", 1)]


def test_a_rule_may_take_the_place_of_its_own_sites() -> None:
    class Chain(Outer):
        name, absorbs = "chain", ("chain",)

        def find(self, node: fx.Node, trace: Trace) -> Iterator[Match]:
            # from the end: what reads a part that was joined before joins it
            joined = [u for u in node.users if u.target is _all_of_it]
            if node.target is torch.exp and not joined:
                yield Match(node, "", {}, (node,), (node,))
            elif node.target is torch.exp:
                yield Match(node, "", {}, (node, *joined), tuple(joined))

    module = trace(lambda a: torch.exp(torch.exp(torch.exp(a))), S)
    assert [(f.rule, f.formulas) for f in _applied(module, Chain())] == [("chain", 1)]
    assert _calls(module) == ["_all_of_it"]


# -------------------------------------------------------------------------------- graphs in graphs


def _within(a: Tensor, b: Tensor) -> fx.GraphModule:
    """A graph that runs ``sigmoid(a) * b`` as a graph of its own."""
    body = trace(lambda a, b: torch.sigmoid(a) * b, S, S)
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "ab"]
    inner = graph.get_attr("inner")
    call = graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (inner, *inputs))
    graph.output(graph.call_function(torch.exp, (call,)))
    return fx.GraphModule({"inner": body}, graph)


class Whole(Rule):
    """A checkpointed part, as a whole."""

    name = op = "whole"

    def patterns(self, p: Any) -> Iterator[Any]:
        """No spelling: found by hand."""
        return iter(())

    def find(self, node: fx.Node, trace: Trace) -> Iterator[Match]:
        """The call."""
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            yield Match(node, "", {}, (node,), (node,))

    def check(self, m: Match) -> None:
        """Always declines."""
        m.require(False, "as it is")


def test_rules_apply_inside_nested_graphs() -> None:
    module = _within(torch.randn(S), torch.randn(S))
    assert _told(_applied(module, Gate())) == [("gate", "rewritten", "mul")]
    assert _calls(module.inner) == ["gated"]
    a, b = torch.randn(S), torch.randn(S)
    assert torch.equal(module.inner(a, b), gated(a, b))  # its code is made anew


def test_a_graph_that_is_part_of_a_formula_is_not_looked_into() -> None:
    module = _within(torch.randn(S), torch.randn(S))
    found = _applied(module, Whole(), Gate())
    assert [(f.rule, f.status, f.reason) for f in found] == [("whole", "refused", "as it is")]
    assert _calls(module.inner) == ["sigmoid", "mul"]
