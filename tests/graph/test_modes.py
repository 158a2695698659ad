"""Modes that are switched between the nodes of a formula: what runs alike may become one op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capturing import capture, rewrite, rewritten


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)


def test_a_mode_that_ends_between_the_nodes_does_no_harm() -> None:
    def fn(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        activated = torch.nn.functional.silu(g)
        with torch.no_grad():
            mean = u.mean()
        with torch.autocast("cpu", enabled=False):
            total = g.sum()
        return activated * u, mean + total

    assert rewritten(rewrite(capture(fn, *_inputs()))) == ["glu"]


def test_a_node_in_another_mode_stops_the_rewrite() -> None:
    def fn(g: Tensor, u: Tensor) -> Tensor:
        with torch.no_grad():
            activated = torch.nn.functional.silu(g)
        return activated * u

    findings = rewrite(capture(fn, *_inputs()))
    assert rewritten(findings) == []
    assert any("switches gradients or autocast" in f.reason for f in findings)


def test_a_mode_that_stays_stops_the_rewrite() -> None:
    def fn(g: Tensor, u: Tensor) -> Tensor:
        activated = torch.nn.functional.silu(g)
        with torch.autocast("cpu", torch.bfloat16):
            return activated * u

    findings = rewrite(capture(fn, *_inputs()))
    assert rewritten(findings) == []


def test_a_formula_is_judged_in_the_autocast_that_it_runs_in() -> None:
    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            linear = torch.nn.functional.linear
            return linear(x, w) + linear(linear(x, a), b) * 2.0

    shapes = ((5, 24), (16, 24), (4, 24), (16, 4))
    inputs = [torch.randn(*s, requires_grad=True) for s in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        findings = [f for f in rewrite(capture(fn, *inputs)) if f.status == "rewritten"]
    assert [f.rule for f in findings] == ["lora_linear"]
    assert findings[0].figures.error is not None
    assert findings[0].figures.error < 1e-5  # that of fp32, not of bf16
