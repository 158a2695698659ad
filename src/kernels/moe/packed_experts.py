"""Stacked weights of experts in few bits, of which few are dequantized at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear.quantized import Quantized, dequantize

_Constants = tuple[Any, ...]


class PackedExperts(Tensor):
    """Frozen weights (experts, out, in) that are stored as a ``Quantized`` matrix per expert.

    To whoever reads it, it is a tensor in the dtype of computation. An operation dequantizes all of
    it; one that takes an expert dequantizes only that, and ``moe_experts.grouped_mm`` takes one
    after the other. Views of all experts or of some, transposed ones too, stay packed.

    Args:
        constants: of each matrix ``(shape, blocksize, kind)``, and
        parts: its tensors, each with a first dimension of experts.
        dtype: that of the numbers.
        transposed: whether the experts' matrices are read as (in, out).
    """

    constants: _Constants
    parts: tuple[Tensor | None, ...]
    transposed: bool

    @staticmethod
    def __new__(
        cls: Any, constants: _Constants, parts: tuple[Tensor | None, ...], dtype: torch.dtype,
        transposed: bool = False,
    ) -> PackedExperts:  # fmt: skip
        """Make the wrapper, which has no storage."""
        (out, into), first = constants[0], next(t for t in parts if t is not None)
        experts = first.shape[0]
        size, strides = (experts, out, into), (out * into, into, 1)
        if transposed:
            size, strides = (experts, into, out), (out * into, 1, into)
        wrapper: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # 2026-11-30
            cls, size, strides, dtype=dtype, device=first.device, requires_grad=False
        )
        wrapper.constants, wrapper.transposed = constants, transposed
        wrapper.parts = tuple(parts)
        return wrapper  # type: ignore[no-any-return]  # 2026-11-30: torch has no type for it

    @staticmethod
    def stack(experts: list[Quantized], dtype: torch.dtype) -> PackedExperts:
        """Matrices of one format and shape as one tensor."""
        columns = zip(*(w.tensors for w in experts), strict=True)
        parts = tuple(None if c[0] is None else torch.stack(c) for c in columns)  # type: ignore[arg-type]  # 2026-11-30: all or none
        return PackedExperts(experts[0][1:], parts, dtype)

    def expert(self, number: int) -> Tensor:
        """One expert's matrix, in plain numbers."""
        parts = tuple(None if t is None else t[number] for t in self.parts)
        matrix = dequantize(Quantized(parts, *self.constants), self.dtype)
        return matrix.t() if self.transposed else matrix

    def unpacked(self) -> Tensor:
        """All weights, in plain numbers."""
        plain = torch.stack([self._again(transposed=False).expert(i) for i in range(len(self))])
        return plain.mT if self.transposed else plain

    def _again(self, **changes: Any) -> PackedExperts:
        own = {"parts": self.parts, "dtype": self.dtype, "transposed": self.transposed}
        return PackedExperts(self.constants, **{**own, **changes})

    def _each(self, change: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else change(t) for t in self.parts)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # 2026-11-30

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-11-30: torch has it for instances
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on plain numbers, unless it is a view or a copy."""
        kwargs = kwargs or {}
        result = _packed(func, args, kwargs) if args and isinstance(args[0], cls) else None
        if result is not None:
            return result
        plain = torch.utils._pytree.tree_map_only(cls, cls.unpacked, (args, kwargs))
        return func(*plain[0], **plain[1])


def _packed(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The result of a view or a copy of packed experts; None for other operations."""
    w: PackedExperts = args[0]
    aten = torch.ops.aten
    if func in (aten.detach.default, aten.alias.default):
        return w._again()
    if func is aten.clone.default:
        return w._again(parts=w._each(torch.clone))
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        moved = w._each(lambda t: t.to(device, copy=True))
        return w._again(parts=moved, dtype=kwargs.get("dtype") or w.dtype)
    if func is aten.transpose.int and {d % 3 for d in args[1:]} == {1, 2}:
        return w._again(transposed=not w.transposed)
    if func is aten.slice.Tensor and (len(args) < 2 or args[1] % 3 == 0):
        return w._again(parts=w._each(lambda t: func(t, *args[1:])))
    if func is aten.select.int and args[1] % 3 == 0:
        return w.expert(args[2])
    return None
