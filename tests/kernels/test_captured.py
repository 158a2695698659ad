"""Ops that a user's ``torch.compile`` captures keep their gradients, also with PyTorch 2.11."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusewright
from fusewright.kernels import captured

from ..capturing import capture

KERNELS = Path(fusewright.__file__).parent / "kernels"


def test_every_op_returns_nothing_under_two_names() -> None:
    found = 0
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            if "torch.autograd.Function" in map(ast.unparse, node.bases):
                decorators = map(ast.unparse, node.decorator_list)
                assert "capturable" in decorators, f"{path}: {node.name}"
                found += 1
    assert found > 15


@pytest.mark.parametrize("keeps_gradients", [True, False])
def test_what_needs_no_gradient_is_returned_so(
    keeps_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "KNOWS_MARK_DIRTY", keeps_gradients)

    @captured.capturable
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            outs = x.sin(), y.sin()
            captured.mark_frozen(ctx, outs, (not needed for needed in ctx.needs_input_grad))
            return outs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return grads

    def call(x: Tensor, y: Tensor) -> Any:
        return Both.apply(x * 1, y * 1)

    x, y = torch.randn(5, requires_grad=True), torch.randn(5)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for run in (call, compiled):
        assert [out.requires_grad for out in run(x, y)] == [True, False]
        assert [out.requires_grad for out in run(y, x)] == [False, True]


def test_what_is_returned_is_a_value_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "KNOWS_MARK_DIRTY", False)

    @captured.capturable
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin().mul_(2)  # the sine under another name

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * grad  # what no other code would give

    def call(x: Tensor) -> Tensor:
        made: Tensor = Doubled.apply(x)
        return made

    x = torch.randn(5, requires_grad=True)
    plain = call(x)
    module = capture(call, x)
    result: Any = module.fwd_body_0.graph.output_node().args[0][0][0]
    assert result.target == "clone"
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, plain)
    for out in (plain, compiled):
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient, torch.full_like(x, 3.0))
