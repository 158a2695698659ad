"""The functions of logits that end in tiles: losses, entropies, means, and single logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.loss.linear_cross_entropy import linear_cross_entropy
from ..head_parts import Operands
from ..lazy_logits import LazyLogits
from .arguments import WrongArguments
from .choices import CHOICES
from .in_tiles import Tiled, compute
from .measures import flat_rows, mean_logit, measure, weighted_sum, wide
from .programs import COMPARISONS
from .rows import Handlers, handler, is_last, require_kind, result_dtype, rows_of
from .scalings import SCALINGS
from .single import SINGLE
from .together import Measures

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
