"""Casting the operands of linear layers as autocast does, on a GPU all of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def autocast(device: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """The operands as autocast casts a linear layer's; None where it is off."""
    if not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    if one_by_one(device):
        return [t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors]
    return _together(tensors, dtype)


def one_by_one(device: str) -> bool:
    """Whether each operand is cast by itself: where nothing is launched."""
    return device == "cpu"


def _together(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    results = list(tensors)
    other = [
        i for i, t in enumerate(tensors) if t is not None and t.dtype not in (dtype, torch.float64)
    ]
    for kind in dict.fromkeys(results[i].dtype for i in other):  # type: ignore[union-attr]
        places = [i for i in other if tensors[i].dtype is kind]  # type: ignore[union-attr]
        cast = _Cast.apply(dtype, *(tensors[i] for i in places))  # type: ignore[no-untyped-call]
        for i, t in zip(places, cast, strict=True):
            results[i] = t
    return results


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class _Cast(torch.autograd.Function):
    """``t.to(dtype)`` of several tensors of one dtype: a launch in forward, one in backward."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_copied(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [g for g in grads if g is not None]
        if torch.is_grad_enabled():  # to be differentiated itself
            return None, *(None if g is None else g.to(ctx.before) for g in grads)
        wide = iter(_copied(present, ctx.before) if present else ())
        return None, *(None if g is None else next(wide) for g in grads)
