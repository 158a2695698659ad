"""Linear layers as the arguments of one op: with LoRA adapters or without, quantized or not.

An autograd function takes tensors one by one, and constants separately: ``flat`` and ``linears``
convert. The weights of one call are plain matrices, or all of them are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..op import Maker
from .casts import autocast
from .quantized import Quantized, dequantize, example_of_quantized

MIXED = "some of the weights are quantized, some are not"


class Linear(NamedTuple):
    """A linear layer as an argument of an op: ``x·Wᵀ + bias + scale·(z·Aᵀ·Bᵀ + lora_bias)``.

    Products with a quantized weight run in ``compute``, or in the input's dtype if that is None;
    others in the weight's. ``dtype`` is that of the result: the product's, or a wider one.
    """

    # (out, in), frozen or trainable; or a frozen ``Quantized``, or a tuple of its fields
    weight: Tensor | tuple[Any, ...]
    bias: Tensor | None = None  # (out,)
    lora_a: Tensor | None = None  # (r, in), or None for a layer without an adapter
    lora_b: Tensor | None = None  # (out, r), in the dtype of ``lora_a``
    scale: float = 1.0
    lora_bias: Tensor | None = None  # (out,), the bias of B
    compute: torch.dtype | None = None
    dtype: torch.dtype | None = None

    def is_quantized(self) -> bool:
        """Whether the weight is packed."""
        return not isinstance(self.weight, Tensor)

    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in)."""
        return tuple(self.weight[2] if isinstance(self.weight, tuple) else self.weight.shape)


def parts(linear: Linear) -> tuple[Any, ...]:
    """The fields of ``linear``, for ops that take no linear without an adapter."""
    return linear


class ResolvedLinear(NamedTuple):
    """``x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ``, as the products see it: one bias, every dtype known."""

    weight: Tensor | Quantized  # (out, in), plain or quantized
    bias: Tensor | None  # (out,), of any floating dtype; the adapter's is added to it
    lora_a: Tensor | None  # (r, in), or None where there is no adapter
    lora_b: Tensor | None  # (out, r), in the dtype of ``lora_a``
    scale: float
    compute: torch.dtype  # in which x·Wᵀ runs: that of a plain weight
    dtype: torch.dtype  # of the result, at least as wide

    def unpacked(self) -> ResolvedLinear:
        """The same with a plain weight."""
        w, kind = self.weight, self.compute
        return self._replace(weight=dequantize(w, kind)) if isinstance(w, Quantized) else self


class Grads(NamedTuple):
    """The gradient of each tensor of a ``ResolvedLinear``, or None; or whether it is needed."""

    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any


class Constants(NamedTuple):
    """The parts of several linears that are not tensors."""

    scales: tuple[float, ...]  # of the adapters
    sizes: tuple[int, ...]  # (out, in, blocksize) of each quantized weight, one after the other
    kinds: tuple[str, ...]  # of each quantized weight
    compute: torch.dtype | None = None  # of products with quantized weights; None: of plain ones
    dtype: torch.dtype | None = None  # of the results; None is that of the products


def flat(given: Sequence[Linear], x: Tensor) -> tuple[list[Tensor | None], Constants]:
    """The tensors of several linears in a row, and the rest.

    Four of each linear; the adapters' biases are added to the bases'. Then four more of each
    quantized weight, whose first one is among those before. ``x`` is the linears' input.

    Raises:
        ValueError: some of the weights are quantized and some are not, or they differ in
            ``compute`` or ``dtype``.
    """
    tensors: list[Tensor | None] = []
    first = given[0]
    packed = [Quantized(*v.weight) for v in given if not isinstance(v.weight, Tensor)]
    if packed and len(packed) < len(given):
        raise ValueError(MIXED)
    if any([v[6:] != first[6:] for v in given]):  # ``compute`` and ``dtype``
        raise ValueError("the linears compute, or return, in several dtypes")
    for weight, bias, lora_a, lora_b, scale, lora_bias, *_ in given:
        if lora_bias is not None:
            bias = lora_bias * scale if bias is None else bias + lora_bias * scale
        tensors += [weight if isinstance(weight, Tensor) else weight[0], bias, lora_a, lora_b]
    for w in packed:
        tensors += [w.absmax, *w[5:]]
    scales = tuple([v[4] for v in given])
    if not packed:
        return tensors, Constants(scales, (), (), None, first.dtype)
    sizes = tuple([n for w in packed for n in (*w.shape, w.blocksize)])
    kinds = tuple([w.kind for w in packed])
    return tensors, Constants(scales, sizes, kinds, first.compute or x.dtype, first.dtype)


def linears(tensors: Sequence[Any], constants: tuple[Any, ...]) -> list[ResolvedLinear]:
    """The linears of ``flat``'s list; ``constants`` are those, or a plain tuple of them."""
    scales, sizes, kinds, compute, dtype = constants
    end = 4 * len(scales)
    resolved = []
    for i, scale in enumerate(scales):
        weight, bias, a, b = tensors[4 * i : 4 * i + 4]
        if kinds:
            absmax, *rest = tensors[end + 4 * i : end + 4 * i + 4]
            out, into, blocksize = sizes[3 * i : 3 * i + 3]
            weight = Quantized(weight, absmax, (out, into), blocksize, kinds[i], *rest)
        low = compute or weight.dtype  # quantized weights come with ``compute``
        resolved.append(ResolvedLinear(weight, bias, a, b, scale, low, dtype or low))
    return resolved


def unflattened(tensors: Sequence[Any], constants: Constants) -> list[Linear]:
    """What ``flat`` was given; the adapters' biases stay in the bases'."""
    _, _, _, compute, dtype = constants
    return [
        Linear(
            v.weight, None if v.bias is None else v.bias.to(v.compute), v.lora_a, v.lora_b,
            v.scale, None, compute, dtype,
        )
        for v in linears(tensors, constants)
    ]  # fmt: skip


_T = TypeVar("_T")


def with_operands(
    run: Callable[[list[Tensor | None], Constants], _T], given: Sequence[Linear], x: Tensor
) -> _T:
    """Call ``run`` with ``flat``'s results, the operands cast as autocast casts a linear layer's.

    Autocast is then off: nothing is cast a second time.
    """
    tensors, constants = flat(given, x)
    device = x.device.type
    cast = _cast_as_autocast(device, tensors, constants)
    if cast is None:
        return run(tensors, constants)
    with torch.autocast(device, enabled=False):
        return run(cast, constants)


def _cast_as_autocast(
    device: str, tensors: Sequence[Tensor | None], constants: Constants
) -> list[Tensor | None] | None:
    # Over quantized weights the adapters alone are cast. None where autocast is off.
    if not constants.kinds:
        return autocast(device, tensors)
    adapters = [t if i % 4 > 1 else None for i, t in enumerate(tensors)]
    cast = autocast(device, adapters[: 4 * len(constants.scales)])
    if cast is None:
        return None
    operands = [t if c is None else c for t, c in zip(tensors, cast, strict=False)]
    return [*operands, *tensors[len(operands) :]]


def wanted(needed: Sequence[bool], count: int) -> list[Grads]:
    """Which gradients of each linear ``needs_input_grad`` asks for, in its part of the linears."""
    return [Grads(*needed[i : i + 4]) for i in range(0, 4 * count, 4)]


def example_of_linear(
    m: Maker, out: int, into: int, quantized: bool = False, bias: bool = False, lora: bool = True
) -> Linear:
    """A linear layer (out, in) for examples."""
    weight = example_of_quantized(m, out, into) if quantized else m.weight(out, into)
    own_bias = m.weight(out, mean=0.0) if bias else None
    if not lora:
        return Linear(weight, own_bias)
    a, b = m.adapter(m.sizes.rank, into), m.adapter(out, m.sizes.rank)
    return Linear(weight, own_bias, a, b, 2.0)
