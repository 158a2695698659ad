"""The function by which PEFT reads a module's weight: what stands in for it gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils import integrations
from torch import Tensor, nn

from fusewright.compiler.copies.opaque_calls import opaque_copies
from fusewright.graph.opaque.functions import reads_weight, stand_in

read = integrations.dequantize_module_weight


class Packed(nn.Linear):
    """A module whose weight is not what it seems, as HQQ's layers are."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.W_q = nn.Parameter(torch.ones(3, 3))

    def dequantize(self) -> Tensor:
        return 3 * self.W_q


class Other(nn.Parameter):
    """A class of weights that TorchDynamo does not know."""


def test_the_weight_of_each_module_is_captured_in_one_graph() -> None:
    found = stand_in(read)
    compiled = torch.compile(lambda x, m: x @ found(m), backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    for module in (nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3).double().float()):
        torch.testing.assert_close(compiled(x, module), x @ module.weight, rtol=0, atol=0)
    module.weight = nn.Parameter(torch.randn(3, 3))
    torch.testing.assert_close(compiled(x, module), x @ module.weight, rtol=0, atol=0)
    torch._dynamo.reset()


def test_other_weights_are_left_to_the_function() -> None:
    module = nn.Linear(3, 3)
    module.weight = Other(torch.randn(3, 3))
    for each in (Packed(), module):
        torch.testing.assert_close(stand_in(read)(each), read(each), rtol=0, atol=0)
    with pytest.raises(AttributeError, match="weight"):
        stand_in(read)(nn.ReLU())


def test_four_bits_are_dequantized_as_by_the_function() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer = layer.to("cpu")
    stand_in.cache_clear()  # made before bitsandbytes was imported, it leaves 4 bits to PEFT
    torch.testing.assert_close(stand_in(read)(layer), read(layer), rtol=0, atol=0)


def test_no_other_function_is_replaced() -> None:
    def dequantize_module_weight(module: Any) -> Any:
        return module.weight

    assert reads_weight(read)
    assert not reads_weight(dequantize_module_weight)
    assert not reads_weight(len)


def test_a_forward_that_reads_a_weight_gets_a_copy() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor, base: nn.Module) -> Tensor:
            return x @ read(base)

    copy = opaque_copies().of(Reads.forward)
    base, x = nn.Linear(3, 3), torch.randn(2, 3)
    compiled = torch.compile(lambda x, m: copy(None, x, m), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, base), x @ base.weight, rtol=0, atol=0)
    assert Reads.forward.__globals__["read"] is read
    torch._dynamo.reset()
