"""Divergences of two log-softmaxes, recorded: KL in both directions and Jensen-Shannon.

A student's distributions are compared with a teacher's class by class, then summed. Each step is
recorded: log-probabilities plus a number, the log of the mixture, each ``kl_div`` and their sum.
Chosen rows of it, summed over all classes, end in ``linear_divergence``. The teacher is lazy as
well, or a real tensor of log-probabilities.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lazy_logits import LazyLogits
from .arguments import WrongArguments, binding
from .distributions import (
    Divergence,
    Given,
    Mixed,
    Shifted,
    Side,
    has_gradient,
    is_same_side,
    leading,
    number,
    record,
    side_of,
)
from .rows import Handlers, HeadRows, handler, rows_of

# ------------------------------------------------------------------------------------- the mixture


@binding
def _add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    z, other = (input, other) if isinstance(input, LazyLogits) else (other, input)
    if alpha != 1 or not isinstance(z.recorded, HeadRows):
        return NotImplemented
    if isinstance(other, LazyLogits):
        return _added(z, other)
    rows = rows_of(z)
    if rows.kind != "log_probs" or rows.weight != 1.0 or not z.is_pending:
        return NotImplemented
    shift = number(other)
    if shift is None or not abs(shift) < _LARGEST_SHIFT:
        return NotImplemented
    shifted = Shifted(
        rows.call, rows.inputs, _only(rows, "stack", "logaddexp", "kl_div"), rows.index, "shifted",
        rows.factor, shift=shift,
    )  # fmt: skip
    return record(lambda t: t + shift, [z], tuple(z.shape), shifted, is_linear=True)


_LARGEST_SHIFT = 80.0
"""Of logarithms: the exponential of a larger one is no number of fp32."""


def _only(rows: HeadRows, *names: str) -> Handlers:
    """Some of the handlers: a stack is no rows that can be chosen, for one."""
    return {name: rows.handlers[name] for name in names}


def _mixed(a: Any, b: Any, kind: str) -> Mixed:
    z = leading(a, b)
    (rows, shift), other = side_of(z, z), side_of(b if z is a else a, z)
    assert isinstance(rows, HeadRows)
    handlers = {"logsumexp": _logsumexp} if kind == "stack" else _only(rows, "kl_div")
    return Mixed(rows.call, rows.inputs, handlers, None, kind, parts=((rows, shift), other))


@binding
def _stack(tensors: Any, dim: Any = 0) -> Any:
    if dim != 0 or len(tensors) != 2 or not all(isinstance(t, Tensor) for t in tensors):
        return NotImplemented
    if tensors[0].dtype != tensors[1].dtype:
        return NotImplemented
    rows = _mixed(tensors[0], tensors[1], "stack")
    shape = (2, *tensors[0].shape)
    return record(lambda a, b: torch.stack([a, b]), tensors, shape, rows, is_linear=True)


@handler
def _logsumexp(z: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    rows = rows_of(z)
    if dim not in (0, (0,), [0]) or keepdim or not isinstance(rows, Mixed):
        return NotImplemented
    mixture = replace(rows, handlers=_only(rows.parts[0][0], "kl_div"), kind="mixture")
    return record(lambda t: t.logsumexp(0), [z], tuple(z.shape[1:]), mixture)


@binding
def _logaddexp(input: Any, other: Any) -> Any:
    rows = _mixed(input, other, "mixture")
    return record(torch.logaddexp, [input, other], tuple(input.shape), rows)


# ---------------------------------------------------------------------------------- class by class


def recorded_kl_div(made: Any, target: Any, log_target: bool, handlers: Handlers) -> LazyLogits:
    """``F.kl_div(made, target, reduction="none")``; WrongArguments if they are not recorded."""
    if not isinstance(made, Tensor) or not isinstance(target, Tensor) or not made.dim():
        raise WrongArguments
    side, shift = side_of(target, made, "log_probs" if log_target else "probs")
    if shift:
        raise WrongArguments
    first: Side
    second: Side
    mixture = _mixture_of(made)
    if isinstance(made, LazyLogits) and mixture is not None:
        name = _name_in_mixture(mixture, side)
        first, second = mixture.parts[0][0], side if name == "second" else mixture.parts[1][0]
        is_trained = has_gradient(target)
        if not made.is_pending or is_trained != (has_gradient(made) and name == "first"):
            raise WrongArguments  # the mixture, or the target, is a constant there
    else:
        other, shift = side_of(made, made)
        if shift:
            raise WrongArguments
        name = "forward" if leading(made, target) is made else "reverse"
        first, second = (other, side) if name == "forward" else (side, other)
    assert isinstance(first, HeadRows)
    rows = Divergence(
        first.call, first.inputs, handlers, None, "divergence", first=first, second=second,
        terms={name: 1.0}, mixture=mixture,
    )  # fmt: skip

    def formula(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(a, b, reduction="none", log_target=log_target)

    return record(formula, [made, target], tuple(made.shape), rows)


def _mixture_of(made: Tensor) -> Mixed | None:
    rows = made.recorded if isinstance(made, LazyLogits) else None
    return rows if isinstance(rows, Mixed) and rows.kind == "mixture" else None


def _name_in_mixture(mixture: Mixed, side: Side) -> str:
    (first, shift), (second, _) = mixture.parts
    if is_same_side(first, side):
        return "first"
    if isinstance(side, Given) and isinstance(second, Given):
        # the mixture was made of a sum, which may be that of these and the rest's logarithm
        if shift < 0.0 and _is_sum(second.tensor, side.tensor, math.log(-math.expm1(shift))):
            return "second"
    elif is_same_side(second, side):
        return "second"
    raise WrongArguments


def _is_sum(total: Tensor, a: Tensor, b: float) -> bool:
    """Whether ``total`` is ``a + b``, but for rounding."""
    if total.dtype is not a.dtype:
        return False
    near = 4 * torch.finfo(a.dtype).eps
    with torch.no_grad():
        pairs = (t.reshape(-1, t.shape[-1]).split(_ROWS) for t in (total, a))
        return all(
            torch.allclose(x, y + b, rtol=near, atol=near * (1.0 - b))
            for x, y in zip(*pairs, strict=True)
        )


_ROWS = 64
"""Rows that are compared at once."""


def _added(
    z: LazyLogits, other: LazyLogits, weights: tuple[float, float] = (1.0, 1.0),
    function: Callable[..., Tensor] = torch.add,
) -> Any:  # fmt: skip
    """The sum of two divergences of the same distributions, weighted."""
    a, b = z.recorded, other.recorded
    if not isinstance(a, Divergence) or not isinstance(b, Divergence):
        return NotImplemented
    if not (z.is_pending and other.is_pending) or z.shape != other.shape or z.dtype != other.dtype:
        return NotImplemented
    if not a.first.is_same(b.first) or a.index is not b.index:
        return NotImplemented
    is_mixed = a.mixture is not None and b.mixture is not None
    if a.mixture is not None and b.mixture is not None and not a.mixture.is_alike(b.mixture):
        return NotImplemented
    if not is_mixed and not is_same_side(a.second, b.second):
        return NotImplemented
    if has_gradient(z) != has_gradient(other):
        return NotImplemented
    mine, others = a.weight * weights[0], b.weight * weights[1]
    terms = {
        name: mine * a.terms.get(name, 0.0) + others * b.terms.get(name, 0.0)
        for name in (*a.terms, *b.terms)
    }
    second = b.second if "second" in b.terms else a.second
    rows = replace(a, second=second, terms=terms, mixture=a.mixture or b.mixture, weight=1.0)
    return record(function, [z, other], tuple(z.shape), rows, is_linear=True)


@binding
def _lerp(input: Any, end: Any, weight: Any) -> Any:
    """The sum of two divergences, the second one with a weight, and the first with the rest."""
    if not isinstance(input, LazyLogits) or not isinstance(end, LazyLogits):
        return NotImplemented
    if not isinstance(weight, (int, float)) or not math.isfinite(weight):
        return NotImplemented
    return _added(input, end, (1.0 - weight, weight), functools.partial(torch.lerp, weight=weight))


MIXTURES: Handlers = {
    "add": _add, "__add__": _add, "__radd__": _add, "stack": _stack, "logaddexp": _logaddexp,
    "lerp": _lerp,
}  # fmt: skip
"""What makes a mixture of distributions, or a sum of divergences, by the name of the function."""
