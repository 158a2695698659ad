"""Rows of lazy logits are chosen, or their shape is changed: with an index, and no values."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..deferred import Change
from ..lazy_gradient import apply_change
from ..lazy_logits import LazyLogits
from .rows import Handlers, WrongArguments, handler, is_last, rows_of


def _chosen(z: LazyLogits, index: Tensor, function: Callable[..., Tensor], view: bool) -> Any:
    size = z.shape[-1]
    rows = replace(rows_of(z), index=index)
    strides = (*(s * size for s in index.stride()), 1) if view else None
    change = Change(function, (*index.shape, size), z.dtype, rows, is_view=view, strides=strides)
    return apply_change(change, z)


def _viewed(z: LazyLogits, function: Callable[[Tensor], Tensor]) -> Any:
    """What a view function makes of logits, if it leaves the last dimension alone."""
    index = rows_of(z).leading_index(z.shape)
    wide = index.unsqueeze(-1).expand(z.shape)
    view = function(wide)
    if not _is_wide(view, z):
        return NotImplemented
    return _chosen(z, view.select(-1, 0), function, True)


def _is_wide(found: Any, z: Tensor) -> bool:
    return (
        isinstance(found, Tensor) and found.dim() > 0 and found.shape[-1] == z.shape[-1]
        and (found.stride(-1) == 0 or z.shape[-1] == 1)
    )  # fmt: skip


@handler
def _getitem(z: LazyLogits, item: Any) -> Any:
    item = _as_it_is_now(item)
    items = item if isinstance(item, tuple) else (item,)
    if all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in items):
        return _viewed(z, lambda t: t[item])
    leading = _leading_items(items, z.dim() - 1)
    if leading is None:
        return NotImplemented
    index = rows_of(z).leading_index(z.shape)[leading]
    return _chosen(z, index, lambda t: t[item], False)


def _as_it_is_now(item: Any) -> Any:
    """An index that a later write to a mask, to a list or to a bound does not change."""
    if isinstance(item, Tensor):
        return item.detach().clone()
    if isinstance(item, (tuple, list)):
        return type(item)(map(_as_it_is_now, item)) if type(item) in (tuple, list) else item
    if isinstance(item, slice):
        ends = (item.start, item.stop, item.step)
        return slice(*(e if e is None else operator.index(e) for e in ends))
    return item


def _leading_items(items: tuple[Any, ...], leading: int) -> tuple[Any, ...] | None:
    """An index with tensors in it, if it is one of the leading dimensions only; else None."""
    if not items:
        return None
    whole = isinstance(items[-1], slice) and items[-1] == slice(None)
    if items[-1] is Ellipsis or (whole and sum(map(_dimensions, items)) == leading + 1):
        items = items[:-1]
    is_supported = all(
        i is None or isinstance(i, (int, slice, list))
        or (isinstance(i, Tensor) and i.dtype in (torch.bool, torch.int64))
        for i in items
    )  # fmt: skip
    return items if is_supported and sum(map(_dimensions, items)) <= leading else None


def _dimensions(item: Any) -> int:
    if isinstance(item, Tensor) and item.dtype is torch.bool:
        return item.dim()
    return 0 if item is None or item is Ellipsis else 1


def _dim(z: Tensor, dim: Any) -> int:
    """A leading dimension, counted from the front."""
    if not isinstance(dim, int) or not -z.dim() <= dim < z.dim() or is_last(z, dim):
        raise WrongArguments
    return dim % z.dim()


@handler
def _split(z: LazyLogits, split_size: Any, dim: int = 0) -> Any:
    dim, total = _dim(z, dim), z.shape[dim]
    if isinstance(split_size, int):
        if split_size < 1:
            return NotImplemented
        starts = range(0, max(total, 1), split_size)
        sizes = [min(split_size, total - s) for s in starts]
    else:
        sizes = list(split_size)
        if sum(sizes) != total or not all(isinstance(s, int) and s >= 0 for s in sizes):
            return NotImplemented
    return _pieces(z, sizes, dim)


@handler
def _chunk(z: LazyLogits, chunks: int, dim: int = 0) -> Any:
    if not isinstance(chunks, int) or chunks < 1:
        return NotImplemented
    dim = _dim(z, dim)
    sizes = [len(c) for c in torch.arange(z.shape[dim]).chunk(chunks)]
    return _pieces(z, sizes, dim)


def _pieces(z: LazyLogits, sizes: list[int], dim: int) -> tuple[Any, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        _viewed(z, functools.partial(torch.narrow, dim=dim, start=start, length=size))
        for start, size in zip(starts, sizes, strict=True)
    )


@handler
def _unbind(z: LazyLogits, dim: int = 0) -> Any:
    dim = _dim(z, dim)
    return tuple(
        _viewed(z, functools.partial(torch.select, dim=dim, index=i)) for i in range(z.shape[dim])
    )


@handler
def _select(z: LazyLogits, dim: int, index: int) -> Any:
    if not isinstance(index, int):
        return NotImplemented
    dim = _dim(z, dim)
    return _viewed(z, lambda t: t.select(dim, index))


@handler
def _narrow(z: LazyLogits, dim: int, start: int, length: int) -> Any:
    if not isinstance(start, int) or not isinstance(length, int):
        return NotImplemented
    dim = _dim(z, dim)
    return _viewed(z, lambda t: t.narrow(dim, start, length))


@handler
def _squeeze(z: LazyLogits, dim: Any) -> Any:
    dim = _dim(z, dim)
    return _viewed(z, lambda t: t.squeeze(dim))


@handler
def _unsqueeze(z: LazyLogits, dim: int) -> Any:
    if not isinstance(dim, int) or not -z.dim() - 1 <= dim <= z.dim():
        return NotImplemented
    dim = dim % (z.dim() + 1)
    return NotImplemented if dim == z.dim() else _viewed(z, lambda t: t.unsqueeze(dim))


def _shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    flat = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not all(isinstance(s, int) for s in flat):
        raise WrongArguments
    return tuple(flat)


@handler
def _view(z: LazyLogits, *shape: Any) -> Any:
    return _reshaped(z, _shape(shape), False)


@handler
def _reshape(z: LazyLogits, *shape: Any) -> Any:
    return _reshaped(z, _shape(shape), True)


def _reshaped(z: LazyLogits, shape: tuple[int, ...], copies: bool) -> Any:
    """``view``, and ``reshape`` where it is one or else copies."""
    index = rows_of(z).leading_index(z.shape)
    if not shape or shape[-1] not in (z.shape[-1], -1):
        return NotImplemented
    if shape[-1] == -1 and (-1 in shape[:-1] or prod(shape[:-1]) != index.numel()):
        return NotImplemented
    try:
        viewed = index.view(shape[:-1])
    except RuntimeError:
        if not copies:
            return NotImplemented  # it raises the same error
        return _chosen(z, index.reshape(shape[:-1]), lambda t: t.reshape(shape), False)
    return _chosen(z, viewed, lambda t: t.view(shape), True)


@handler
def _flatten(z: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = _dim(z, start_dim), _dim(z, end_dim)
    if start >= end:
        return NotImplemented
    shape = z.shape
    return _reshaped(z, (*shape[:start], -1, *shape[end + 1 :]), True)


@handler
def _contiguous(z: LazyLogits) -> Any:
    index = rows_of(z).leading_index(z.shape)
    if index.is_contiguous():
        return z
    return _chosen(z, index.contiguous(), Tensor.contiguous, False)


CHOICES: Handlers = {
    "__getitem__": _getitem, "split": _split, "chunk": _chunk, "unbind": _unbind,
    "select": _select, "narrow": _narrow, "squeeze": _squeeze, "unsqueeze": _unsqueeze,
    "view": _view, "reshape": _reshape, "flatten": _flatten, "contiguous": _contiguous,
}  # fmt: skip
"""What chooses rows, or changes their shape, by the name of the function."""
