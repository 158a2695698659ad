"""Whether the errors of gradients have a bias, whatever their size.

Rounding errs in both directions, so over many tensors and steps the signed mean of the errors is
near zero: within its standard error, or within what eager mode errs in that direction. A kernel
that truncates, or scales by slightly too little, is as near to the reference as any other in each
element, and still moves all weights in one direction. TRL's invariance tests look at the same
quantity, the mean of signed differences, next to the largest difference.

Two directions are tested, both relative to the mean size of the reference's elements: ``size``
(errors that agree with the sign of the reference: gradients that are too large or too small) and
``offset`` (errors of one sign: gradients that are rounded down, or up).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rewrite.tolerance import FACTOR, unit

_ERRORS = 4.0
"""Standard errors that a mean may be from zero: by chance once in 16,000 times."""
_SCALAR = 0.21
"""Standard deviation of the relative error of one rounded number, in units of rounding. All
gradients of a step are multiplied by single numbers, such as the reciprocal of the tokens."""
_SCALAR_MOST = 0.5


@dataclass(frozen=True)
class Lean:
    """The signed mean error of one tensor's gradient in one step; all relative.

    Attributes:
        size: mean of the errors times the reference's signs, over the mean of its absolute values.
        offset: mean of the errors over the same.
        rms: norm of the errors over the reference's norm.
    """

    size: float
    offset: float
    rms: float


def lean(actual: Tensor, exact: Tensor) -> Lean | None:
    """The signed mean error of a gradient against the reference's; shapes are equal.

    None where that has no meaning: the reference is zero everywhere, or a value is not finite.
    """
    size = toward = off = squares = square = 0.0
    flat = zip(actual.reshape(-1).split(_PIECE), exact.reshape(-1).split(_PIECE), strict=True)
    for ours, truth in flat:
        truth = truth.detach().to(torch.float64)
        error = ours.detach().to(torch.float64) - truth
        size += float(truth.abs().sum())
        toward += float((error * truth.sign()).sum())
        off += float(error.sum())
        squares += float(error.square().sum())
        square += float(truth.square().sum())
    if not size or not math.isfinite(size + toward):
        return None
    return Lean(toward / size, off / size, (squares / square) ** 0.5)


_PIECE = 1 << 22

Step = Mapping[str, Lean]
"""The leans of one step's gradients, by parameter."""


@dataclass(frozen=True)
class Drift:
    """The mean bias in one direction; all relative to the size of the gradients.

    Attributes:
        direction: ``"size"`` or ``"offset"``.
        bias: signed mean over tensors and steps.
        eager: that of eager mode.
        error: standard error of ``bias``.
        allowed: how far from zero, and from ``eager``, it may be.
    """

    direction: str
    bias: float
    eager: float
    error: float
    allowed: float

    @property
    def exceeded(self) -> bool:
        """Whether the errors have a bias that neither chance nor eager mode explains."""
        return min(abs(self.bias), abs(self.bias - self.eager)) > self.allowed

    def text(self) -> str:
        """What was measured, as a clause."""
        return (
            f"the gradients are {_WORDS[self.direction, self.bias > 0]} by {abs(self.bias):.1e} "
            f"of their size on average (standard error {self.error:.1e}, eager mode "
            f"{self.eager:+.1e}, allowed {self.allowed:.1e})"
        )


_WORDS = {
    ("size", True): "too large", ("size", False): "too small",
    ("offset", True): "rounded up", ("offset", False): "rounded down",
}  # fmt: skip


def drifts(
    steps: Sequence[Step], eager: Sequence[Step], dtype: torch.dtype, tokens: int
) -> list[Drift]:
    """The bias of gradients in both directions; empty where fewer than two tensors have one.

    Args:
        steps: of what is judged, one or more; the weights of each step are the reference's.
        eager: the same steps in eager mode of the same precision; empty if there is none.
        dtype: in which the gradients are computed.
        tokens: that are trained in all steps together.
    """
    result = []
    for direction in ("size", "offset"):
        means, spread, rms = _means(steps, direction)
        if not means:
            continue
        eager_means, eager_spread, eager_rms = _means(eager, direction)
        bias, eager_bias = _mean(means), _mean(eager_means)
        # the mean over tensors, and what all tensors have in common, which their spread does not
        # show: errors of tokens, and of numbers that a whole step is multiplied by
        of_way = math.hypot(spread, rms / max(1, tokens) ** 0.5)
        of_eager = math.hypot(eager_spread, eager_rms / max(1, tokens) ** 0.5)
        error = max(of_way, of_eager, _standard_error(means))
        scalar = min(_ERRORS * _SCALAR / len(means) ** 0.5, _SCALAR_MOST) * unit(dtype)
        allowed = (FACTOR - 1) * abs(eager_bias) + _ERRORS * error + scalar
        result.append(Drift(direction, bias, eager_bias, error, allowed))
    return result


def _means(steps: Sequence[Step], direction: str) -> tuple[list[float], float, float]:
    """The mean of each step, the standard error that tensors tell, and the mean of ``rms``."""
    means, variances, rms = [], [], []
    for step in steps:
        values = [getattr(each, direction) for each in step.values()]
        if len(values) < 2:
            continue
        means.append(_mean(values))
        variances.append(_standard_error(values) ** 2)
        rms += [each.rms for each in step.values()]
    return means, sum(variances) ** 0.5 / max(1, len(means)), _mean(rms)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return (variance / len(values)) ** 0.5
