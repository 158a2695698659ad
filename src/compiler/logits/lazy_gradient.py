"""Gradients of logits whose values are computed only where something looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

_HISTORY = {
    "grad_fn", "grad", "is_leaf", "output_nr", "retains_grad", "_base", "_backward_hooks",
    "_version", "register_hook", "retain_grad", "requires_grad_",
}  # fmt: skip
_ATTRIBUTES = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "itemsize",
    "is_sparse", "is_quantized", "is_meta", "is_nested", *_HISTORY,
}  # fmt: skip
_METHODS = {
    "size", "dim", "numel", "is_floating_point", "is_complex", "nelement", "ndimension", "__len__",
    "element_size", "get_device", "is_contiguous", "stride", "storage_offset", "is_inference",
    "_is_view", *_HISTORY,
}  # fmt: skip


def describes(func: Any, name: str) -> bool:
    """True for functions that read or change what is known of a tensor without its values."""
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(func.__self__, "__name__", "") in _ATTRIBUTES
    return name in _METHODS


Part = Callable[[], list[Any]]
"""Computes a part of the gradients of operands and inputs; None where there is nothing to add."""


class LazyGradient(Tensor):
    """The gradient of logits, as a loss sends it back.

    It passes through the backward nodes of views, casts and scales as it is: the gradients of
    rows and head are those that the losses found. Any function that is called on it, by a hook for
    example, computes the values, and these go on in its place.

    Attributes:
        parts: compute the gradients of the fused loss's operands, then of the inputs of the logits;
            they are to be added up.
    """

    parts: list[Part]
    _compute: Callable[[], Tensor]
    _found: Tensor | None = None
    _is_read = False

    @staticmethod
    def of(
        like: Tensor, compute: Callable[[], Tensor], parts: list[Part], device: Any = None
    ) -> LazyGradient:
        """A gradient of the form of ``like``; ``compute`` returns its values."""
        gradient: LazyGradient = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyGradient, like.size(), strides=like.stride(), dtype=like.dtype,
            device=like.device if device is None else device,
        )  # fmt: skip
        torch._C._set_throw_on_mutable_data_ptr(gradient)
        gradient._compute, gradient.parts = compute, parts
        return gradient

    def values(self) -> Tensor:
        """The values, which are this gradient from now on: they may be written to."""
        if self._found is None:
            self._found = self._compute()
        self._is_read = True
        return self._found

    def peek(self) -> Tensor:
        """The values, for another gradient that is made of them."""
        return self._compute().clone() if self._found is None else self._found

    @property
    def is_direct(self) -> bool:
        """True while ``parts`` are the whole gradient: its values were not given out."""
        return not self._is_read

    def direct(self, count: int) -> list[Any]:
        """The gradients of ``count`` operands and inputs, added up in fp32."""
        if len(self.parts) == 1:
            return self.parts[0]()
        totals: list[Any] = [None] * count
        dtypes: list[Any] = [None] * count
        for part in self.parts:
            for i, grad in enumerate(part()):
                if grad is None:
                    continue
                if totals[i] is None:
                    wide = grad.dtype in (torch.float32, torch.float64)
                    totals[i], dtypes[i] = grad.clone() if wide else grad.float(), grad.dtype
                else:
                    totals[i] += grad
        return [t if t is None else t.to(d) for t, d in zip(totals, dtypes, strict=True)]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if describes(func, getattr(func, "__name__", "")):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-11-24: torch types it as a method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with enable_reentrant_dispatch():
            if _passes(func, args):
                return _passed(func, args, kwargs)
            args, kwargs = tree_map(_real, (args, kwargs))
            return func(*args, **kwargs)

    def __repr__(  # type: ignore[override]  # 2026-11-24: torch calls the argument otherwise
        self, *, tensor_contents: Any = None
    ) -> str:
        return repr(self.values())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.values().clone()


_INTO = {aten.index_put.default, aten.index_add.default}
_PASSED = {
    aten.slice_backward.default, aten.select_backward.default, aten.cat.default, aten.stack.default,
    aten.clone.default, aten._to_copy.default, aten.neg.default, aten._unsafe_view.default,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.sum.dim_IntList,
    aten._log_softmax_backward_data.default, aten.new_zeros.default, aten.add.Tensor, *_INTO,
}  # fmt: skip
"""Operators of the backward nodes between a loss and the logits, besides views, and sums of them.

Python code cannot call them on a ``LazyGradient``: its ``__torch_function__`` gives them values.
"""


def _real(x: Any) -> Any:
    return x.values() if isinstance(x, LazyGradient) else x


def _passes(func: Any, args: Any) -> bool:
    """True where the result of ``func`` is a gradient of logits that has the same parts."""
    if not (func.is_view or func in _PASSED):
        return False
    summed = args[:2] if func is aten.add.Tensor else args[:1]
    summed = [*summed, args[2]] if func is aten.index_put.default else summed
    summed = [*summed, args[3]] if func is aten.index_add.default else summed
    return all(isinstance(x, LazyGradient) and x.is_direct for x in tree_leaves(summed))


def _passed(func: Any, args: Any, kwargs: Any) -> Any:
    sources = [x for x in tree_leaves(args) if isinstance(x, LazyGradient)]
    given = {k: v for k, v in kwargs.items() if k != "device"}
    like = sources[0] if func in _INTO else func(*tree_map(without_values, args), **given)
    if func is aten.new_zeros.default:
        size, dtype, device = like.size(), like.dtype, sources[0].device
        return LazyGradient.of(
            like, lambda: torch.zeros(size, dtype=dtype, device=device), [], device
        )

    def compute() -> Tensor:
        values = tree_map(lambda x: x.peek() if isinstance(x, LazyGradient) else x, args)
        with torch.no_grad():
            result: Tensor = func(*values, **kwargs)
        return result

    parts = [part for source in sources for part in source.parts]
    return LazyGradient.of(like, compute, parts, sources[0].device)


def without_values(x: Any) -> Any:
    """A tensor on the device ``meta``, to find the form of a result."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
