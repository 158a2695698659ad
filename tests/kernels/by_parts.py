"""The ops of linears over their parts, one argument each: tests differentiate by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fusewright.kernels.linear.linear import LORA_LINEAR, QKV_BLOCK
from fusewright.kernels.linear.projections import Linear
from fusewright.kernels.mlp import mlp_block
from fusewright.kernels.op import Op


def _over(op: Op, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Op:
    return Op(op.name, change(op.reference), change(op.call), change(op.unsupported))


def _of_one(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float, x_lora: Any = None,
        lora_bias: Any = None, dtype: Any = None, compute: Any = None,
    ) -> Any:  # fmt: skip
        parts = (weight, bias, a, b, scale, lora_bias, x_lora, compute, dtype)
        return function(x, Linear(*parts))

    return call


def _of_several(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        x: Any, weights: Any, biases: Any, lora_as: Any, lora_bs: Any, scales: Any,
        lora_biases: Any, *options: str, compute: Any = None, dtype: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        parts = (weights, biases, lora_as, lora_bs, scales, lora_biases)
        return function(x, records(*parts, compute, dtype), *options, **more)

    return call


def records(*parts: Any) -> list[Linear]:
    """Linears from lists of their weights, biases, A's, B's, scales and biases of B."""
    *lists, compute, dtype = (*parts, None, None)[:8]
    each: Sequence[Any] = list(zip(*lists, strict=True))
    return [Linear(*one, None, compute, dtype) for one in each]


LORA = _over(LORA_LINEAR, _of_one)
QKV, MLP = _over(QKV_BLOCK, _of_several), _over(mlp_block.OP, _of_several)
