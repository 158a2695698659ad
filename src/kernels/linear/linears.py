"""Linear layers as the arguments of one op: with LoRA adapters or without, quantized or not.

An autograd function takes tensors one by one, and constants beside them: here is the way there and
back. The weights of one call are plain matrices, or all of them are quantized.
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

    Attributes:
        weight: (out, in), frozen or trainable; or a frozen ``Quantized``, or a tuple of its fields.
        bias: (out,) or None.
        lora_a: (r, in), or None for a layer without an adapter.
        lora_b: (out, r), in the dtype of ``lora_a``, or None.
        scale: what the adapter's output is multiplied by.
        lora_bias: (out,), the bias of B, or None.
        compute: in which products with a quantized weight run; None is the input's dtype. Others
            run in the weight's.
        dtype: of the result, at least as wide as that of the product; None is that one.
    """

    weight: Tensor | tuple[Any, ...]
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    lora_bias: Tensor | None = None
    compute: torch.dtype | None = None
    dtype: torch.dtype | None = None

    def is_quantized(self) -> bool:
        """Whether the weight is packed."""
        return not isinstance(self.weight, Tensor)

    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in)."""
        return tuple(self.weight[2] if isinstance(self.weight, tuple) else self.weight.shape)


def parts(linear: Linear) -> tuple[Any, ...]:
    """Its fields, for ops that take no linear without an adapter."""
    return linear


class ResolvedLinear(NamedTuple):
    """``x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ``, as the products see it: one bias, every dtype known.

    Attributes:
        weight: (out, in), plain or quantized.
        bias: (out,) or None, of any floating dtype; the adapter's is in it.
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

    def unpacked(self) -> ResolvedLinear:
        """The same with a plain weight."""
        w, kind = self.weight, self.compute
        return self._replace(weight=dequantize(w, kind)) if isinstance(w, Quantized) else self


class Grads(NamedTuple):
    """For each tensor of a ``ResolvedLinear`` its gradient, or None; or whether that is wanted."""

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


def flat(given: Sequence[Linear], x: Tensor) -> tuple[list[Tensor | None], Constants]:
    """The tensors of several linears in a row, and the rest.

    Four of each linear; the adapters' biases join the bases'. Then four more of each quantized
    weight, whose first one is among those before.

    Args:
        given: the linears; all compute in one dtype, and return one.
        x: their input.

    Raises:
        ValueError: some of the weights are quantized and some are not, or the dtypes differ.
    """
    found: list[Tensor | None] = []
    first = given[0]
    packed = [Quantized(*v.weight) for v in given if not isinstance(v.weight, Tensor)]
    if packed and len(packed) < len(given):
        raise ValueError(MIXED)
    if any([v[6:] != first[6:] for v in given]):  # ``compute`` and ``dtype``
        raise ValueError("the linears compute, or return, in several dtypes")
    for weight, bias, lora_a, lora_b, scale, lora_bias, *_ in given:
        if lora_bias is not None:
            bias = lora_bias * scale if bias is None else bias + lora_bias * scale
        found += [weight if isinstance(weight, Tensor) else weight[0], bias, lora_a, lora_b]
    for w in packed:
        found += [w.absmax, *w[5:]]
    scales = tuple([v[4] for v in given])
    if not packed:
        return found, Constants(scales, (), (), None, first.dtype)
    sizes = tuple([n for w in packed for n in (*w.shape, w.blocksize)])
    kinds = tuple([w.kind for w in packed])
    return found, Constants(scales, sizes, kinds, first.compute or x.dtype, first.dtype)


def linears(tensors: Sequence[Any], constants: tuple[Any, ...]) -> list[ResolvedLinear]:
    """The linears of ``flat``'s list; ``constants`` are those, or a plain tuple of them."""
    scales, sizes, kinds, compute, dtype = constants
    end = 4 * len(scales)
    found = []
    for i, scale in enumerate(scales):
        weight, bias, a, b = tensors[4 * i : 4 * i + 4]
        if kinds:
            absmax, *rest = tensors[end + 4 * i : end + 4 * i + 4]
            out, into, blocksize = sizes[3 * i : 3 * i + 3]
            weight = Quantized(weight, absmax, (out, into), blocksize, kinds[i], *rest)
        low = compute or weight.dtype  # quantized weights come with ``compute``
        found.append(ResolvedLinear(weight, bias, a, b, scale, low, dtype or low))
    return found


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
