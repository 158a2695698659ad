"""ResolvedLinear layers on rows, with or without LoRA adapters, for the ops of several linears.

Everything here works on rows (N, features) and returns fresh tensors. A's of one input run as one
matmul, and all gradients of one input are summed in one buffer, in the input's dtype, which may be
wider than the products'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..direct import direct
from ..launch import library_op, use_triton
from ..matmul import linear, mm
from .linears import Grads, ResolvedLinear
from .products import (
    Rows,
    adapted_product,
    beside,
    gradient_of_a,
    gradient_of_b,
    narrow_copy,
    on_cpu,
    rank_update,
    scaled_mm,
    sum_of_products,
)
from .quant_products import product, sum_of_quantized
from .quantized import Quantized


# -- several linears on one input ------------------------------------------------------------------
def _by_dtype(given: Sequence[Tensor | None]) -> list[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for i, t in enumerate(given):
        if t is not None:
            groups.setdefault(t.dtype, []).append(i)
    return list(groups.values())


# Opaque on the CPU: Inductor would compile kernels for copies that take no time.
_join = direct(library_op("join_matrices(Tensor[] parts, int dim) -> Tensor", torch.cat, torch.cat))


def _joined(parts: Sequence[Any], dim: int) -> Tensor:
    if len(parts) == 1:
        return cast("Tensor", parts[0])
    join: Callable[..., Tensor] = _join if on_cpu(parts[0]) else torch.cat
    return join(list(parts), dim)


def narrow(x: Rows, layers: Sequence[ResolvedLinear]) -> list[Tensor | None]:
    """``scale·x·Aᵀ`` (N, r) of each adapter, in its dtype: of one dtype, all as one matmul."""
    results: list[Tensor | None] = [None] * len(layers)
    for group in _together([layer.lora_a for layer in layers]):
        stacked = _joined([layers[i].lora_a for i in group], 0)
        widths = [layers[i].lora_a.shape[0] for i in group]  # type: ignore[union-attr]
        # the scale goes onto the narrow factor, where it costs nothing and serves dB too
        scales = {layers[i].scale for i in group}
        rows, right = x.beside(stacked), stacked.t()
        plain = on_cpu(rows) and rows.dtype is right.dtype
        if len(scales) == 1 and not plain:
            whole = scaled_mm(rows, right, scales.pop())
            parts: Sequence[Tensor] = whole.split_with_sizes(widths, 1)
        else:
            whole = mm(rows, right) if plain else scaled_mm(rows, right, 1.0)
            each = zip(group, whole.split_with_sizes(widths, 1), strict=True)
            parts = [part * layers[i].scale for i, part in each]
        for i, part in zip(group, parts, strict=True):
            results[i] = part
    return results


_SHORT = 256
"""Features below which fp32 products stay apart: MKL sums a few short rows more exactly."""


def _together(matrices: Sequence[Tensor | None]) -> list[list[int]]:
    groups = _by_dtype(matrices)
    for a in matrices:
        if a is not None and a.dtype is torch.float32 and a.shape[1] < _SHORT:
            return [[i] for group in groups for i in group]
    return groups


def narrow_copy_for(layers: Sequence[ResolvedLinear], x: Tensor) -> Tensor | None:
    """``products.narrow_copy`` for several linears."""
    adapters = (layer.lora_a.dtype for layer in layers if layer.lora_a is not None)
    return narrow_copy(x, (*(layer.compute for layer in layers), *adapters))


def widen(x: Rows, layer: ResolvedLinear, h: Tensor | None) -> Tensor:
    """The output (N, out) of one linear; ``h`` is its part of ``narrow``."""
    low, dtype = x.to(layer.compute), layer.dtype
    bias = None if layer.bias is None else layer.bias.to(low.dtype)
    if isinstance(layer.weight, Quantized):
        right = None if h is None or layer.lora_b is None else layer.lora_b.t()
        return product(low, layer.weight, bias=bias, left=h, right=right, dtype=dtype)
    if h is None or layer.lora_b is None:
        return linear(low, layer.weight, bias).to(dtype)
    return adapted_product(low, layer.weight.t(), bias, h, layer.lora_b.t(), dtype)


class Returned(NamedTuple):
    """The upstream gradients of several linears on one input, and their products with the B's."""

    # (N, out), each in the dtype of its product; None where there is none
    dys: Sequence[Tensor | None]
    ts: list[Tensor | None]  # ``scale·dY·B`` (N, r), shared by the gradients of x and of A
    dbs: list[Tensor | None]  # the gradients of the B's that are needed


def returned(
    layers: Sequence[ResolvedLinear],
    hs: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
    need_x: bool,
    needs: Sequence[Grads],
) -> Returned:
    """Pass the upstream gradients through the B's, as far as ``needs`` asks for it."""
    # One after the other: where fp32 adapters need each cast, the copy goes.
    ts: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    lows: list[Tensor | None] = []
    for layer, h, dy, need in zip(layers, hs, dys, needs, strict=True):
        t = db = low = None
        if dy is not None:
            low = dy.to(layer.compute)
            need_t, need_b = need_x or need.lora_a, need.lora_b and h is not None
            if layer.lora_b is not None and (need_t or need_b):
                kind = layer.lora_b.dtype
                wide = low if kind is layer.compute else beside(dy, layer.lora_b)
                t = scaled_mm(wide, layer.lora_b, layer.scale, True) if need_t else None
                db = gradient_of_b(h, wide) if h is not None and need_b else None
        ts.append(t)
        dbs.append(db)
        lows.append(low)
    return Returned(lows, ts, dbs)


def backward(
    x: Rows | None, layers: Sequence[ResolvedLinear], hs: Sequence[Tensor | None],
    dys: Sequence[Tensor | None], need_x: bool, needs: Sequence[Grads], dtype: torch.dtype,
) -> tuple[Tensor | None, list[Grads]]:  # fmt: skip
    """The gradients of x (in ``dtype``, or None) and of each of several linears on it.

    ``x`` (N, in) is needed for the gradients of the weights and of the A's, ``hs`` (the parts of
    ``narrow``) for those of the B's. ``dys`` are the upstream gradients (N, out); None where there
    is none.
    """
    back = returned(layers, hs, dys, need_x, needs)
    gradients = gradients_of_parameters(x, layers, back, needs)
    return gradient_of_input(layers, back, dtype) if need_x else None, gradients


def gradient_of_input(
    layers: Sequence[ResolvedLinear], back: Returned, dtype: torch.dtype
) -> Tensor | None:
    """``Σ dyᵢ·Wᵢ + tᵢ·Aᵢ`` in one buffer of ``dtype``, all adapters as one product."""
    pairs: list[tuple[Tensor, Any]] = [
        (dy, layer.weight) for dy, layer in zip(back.dys, layers, strict=True) if dy is not None
    ]
    if not pairs:
        return None
    updates = [
        (_joined([back.ts[i] for i in group], 1), _joined([layers[i].lora_a for i in group], 0))
        for group in _by_dtype(back.ts)
    ]
    if isinstance(pairs[0][1], Quantized):
        return sum_of_quantized(pairs, updates, dtype)
    fast = pairs[0][0].dtype is dtype and use_triton(*chain.from_iterable((*pairs, *updates)))
    total = pairs if fast else [*pairs, *updates]
    lefts, rights = map(list, zip(*total, strict=True))
    if len(lefts) > 1:
        dx = sum_of_products(None, lefts, rights, dtype)
    else:
        dx = mm(lefts[0], rights[0]).to(dtype)
    for update in updates if fast else ():
        dx = rank_update(dx, *update)
    return dx


def gradients_of_parameters(
    x: Rows | None,
    layers: Sequence[ResolvedLinear],
    back: Returned,
    needs: Sequence[Grads],
) -> list[Grads]:
    """The gradients of each linear's parameters, None where not needed."""
    das = _gradients_of_a(x, layers, back.ts, needs)
    gradients = []
    each = zip(layers, needs, back.dys, das, back.dbs, strict=True)
    for layer, need, dy, da, db in each:
        if dy is None:
            gradients.append(Grads(None, None, None, None))
            continue
        dweight = mm(dy.t(), x.to(dy.dtype)) if need.weight and x is not None else None
        dbias = dy.sum(0, dtype=layer.bias.dtype) if need.bias and layer.bias is not None else None
        gradients.append(Grads(dweight, dbias, da, db))
    return gradients


def _gradients_of_a(
    x: Rows | None,
    layers: Sequence[ResolvedLinear],
    ts: Sequence[Tensor | None],
    needs: Sequence[Grads],
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * len(layers)
    needed = [t if need.lora_a else None for t, need in zip(ts, needs, strict=True)]
    for group in _by_dtype(needed):
        if x is not None:
            widths = [layers[i].lora_a.shape[0] for i in group]  # type: ignore[union-attr]
            joined = _joined([needed[i] for i in group], 1)
            stacked = gradient_of_a(x.beside(joined), joined)
            for i, part in zip(group, stacked.split_with_sizes(widths, 0), strict=True):
                gradients[i] = part
    return gradients
