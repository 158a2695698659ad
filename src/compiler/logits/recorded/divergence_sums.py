"""Divergences that are recorded, summed over all classes: they end in ``linear_divergence``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....kernels.loss.linear_divergence import linear_divergence, unsupported
from ..head_parts import Operands
from ..lazy_logits import LazyLogits
from .arguments import WrongArguments, binding
from .choices import CHOICES
from .distributions import Divergence, Given, number
from .divergences import MIXTURES, recorded_kl_div
from .in_tiles import Tiled, compute
from .measures import wide
from .rows import Handlers, HeadRows, handler, is_last, result_dtype
from .scalings import SCALINGS

_Second = tuple[Tensor, Tensor | None, Tensor | None]
"""Rows, weight and bias; or log-probabilities alone."""
_IGNORED = -100
_Part = tuple[str, float, float]
"""Kind, share of the teacher in its mixture, and weight in the sum."""


def _parts(rows: Divergence, dtype: torch.dtype) -> list[_Part]:
    """The sum as divergences that the op computes."""
    terms = {name: weight * rows.weight for name, weight in rows.terms.items()}
    parts = [
        (kind, 0.5, terms[name])
        for name, kind in (("forward", "forward_kl"), ("reverse", "reverse_kl"))
        if name in terms
    ]
    if "first" not in terms and "second" not in terms:
        return parts
    first, second = terms.get("first", 0.0), terms.get("second", 0.0)
    weight = first + second
    beta = second / weight if weight else 0.0
    # in the mixture both shares are rounded to the dtype, and so were their logarithms
    near = 4 * torch.finfo(dtype).eps
    if rows.mixture is None or not 0.0 < beta < 1.0:
        raise WrongArguments
    for share, exact in zip(rows.mixture.shares, (1.0 - beta, beta), strict=True):
        if not math.isclose(share, exact, rel_tol=near * (1.0 - math.log(exact))):
            raise WrongArguments
    return [*parts, ("jsd", beta, weight)]


def _temperature(rows: HeadRows) -> float:
    """What the projection is divided by; a soft cap or a scale that is learnt is something else."""
    head = rows.call.plan.head
    if head is None or head.softcap is not None or head.factor is not None:
        raise WrongArguments
    factor = head.scale * rows.factor
    if head.scale <= 0 or factor <= 0 or not rows.call.can_end_in_tiles(rows.inputs):
        raise WrongArguments
    return 1.0 / factor


def _operands(rows: HeadRows) -> Operands:
    head = rows.call.plan.head
    assert head is not None
    with torch.no_grad():
        return head.of(rows.inputs, rows.index, rows.factor)


def _selected(rows: HeadRows, index: Tensor | None) -> HeadRows:
    """``rows``, or those of them that an ``index`` chooses."""
    if index is None:
        return rows
    return replace(rows, index=index if rows.index is None else rows.index.reshape(-1)[index])


def _require_second(first: HeadRows, second: HeadRows) -> _Second:
    """The operands of the distribution that gets no gradient."""
    # the op has one temperature, and one autocast
    if not math.isclose(_temperature(first), _temperature(second), rel_tol=1e-9):
        raise WrongArguments
    if first.call.autocast != second.call.autocast:
        raise WrongArguments
    if any(isinstance(t, Tensor) and t.is_inference() for t in second.inputs):
        raise WrongArguments
    mine, other = _operands(first), _operands(second)
    with first.call.mode(False):
        if unsupported(*mine[:3], *other[:3]):
            raise WrongArguments
    return other.x, other.weight, other.bias


def _require_given(first: HeadRows, second: Given) -> _Second:
    """Log-probabilities in place of the operands, as the op takes them."""
    mine, values = _operands(first), second.values()
    operands = values.reshape(-1, values.shape[-1]), None, None
    if values.dtype is torch.float64 is not mine.x.dtype:
        raise WrongArguments
    with first.call.mode(False):
        if unsupported(*mine[:3], *operands):
            raise WrongArguments
    return operands


def _targets(second: Given, index: Tensor | None) -> Tensor | None:
    """What leaves out all rows but those of ``index``: no row of a real tensor is copied."""
    if index is None:
        return None
    values = second.tensor
    targets = index.new_full((values.numel() // values.shape[-1],), _IGNORED)
    return targets.index_fill_(0, index, 0)


def _each_row(z: LazyLogits, rows: Divergence) -> Tensor:
    """The divergence of each row, flat, in fp32 (fp64 for fp64)."""
    parts, temperature = _parts(rows, z.dtype), _temperature(rows.first)
    index = None if rows.index is None else rows.index.reshape(-1)
    if isinstance(rows.second, Given):
        first, targets = rows.first, _targets(rows.second, index)
        other = _require_given(first, rows.second)
    else:
        first, targets = _selected(rows.first, index), None
        other = _require_second(first, _selected(rows.second, index))

    def tiled(o: Operands) -> Tensor:
        terms = [
            linear_divergence(o.x, o.weight, o.bias, *other, targets, kind, beta, temperature)
            * weight
            for kind, beta, weight in parts
        ]
        total = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
        return total if targets is None else total[index]

    def formula(values: Tensor) -> Tensor:
        return wide(values).reshape(-1, values.shape[-1]).sum(-1)

    return compute(z, Tiled("divergence", tiled, formula), first)


def _dims(dim: Any) -> Any:
    return dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim


@handler
def _sum(z: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    rows, dim = z.recorded, _dims(dim)
    if not isinstance(rows, Divergence) or (dim is None and keepdim):
        return NotImplemented
    if dim is not None and not is_last(z, dim):
        return NotImplemented
    cast = result_dtype(lambda t: t.sum(dtype=dtype), z)
    each = _each_row(z, rows)
    if dim is None:
        return each.sum().to(cast)
    each = each.view(z.shape[:-1]).to(cast)
    return each.unsqueeze(-1) if keepdim else each


@handler
def _mean(z: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not z.numel():
        return NotImplemented
    cast = result_dtype(lambda t: t.mean(dtype=dtype), z)
    count = z.numel() if dim is None else z.shape[-1]
    total = _sum(z, dim, keepdim, dtype=torch.float64 if cast is torch.float64 else torch.float32)
    return NotImplemented if total is NotImplemented else (total / count).to(cast)


def _by_number(name: str) -> Callable[..., Any]:
    """A product or quotient with a number, also one in a tensor without dimensions."""

    @binding
    def scaled(input: Any, other: Any) -> Any:
        factors = [number(x) if not isinstance(x, LazyLogits) else x for x in (input, other)]
        if any(x is None for x in factors):
            return NotImplemented
        return SCALINGS[name](*factors)

    return scaled


_SCALES = (
    "div", "divide", "true_divide", "__truediv__", "mul", "multiply", "__mul__", "__rmul__",
)  # fmt: skip
_CASTS = ("to", "type_as", "float", "double", "half", "bfloat16", "neg", "negative", "__neg__")

_ELEMENTS: Handlers = {
    **CHOICES, **MIXTURES,
    **{name: _by_number(name) for name in _SCALES}, **{name: SCALINGS[name] for name in _CASTS},
    "detach": SCALINGS["detach"], "sum": _sum, "mean": _mean,
}  # fmt: skip


@binding
def _kl_div(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None,
    reduction: str = "mean", log_target: bool = False,
) -> Any:  # fmt: skip
    if size_average is not None or reduce is not None:
        return NotImplemented
    if reduction not in ("none", "sum", "mean", "batchmean"):
        return NotImplemented
    elements = recorded_kl_div(input, target, log_target, _ELEMENTS)
    if reduction == "none":
        return elements
    if reduction == "mean":
        return _mean(elements)
    total = _sum(elements)
    if reduction == "sum" or total is NotImplemented:
        return total
    return total / input.shape[0] if input.shape[0] else NotImplemented


DIVERGENCES: Handlers = {**MIXTURES, "kl_div": _kl_div}
"""What two recorded distributions are compared by, by the name of the function."""
