"""Which inputs each output of a graph is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.map import map as hop_map
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

from fusewright.graph.effects import Effects


def _captured(function: Any, *inputs: Any) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, examples: Any) -> Any:
        found.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def _names(graph: fx.GraphModule) -> list[set[str]] | None:
    """As ``Effects.inputs_of_outputs``, with the names of the inputs."""
    inputs = [
        n.name.removeprefix("l_").strip("_") for n in graph.graph.find_nodes(op="placeholder")
    ]
    found = Effects(graph).inputs_of_outputs
    return None if found is None else [{inputs[i] for i in of} for of in found]


A, B, C = (torch.randn(3, 4) for _ in range(3))


def test_each_output_has_its_own_inputs() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        d = a * b
        return d + 1, torch.cat([d, c]), c.sum()

    assert _names(_captured(function, A, B, C)) == [{"a", "b"}, {"a", "b", "c"}, {"c"}]


def test_parts_of_one_value_have_all_of_it() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first, second = torch.cat([a, b]).chunk(2)
        return first, second

    assert _names(_captured(function, A, B)) == [{"a", "b"}, {"a", "b"}]


def test_a_checkpointed_body_is_followed() -> None:
    def part(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return a.sin() * b, c.cos()

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        first, second = checkpoint(part, a, b, c, use_reentrant=False)
        return first + 1, second * b

    assert _names(_captured(function, A, B, C)) == [{"a", "b"}, {"b", "c"}]


def test_other_calls_of_a_graph_have_all_inputs() -> None:
    """Their arguments are not those of the graph, or go round in it."""

    def scanned(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        carry, found = scan(lambda carry, row: (carry * 2 + row, carry * c), a, b)
        return carry, found, c.sin()

    def mapped(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return hop_map(lambda rows: (rows[0] * 2, rows[1] * 3), (a, b))  # type: ignore[no-any-return]

    everything = frozenset({0, 1, 2})
    found = Effects(_captured(scanned, torch.randn(4), A, torch.randn(4))).inputs_of_outputs
    assert found == [everything, everything, frozenset({2})]
    assert _names(_captured(mapped, A, B)) == [{"a", "b"}, {"a", "b"}]


def test_a_reentrant_checkpoint_is_not_followed() -> None:
    """It gives zeros where a gradient is missing."""

    def part(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a.sin(), b.cos()

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first, second = checkpoint(part, a, b, use_reentrant=True)
        return first, second

    inputs = (A.clone().requires_grad_(), B.clone().requires_grad_())
    assert _names(_captured(function, *inputs)) == [{"a", "b"}, {"a", "b"}]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a * 2, b * 2

    @staticmethod
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return da * 2, db * 2


def test_of_an_autograd_function_all_outputs_have_all_inputs() -> None:
    """Its backward may do anything."""

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first, second = _Twice.apply(a, b)
        return first, second

    inputs = (A.clone().requires_grad_(), B.clone().requires_grad_())
    assert _names(_captured(function, *inputs)) == [{"a", "b"}, {"a", "b"}]


def test_nothing_is_known_of_a_graph_that_writes() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        c = a.clone()
        d = c.view(-1)
        c += b
        return d, a * 2

    assert _names(_captured(function, A, B)) is None


def test_nothing_is_known_of_one_that_writes_in_a_checkpoint() -> None:
    def part(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        c = a.clone()
        c += b
        return c.sin(), a * 2

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first, second = checkpoint(part, a, b, use_reentrant=False)
        return first, second

    assert _names(_captured(function, A, B)) is None
