"""Logits that are computed when somebody reads them.

``outputs.logits`` of a training step is read by metrics and by custom losses, and by nobody else;
for a large vocabulary it is the largest tensor of the step. ``LazyLogits`` stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_METADATA = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "itemsize",
    "is_sparse", "is_quantized", "is_meta", "is_nested",
}  # fmt: skip
_DESCRIBING = {
    "size", "dim", "numel", "is_floating_point", "is_complex", "nelement", "ndimension", "__len__",
    "element_size", "get_device",
}  # fmt: skip


class LazyLogits(Tensor):
    """A tensor whose values are computed at the first use of them.

    Shape, dtype and device are known at once. Everything else (indexing, arithmetic, printing,
    ``detach``, ``numpy``) computes the values, with their autograd history, and keeps them.
    Casts to another dtype stay lazy, as mixed-precision wrappers cast every output.
    """

    _compute: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
    ) -> LazyLogits:
        """Make one; ``compute`` must return a tensor of this shape, dtype, device and need."""
        made: LazyLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        made._compute, made._made = compute, None
        return made

    def materialize(self) -> Tensor:
        """The values: computed now, or at the first call."""
        if self._made is None:
            self._made = self._compute()
        return self._made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func.__self__, "__name__", "") in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name in _DESCRIBING:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        first = args[0] if args else None
        if isinstance(first, LazyLogits):
            cast = _target_dtype(name, args[1:], kwargs or {})
            if cast is not None and first._made is None:
                return LazyLogits(
                    lambda: first.materialize().to(cast),
                    tuple(first.shape),
                    cast,
                    first.device,
                    first.requires_grad,
                )
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-11-24: torch types it as a method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(  # type: ignore[override]  # 2026-11-24: torch calls the argument otherwise
        self, *, tensor_contents: Any = None
    ) -> str:
        return repr(self.materialize())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().detach().clone()


def _real(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyLogits) else x


def _target_dtype(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype of a call that only casts, else None."""
    if name == "float" and not args:
        return torch.float32
    if name == "to" and not kwargs and len(args) == 1 and isinstance(args[0], torch.dtype):
        return args[0]
    return None
