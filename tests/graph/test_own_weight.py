"""Functions that look up a module's weight: what stands for them gives what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright.compiler.copies.opaque_calls import opaque_copies
from fusewright.graph.opaque.functions import asks_for_place, stand_in


def looked_up(module: Any) -> Any:
    """As a library does that knows several kinds of quantized weights."""
    if hasattr(module, "W_q"):
        return module.dequantize()
    if type(module.weight).__module__.startswith("elsewhere."):
        return module.weight.dequantize()
    return module.weight


def doubled(module: Any) -> Any:
    weight = module.weight
    return weight if type(weight).__module__ == "elsewhere" else 2 * weight


def by_class(module: Any) -> Any:
    weight = module.weight
    elsewhere = type(weight).__module__ == "elsewhere"
    return -weight if isinstance(module, Negative) or elsewhere else weight


def other_arguments(module: Any, factor: float) -> Any:
    return module.weight * factor if type(module.weight).__module__ == "torch" else module.weight


class Negative(nn.Linear):
    """A class of which a function may know something."""


class Packed(nn.Linear):
    """A module whose weight is not what it seems."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.W_q = nn.Parameter(torch.ones(3, 3))

    def dequantize(self) -> Tensor:
        return 3 * self.W_q


@pytest.mark.parametrize("function", [looked_up, by_class])
def test_the_weight_of_each_module_is_captured_in_one_graph(function: Any) -> None:
    assert asks_for_place(function)
    found = stand_in(function)
    compiled = torch.compile(lambda x, m: x @ found(m), backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    for module in (nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3).double().float()):
        torch.testing.assert_close(compiled(x, module), x @ module.weight, rtol=0, atol=0)
    module.weight = nn.Parameter(torch.randn(3, 3))
    torch.testing.assert_close(compiled(x, module), x @ module.weight, rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("function", "module"),
    [(looked_up, Packed()), (doubled, nn.Linear(3, 3)), (by_class, Negative(3, 3))],
    ids=["an attribute", "not the weight itself", "a class"],
)
def test_what_is_not_the_modules_own_weight_is_left_to_the_function(
    function: Any, module: nn.Module
) -> None:
    torch.testing.assert_close(stand_in(function)(module), function(module), rtol=0, atol=0)
    assert stand_in(function)(module) is not module.weight


def test_only_functions_of_one_module_that_ask_for_a_place_are_replaced() -> None:
    assert not asks_for_place(other_arguments)
    assert not asks_for_place(lambda module: module.weight)
    assert not asks_for_place(len)


def test_a_forward_that_looks_up_a_weight_gets_a_copy() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor, base: nn.Module) -> Tensor:
            return x @ looked_up(base)

    copy = opaque_copies(lambda module, copy: copy).of(Reads.forward)
    base, x = nn.Linear(3, 3), torch.randn(2, 3)
    compiled = torch.compile(lambda x, m: copy(None, x, m), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, base), x @ base.weight, rtol=0, atol=0)
    assert Reads.forward.__globals__["looked_up"] is looked_up
    torch._dynamo.reset()
