"""Verdicts: which are remembered, by which sizes and draws a rewrite is judged, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusewright.report import Figures
from fusewright.rewrite import verify
from fusewright.rewrite.conditions import settings_around
from fusewright.rewrite.engine import Candidate, Fuel, Verdict, apply
from fusewright.rewrite.rule import Emit, Match, Rule
from fusewright.rewrite.sample_inputs import Regime
from fusewright.rewrite.verify import Outcome, Verifier

from ..capturing import capture
from .faults import D, given, graph_of, judged, of_any_size, when
from .graphs import named, trace


class Same(Rule):
    """A formula, replaced by a function of its two inputs."""

    name = op = "same"

    def __init__(self, function: Callable[..., Any], *patterns: Callable[..., Any]) -> None:
        self.function, self.spellings = function, patterns

    def patterns(self, p: Any, x: Any, y: Any) -> Iterator[Any]:
        """Those of the test."""
        for pattern in self.spellings:
            yield pattern(p, x, y)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """A call of the function."""
        return ops.call(self.function, m.x, m.y)


def _product(p: Any, x: Any, y: Any) -> Any:
    return x * y


def _activated(p: Any, x: Any, y: Any) -> Any:
    return p.either(p.silu(x), p.relu(x)) * y


def _verdicts(verifier: Verifier, graph: fx.GraphModule, rule: Rule) -> list[str]:
    """The reasons given for the formulas of a graph."""
    return [f.reason for f in apply(graph, [rule], {}, verifier, Fuel())]


# ------------------------------------------------------------------------------ what is remembered


@pytest.mark.parametrize(("always", "times"), [(False, 1), (True, 2)])
def test_equal_candidates_are_judged_once(
    monkeypatch: pytest.MonkeyPatch, always: bool, times: int
) -> None:
    seen: list[Candidate] = []

    def judge(candidate: Candidate, traced: bool) -> Verdict:
        seen.append(candidate)
        return Verdict("no")

    monkeypatch.setattr(verify, "_judge", judge)
    verifier = Verifier(always=always)
    assert Verifier().always is False
    for _ in range(2):
        assert _verdicts(verifier, graph_of("glu"), Same(torch.mul, _activated)) == ["no"]
    assert len(seen) == times


def _count(*made: tuple[fx.GraphModule, Rule]) -> int:
    """How many different verdicts there are on these formulas."""
    verifier = Verifier()
    for graph, rule in made:
        _verdicts(verifier, graph, rule)
    return len(verifier.verdicts)


def test_what_makes_a_candidate_another_one() -> None:
    def graph(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
        return capture(lambda g, u: fn(g) * u, *(inputs or given("glu")))

    def silu() -> tuple[fx.GraphModule, Rule]:
        return graph(F.silu), rule

    rule = Same(lambda x, y: F.silu(x) * y, _activated)
    assert _count(silu(), silu()) == 1
    assert _count(silu(), (graph(F.relu), rule)) == 2  # another function
    assert _count(silu(), (graph(F.silu, *given("glu", torch.bfloat16)), rule)) == 2
    assert _count(silu(), (graph(F.silu, *(t.detach() for t in given("glu"))), rule)) == 2
    wider = [of_any_size(torch.randn(2, 6, 24, requires_grad=True), 1) for _ in "gu"]
    assert _count(silu(), (graph(F.silu, *wider), rule)) == 2
    named_ = Same(lambda x, y: F.silu(x) * y, lambda p, x, y: ("named", _activated(p, x, y)))
    assert _count(silu(), (graph(F.silu), named_)) == 2  # another spelling


def test_what_was_verified_under_autocast_is_another_one_without_it() -> None:
    verifier = Verifier()
    rule = Same(lambda x, y: F.silu(x) * y, _activated)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            _verdicts(verifier, graph_of("glu"), rule)
    assert len(verifier.verdicts) == 3
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        _verdicts(verifier, graph_of("glu"), rule)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert len(verifier.verdicts) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_autocast_of_any_device_is_a_setting(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_around()
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda d: d == device or known(d))
    assert settings_around() != before


def test_sums_of_16_bits_are_a_setting() -> None:
    matmul, before = torch.backends.cuda.matmul, settings_around()
    known = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = not known
    try:
        assert settings_around() != before
    finally:
        matmul.allow_fp16_accumulation = known
    assert settings_around() == before


def test_an_input_that_is_no_tensor_does_not_hide_those_behind_it() -> None:
    def made(dtype: torch.dtype, number: int) -> tuple[fx.GraphModule, Rule]:
        module = trace(lambda n, x: n * x, (), (4, 3))
        named(module, "n").meta["example_value"] = number
        for name in ("x", "mul"):
            named(module, name).meta["example_value"] = torch.empty(4, 3, dtype=dtype)
        return module, Same(torch.mul, _product)

    assert _count(made(torch.float32, 2), made(torch.float32, 3)) == 1
    assert _count(made(torch.float32, 2), made(torch.float64, 2)) == 2


# ------------------------------------------------------------------------------- sizes and draws


def _shapes(monkeypatch: pytest.MonkeyPatch, needed: tuple[int, ...] | None) -> list[Any]:
    """The sizes that an op is tried with, when it works for those that are ``needed`` only."""
    shapes: list[tuple[int, ...]] = []

    def picky(f: Any, gate: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(gate.shape[:2]))
        if needed is not None and shapes[-1] != needed:
            raise ValueError("not for these")
        return f(gate, *args)

    finding = judged("glu", picky)
    assert finding.status == "rewritten", finding.reason
    return shapes


def test_small_sizes_are_tried_and_then_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(_shapes(monkeypatch, None)) == {(5, 7), (4, 8)}
    # the captured call had 2 x 6 tokens
    assert set(_shapes(monkeypatch, (2, 6))) == {(5, 7), (2, 6)}
    monkeypatch.setattr(verify, "smaller", lambda c: c)
    assert set(_shapes(monkeypatch, None)) == {(5, 7), (4, 8)}


def test_a_reason_that_smaller_weights_are_is_none_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    verdict = verify._verdict

    def small_only(site: Any, small: bool) -> Verdict:
        calls.append("real" if site.candidate.rule.name == "glu" and calls else "smaller")
        return Verdict("by smaller weights") if len(calls) == 1 else verdict(site, small)

    monkeypatch.setattr(verify, "smaller", lambda c: c)
    monkeypatch.setattr(verify, "_verdict", small_only)
    assert judged("glu", None).status == "rewritten"
    assert calls == ["smaller", "real"]
    # and what is right by smaller weights is not tried again
    calls.append("before")
    del calls[:-1]
    assert judged("glu", None).status == "rewritten"
    assert len(calls) == 2


def test_each_draw_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[Tensor]]] = []

    def unlucky(site: Any, draws: list[list[Tensor]], regime: Regime) -> Verdict:
        seen.append(list(draws))
        return Verdict("output 0: peak error 2 exceeds 1")

    monkeypatch.setattr(verify, "_check", unlucky)
    assert judged("glu", None).status == "refused"
    assert [len(draws) for draws in seen] == [1, 16, 64]
    first = [float(draw[0].detach().sum()) for draw in seen[-1]]
    assert len(set(first)) == 64


def test_a_reason_that_is_not_the_figures_is_not_a_matter_of_luck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def wrong(site: Any, draws: Any, regime: Regime) -> Verdict:
        seen.append(len(draws))
        return Verdict("only the rewrite writes to input 0")

    monkeypatch.setattr(verify, "_check", wrong)
    assert judged("glu", None).reason == "only the rewrite writes to input 0"
    assert seen == [1]


# -------------------------------------------------------------------------------------- modes


def test_gradients_that_are_off_inside_a_mode_that_is_on() -> None:
    def fn(g: Tensor, u: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            return F.silu(g) * u

    fault = when(lambda x: not torch.is_grad_enabled())
    assert "output 0" in judged("glu", fault, capture(fn, *given("glu"))).reason


@pytest.mark.parametrize("on", [True, False])
def test_gradients_are_on_or_off_as_where_a_single_node_stands(on: bool) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(on):
            return x * y

    def wrong(x: Tensor, y: Tensor) -> Tensor:
        return x * y * (1 if torch.is_grad_enabled() is on else 1.01)

    with torch.set_grad_enabled(not on):
        (reason,) = _verdicts(Verifier(), capture(fn, *given("glu")), Same(wrong, _product))
    assert reason == ""


# ------------------------------------------------------------------------------------------ figures


def test_the_figures_of_a_rewrite() -> None:
    figures = judged("glu", None).figures
    assert figures.error is not None
    assert figures.grad_error is not None
    assert 0 < figures.error < 1e-6
    assert 0 < figures.grad_error < 1e-6
    # per token: what silu gives, which its product with up keeps; and nothing
    assert (figures.saved_before, figures.saved_after) == (4 * D, 0.0)


def _made(outputs: list[Any], grads: list[Any], kept: int = 0) -> Outcome:
    return Outcome((outputs, grads, [None] * len(grads), []), frozenset(), (), kept)


def test_the_largest_error_that_says_something() -> None:
    def off(by: float) -> Tensor:
        return torch.full((4,), 1 + by)

    exact = torch.ones(4, dtype=torch.float64)
    noise = torch.full((4,), 1e-17, dtype=torch.float64)
    ours = _made([off(0.25), off(0.5)], [None, off(0.125), off(9), off(0.0625)], 80)
    theirs = _made([off(0), off(0)], [None, off(0), off(0), off(0)], 160)
    truth = _made([exact, exact], [None, exact, noise, exact])
    found = verify._figures(ours, theirs, truth, 10)
    # a gradient that is nothing but rounding in the original says nothing
    assert found == Figures(error=0.5, grad_error=0.125, saved_before=16.0, saved_after=8.0)
    for lost in (ours, theirs, truth):
        runs = [
            _made([None, *r.results[0][1:]], r.results[1], r.saved) if r is lost else r
            for r in (ours, theirs, truth)
        ]
        assert verify._figures(*runs, 10).error == 0.5
    none = _made([None], [None])
    assert verify._figures(none, none, none, 1) == Figures(saved_before=0.0, saved_after=0.0)


def test_random_numbers_are_left_as_they_were() -> None:
    before = torch.get_rng_state()
    judged("glu", lambda f, *args: f(*args) + 0 * torch.rand(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_form_for_a_tracer_is_judged_like_the_other_one() -> None:
    def fault(f: Any, x: Tensor, *args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            x.detach().mul_(2)
        return f(x, *args)

    assert judged("glu", fault).status == "rewritten"
    assert judged("glu", fault, traced=True).reason == "only the rewrite writes to input 0"
