"""Linear layers as the arguments of one op: with LoRA adapters or without, quantized or not.

An autograd function takes tensors one by one, and constants beside them: here is the way there and
back. The weights of one call are plain matrices, or all of them are quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .products import autocast
from .quantized import Quantized, dequantize

Weight = Tensor | Sequence[Any]
"""A matrix, or the fields of a ``Quantized``."""


class Linear(NamedTuple):
    """``x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ``.

    Attributes:
        weight: (out, in), plain or quantized.
        bias: (out,) or None, of any floating dtype.
        lora_a: (r, in), or None where there is no adapter.
        lora_b: (out, r), in the dtype of ``lora_a``, or None.
        scale: of the adapter.
        compute: the dtype in which x·Wᵀ runs: that of a plain weight.
        dtype: of the result, at least as wide.
    """

    weight: Tensor | Quantized
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scale: float
    compute: torch.dtype
    dtype: torch.dtype

    def unpacked(self) -> Linear:
        """The same with a plain weight."""
        w, kind = self.weight, self.compute
        return self._replace(weight=dequantize(w, kind)) if isinstance(w, Quantized) else self

    def numel(self) -> int:
        """The elements of its matrices."""
        out, into = self.weight.shape
        adapter = (t.numel() for t in (self.lora_a, self.lora_b) if t is not None)
        return out * into + sum(adapter)


class Grads(NamedTuple):
    """A value for each tensor of a ``Linear``: its gradient or None, or whether that is wanted."""

    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any


class Constants(NamedTuple):
    """What of several linears is no tensor.

    Attributes:
        scales: of the adapters.
        sizes: (out, in, blocksize) of each quantized weight, one after the other; else empty.
        kinds: of each quantized weight; else empty.
        compute: the dtype in which products with quantized weights run; None is that of plain ones.
        dtype: of the results; None is that of the products.
    """

    scales: tuple[float, ...]
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    compute: torch.dtype | None = None
    dtype: torch.dtype | None = None


def flat(
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scales: Sequence[float],
    lora_biases: Sequence[Tensor | None],
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], Constants]:
    """The tensors of several linears in a row, and the rest.

    Four of each linear; the adapters' biases join the bases'. Then four more of each quantized
    weight, whose first one is among those before.

    Args:
        weights: of the linears, and so on.
        biases: (out,) each, or None.
        lora_as: (r, in) each, or None.
        lora_bs: (out, r) each, or None.
        scales: of the adapters.
        lora_biases: (out,) each, or None.
        compute: in which products with quantized weights run.
        dtype: of the results; None is that of the products.
    """
    found: list[Tensor | None] = []
    packed = [Quantized(*w) for w in weights if not isinstance(w, Tensor)]
    if packed and len(packed) < len(weights):
        raise ValueError("some of the weights are quantized, some are not")
    firsts = [w if isinstance(w, Tensor) else w[0] for w in weights]
    each = zip(firsts, biases, lora_as, lora_bs, scales, lora_biases, strict=True)
    for first, bias, lora_a, lora_b, scale, lora_bias in each:
        if lora_bias is not None:
            bias = lora_bias * scale if bias is None else bias + lora_bias * scale
        found += [first, bias, lora_a, lora_b]
    for w in packed:
        found += [w.absmax, *w[5:]]
    sizes = (n for w in packed for n in (*w.shape, w.blocksize))
    kinds = tuple(w.kind for w in packed)
    return found, Constants(tuple(scales), tuple(sizes), kinds, compute if packed else None, dtype)


def linears(tensors: Sequence[Any], constants: Constants) -> list[Linear]:
    """The linears of ``flat``'s list."""
    scales, sizes, kinds, compute, dtype = constants
    end = 4 * len(scales)
    fours = [tensors[i : i + 4] for i in range(0, end, 4)]
    weights = [four[0] for four in fours]
    if kinds:
        for i, kind in enumerate(kinds):
            absmax, *rest = tensors[end + 4 * i : end + 4 * i + 4]
            out, into, blocksize = sizes[3 * i : 3 * i + 3]
            weights[i] = Quantized(weights[i], absmax, (out, into), blocksize, kind, *rest)
    each = zip(weights, fours, scales, strict=True)
    lows = [compute or w.dtype for w in weights]  # quantized weights come with ``compute``
    return [
        Linear(w, bias, a, b, scale, low, dtype or low)
        for (w, (_, bias, a, b), scale), low in zip(each, lows, strict=True)
    ]


def lists(tensors: Sequence[Any], constants: Constants) -> tuple[list[Any], ...]:
    """What ``flat`` was given; the adapters' biases stay in the bases'."""
    layers = linears(tensors, constants)
    biases = [None if v.bias is None else v.bias.to(v.compute) for v in layers]
    weights, _, lora_as, lora_bs, scales, *_ = (list(part) for part in zip(*layers, strict=True))
    return weights, biases, lora_as, lora_bs, scales, [None] * len(layers)


def cast_as_autocast(
    device: str, tensors: Sequence[Tensor | None], constants: Constants
) -> list[Tensor | None] | None:
    """``flat``'s list as autocast casts a linear layer's operands; None where it is off.

    Over quantized weights the adapters alone are cast.
    """
    if not constants.kinds:
        return autocast(device, tensors)
    adapters = [t if i % 4 > 1 else None for i, t in enumerate(tensors)]
    cast = autocast(device, adapters[: 4 * len(constants.scales)])
    if cast is None:
        return None
    own = [t if c is None else c for t, c in zip(tensors, cast, strict=False)]
    return [*own, *tensors[len(own) :]]


def wanted(needed: Sequence[bool], count: int) -> list[Grads]:
    """The same for ``needs_input_grad``'s part, as far as it is of linears."""
    return [Grads(*needed[i : i + 4]) for i in range(0, 4 * count, 4)]
