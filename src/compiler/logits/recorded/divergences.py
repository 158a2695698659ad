"""Divergences of two log-softmaxes, recorded: KL in both directions and Jensen-Shannon.

A student's distributions are compared with a teacher's class by class, then summed. Each step is
recorded: log-probabilities plus a number, the log of the mixture, each ``kl_div`` and their sum.
Chosen rows of it, summed over all classes, end in ``linear_divergence``. The teacher is lazy as
well, or a real tensor of log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..deferred import Change
from ..lazy_gradient import apply_change
from ..lazy_logits import LazyLogits
from .rows import Handlers, HeadRows, WrongArguments, handler, rows_of


@dataclass(frozen=True, eq=False)
class Given:
    """Log-probabilities that are a real tensor.

    Attributes:
        tensor: (..., vocabulary), without a gradient.
        version: what it was when it was recorded.
    """

    tensor: Tensor
    version: int

    def values(self) -> Tensor:
        """The tensor, unless it was written to since."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a divergence cannot be computed: the log-probabilities that logits are compared "
                "with were written to since. Write to a clone() of them, or use "
                "fusewright.optimize(model, logits='always')."
            )
        return self.tensor


Side = HeadRows | Given
"""One of the two distributions of each row."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Shifted(HeadRows):
    """Log-probabilities plus the number ``shift``."""

    shift: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixed(HeadRows):
    """The log of a mixture of two distributions, or the two stacked.

    Attributes:
        parts: both, and what was added to their log-probabilities; the first has the gradient.
    """

    parts: tuple[tuple[HeadRows, float], tuple[Side, float]]

    @property
    def shares(self) -> tuple[float, float]:
        """Of both in the mixture; what was added to a real tensor is that of the rest."""
        (_, a), (second, b) = self.parts
        return math.exp(a), -math.expm1(a) if isinstance(second, Given) else math.exp(b)

    def is_alike(self, other: Mixed) -> bool:
        """Whether another one mixes the same distributions, in equal shares."""
        (first, a), (second, b) = self.parts
        (other_first, other_a), (other_second, other_b) = other.parts
        is_equal = first.is_same(other_first) and _is_same(second, other_second)
        return is_equal and (a, b) == (other_a, other_b)


@dataclass(frozen=True, eq=False, kw_only=True)
class Divergence(HeadRows):
    """Sums of ``exp(target) * (target - input)``, class by class.

    ``index`` counts the rows of both distributions.

    Attributes:
        first: the one that has the gradient.
        second: the other.
        terms: ``"forward"``, KL(second || first); ``"reverse"``, KL(first || second); ``"first"``
            and ``"second"``, KL(... || mixture) -> its weight in the sum.
        mixture: of first and second, or None.
    """

    first: HeadRows
    second: Side
    terms: Mapping[str, float]
    mixture: Mixed | None


def number(x: Any) -> float | None:
    """A number, also one in a tensor without dimensions; None for anything else."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if type(x) is not Tensor or x.dim() or not x.is_floating_point():
        return None
    return None if x.requires_grad and torch.is_grad_enabled() else x.item()


def _has_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _side(x: Any, like: Tensor, kind: str = "log_probs") -> tuple[Side, float]:
    """What is known of log-probabilities of the shape of ``like``, and what was added to them."""
    if x.shape != like.shape or x.device != like.device:
        raise WrongArguments
    if not isinstance(x, LazyLogits):
        if type(x) is not Tensor or not x.is_floating_point() or kind != "log_probs":
            raise WrongArguments
        if x.is_inference() or _has_gradient(x):
            raise WrongArguments
        return Given(x, x._version), 0.0
    rows = x.recorded
    if not x.is_pending or not isinstance(rows, HeadRows) or rows.weight != 1.0:
        raise WrongArguments
    if rows.kind != kind and not (isinstance(rows, Shifted) and kind == "log_probs"):
        raise WrongArguments
    return rows, rows.shift if isinstance(rows, Shifted) else 0.0


def _is_same(a: Side, b: Side) -> bool:
    if isinstance(a, Given) or isinstance(b, Given):
        return isinstance(a, Given) and isinstance(b, Given) and a.tensor is b.tensor
    return a.is_same(b)


def _leading(a: Any, b: Any) -> LazyLogits:
    """The one of two that gets the gradient; the other gets none."""
    lazy = [z for z in (a, b) if isinstance(z, LazyLogits)]
    trained = [z for z in lazy if _has_gradient(z)]
    if len(trained) > 1:
        raise WrongArguments
    return trained[0] if trained else lazy[0]


def _record(
    function: Callable[..., Tensor], of: Sequence[Any], shape: tuple[int, ...], recorded: HeadRows,
    is_linear: bool = False,
) -> LazyLogits:  # fmt: skip
    """What ``function`` makes of ``of``, some of them lazy."""
    given = [None if isinstance(x, LazyLogits) else Given(x, x._version) for x in of]
    tiny = [torch.zeros((1, 1), dtype=x.dtype, device=x.device) for x in of]
    dtype = function(*tiny).dtype  # under the autocast at hand

    def run(*values: Tensor) -> Tensor:
        lazy = iter(values)
        made = function(*(next(lazy) if g is None else g.values() for g in given))
        return made.to(dtype)

    change = Change(run, shape, dtype, recorded, is_linear=is_linear)
    return apply_change(change, *(x for x in of if isinstance(x, LazyLogits)))


# ------------------------------------------------------------------------------------- the mixture


def _add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    z, other = (a, b) if isinstance(a, LazyLogits) else (b, a)
    if alpha != 1 or not isinstance(z.recorded, HeadRows):
        return NotImplemented
    if isinstance(other, LazyLogits):
        return _added(z, other)
    rows = rows_of(z)
    if rows.kind != "log_probs" or rows.weight != 1.0 or not z.is_pending:
        return NotImplemented
    shift = number(other)
    if shift is None:
        return NotImplemented
    made = Shifted(
        rows.call, rows.inputs, _only(rows, "stack", "logaddexp", "kl_div"), rows.index, "shifted",
        rows.factor, shift=shift,
    )  # fmt: skip
    return _record(lambda t: t + shift, [z], tuple(z.shape), made, is_linear=True)


def _only(rows: HeadRows, *names: str) -> Handlers:
    """Some of the handlers: a stack is no rows that can be chosen, for one."""
    return {name: rows.handlers[name] for name in names}


def _mixed(a: Any, b: Any, kind: str) -> Mixed:
    leading = _leading(a, b)
    (rows, shift), other = _side(leading, a), _side(b if leading is a else a, a)
    assert isinstance(rows, HeadRows)
    handlers = {"logsumexp": _logsumexp} if kind == "stack" else _only(rows, "kl_div")
    return Mixed(rows.call, rows.inputs, handlers, None, kind, parts=((rows, shift), other))


def _stack(tensors: Any, dim: Any = 0) -> Any:
    if dim != 0 or len(tensors) != 2 or not all(isinstance(t, Tensor) for t in tensors):
        return NotImplemented
    if tensors[0].dtype != tensors[1].dtype:
        return NotImplemented
    rows = _mixed(tensors[0], tensors[1], "stack")
    shape = (2, *tensors[0].shape)
    return _record(lambda a, b: torch.stack([a, b]), tensors, shape, rows, is_linear=True)


@handler
def _logsumexp(z: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    rows = rows_of(z)
    if dim not in (0, (0,), [0]) or keepdim or not isinstance(rows, Mixed):
        return NotImplemented
    made = replace(rows, handlers=_only(rows.parts[0][0], "kl_div"), kind="mixture")
    return _record(lambda t: t.logsumexp(0), [z], tuple(z.shape[1:]), made)


def _logaddexp(a: Any, b: Any) -> Any:
    rows = _mixed(a, b, "mixture")
    return _record(torch.logaddexp, [a, b], tuple(a.shape), rows)


# ---------------------------------------------------------------------------------- class by class


def recorded_kl_div(made: Any, target: Any, log_target: bool, handlers: Handlers) -> LazyLogits:
    """``F.kl_div(made, target, reduction="none")``.

    Raises:
        WrongArguments: it is none of two recorded distributions.
    """
    if not isinstance(made, Tensor) or not isinstance(target, Tensor) or not made.dim():
        raise WrongArguments
    side, shift = _side(target, made, "log_probs" if log_target else "probs")
    if shift:
        raise WrongArguments
    mixture = made.recorded if isinstance(made, LazyLogits) else None
    if isinstance(mixture, Mixed) and mixture.kind == "mixture":
        name = _name_in_mixture(mixture, side)
        first, second = mixture.parts[0][0], side if name == "second" else mixture.parts[1][0]
        is_trained = _has_gradient(target)
        if not made.is_pending or is_trained != (_has_gradient(made) and name == "first"):
            raise WrongArguments  # the mixture, or the target, is a constant there
    else:
        mixture, (other, shift) = None, _side(made, made)
        if shift:
            raise WrongArguments
        name = "forward" if _leading(made, target) is made else "reverse"
        first, second = (other, side) if name == "forward" else (side, other)
    assert isinstance(first, HeadRows)
    rows = Divergence(
        first.call, first.inputs, handlers, None, "divergence", first=first, second=second,
        terms={name: 1.0}, mixture=mixture,
    )  # fmt: skip

    def formula(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(a, b, reduction="none", log_target=log_target)

    return _record(formula, [made, target], tuple(made.shape), rows)


def _name_in_mixture(mixture: Mixed, side: Side) -> str:
    (first, shift), (second, _) = mixture.parts
    if _is_same(first, side):
        return "first"
    if isinstance(side, Given) and isinstance(second, Given):
        # the mixture was made of a sum, which may be that of these and the rest's logarithm
        if shift < 0.0 and _is_sum(second.tensor, side.tensor, math.log(-math.expm1(shift))):
            return "second"
    elif _is_same(second, side):
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


def _added(z: LazyLogits, other: LazyLogits) -> Any:
    """The sum of two divergences of the same distributions."""
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
    if not is_mixed and not _is_same(a.second, b.second):
        return NotImplemented
    if _has_gradient(z) != _has_gradient(other):
        return NotImplemented
    terms = {
        name: a.weight * a.terms.get(name, 0.0) + b.weight * b.terms.get(name, 0.0)
        for name in (*a.terms, *b.terms)
    }
    second = b.second if "second" in b.terms else a.second
    rows = replace(a, second=second, terms=terms, mixture=a.mixture or b.mixture, weight=1.0)
    return _record(torch.add, [z, other], tuple(z.shape), rows, is_linear=True)


MIXTURES: Handlers = {
    "add": _add, "__add__": _add, "__radd__": _add, "stack": _stack, "logaddexp": _logaddexp,
}  # fmt: skip
"""What makes a mixture of distributions, or a sum of divergences, by the name of the function."""
