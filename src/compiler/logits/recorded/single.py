"""Single logits and log-probabilities: those of a target, and those of the top classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..head_parts import Operands
from ..lazy_logits import LazyLogits
from .in_tiles import Tiled, compute
from .measures import flat_rows, measure, picked
from .rows import Handlers, handler, is_last, logits_exist, remember_pick, require_kind, rows_of
from .together import Measures

_MOST_PICKED = 64
"""Columns of a gather, at most, that are computed one by one."""


@handler
def _gather(z: LazyLogits, dim: Any, index: Tensor, sparse_grad: bool = False) -> Any:
    return _at(z, dim, index, sparse_grad)


def _at(z: LazyLogits, dim: Any, index: Tensor, sparse: bool = False, is_top: bool = False) -> Any:
    """``gather``, of the highest logits of each row, in order, or of any."""
    kind = require_kind(z, "logits", "log_probs")
    if not is_last(z, dim) or sparse or not isinstance(index, Tensor):
        return NotImplemented
    if logits_exist(rows_of(z)):
        return NotImplemented
    if index.device.type == "cpu" and not _are_classes(index, z.shape[-1]):
        return NotImplemented  # it raises; a GPU's kernels say so later, as they do in eager mode
    if index.dtype is not torch.int64 or index.dim() != z.dim() or index.device != z.device:
        return NotImplemented
    columns = index.shape[-1]
    if index.shape[:-1] != z.shape[:-1] or not 0 < columns <= _MOST_PICKED:
        return NotImplemented
    flat = index.reshape(-1, columns)
    weight = rows_of(z).weight

    def tiled(o: Operands) -> Tensor:
        if kind == "log_probs" and columns == 1:
            return measure(o, "logprob", flat[:, 0]).unsqueeze(-1) * weight
        logits = picked(o, flat)
        if kind == "log_probs":
            logits = logits - measure(o, "logsumexp").unsqueeze(-1)
        return logits * weight

    def formula(values: Tensor) -> Tensor:
        return flat_rows(values).gather(-1, flat)

    name = "log-probabilities" if kind == "log_probs" else "single logits"
    is_one = kind == "log_probs" and columns == 1
    measures = Measures({"logprob": weight}, flat[:, 0]) if is_one else None
    result = compute(z, Tiled(name, tiled, formula, measures, (index,)))
    result = result.view(index.shape).to(z.dtype)
    remember_pick(rows_of(z), z.dtype, index, result, is_top)
    return result


def _are_classes(index: Tensor, count: int) -> bool:
    return not index.numel() or bool((index.min() >= 0) & (index.max() < count))


# ------------------------------------------------------------------------------------- top classes


def _constant(z: LazyLogits, name: str, output: str, **more: Any) -> Tensor:
    """Indices of classes, which have no gradient."""
    with torch.no_grad():
        return compute(z, Tiled(name, lambda o: measure(o, output, **more), _no_formula))


def _no_formula(values: Tensor) -> Tensor:
    raise NotImplementedError("indices have no gradient")


@handler
def _argmax(z: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    require_kind(z, "logits", "log_probs", "probs")
    if not is_last(z, dim) or rows_of(z).weight <= 0:
        return NotImplemented
    if logits_exist(rows_of(z)):
        return NotImplemented
    indices = _constant(z, "argmax", "argmax").view(*z.shape[:-1], 1)
    remember_pick(rows_of(z), z.dtype, indices, None, True)
    return indices if keepdim else indices.squeeze(-1)


@handler
def _max(z: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    require_kind(z, "logits", "log_probs")
    indices = _argmax(z, dim, True)
    if indices is NotImplemented:
        return NotImplemented
    values = _at(z, -1, indices, is_top=True)
    if values is NotImplemented:
        return NotImplemented
    if not keepdim:
        values, indices = values.squeeze(-1), indices.squeeze(-1)
    return torch.return_types.max((values, indices))  # type: ignore[attr-defined]


@handler
def _amax(z: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if torch.is_grad_enabled() and z.requires_grad:
        return NotImplemented  # it shares the gradient among equal logits
    maximum = _max(z, dim, keepdim)
    return NotImplemented if maximum is NotImplemented else maximum.values


@handler
def _topk(z: LazyLogits, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True) -> Any:
    # several log-probabilities of a row are a difference, and a target's is not: it may be the k-th
    require_kind(z, "logits")
    if not is_last(z, dim) or not largest:
        return NotImplemented
    if logits_exist(rows_of(z)):
        return NotImplemented
    if not isinstance(k, int) or not 0 < k <= min(z.shape[-1], _MOST_PICKED):
        return NotImplemented
    indices = _constant(z, "top classes", "topk_indices", top_k=k).view(*z.shape[:-1], k)
    values = _at(z, -1, indices, is_top=True)
    if values is NotImplemented:
        return NotImplemented
    # computed one by one, near ties may come in another order
    order = values.detach().argsort(dim=-1, descending=True, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    return torch.return_types.topk((values, indices))  # type: ignore[attr-defined]


SINGLE: Handlers = {
    "gather": _gather, "argmax": _argmax, "max": _max, "amax": _amax, "topk": _topk,
}  # fmt: skip
"""What gives single numbers of rows, by the name of the function."""
