"""Products with quantized weights, on rows: one opaque op each, without an autograd rule.

A weight's only copy of full precision lives while a product runs, so that no compiler finds it
worth keeping. The low-rank product of an adapter is added in the same op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..direct import direct
from ..launch import library_op, use_triton
from ..matmul import addmm, addmm_, mm
from .products import accumulated, plus_products, rank_update
from .quantized import Quantized, dequantize


def split(w: Quantized) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The constants of a weight, and its tensors."""
    return w[2:5], (*w[:2], *w[5:])


def join(fixed: tuple[Any, ...], tensors: tuple[Any, ...]) -> Quantized:
    """The weight again."""
    return Quantized(*tensors[:2], *fixed, *tensors[2:])


def _product(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, transposed: bool, bias: Tensor | None, left: Tensor | None, right: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = Quantized(
        packed, absmax, (out, into), blocksize, kind, absmax_8bit, absmax_code, absmax_offset
    )
    triton = use_triton(x, absmax)
    if triton and not transposed and _is_for_few(x, w):
        base: Tensor = _direct_few(x, *w[:2], *w[5:], *w.shape, blocksize, kind, bias)
    else:
        matrix = dequantize(w, x.dtype)
        matrix = matrix if transposed else matrix.t()
        if left is not None and right is not None and x.dtype is dtype and not triton:
            return accumulated(bias, [x, left], [matrix, right], dtype)
        base = mm(x, matrix) if bias is None else addmm(bias, x, matrix)
    if left is None or right is None:
        return base.to(dtype)
    if triton:
        updated: Tensor = rank_update(base.to(dtype), left, right)
        return updated
    return plus_products(base, [(left, right)], dtype)


def _product_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, transposed: bool, bias: Tensor | None, left: Tensor | None, right: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], into if transposed else out, dtype=dtype)


def _product_flops(x: Tensor, *rest: Any) -> int:
    (out, into), right = rest[5:7], rest[-2]
    elements: int = out * into + (0 if right is None else right.numel())
    return 2 * x.shape[0] * elements


_product_op = library_op(
    "quant_product(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_8bit,"
    " Tensor? absmax_code, Tensor? absmax_offset, int out, int into, int blocksize, str kind,"
    " bool transposed, Tensor? bias, Tensor? left, Tensor? right, ScalarType dtype) -> Tensor",
    _product,
    _product_fake,
    _product_flops,
    temporary=lambda x, *rest: x.element_size() * rest[5] * rest[6],  # the weight unpacked
)
_direct_product = direct(_product_op)


def product(
    x: Tensor, w: Quantized, *, transposed: bool = False, bias: Tensor | None = None,
    left: Tensor | None = None, right: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``x·Wᵀ + bias + left·right``, or with x·W, in ``dtype`` (default: x's); no autograd.

    ``x`` is (N, in), or (N, out) if ``transposed``: then it is multiplied with W, not its
    transpose. W (out, in) is rounded to x's dtype. The bias (out,) is in x's dtype, ``left`` is (N,
    r) and ``right`` (r, out), or (r, in).
    """
    result: Tensor = _direct_product(
        x, *w[:2], *w[5:], *w.shape, w.blocksize, w.kind, transposed, bias, left, right,
        dtype or x.dtype,
    )  # fmt: skip
    return result


def _sum(
    xs: list[Tensor], weights: list[Tensor | None], sizes: list[int], kinds: list[str],
    lefts: list[Tensor], rights: list[Tensor], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    total: Any = None
    for i, (x, kind) in enumerate(zip(xs, kinds, strict=True)):
        out, into, blocksize = sizes[3 * i : 3 * i + 3]
        fields = weights[5 * i : 5 * i + 5]
        matrix = dequantize(join(((out, into), blocksize, kind), tuple(fields)), x.dtype)
        if total is None:
            total = mm(x, matrix).to(dtype)
        else:  # a wider sum rounds each product by itself: ``plus_products``
            total = addmm_(total, x, matrix) if x.dtype is dtype else total.add_(mm(x, matrix))
        del matrix  # before the next one is made
    for left, right in zip(lefts, rights, strict=True):
        if use_triton(total, left, right):
            total = rank_update(total, left, right)
        else:
            total = plus_products(total, [(left, right)], dtype)
    return cast(Tensor, total)


def _sum_fake(
    xs: list[Tensor], weights: list[Tensor | None], sizes: list[int], kinds: list[str],
    lefts: list[Tensor], rights: list[Tensor], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return xs[0].new_empty(xs[0].shape[0], sizes[1], dtype=dtype)


def elements_of(sizes: list[int]) -> list[int]:
    """The elements of each weight; ``sizes`` holds (out, in, blocksize) of one after the other."""
    return [out * into for out, into in zip(sizes[::3], sizes[1::3], strict=True)]


def _sum_flops(xs: list[Tensor], weights: Any, sizes: list[int], *rest: Any) -> int:
    elements: int = sum(elements_of(sizes)) + sum(t.numel() for t in rest[-2])
    return 2 * xs[0].shape[0] * elements


_sum_op = library_op(
    "quant_sum_of_products(Tensor[] xs, Tensor?[] weights, int[] sizes, str[] kinds,"
    " Tensor[] lefts, Tensor[] rights, ScalarType dtype) -> Tensor",
    _sum,
    _sum_fake,
    _sum_flops,
    temporary=lambda xs, weights, sizes, *_: xs[0].element_size() * max(elements_of(sizes)),
)
_direct_sum = direct(_sum_op)


def sum_of_quantized(
    pairs: Sequence[tuple[Tensor, Quantized]],
    updates: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> Tensor:
    """``Σ xᵢ·Wᵢ + Σ leftⱼ·rightⱼ`` (N, in), each added to those before; no autograd.

    ``pairs``, one at least, are xᵢ (N, outᵢ) and the weight (outᵢ, in); ``updates`` (N, r) and
    (r, in). ``dtype`` is that of the x's, or wider.
    """
    halves = [split(w) for _, w in pairs]
    result: Tensor = _direct_sum(
        [x for x, _ in pairs],
        [t for _, tensors in halves for t in tensors],
        [n for (shape, blocksize, _), _ in halves for n in (*shape, blocksize)],
        [kind for (_, _, kind), _ in halves],
        [left for left, _ in updates],
        [right for _, right in updates],
        dtype,
    )
    return result


# -- triton: for few rows, dequantize inside the product

_FEW = 16
"""Rows of x up to which dequantizing inside the product is the cheaper way."""


def _is_for_few(x: Tensor, w: Quantized) -> bool:
    return x.shape[0] <= _FEW and w.kind != "int8" and w.shape[1] % w.blocksize == 0


def _few_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out)


def _few_plain(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    rest = absmax_8bit, absmax_code, absmax_offset
    matrix = dequantize(Quantized(packed, absmax, (out, into), blocksize, kind, *rest), x.dtype)
    return mm(x, matrix.t()) if bias is None else addmm(bias, x, matrix.t())


_few = library_op(
    "quant_linear_few(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_8bit,"
    " Tensor? absmax_code, Tensor? absmax_offset, int out, int into, int blocksize, str kind,"
    " Tensor? bias) -> Tensor",
    "linear.quant_linear:few",
    _few_fake,
    lambda x, *rest: 2 * x.shape[0] * rest[5] * rest[6],
    plain=_few_plain,
)
_direct_few = direct(_few)
