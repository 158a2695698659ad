"""The functions of logits that end in tiles: losses, entropies, means, and single logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.loss.linear_cross_entropy import linear_cross_entropy
from ..head_call import Operands
from ..lazy_logits import LazyLogits
from .choices import CHOICES
from .in_tiles import (
    Measures,
    Tiled,
    compute,
    flat_rows,
    mean_logit,
    measure,
    picked,
    weighted_sum,
    wide,
)
from .programs import COMPARISONS
from .rows import (
    Handlers,
    WrongArguments,
    handler,
    is_last,
    logits_exist,
    remember_pick,
    require_kind,
    result_dtype,
    rows_of,
)
from .scalings import SCALINGS

# ------------------------------------------------------------------------------------ single logits


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


# -------------------------------------------------------------------------------------- the target


@handler
def _cross_entropy(
    z: LazyLogits, target: Tensor, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    require_kind(z, "logits")
    if weight is not None or not _is_loss(z, target, size_average, reduce, reduction):
        return NotImplemented
    if not 0.0 <= label_smoothing <= 1.0 or (label_smoothing and reduction == "none"):
        return NotImplemented
    dtype = _loss_dtype(F.cross_entropy, z)

    def tiled(o: Operands) -> Tensor:
        if reduction == "none":
            return -measure(o, "logprob", target, ignore_index=ignore_index)
        if o.softcap is not None and o.temperature != 1.0:
            if label_smoothing:
                raise WrongArguments
            return _reduced(measure(o, "logprob", target, ignore_index=ignore_index), target,
                            ignore_index, reduction)  # fmt: skip
        x, scale = o.x, o.scale
        if isinstance(scale, Tensor):
            x, scale = (x * scale).to(x.dtype), 1.0
        return linear_cross_entropy(
            x, o.weight, o.bias, target, ignore_index, reduction, float(label_smoothing),
            o.softcap, scale / o.temperature,
        )  # fmt: skip

    def formula(values: Tensor) -> Tensor:
        return F.cross_entropy(
            wide(values), target, None, None, ignore_index, None, reduction, label_smoothing
        )

    return compute(z, Tiled("cross entropy", tiled, formula, given=(target,))).to(dtype)


@handler
def _nll_loss(
    z: LazyLogits, target: Tensor, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    require_kind(z, "log_probs")
    if weight is not None or not _is_loss(z, target, size_average, reduce, reduction):
        return NotImplemented
    factor, dtype = rows_of(z).weight, _loss_dtype(F.nll_loss, z)

    def tiled(o: Operands) -> Tensor:
        terms = measure(o, "logprob", target, ignore_index=ignore_index) * factor
        return -terms if reduction == "none" else _reduced(terms, target, ignore_index, reduction)

    def formula(values: Tensor) -> Tensor:
        return F.nll_loss(wide(values), target, None, None, ignore_index, None, reduction)

    return compute(z, Tiled("cross entropy", tiled, formula, given=(target,))).to(dtype)


def _loss_dtype(function: Callable[..., Tensor], z: LazyLogits) -> torch.dtype:
    target = torch.zeros(1, dtype=torch.int64, device=z.device)
    return result_dtype(lambda t: function(t, target), z)


def _reduced(logprob: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    total = -logprob.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def _is_loss(z: LazyLogits, target: Any, average: Any, reduce: Any, reduction: Any) -> bool:
    return (
        average is None and reduce is None and reduction in ("mean", "sum", "none")
        and z.dim() == 2 and isinstance(target, Tensor) and target.dtype is torch.int64
        and target.shape == z.shape[:1] and target.device == z.device
    )  # fmt: skip


# -------------------------------------------------------------------------------------- whole rows


def _of_rows(
    z: LazyLogits, name: str, tiled: Callable[[Operands], Tensor],
    formula: Callable[[Tensor], Tensor], keepdim: bool, dtype: torch.dtype,
    measures: Measures | None = None,
) -> Tensor:  # fmt: skip
    """One number per row."""
    result = compute(z, Tiled(name, tiled, lambda v: formula(flat_rows(v)), measures))
    result = result.view(z.shape[:-1]).to(dtype)
    return result.unsqueeze(-1) if keepdim else result


@handler
def _logsumexp(z: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    require_kind(z, "logits")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not is_last(z, dim):
        return NotImplemented
    dtype = result_dtype(lambda t: t.logsumexp(-1), z)
    tiled = functools.partial(measure, name="logsumexp")
    measures = Measures({"logsumexp": 1.0})
    return _of_rows(z, "log-sum-exp", tiled, lambda v: v.logsumexp(-1), keepdim, dtype, measures)


@handler
def _sum(z: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    kind = require_kind(z, "p_log_p", "p_z", "p_p", "log_probs")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not is_last(z, dim):
        return NotImplemented
    rows, size = rows_of(z), z.shape[-1]

    w = rows.weight
    weights = {
        "p_log_p": {"entropy": -w},
        "p_z": {"logsumexp": w, "entropy": -w},
        "p_p": {"sum_p2": w},
        "log_probs": {"logsumexp": -w * size, "mean_logit": w * size},
    }[kind]

    def tiled(o: Operands) -> Tensor:
        return weighted_sum(o, weights)

    cast = result_dtype(lambda t: t.sum(-1, dtype=dtype), z)
    name = {"p_p": "sum of squared probabilities", "log_probs": "sum of log-probabilities"}
    return _of_rows(
        z, name.get(kind, "entropy"), tiled, lambda v: v.sum(-1), keepdim, cast, Measures(weights)
    )


@handler
def _mean(z: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    require_kind(z, "logits", "log_probs")
    if z.numel() == 0:
        return NotImplemented
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if is_last(z, dim):
        return _row_means(z, keepdim, result_dtype(lambda t: t.mean(-1, dtype=dtype), z))
    if dim is not None or keepdim:
        return NotImplemented
    whole = result_dtype(lambda t: t.mean(dtype=dtype), z)
    return _row_means(z, False, wide(torch.empty(0, dtype=z.dtype)).dtype).mean().to(whole)


def _row_means(z: LazyLogits, keepdim: bool, dtype: torch.dtype) -> Tensor:
    rows, means = rows_of(z), functools.partial(torch.mean, dim=-1)
    if rows.kind == "logits":
        return _of_rows(
            z, "mean logit", lambda o: mean_logit(o) * rows.weight, means, keepdim, dtype
        )
    weights = {"logsumexp": -rows.weight, "mean_logit": rows.weight}

    def tiled(o: Operands) -> Tensor:
        return weighted_sum(o, weights)

    name = "mean log-probability"
    return _of_rows(z, name, tiled, means, keepdim, dtype, Measures(weights))


HANDLERS: Handlers = {
    **CHOICES, **SCALINGS, **COMPARISONS, **SINGLE,
    "cross_entropy": _cross_entropy, "nll_loss": _nll_loss, "logsumexp": _logsumexp, "sum": _sum,
    "mean": _mean,
}  # fmt: skip
"""What is recorded, and what is computed in tiles, by the name of the function."""
