"""Rewrites that do something beside their values, or leave something out, are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusewright.graph.layouts import layout_is_read
from fusewright.passes.glu import GLU
from fusewright.rewrite.rule import Emit, Match, Rule
from fusewright.rewrite.verify import VerifySettings, runs

from ..capturing import capture
from .faults import D, changed, given, graph_of, judged, of_any_size, verdict, with_gradient

OPS = ("rms_norm", "glu", "lora_linear", "linear_cross_entropy")


@pytest.mark.parametrize("op", OPS)
def test_a_write_in_forward(op: str) -> None:
    def fault(f: Any, x: Tensor, *args: Any) -> Tensor:
        result = f(x, *args)
        x.detach().mul_(2)
        return result

    assert "only the rewrite writes to input" in judged(op, fault).reason


def test_a_write_in_backward() -> None:
    def fault(f: Any, x: Tensor, *args: Any) -> Tensor:
        def wipe(grad: Tensor) -> Tensor:
            x.detach().zero_()
            return grad

        return with_gradient(f(x, *args), wipe)

    assert "only the rewrite writes to input" in judged("linear_cross_entropy", fault).reason


def test_a_write_that_is_lost() -> None:
    def fn(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate, inplace=True) * up

    class Blind(GLU):
        """The rule as it would be if it took the activation for one that does not write."""

        def patterns(self, p: Any, gate: Any, up: Any) -> Any:
            yield "silu", p.silu(gate, True) * up

        def check(self, m: Match) -> None:
            """Nothing."""

    with torch.no_grad():
        graph = capture(fn, *given("glu"))
        assert verdict(Blind(), graph) == "only the original writes to input 0"


class Copy(Rule):
    """``x.clone()`` replaced by what ``made`` makes of x."""

    name = op = "copy"

    def __init__(self, made: Any) -> None:
        self.made = made

    def patterns(self, p: Any, x: Any) -> Any:
        """The call."""
        yield p.clone(x)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """Whatever is to be tried."""
        return ops.call(self.made, m.x)


COPIES = {
    "an alias": (lambda x: x.view_as(x), "of the rewrite only: output 0 shares memory with input"),
    "a part of the input": (lambda x: x[...], "output 0 shares memory with input 0"),
    "another layout": (lambda x: _turned(x), "of the rewrite only: output 0 has strides"),
    "no gradient": (lambda x: x.detach().clone(), "only the original has it"),
    "another dtype": (lambda x: x.double(), "dtype torch.float64 instead of torch.float32"),
    "another shape": (lambda x: x.clone()[None], "shape (1, "),
    "a broadcast shape": (lambda x: x[:1].expand_as(x).clone(), "output 0: rms error"),
    "another class": (lambda x: torch.nn.Parameter(x.detach().clone()), "only the original has it"),
}


def _turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("kind", COPIES)
def test_another_tensor_than_a_copy(kind: str) -> None:
    made, reason = COPIES[kind]
    graph = capture(lambda x: x.clone().view(-1), *given("glu")[:1])
    found = verdict(Copy(made), graph)
    assert found is not None
    assert reason in found


def test_an_alias_that_is_lost() -> None:
    class View(Copy):
        def patterns(self, p: Any, x: Any) -> Any:
            yield p.transpose(x, -2, -1)

    graph = capture(lambda x: x.transpose(-2, -1), *given("glu")[:1])
    rule = View(lambda x: x.mT.clone(memory_format=torch.preserve_format))
    found = verdict(rule, graph)
    assert found == "of the original only: output 0 shares memory with input 0"


def test_two_outputs_in_one_memory() -> None:
    class Pair(Rule):
        name = op = "pair"
        outputs = ("first",)

        def patterns(self, p: Any, x: Any) -> Any:
            """Two copies of one value, one made from the other."""
            yield p.clone(p.capture("first", p.clone(x)))

        def rewrite(self, m: Match, ops: Emit) -> tuple[fx.Node, fx.Node]:
            """One copy for both."""
            made = ops.call(torch.clone, m.x)
            return made, made

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x.clone()
        return first.clone(), first

    found = verdict(Pair(), capture(fn, *given("glu")[:1]))
    assert found == "of the rewrite only: output 1 shares memory with output 0"


def test_an_output_that_cannot_be_written_to() -> None:
    class Views(torch.autograd.Function):
        """What returns views that it has made itself."""

        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone().view(y.shape)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    finding = judged("glu", lambda f, *args: Views.apply(f(*args)))
    assert "of the rewrite only: output 0 cannot be written in place" in finding.reason


@pytest.mark.parametrize("op", OPS)
def test_a_random_draw(op: str) -> None:
    def fault(f: Any, *args: Any) -> Tensor:
        torch.rand(1)
        return f(*args)

    assert "draws other random numbers than the original" in judged(op, fault).reason


def test_a_random_draw_that_is_lost() -> None:
    class Kept(Copy):
        def patterns(self, p: Any, x: Any) -> Any:
            yield p.dropout(x, p.anything, p.anything, p.anything)

    graph = capture(lambda x: F.dropout(x, 1e-9), *given("glu")[:1])
    found = verdict(Kept(torch.clone), graph)
    assert found == "the rewrite draws other random numbers than the original"


@pytest.mark.parametrize(("op", "which"), [("glu", 0), ("glu", 1), ("rms_norm", 1)])
def test_a_gradient_that_is_missing(op: str, which: int) -> None:
    def fault(f: Any, *args: Any) -> Tensor:
        return f(*(a.detach() if i == which else a for i, a in enumerate(args)))

    finding = judged(op, fault)
    assert "gradient of input" in finding.reason
    assert "only the original has it" in finding.reason


def test_a_gradient_where_there_is_none() -> None:
    def fault(f: Any, x: Tensor, residual: Tensor, w: Tensor, *args: Any) -> Any:
        total, normed = f(x, residual, w, *args)
        return total + 0 * w.sum(), normed

    reason = judged("add_rms_norm", fault).reason
    assert "of the rewrite only: output 1 alone gives a gradient of input" in reason


def test_an_output_that_needs_a_gradient() -> None:
    q, k, cos, sin = given("rope")
    graph = graph_of("rope", [of_any_size(q.detach(), 2), k, cos, sin])

    def fault(f: Any, tensors: Any, *args: Any) -> Any:
        return changed(f(tensors, *args), lambda t: t.clone().requires_grad_() * 1)

    reason = judged("rope", fault, graph).reason
    assert "of the rewrite only: output 0 requires a gradient" in reason


def test_what_raises_is_refused() -> None:
    def fault(f: Any, *args: Any) -> Tensor:
        raise ValueError("no")

    assert judged("glu", fault).reason == "could not be run for verification: ValueError: no"


def test_each_run_has_inputs_of_its_own() -> None:
    x = torch.randn(2, 3)
    before = x.clone()
    setting = VerifySettings([False], frozenset(), grad=False)
    for _ in range(2):
        outputs, _, _, written = runs(lambda t: (t.mul_(2),), [[x]], setting).results
        assert torch.equal(x, before)
        assert torch.equal(outputs[0], 2 * before)
        assert torch.equal(written[0], 2 * before)


def test_a_write_that_both_have_is_compared_by_its_values() -> None:
    class Twice(Copy):
        def patterns(self, p: Any, x: Any) -> Any:
            yield p.relu(x, True)

    def graph() -> fx.GraphModule:
        return capture(lambda x: F.relu(x, inplace=True), torch.randn(2, 6, D))

    def late(x: Tensor) -> Tensor:
        result = x.relu_().clone()
        x.mul_(1.01)
        return result

    assert verdict(Twice(torch.relu_), graph()) is None
    found = verdict(Twice(lambda x: x.relu_().mul_(1.01)), graph())
    assert found is not None
    assert found.startswith("output 0: rms error")
    found = verdict(Twice(late), graph())
    assert found == "of the original only: output 0 shares memory with input 0"


@pytest.mark.parametrize(("reader", "kind"), [
    (lambda y: y.view(-1), "for views"),
    (lambda y: (y * 2).mT.view_as(y.mT), "for views"),
    (lambda y: y.as_strided((2,), (1,)), "exactly"),
    (lambda y: y.reshape(-1), ""),
    (lambda y: y.sum() + 1, ""),
    (lambda y: y.contiguous().view(-1), ""),
    (lambda y: F.dropout(y * 2, 0.5), "exactly"),
    (lambda y: F.dropout(y * 2, 0.5, training=False), ""),
    (lambda y: torch.rand_like(y), "exactly"),
])  # fmt: skip
def test_who_reads_a_layout(reader: Any, kind: str) -> None:
    graph = capture(lambda x: reader(x.clone()).sum(), torch.randn(2, 6, D))
    copy = next(n for n in graph.graph.nodes if n.target == "clone")
    assert layout_is_read(copy) == kind


def test_random_numbers_are_drawn_in_the_order_of_memory() -> None:
    turned = torch.randn(6, 2, D).transpose(0, 1)
    graph = capture(lambda x: F.dropout(x.clone(), 0.5).sum(), turned)
    assert verdict(Copy(torch.clone), graph) is None
    dense = torch.contiguous_format
    found = verdict(Copy(lambda x: x.clone(memory_format=dense)), graph)
    assert found is not None
    assert "has strides" in found


def test_a_contiguous_layout_serves_every_view() -> None:
    turned = torch.randn(6, 2, D).transpose(0, 1)
    graph = capture(lambda x: x.clone().view(2, 6, 4, 4).sum(), turned)
    assert verdict(Copy(torch.clone), graph) is None
    dense = torch.contiguous_format
    assert verdict(Copy(lambda x: x.clone(memory_format=dense)), graph) is None
