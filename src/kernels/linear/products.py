"""Matrix products that add up in one accumulator: what the ops with LoRA adapters share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..choice import Implementation
from ..direct import direct
from ..launch import library_op, use_triton_dot, without_base
from ..matmul import addmm, addmm_, mm
from ..native import low_rank as native
from ..processor import processor

_unsafe_view = torch.ops.aten._unsafe_view.default


def shaped(rows: Tensor, x: Tensor) -> Tensor:
    """``rows`` (N, M), which nobody else reads, as (..., M) with the leading sizes of ``x``."""
    # This is no view: one that was made without gradients could not be written to with them.
    out: Tensor = _unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
    return out


def accumulated(
    bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """``bias + left₀ (N, K₀) · right₀ (K₀, M) + left₁ · right₁ + …`` in ``dtype``.

    For use inside an opaque op; elsewhere it is ``sum_of_products``.
    """
    first, *following = zip(lefts, rights, strict=True)
    total = mm(*first) if bias is None else addmm(bias, *first)
    return plus_products(total, following, dtype)


def plus_products(
    total: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Tensor:
    """``total + Σ left · right`` in ``dtype``; ``total`` must be the caller's, and is used up."""
    # Where the sum is wider than ``total`` was, each product is rounded by itself, as it is where
    # autograd adds up gradients that went through casts: rounding the sums too would lose more.
    wider, total = total.dtype is not dtype, total.to(dtype)
    for left, right in pairs:
        right = right.contiguous()  # a transposed one costs a quarter of the speed
        if wider and left.dtype is not dtype:
            total.add_(mm(left, right))
        else:  # addmm wants one dtype
            addmm_(total, left.to(dtype), right.to(dtype))
        del left, right  # before an iterator makes the next ones
    return total


def _sum_of_products_fake(
    bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor], dtype: torch.dtype
) -> Tensor:
    return lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1], dtype=dtype)


# Opaque, because a traced graph has no in-place operations: Inductor would copy every output.
_sum_of_products_op = direct(
    library_op(
        "lora_sum_of_products(Tensor? bias, Tensor[] lefts, Tensor[] rights, ScalarType dtype)"
        " -> Tensor",
        accumulated,
        _sum_of_products_fake,
        lambda bias, lefts, rights, dtype: 2 * lefts[0].shape[0] * sum(r.numel() for r in rights),
    )
)


def _rank_update_fake(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return base.new_empty(base.shape)


rank_update = direct(
    library_op(
        "lora_rank_update(Tensor base, Tensor left, Tensor right) -> Tensor",
        "linear.lora_linear:rank_update",
        _rank_update_fake,
        lambda base, left, right: 2 * left.shape[0] * right.numel(),
        plain=lambda base, left, right: plus_products(base.clone(), [(left, right)], base.dtype),
        libraries=(
            Implementation(
                "torch.addmm",
                torch.addmm,
                lambda base, left, right: (
                    ""
                    if base.dtype is left.dtype is right.dtype
                    else "it multiplies and adds in one dtype"
                ),
            ),
        ),
    )
)


def sum_of_products(
    bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """``bias + Σ leftᵢ · rightᵢ``, each product in the accumulator of those before.

    Bias is (M,) or None, leftᵢ (N, Kᵢ), rightᵢ (Kᵢ, M); ``dtype`` is by default the first pair's.
    """
    result: Tensor = _sum_of_products_op(bias, lefts, rights, dtype or lefts[0].dtype)
    return result


def _wide_product_fake(wide: Tensor, narrow: Tensor, scale: float, transposed: bool) -> Tensor:
    shape = (wide.shape[0], narrow.shape[1])
    return wide.new_empty(shape[::-1] if transposed else shape, dtype=narrow.dtype)


def _wide_product_plain(wide: Tensor, narrow: Tensor, scale: float, transposed: bool) -> Tensor:
    result = torch.mm(wide.to(narrow.dtype), narrow).mul_(scale)
    return result.t() if transposed else result


def in_parts(narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """``narrow`` (K, r) as three parts (K, 3 r) in ``dtype``, whose sum it is: the smallest first.

    Each part is what is left of the number after those before: 8 bits each in bf16, which are the
    24 of an fp32 number together (Ootomo & Yokota 2022).
    """
    high = narrow.to(dtype)
    rest = narrow - high
    middle = rest.to(dtype)
    return torch.cat([(rest - middle).to(dtype), middle, high], 1)


def product_of_parts(wide: Tensor, narrow: Tensor, scale: float, transposed: bool) -> Tensor:
    """``wide_product`` by one product of the library, which adds up in fp32 and returns it."""
    parts = _mm_in_fp32(wide, in_parts(narrow, wide.dtype)).unflatten(1, (3, -1))
    result = torch.add(parts[:, 0], parts[:, 1]).add_(parts[:, 2]).mul_(scale)
    return result.t().contiguous() if transposed else result


def _mm_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


_wide_product_op = direct(
    library_op(
        "lora_wide_product(Tensor wide, Tensor narrow, float scale, bool transposed) -> Tensor",
        "linear.lora_linear:wide_product",
        _wide_product_fake,
        lambda wide, narrow, *_: 2 * wide.shape[0] * narrow.numel(),
        plain=_wide_product_plain,
        libraries=(
            Implementation(
                "in three parts",
                product_of_parts,
                lambda wide, *_: (
                    "" if wide.dtype is torch.bfloat16 else "parts are numbers of bfloat16"
                ),
            ),
        ),
    )
)


def _native_product(wide: Tensor, narrow: Tensor, scale: float, transposed: bool) -> Tensor:
    if native.takes(wide, narrow):
        return native.product(wide, narrow, scale, transposed)
    return without_base(_wide_product_plain(wide, narrow, scale, transposed).contiguous())


_native_product_op = direct(
    library_op(
        "lora_native_product(Tensor wide, Tensor narrow, float scale, bool transposed) -> Tensor",
        _native_product,
        _wide_product_fake,
        lambda wide, narrow, *_: 2 * wide.shape[0] * narrow.numel(),
    )
)


def _wide_product(wide: Tensor, narrow: Tensor, scale: float, transposed: bool) -> Tensor:
    op = _wide_product_op if use_triton_dot(wide, narrow) else _native_product_op
    result: Tensor = op(wide, narrow, scale, transposed)
    return result


def multiplies_as_is(wide: Tensor, narrow: Tensor) -> bool:
    """Whether a kernel multiplies ``wide`` as it is with fp32, as exactly as fp32 products."""
    # On a GPU: an fp32 number is the sum of three in bf16, whose products tensor cores add up in
    # fp32. Three in fp16 are no such sum where a number is below 1e-4 (gradients are) or above
    # 65,504. On a CPU with a C++ compiler the kernel multiplies in fp32.
    if wide.dtype is not torch.bfloat16 or narrow.dtype is not torch.float32:
        return False
    return use_triton_dot(wide, narrow) or native.available(wide, narrow)


def beside(wide: Tensor, narrow: Tensor) -> Tensor:
    """``wide`` in the dtype in which it is multiplied with ``narrow``: as it is, or narrow's."""
    return wide if multiplies_as_is(wide, narrow) else wide.to(narrow.dtype)


class Rows:
    """Rows (N, features), and their copies in other dtypes, each made once."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._copies: dict[torch.dtype, Tensor] = {}

    def to(self, dtype: torch.dtype) -> Tensor:
        """The rows in ``dtype``."""
        if self.rows.dtype is dtype:
            return self.rows
        if dtype not in self._copies:
            self._copies[dtype] = self.rows.to(dtype)
        return self._copies[dtype]

    def beside(self, narrow: Tensor) -> Tensor:
        """The rows in the dtype in which they are multiplied with ``narrow``."""
        return self.rows if multiplies_as_is(self.rows, narrow) else self.to(narrow.dtype)


def is_wide(x: Tensor) -> bool:
    """Whether ``narrow_copy`` may find a narrower dtype: products have no less than 16 bits."""
    return x.element_size() > 2


def narrow_copy(x: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor | None:
    """``x`` in the only dtype in which an op reads it, where that is narrower; else None."""
    # The op's function is given both: the gradient belongs to ``x``, and is in its dtype; the copy
    # is kept for backward. It is made outside the function, so that what is kept has a history for
    # a second derivative.
    needed = set(dtypes)
    alone = needed.pop() if len(needed) == 1 else x.dtype
    return x.to(alone) if alone.itemsize < x.element_size() else None


def scaled_mm(left: Tensor, right: Tensor, scale: float, of_right: bool = False) -> Tensor:
    """``scale·left·right``, left as returned by ``beside``; on a GPU in the accumulator.

    Elsewhere the product is scaled, or with ``of_right`` the right factor: no rounded result then.
    """
    if left.dtype is not right.dtype:
        return _wide_product(left, right, scale, False)
    if not on_cpu(left):
        # with beta 0 what is added counts for nothing: a view of what is there, for no launch
        return torch.addmm(left[:1, :1], left, right, beta=0, alpha=scale)
    if scale == 1.0:
        return mm(left, right)
    return mm(left, right * scale) if of_right else mm(left, right) * scale


def gradient_of_a(z: Tensor, t: Tensor) -> Tensor:
    """``tᵀ·z`` (r, in) for t = scale·dY·B."""
    # On a GPU in the strides of the parameter: autograd would clone any other, and the buckets of
    # DDP would not fit it. So is ``gradient_of_b``.
    if z.dtype is not t.dtype:
        if multiplies_as_is(z, t):
            return _wide_product(z.t(), t, 1.0, True)
        z = z.to(t.dtype)
    return mm(t.t(), z) if not on_cpu(z) or _narrow_first(z) else mm(z.t(), t).t()


def gradient_of_b(h: Tensor, dy: Tensor) -> Tensor:
    """``dyᵀ·h`` (out, r) for h = scale·x·Aᵀ, and dY as returned by ``beside``."""
    if dy.dtype is not h.dtype:
        return _wide_product(dy.t(), h, 1.0, False)
    low = on_cpu(dy) and dy.dtype in (torch.bfloat16, torch.float16)
    return mm(h.t(), dy).t() if low or _narrow_first(dy) else mm(dy.t(), h)


def _narrow_first(t: Tensor) -> bool:
    # Whether narrow · wide is faster than wide · narrow; in half precision it is everywhere so for
    # ``gradient_of_b``.
    return on_cpu(t) and processor().thin_factors_first()


def on_cpu(t: Tensor) -> bool:
    """Whether a tensor is on the CPU, where other forms of a product are fast."""
    return t.device.type == "cpu"
