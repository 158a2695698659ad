"""Products in fewer bits than their input has: under autocast, and over quantized weights.

What comes back to the input is added up in its own dtype, as autograd does behind the casts; no
error of a sum in fewer bits may show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.kernels.linear.linear import (
    KEEPS,
    QUANT_LINEAR,
    quant_linear,
    quant_linear_reference,
)
from fusewright.kernels.mlp import mlp_block

from .by_parts import LORA, MLP, QKV
from .quantized_weights import random_weight
from .test_qkv_block import make
from .util import assert_parity_of_draws, saved_tensors

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALES = [2.0, 0.37, 1.0]
QKV_SIZES, MLP_SIZES = [(64, 64), (32, 64), (32, 64)], [(128, 64), (128, 64), (64, 128)]


class Case:
    """Linears of given sizes: the tensors that are drawn anew, and how an op is called with them.

    Attributes:
        weights: quantized ones, or none.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], *, packed: bool, adapter: torch.dtype = F32,
        train: bool = False, bias: bool = False,
    ) -> None:  # fmt: skip
        self.sizes, self.adapter, self.train, self.bias = sizes, adapter, train, bias
        torch.manual_seed(0)
        self.weights = [random_weight(size) for size in sizes] if packed else []

    def draw(self) -> list[Tensor]:
        made = [make(35, self.sizes[0][1], dtype=F32)]
        for out, into in self.sizes:
            if not self.weights:
                weight = make(out, into, dtype=F32, spread=into**-0.5)
                made.append(weight.requires_grad_(self.train))
            if self.bias:
                made.append(make(out, dtype=F32))
            made.append(make(4, into, dtype=self.adapter, spread=into**-0.5))
            made.append(make(out, 4, dtype=self.adapter, spread=0.3))
        return made

    def call(self, op: Callable[..., Any], autocast: torch.dtype | None, *options: Any,
             **named: Any) -> Callable[..., Any]:  # fmt: skip
        """``op`` as a function of the drawn tensors."""

        def run(x: Tensor, *tensors: Tensor) -> Any:
            left, count = list(tensors), len(self.sizes)
            lists: list[list[Any]] = [[], [], [], []]
            for i in range(count):
                lists[0].append(self.weights[i] if self.weights else left.pop(0))
                lists[1].append(left.pop(0) if self.bias else None)
                lists[2].append(left.pop(0))
                lists[3].append(left.pop(0))
            kinds = named if x.dtype is not torch.float64 else {}
            with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
                return op(x, *lists, SCALES[:count], [None] * count, *options, **kinds)

        return run


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("autocast", [BF16, F16])
def test_linears_under_autocast(autocast, train, keep):
    case = Case(QKV_SIZES, packed=False, train=train, bias=True)
    ours = case.call(QKV.call, autocast, keep)
    assert_parity_of_draws(ours, case.call(QKV.reference, autocast), case.draw)


@pytest.mark.parametrize("keep", mlp_block.KEEPS)
@pytest.mark.parametrize("train", [False, True])
def test_a_gated_mlp_under_autocast(train, keep):
    case = Case(MLP_SIZES, packed=False, train=train)
    ours = case.call(MLP.call, BF16, "silu", "two", keep)
    theirs = case.call(MLP.reference, BF16, "silu", "two")
    assert_parity_of_draws(ours, theirs, case.draw)


WIDE = {"compute": BF16, "dtype": F32}


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("keep", KEEPS)
def test_linears_over_quantized_weights_that_compute_in_fewer_bits(keep, autocast):
    case = Case(QKV_SIZES, packed=True)
    ours = case.call(QKV.call, autocast, keep, **WIDE)
    theirs = case.call(QKV.reference, autocast, **WIDE)
    assert_parity_of_draws(ours, theirs, case.draw)


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("keep", mlp_block.KEEPS)
def test_a_gated_mlp_over_quantized_weights_that_compute_in_fewer_bits(keep, autocast):
    case = Case(MLP_SIZES, packed=True)
    ours = case.call(MLP.call, autocast, "silu", "two", keep, **WIDE)
    theirs = case.call(MLP.reference, autocast, "silu", "two", **WIDE)
    assert_parity_of_draws(ours, theirs, case.draw)


def _single(op: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    """An op on one linear with an adapter, called as those on several are."""

    def call(x: Tensor, weights: Any, biases: Any, lora_as: Any, lora_bs: Any, scales: Any,
             lora_biases: Any, **named: Any) -> Tensor:  # fmt: skip
        adapter = (lora_as[0], lora_bs[0], scales[0], *rest)
        return op(x, weights[0], biases[0], *adapter, **named)

    return call


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("adapter", [F32, BF16])
def test_one_adapter_over_a_quantized_weight(adapter, autocast):
    case = Case(QKV_SIZES[1:2], packed=True, adapter=adapter)
    theirs = case.call(_single(LORA.reference), autocast, **WIDE)
    ours = case.call(_single(LORA.call), autocast, **WIDE)
    assert_parity_of_draws(ours, theirs, case.draw)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [None, F32])
def test_one_adapter_over_a_plain_weight(dtype, train):
    """Under autocast, and with a result wider than the product."""
    case = Case(QKV_SIZES[1:2], packed=False, train=train, bias=True)
    theirs = case.call(_single(LORA.reference), BF16, dtype=dtype)
    ours = case.call(_single(LORA.call), BF16, dtype=dtype)
    assert_parity_of_draws(ours, theirs, case.draw)


def test_a_quantized_linear_that_computes_in_fewer_bits():
    w = random_weight((32, 64))

    def over(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: op(x, w, None, *((BF16, F32) if x.dtype is F32 else ()))

    assert_parity_of_draws(
        over(quant_linear), over(quant_linear_reference),
        lambda: [make(35, 64, dtype=F32)],
    )  # fmt: skip


def test_of_a_wide_input_the_narrow_copy_is_kept():
    case = Case(QKV_SIZES, packed=False)
    given = case.draw()
    with saved_tensors() as saved:
        case.call(QKV.call, BF16)(*given)
    assert [t.dtype for t in saved if t.shape == given[0].shape] == [BF16]


def test_a_result_narrower_than_the_product_is_refused():
    w = random_weight((8, 64))
    x = torch.randn(3, 64)
    assert "narrower" in QUANT_LINEAR.unsupported(x, w, None, F32, BF16)[0]
    a, b = torch.randn(4, 64), torch.randn(8, 4)
    weight = torch.randn(8, 64)
    found = LORA.unsupported(x, weight, None, a, b, 1.0, None, None, BF16)
    assert "narrower" in found[0]


@pytest.mark.parametrize("name", ["linears", "mlp", "one"])
def test_a_gradient_penalty_under_autocast(name):
    """What is kept is a copy of x in fewer bits: its history must lead to x."""
    sizes = {"linears": QKV_SIZES, "mlp": MLP_SIZES, "one": QKV_SIZES[1:2]}[name]
    case = Case(sizes, packed=False)
    ops = {
        "linears": (QKV.call, QKV.reference),
        "mlp": (MLP.call, MLP.reference, "silu"),
        "one": (_single(LORA.call), _single(LORA.reference)),
    }
    ours, theirs, *rest = ops[name]

    def penalty(op: Callable[..., Any]) -> Callable[..., Any]:
        @torch.enable_grad()
        def run(x: Tensor, *tensors: Tensor) -> Tensor:
            outs = case.call(op, BF16, *rest)(x, *tensors)
            total = sum(o.square().sum() for o in (outs if isinstance(outs, tuple) else (outs,)))
            (grad,) = torch.autograd.grad(total, x, create_graph=True)
            return grad

        return run

    assert_parity_of_draws(penalty(ours), penalty(theirs), case.draw)
