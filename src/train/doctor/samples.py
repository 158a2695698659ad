"""A typical call of each op: what shapes and dtypes its record is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.launch import use_triton
from ...kernels.linear.linears import Linear
from ...kernels.linear.quantized import Quantized

_ROWS, _WIDE, _RANK, _HEADS, _LONG = 128, 256, 16, 4, 64
"""Tokens, features, rank, heads, and the length of a sequence; any would do that kernels take."""


@dataclass(frozen=True)
class Maker:
    """Makes arguments of one dtype on one device, under whichever mode is active.

    Args:
        dtype: of activations and weights.
        device: where they are.
    """

    dtype: torch.dtype
    device: torch.device

    def x(self, *shape: int) -> Tensor:
        """An activation."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)

    def w(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """A trained weight."""
        return nn.Parameter(torch.zeros(shape, dtype=dtype or self.dtype, device=self.device))

    def lora(self, weight: Any = None, out: int = _WIDE, into: int = _WIDE) -> Linear:
        """A linear layer with an adapter in fp32, PEFT's default."""
        a, b = self.w(_RANK, into, dtype=torch.float32), self.w(out, _RANK, dtype=torch.float32)
        return Linear(self.w(out, into) if weight is None else weight, None, a, b, 2.0)

    def packed(self) -> Quantized:
        """A matrix in NF4."""
        size = _WIDE * _WIDE
        codes = torch.zeros(size // 2, 1, dtype=torch.uint8, device=self.device)
        absmax = torch.zeros(size // 64, dtype=torch.float32, device=self.device)
        return Quantized(codes, absmax, (_WIDE, _WIDE), 64, "nf4")

    def heads(self, number: int = _HEADS) -> Tensor:
        """Queries, keys or values: (B, H, T, D)."""
        return self.x(2, number, _LONG, 64)

    def table(self, *shape: int) -> Tensor:
        """A tensor that gets no gradient, such as cos and sin."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def whole(self, *shape: int) -> Tensor:
        """Whole numbers: labels, or the experts of tokens."""
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def _norm_and_linears(m: Maker) -> tuple[Any, ...]:
    weights = [m.w(_WIDE, _WIDE), m.w(_WIDE, _WIDE)]
    return m.x(_ROWS, _WIDE), m.w(_WIDE), 1e-6, 0.0, "inner", weights, [None, None]


def _attention(m: Maker) -> tuple[Any, ...]:
    """Triton's kernels are for masks; on a CPU it looks at what is in them, and here nothing is."""
    heads = m.heads(), m.heads(2), m.heads(2)
    if not use_triton(*heads):
        return (*heads, None, True)
    return (*heads, None, False, m.whole(1, 1, _LONG, _LONG) == 0)


def _up(m: Maker) -> tuple[Any, ...]:
    return (m.x(_ROWS, _WIDE), m.w(4, _WIDE, _WIDE), None, *_routing(m))


def _down(m: Maker) -> tuple[Any, ...]:
    weights = torch.zeros(2 * _ROWS, dtype=torch.float32, device=m.device)
    return (m.x(2 * _ROWS, _WIDE), weights, m.w(4, _WIDE, _WIDE), None, *_routing(m))


def _routing(m: Maker) -> tuple[Any, ...]:
    offsets = torch.zeros(4, dtype=torch.int32, device=m.device)
    return m.whole(2 * _ROWS), m.whole(2 * _ROWS), offsets, 2


def _scan(m: Maker) -> tuple[Any, ...]:
    a = m.w(_WIDE, 16, dtype=torch.float32)
    return (*(m.x(2, _WIDE, _LONG) for _ in range(2)), a, m.x(2, 16, _LONG), m.x(2, 16, _LONG))


def _chunked(m: Maker) -> tuple[Any, ...]:
    a = m.w(_HEADS, dtype=torch.float32)
    b, c = m.x(2, _LONG, 2, 16), m.x(2, _LONG, 2, 16)
    return m.x(2, _LONG, _HEADS, 64), m.x(2, _LONG, _HEADS), a, b, c


CALLS: Mapping[str, Callable[[Maker], tuple[Any, ...]]] = {
    "layer_norm": lambda m: (m.x(_ROWS, _WIDE), m.w(_WIDE), m.w(_WIDE), 1e-6),
    "rms_norm": lambda m: (m.x(_ROWS, _WIDE), m.w(_WIDE), 1e-6),
    "add_rms_norm": lambda m: (m.x(_ROWS, _WIDE), m.x(_ROWS, _WIDE), m.w(_WIDE), 1e-6),
    "rms_norm_linear": _norm_and_linears,
    "rope": lambda m: (
        (m.heads(), m.heads(2)), m.table(1, 1, _LONG, 64), m.table(1, 1, _LONG, 64), 64,
    ),
    "attention": _attention,
    "glu": lambda m: (m.x(_ROWS, _WIDE), m.x(_ROWS, _WIDE), "silu"),
    "glu_packed": lambda m: (m.x(_ROWS, 2 * _WIDE), "silu", False),
    "mlp_block": lambda m: (m.x(_ROWS, _WIDE), [m.lora(), m.lora(), m.lora()], "silu"),
    "lora_linear": lambda m: (m.x(_ROWS, _WIDE), m.lora()),
    "quant_linear": lambda m: (m.x(_ROWS, _WIDE), m.packed()),
    "quant_lora_linear": lambda m: (m.x(_ROWS, _WIDE), m.lora(m.packed())),
    "qkv_block": lambda m: (m.x(_ROWS, _WIDE), [m.lora(), m.lora(), m.lora()]),
    "dora": lambda m: (m.x(_ROWS, _WIDE), m.w(_WIDE)),
    "dora_row_norms": lambda m: (
        m.w(_WIDE, _WIDE), m.w(_RANK, _WIDE), m.w(_WIDE, _RANK), 2.0, m.dtype,
    ),
    "moe_up": _up,
    "moe_down": _down,
    "linear_cross_entropy": lambda m: (m.x(_ROWS, _WIDE), m.w(1000, _WIDE), None, m.whole(_ROWS)),
    "linear_logprob": lambda m: (m.x(_ROWS, _WIDE), m.w(1000, _WIDE), None, m.whole(_ROWS)),
    "linear_divergence": lambda m: (
        m.x(_ROWS, _WIDE), m.w(1000, _WIDE), None, m.table(_ROWS, 64), m.table(1000, 64), None,
    ),
    "selective_scan": _scan,
    "ssd": _chunked,
}  # fmt: skip
"""Name of an op -> its arguments."""
