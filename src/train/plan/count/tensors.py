"""The tensors of a model, by the unit that is gathered at a time: how many numbers, how many bytes.

Each block is a unit; what is outside of them (embeddings, final norm, head) is one more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...model.quantize import bare_experts
from ...model.stored import Packing
from .blueprint import Blueprint

_ABSMAX_BLOCK = 64
"""Weights of 4 bits that share a scale (bitsandbytes' default)."""

_NESTED_BLOCK = 256
"""Scales that share a second scale, where they are quantized, too."""


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        numbers: how many it has.
        rows: its size in the first dimension, which is what is divided between processes.
        bytes: of the whole tensor, its scales not included where it is quantized.
        scales: bytes of those, which no strategy divides, and of all of a weight that is whole in
            each process.
        itemsize: bytes of a number in the dtype of computation.
        is_matrix: whether it has two dimensions or more.
    """

    numbers: int
    rows: int
    bytes: int
    itemsize: int
    trains: bool
    is_matrix: bool
    scales: int = 0

    def shard(self, ranks: int) -> float:
        """The bytes that the first of ``ranks`` processes has: whole rows, as in FSDP2."""
        return math.ceil(self.rows / ranks) / self.rows if self.rows else 1.0


@dataclass(frozen=True)
class FSDPUnit:
    """Weights that are gathered together.

    Attributes:
        name: the path of its first block, or ``""`` for what is outside of all blocks.
        times: how often it occurs in the model.
        weights: of one of them.
    """

    name: str
    times: int
    weights: tuple[Weight, ...]


def fsdp_units(
    blueprint: Blueprint, bits: int | Packing | None, experts: bool = False
) -> list[FSDPUnit]:
    """The units of a model.

    ``bits`` of quantized linear layers are 4 or 8, or how their checkpoint packs them; None:
    nothing is quantized. With ``experts``, bare weights of experts are quantized, too.
    """
    stored = bits if isinstance(bits, Packing) else None
    quantized = set() if bits is None else _quantized(blueprint.model, experts, stored)
    inside = {id(p) for b in blueprint.blocks.values() for p in b.parameters()}
    rest = [p for p in blueprint.model.parameters() if id(p) not in inside]
    result = [
        FSDPUnit(path, blueprint.times[path], tuple(_weights(block.parameters(), quantized, bits)))
        for path, block in blueprint.blocks.items()
    ]
    return [*result, FSDPUnit("", 1, tuple(_weights(iter(rest), quantized, bits)))]


def _weights(
    parameters: Iterator[nn.Parameter], quantized: set[int], bits: int | Packing | None
) -> Iterator[Weight]:
    for p in parameters:
        size, scales = p.nbytes, 0
        if bits and id(p) in quantized:
            if isinstance(bits, Packing):
                size, scales = bits.nbytes(p)
            else:
                size, scales = quantized_bytes(p, bits)
            if (
                isinstance(bits, Packing) or bits == 8 or p.dim() == 3
            ):  # which FSDP cannot divide either
                size, scales = 0, size + scales
        rows = p.shape[0] if p.dim() else 1
        yield Weight(p.numel(), rows, size, p.element_size(), p.requires_grad, p.dim() > 1, scales)


def _quantized(model: Any, experts: bool, stored: Packing | None) -> set[int]:
    """The weights that are replaced: of frozen linear layers but the head, and of experts."""
    head = model.get_output_embeddings()
    heads = set() if head is None else set(head.modules())
    replaced = {
        id(m.weight)
        for name, m in model.named_modules()
        if type(m) is nn.Linear
        and m not in heads
        and not m.weight.requires_grad
        and (stored is None or stored.has(name))
    }
    if experts:
        replaced |= {id(p) for _, _, p in bare_experts(model) if not p.requires_grad}
    return replaced


def quantized_bytes(weight: Tensor, bits: int) -> tuple[int, int]:
    """The bytes of a quantized tensor (..., out, in), and those of its scales.

    Four bits: two weights a byte, a scale of 8 bits for 64 of them, one of 32 bits for 256 of those
    (double quantization). Eight bits: a byte each, and a scale of 32 bits for each row.
    """
    if bits == 8:
        return weight.numel(), 4 * (weight.numel() // max(weight.shape[-1], 1))
    scales = math.ceil(weight.numel() / _ABSMAX_BLOCK)
    return math.ceil(weight.numel() / 2), scales + 4 * math.ceil(scales / _NESTED_BLOCK)
