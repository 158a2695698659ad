"""torch's ring attention on a CPU, for which torch has registered no kernel of its own.

Its templates take any attention that returns the logarithms of its sums. So the tests can run
everything around them without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

_HEADS_FIRST = 2
"""The dimension of the sequence in (B, heads, T, D)."""

calls: list[str] = []
"""Which of the two handlers ran, in order."""


def register() -> None:
    """Let DTensors with a part of the sequence go through the templates."""
    aten = torch.ops.aten
    ring.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu.default] = _forward
    ring.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu_backward.default] = _backward


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    calls.append("forward")
    query, key, value, *rest = args  # then dropout_p and is_causal, where they are not the default
    causal = rest[1] if len(rest) > 1 else kwargs.get("is_causal", False)
    out, sums = ring._templated_ring_attention(
        query.device_mesh.get_group(), _HEADS_FIRST, op, *map(_local, (query, key, value)),
        is_causal=causal, scale=kwargs.get("scale"),
    )[:2]  # fmt: skip
    return _sharded(out, query), _sharded(sums, query)


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    calls.append("backward")
    grad, query, key, value, out, sums, dropout, causal = args[:8]
    grads = ring._templated_ring_attention_backward(
        query.device_mesh.get_group(), _HEADS_FIRST, op, _local(grad), "grad_out",
        *map(_local, (query, key, value, out, sums)), is_causal=causal, dropout_p=dropout,
        scale=kwargs.get("scale"),
    )  # fmt: skip
    return tuple(_sharded(g, query) for g in grads[:3])


def _local(value: Any) -> Tensor:
    local: Tensor = value._local_tensor
    return local.contiguous()


def _sharded(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(local, like.device_mesh, [Shard(_HEADS_FIRST)], run_check=False)
