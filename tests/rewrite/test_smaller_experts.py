"""Of many experts a few are verified, and their sizes keep their ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusewright.graph.cleanup import remove_noops
from fusewright.graph.functionalize import remove_writes
from fusewright.passes import PIPELINE
from fusewright.rewrite import sample_inputs
from fusewright.rewrite.engine import Fuel, apply
from fusewright.rewrite.findings import Finding
from fusewright.rewrite.op_table import TABLE
from fusewright.rewrite.smaller_weights import _chosen
from fusewright.rewrite.verify import Verifier

from ..capturing import capture
from ..passes.test_moe_experts import experts
from .faults import of_any_size
from .test_smaller_weights import measured

MANY, HIDDEN = 80, 32


def _graph(number: int, inner: int, masked: bool = False) -> fx.GraphModule:
    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape) / 8).bfloat16().requires_grad_()

    index = of_any_size(torch.randint(0, number, (12, 16)), 0)
    x, weights = of_any_size(leaf(12, HIDDEN), 0), of_any_size(torch.rand(12, 16), 0)
    given = x, index, weights, leaf(number, 2 * inner, HIDDEN), leaf(number, HIDDEN, inner)
    return capture(lambda x, i, w, u, d: experts(x, i, w, u, d, masked=masked), *given)


def _judged(graph: fx.GraphModule, **changed: Callable[..., Any]) -> Finding:
    remove_writes(graph)
    remove_noops(graph)
    found = apply(graph, PIPELINE, {**TABLE, **changed}, Verifier(), Fuel())
    return next(f for f in found if f.rule == "moe_experts")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], set[int]]]:
    """The shapes of the first weights that verification draws, and the experts of the tokens."""
    made: list[tuple[tuple[int, ...], set[int]]] = []
    sample = sample_inputs.sample

    def noted(candidate: Any, *args: Any) -> Any:
        inputs = sample(candidate, *args)
        if candidate.rule.name == "moe_experts":
            given = dict(zip(candidate.inputs, inputs, strict=True))
            up, ids = given[candidate.match.up], given[candidate.match.ids]
            made.append((tuple(up.shape), set(ids.tolist())))
        return inputs

    monkeypatch.setattr(sample_inputs, "sample", noted)
    return made


@pytest.mark.parametrize("masked", [False, True])
def test_many_experts_take_no_memory(drawn: list[Any], masked: bool) -> None:
    graph = _graph(MANY, 640, masked)
    with measured() as sizes:
        finding = _judged(graph)
    assert finding.status == "rewritten", finding.reason
    assert {shape[0] for shape, _ in drawn} == {9}
    # in fp64 the weight alone would be 26 MB
    assert 0 < max(sizes) < 4 << 20
    found = set.union(*(numbers for _, numbers in drawn))
    assert len(found - {9}) == 6  # a third of the experts has no token
    assert (9 in found) == masked  # some experts are elsewhere


def test_a_gated_unit_keeps_its_halves(drawn: list[Any]) -> None:
    graph = _graph(4, 8192)
    with measured() as sizes:
        finding = _judged(graph)
    assert finding.status == "rewritten", finding.reason
    assert (4, HIDDEN, 768) in {shape for shape, _ in drawn}
    # none of the experts is left out: the tokens are those of any other size
    assert set.union(*(numbers for _, numbers in drawn)) == {0, 1, 2, 3}
    # in fp64 the weight would be 16 MB; the rows between the projections have their real width
    assert 0 < max(sizes) < 12 << 20


@pytest.mark.long
def test_the_figures_are_those_of_the_real_sizes() -> None:
    small, large = (_judged(_graph(number, 640)).figures for number in (8, MANY))
    wide = _judged(_graph(4, 8192)).figures
    assert small.saved_before is not None
    assert small.saved_after is not None
    assert large.saved_before == pytest.approx(small.saved_before, rel=0.1)
    assert wide.saved_before == pytest.approx(small.saved_before * 8192 / 640, rel=0.1)
    assert wide.saved_after == pytest.approx(small.saved_after * 8192 / 640, rel=0.1)


def test_an_expert_without_a_token_is_among_the_few() -> None:
    """An op that forgets the gradient of such an expert is refused."""

    def up(
        x: Any, weight: Tensor, bias: Any, order: Any, where: Any, ends: Tensor, *rest: Any
    ) -> Any:
        right = TABLE["moe_up"](x, weight, bias, order, where, ends, *rest)
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return right + 0.1 * (weight * empty.view(-1, 1, 1)).sum()

    assert _judged(_graph(MANY, 640)).status == "rewritten"
    assert "error" in _judged(_graph(MANY, 640), moe_up=up).reason


def test_a_number_of_experts_that_is_one_of_features_stays() -> None:
    large = (64, 1024, 512)
    assert _chosen([large, (64, 512, 512)], {64, 1024, 512}) == {64: 9, 63: 8}
    assert _chosen([large, (64, 512, 64)], {64, 1024, 512}) == {}
    assert _chosen([(64, 1024, 8)], {64, 1024, 8}) == {}  # not large
    assert _chosen([(9, 1024, 512)], {9, 1024, 512}) == {}
    assert _chosen([large], {64, 63, 9, 1024, 512}) == {64: 10}
