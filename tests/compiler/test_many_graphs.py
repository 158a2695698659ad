"""Modules that differ in a number, or change one at each call: few graphs, and none given up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fusewright import optimize
from tests.explained import explain

from ..models.tiny import Stack

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A gated block with a number of its own."""

    def __init__(self, number: Any, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.number, self.use = number, use

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.silu(self.gate(x)) * self.up(x))
        return x + 0.1 * self.use(self, y)


def _stack(numbers: list[Any], use: Callable[[Any, Tensor], Tensor]) -> Stack:
    torch.manual_seed(0)
    return Stack(Block(n, use) for n in numbers)


def index(self: Any, y: Tensor) -> Tensor:
    return y / (1 + self.number)


def first_ones(self: Any, y: Tensor) -> Tensor:
    return y * 2 if self.number < 3 else y


def factor(self: Any, y: Tensor) -> Tensor:
    return y * self.number


def counter(self: Any, y: Tensor) -> Tensor:
    self.number += 1
    return y * self.number


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Heads(nn.Module):
    """A rotary embedding on heads of a size of its own, and a number of its own."""

    def __init__(self, size: int, number: int) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 2 * size), nn.Linear(2 * size, 8)
        self.size, self.number = size, number

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], -1, self.size).transpose(1, 2)
        q = _rotated(q, cos[:, None], sin[:, None]) / (1 + self.number)
        return x + self.o(q.transpose(1, 2).flatten(2))


class HeadsOfTwoSizes(Stack):
    """Each layer is given the tables of its size."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1, layer.size)
            angles = angles.expand(len(x), -1, -1)
            x = layer(x, angles.cos(), angles.sin())
        return x


@pytest.mark.long("sizes0")
@pytest.mark.long("sizes1")
@pytest.mark.parametrize("sizes", [(4, 6), (6, 4)])
def test_sizes_of_heads_are_constants_though_numbers_vary(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    eager = HeadsOfTwoSizes(Heads(sizes[i % 2], i) for i in range(14))
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    assert explain(ours).by_rule() == {"rope": 14}


def _assert_equal(ours: nn.Module, eager: nn.Module, steps: int = 1) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for _ in range(steps):
        results = []
        for model in (ours, eager):
            model.zero_grad()
            y = model(x)
            y.square().mean().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters())])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("numbers", "use"),
    [
        (list(range(70)), index),
        (list(range(70)), first_ones),
        ([1 / (i + 1) for i in range(70)], factor),
    ],
    ids=["index", "first ones", "factor"],
)
@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_seventy_layers_that_differ_in_a_number(numbers, use, codegen) -> None:
    eager = _stack(numbers, use)
    ours = optimize(copy.deepcopy(eager), codegen=codegen)
    _assert_equal(ours, eager, steps=2)
    report = explain(ours)
    assert not report.bypasses
    assert report.by_rule()["glu"] == 70
    assert report.graphs <= 16
    _assert_equal(ours, eager)
    assert explain(ours).graphs <= report.graphs


def test_layers_that_count_their_calls() -> None:
    eager = _stack([0, 0], counter)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, steps=40)
    assert [b.number for b in ours.layers] == [40, 40]
    report = explain(ours)
    assert not report.bypasses
    assert report.by_rule()["glu"] == 2
    assert report.graphs <= 16


@pytest.mark.slow
def test_layers_that_no_input_can_tell_apart_get_a_graph_each() -> None:
    def named(self: Any, y: Tensor) -> Tensor:
        return y / (1 + len(self.number))

    eager = _stack(["x" * i for i in range(66)], named)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, steps=2)
    assert not explain(ours).bypasses
    assert explain(ours).by_rule()["glu"] == 66


@pytest.mark.slow
def test_a_layer_that_is_another_at_each_call_is_given_up_with_the_reason() -> None:
    def renamed(self: Any, y: Tensor) -> Tensor:
        self.number += "x"
        return y / len(self.number)

    eager = _stack(["", ""], renamed)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, steps=60)
    assert any("each call needs a graph of its own" in b.reason for b in explain(ours).bypasses)


def test_only_a_capture_sets_up_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around each call that would take as long as to find the graph."""
    found: list[Any] = []
    own = torch._dynamo.maybe_mark_dynamic
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *a: found.append(a) or own(*a))
    model = optimize(_stack([1.0, 1.0], factor), codegen="eager")
    for _ in range(2):
        model(torch.randn(2, 5, 8)).sum().backward()
    assert found
    found.clear()
    for length in (5, 7):
        model(torch.randn(2, length, 8)).sum().backward()
    assert not found


class Sum(nn.Module):
    """A parametrization that adds something to a weight, as PEFT's adapters of parameters do."""

    def __init__(self, added: Tensor) -> None:
        super().__init__()
        self.added = added

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.added


def _parametrized(model: Stack) -> None:
    for layer in model.layers:
        parametrize.register_parametrization(layer.gate, "weight", Sum(torch.ones(8, 8)))


def _plain(model: Stack) -> None:
    for layer in model.layers:
        parametrize.remove_parametrizations(layer.gate, "weight", leave_parametrized=False)


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("steps", [1, 2])
def test_classes_that_are_made_anew_cost_two_graphs_per_region(steps: int) -> None:
    """TorchDynamo guards classes by identity.

    The blocks are left after two graphs each, and then the layers in them that change; also where
    each class is called twice, as with a checkpoint around the block.
    """
    model = _stack([1, 1], index)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    before, graphs = _graphs(), []
    for _ in range(6):
        for stack in (model, eager):
            _parametrized(stack)
        _assert_equal(model, eager, steps)
        for stack in (model, eager):
            _plain(stack)
        graphs.append(_graphs() - before)
    assert graphs == [2, 4, 6, 8, 8, 8]
    report = str(explain(model))
    assert "gets a new class again and again" in report
    assert "0 rewrites" in report


def test_classes_that_are_made_once_or_come_back_are_captured() -> None:
    model = _stack([1, 1], index)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    kinds = [type(f"Linear{i}", (nn.Linear,), {}) for i in range(2)]
    before = _graphs()
    for i in (0, 0, 1, 0, 1, 0, 1, 0, 1):
        for layer in (*model.layers, *eager.layers):
            layer.gate.__class__ = kinds[i]
        _assert_equal(model, eager)
    assert _graphs() - before == 2
    assert "new class" not in str(explain(model))


def test_classes_of_other_names_are_captured() -> None:
    """Wrapped, sharded, given adapters: one call after each change."""
    model = _stack([1, 1], index)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    before = _graphs()
    for name in ("Plain", "Adapted", "Sharded", "Sharded", "Quantized", "Quantized"):
        kind = type(name, (nn.Linear,), {})
        for layer in (*model.layers, *eager.layers):
            layer.gate.__class__ = kind
        _assert_equal(model, eager)
    assert _graphs() - before == 6
    assert "new class" not in str(explain(model))


class Checkpointed(Stack):
    """A checkpoint surrounds each block, and in it a part of the block gets a new class."""

    def forward(self, x: Tensor) -> Tensor:
        def run(layer: Any, x: Tensor) -> Tensor:
            parametrize.register_parametrization(layer.gate, "weight", Sum(torch.ones(8, 8)))
            try:
                return layer(x)
            finally:
                parametrize.remove_parametrizations(layer.gate, "weight", leave_parametrized=False)

        for layer in self.layers:
            x = checkpoint(run, layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_block_runs_again_in_a_checkpoint_as_it_has_run(calls: int) -> None:
    """It is left at a forward, however many calls there were, and not where it runs again."""
    torch.manual_seed(0)
    eager = Checkpointed(Block(1, index) for _ in range(2))
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(calls):
        ours(torch.randn(2, 5, 8))
    _assert_equal(ours, eager, steps=4)
    assert "gets a new class again and again" in str(explain(ours))
