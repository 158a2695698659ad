"""Matrix products that add up in one accumulator: what the ops with LoRA adapters share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import LIBRARY, library_op, use_triton


def accumulated(bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    """``bias + left₀ (N, K₀) · right₀ (K₀, M) + left₁ · right₁ + …`` in the first pair's dtype.

    For use inside an opaque op; elsewhere it is ``sum_of_products``.
    """
    first, *others = zip(lefts, rights, strict=True)
    total = torch.mm(*first) if bias is None else torch.addmm(bias, *first)
    for left, right in others:
        # addmm wants one dtype; a transposed right operand costs it a quarter of its speed
        total.addmm_(left.to(total.dtype), right.to(total.dtype).contiguous())
    return total


def _sum_of_products_fake(bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    return lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1])


# Opaque, because a traced graph has no in-place operations: Inductor would copy every output.
# 2026-11-24: torch.library is not typed
LIBRARY.define(  # type: ignore[no-untyped-call]
    "lora_sum_of_products(Tensor? bias, Tensor[] lefts, Tensor[] rights) -> Tensor"
)
LIBRARY.impl(  # type: ignore[no-untyped-call]
    "lora_sum_of_products", accumulated, "CompositeExplicitAutograd"
)
torch.library.register_fake("fusewright::lora_sum_of_products", _sum_of_products_fake, lib=LIBRARY)


def _rank_update_fake(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return base.new_empty(base.shape)


rank_update = library_op(
    "lora_rank_update(Tensor base, Tensor left, Tensor right) -> Tensor",
    "lora_linear:rank_update",
    _rank_update_fake,
)


def sum_of_products(bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    """``bias + Σ leftᵢ · rightᵢ``, each product in the accumulator of those before."""
    op = torch.ops.fusewright.lora_sum_of_products.default
    result: Tensor = op(bias, lefts, rights)
    return result


def adapted_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
) -> Tensor:
    """``x (N, K) · weight (K, M) + bias + left (N, r) · right (r, M)``, rounded twice."""
    if use_triton(x, weight, left, right):
        base = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        updated: Tensor = rank_update(base, left, right)
        return updated
    return sum_of_products(bias, [x, left], [weight, right])


def gradient_of_a(z: Tensor, t: Tensor) -> Tensor:
    """``tᵀ·z`` (r, in) for t = scale·dY·B."""
    z = z.to(t.dtype)
    return torch.mm(t.t(), z) if _narrow_first(z) else torch.mm(z.t(), t).t()


def gradient_of_b(h: Tensor, dy: Tensor) -> Tensor:
    """``dyᵀ·h`` (out, r) for h = scale·x·Aᵀ."""
    low = dy.dtype in (torch.bfloat16, torch.float16)
    return torch.mm(h.t(), dy).t() if low or _narrow_first(dy) else torch.mm(dy.t(), h)


_AMX = torch.cpu._is_amx_tile_supported()


def _narrow_first(t: Tensor) -> bool:
    """Whether a narrow matrix is better multiplied with a wide one than the wide one with it.

    Measured on Intel with AMX, 256 to 4,096 rows: wide first takes 1.1 (rank 64) to 3.6 times (rank
    8) as long in fp32, and 1.0 to 1.7 times in bf16. On AMD it is the other way round, but for
    ``gradient_of_b`` in half precision: there too, the narrow one goes first.
    """
    return t.device.type == "cpu" and _AMX


def autocast(device: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """The operands as autocast casts a linear layer's; None where it is off."""
    if not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors]
