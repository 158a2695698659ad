"""The ops that a rewrite calls are asked whether they take the tensors of the site."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.graph.effects import Effects
from fusewright.kernels.op import Op
from fusewright.rewrite.copies import copy_what_is_written
from fusewright.rewrite.rule import Emit, Match, Rule

from .graphs import trace
from .test_engine import Gate, S, _applied, _calls, _told, gated


def _positive_rows_only(x: Tensor, y: Tensor) -> list[str]:
    """Sizes are numbers here, whatever the graph was captured with."""
    assert type(x.shape[0]) is int
    return [] if y.shape[-1] > 8 else [f"y has {y.shape[-1]} features and it wants more"]


class GateByOp(Gate):
    """``Gate``, calling an op that is asked."""

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """Of what ``Gate`` passes, the second operand is the result of another call."""
        return ops.call(OP, m.x, ops.call(torch.neg, ops.call(torch.neg, m.y)))


OP = Op("gated", gated, gated, _positive_rows_only)


@pytest.mark.parametrize("optional", [False, True])
def test_an_op_is_asked_before_it_is_put_in(optional: bool) -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.sigmoid(a) * b

    class Asked(GateByOp):
        pass

    Asked.optional = optional
    module = trace(fn, S, S)
    (found,) = _applied(module, Asked())
    assert found.status == ("left" if optional else "refused")
    assert found.reason == "y has 8 features and it wants more"
    assert _calls(module) == ["sigmoid", "mul"]
    wide = trace(fn, (2, 3, 9), (2, 3, 9))
    assert _told(_applied(wide, Asked())) == [("gate", "rewritten", "mul")]


def test_an_op_whose_check_fails_is_not_put_in() -> None:
    def broken(x: Tensor, y: Tensor) -> list[str]:
        raise KeyError("nothing there")

    class Broken(Gate):
        def rewrite(self, m: Match, ops: Emit) -> Any:
            return ops.call(replace(OP, unsupported=broken), m.x, m.y)

    (found,) = _applied(trace(lambda a, b: torch.sigmoid(a) * b, S, S), Broken())
    assert (found.status, found.reason) == (
        "refused",
        "its op's check failed: KeyError: 'nothing there'",
    )


def _strict(x: Tensor) -> Tensor:
    raise RuntimeError("not of this dtype")


def test_an_op_that_refuses_is_not_run_for_those_after_it() -> None:
    class Chain(Gate):
        def rewrite(self, m: Match, ops: Emit) -> Any:
            strict = Op("strict", _strict, _strict, lambda x: [f"it takes no {x.dtype}"])
            return ops.call(OP, m.x, ops.call(strict, m.y))

    (found,) = _applied(trace(lambda a, b: torch.sigmoid(a) * b, S, S), Chain())
    assert (found.status, found.reason) == ("refused", "it takes no torch.float32")


def test_a_call_before_the_op_may_name_its_arguments() -> None:
    class Named(Gate):
        def rewrite(self, m: Match, ops: Emit) -> Any:
            return ops.call(OP, m.x, ops.call(torch.mul, input=m.y, other=1.0))

    wide = trace(lambda a, b: torch.sigmoid(a) * b, (2, 3, 9), (2, 3, 9))
    assert _told(_applied(wide, Named())) == [("gate", "rewritten", "mul")]


def test_what_an_op_keeps_of_its_outputs_is_copied_wherever_the_op_is_from() -> None:
    class Pair(Rule):
        name = op = "pair"
        outputs = ("total",)

        def patterns(self, p: Any, x: Any, y: Any) -> Any:
            yield p.tanh(p.capture("total", p.add(x, y)))

        def rewrite(self, m: Match, ops: Emit) -> Any:
            pair = ops.call(Op("pair", _pair, _pair, lambda x, y: [], (0,)), m.x, m.y)
            return ops.item(pair, 1), ops.item(pair, 0)

    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return torch.tanh(total), total

    module = trace(fn, S, S)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["example_value"].requires_grad_()
    _applied(module, Pair())
    assert copy_what_is_written(Effects(module), open_to_writes=True) == 1


@pytest.mark.parametrize(("kept", "copies"), [((), 0), ((0,), 1)])
def test_the_only_output_of_an_op_may_be_kept(kept: tuple[int, ...], copies: int) -> None:
    class One(Gate):
        def rewrite(self, m: Match, ops: Emit) -> Any:
            return ops.call(Op("one", gated, gated, lambda x, y: [], kept), m.x, m.y)

    module = trace(lambda a, b: torch.sigmoid(a) * b, S, S)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["example_value"].requires_grad_()
    _applied(module, One())
    assert copy_what_is_written(Effects(module), open_to_writes=True) == copies


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + y, torch.tanh(x + y)
