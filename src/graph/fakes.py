"""Fake tensors in place of example values: shapes and strides in numbers, no contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from ..kernels.cost import like


def fake(example: Any, size: Callable[[Any], Any]) -> Any:
    """``example`` (a tensor, a size, or several in tuples and lists) as fakes, in a fake mode."""
    # ``size`` gives a symbolic size its number

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return size(value) if isinstance(value, torch.SymInt) else value
        shape, strides = [size(s) for s in value.shape], [size(s) for s in value.stride()]
        if unpacks_itself(value):
            holder: Any = value
            names, context = holder.__tensor_flatten__()
            inner = {name: one(getattr(holder, name)) for name in names}
            return type(holder).__tensor_unflatten__(inner, context, shape, strides)
        return like(value, shape, strides)

    return tree_map(one, example)


def unpacks_itself(value: Any) -> bool:
    """Whether a tensor holds others, and has its own ``dequantize``: ``subclasses.py``."""
    own = getattr(type(value), "dequantize", None)
    return is_traceable_wrapper_subclass(value) and own is not Tensor.dequantize


def hint(s: Any) -> int:
    """The number that a symbolic size had when it was captured."""
    return s if type(s) is int else int(getattr(s.node, "hint", None) or 1)
