"""Whether the errors of gradients have a bias, whatever their size.

Rounding errs in both directions, so the signed mean of the errors over a gradient, over tensors and
over steps is near zero, or near what eager mode's is, which rounds most of the same values. A
kernel that truncates, or scales by slightly too little, is as near to the reference as any other in
each element, and still moves all weights in one direction. TRL's invariance tests look at the same
quantity, the mean of signed differences, next to the largest difference.

Two directions are tested, both relative to the mean size of the reference's elements: ``size``
(errors that agree with the sign of the reference: gradients that are too large or too small) and
``offset`` (errors of one sign: gradients that are rounded down, or up).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.tolerance import budget, unit

_ERRORS = 5.0
"""Standard errors that a mean may be from eager mode's; by chance once in two million times."""
_SUSPECT = 1.65
"""Standard errors from which on more steps are worth their time."""
_LEAST = 0.125
"""In units of rounding: a smaller bias is none."""
_SCALAR = 0.21
_SCALAR_MOST = 0.5
"""Standard deviation and maximum of the relative error of one rounded number, in its units. All
gradients of a step are multiplied by single numbers in fp32, such as the reciprocal of the tokens.
"""
_UNEVEN = 2.0
"""Few tokens have much of the gradient, so that this many of them tell no more than one."""
_PIECE = 1 << 22


@dataclass(frozen=True)
class Lean:
    """The signed mean errors of one tensor's gradient in one step; all relative.

    Attributes:
        size: mean of the errors times the reference's signs, over the mean of its absolute values.
        offset: mean of the errors over the same.
        eager_size: as ``size``, of eager mode.
        eager_offset: as ``offset``, of eager mode.
        rms: norm of the difference from eager mode over the reference's norm.
        elements: how many the mean is taken over.
    """

    size: float
    offset: float
    eager_size: float
    eager_offset: float
    rms: float
    elements: int


def lean(actual: Tensor, eager: Tensor | None, exact: Tensor) -> Lean | None:
    """The signed mean errors of a gradient and of eager mode's, of the same weights and tokens.

    All of one shape. ``exact`` is the reference in a higher precision; without ``eager``, in the
    precision of ``actual``, errors count as if eager mode had none. Returns None where a mean has
    no meaning: the reference is zero everywhere, or a value is not finite.
    """
    total = torch.zeros(7, dtype=torch.float64)
    flat = [t.detach().reshape(-1).split(_PIECE) for t in (actual, exact, exact)]
    if eager is not None:
        flat[1] = eager.detach().reshape(-1).split(_PIECE)
    for pieces in zip(*flat, strict=True):
        ours, plain, truth = (piece.to("cpu", torch.float64) for piece in pieces)
        error, eagers, sign = ours - truth, plain - truth, truth.sign()
        sums = (error @ sign, error.sum(), eagers @ sign, eagers.sum(), truth.abs().sum(),
                (ours - plain).square().sum(), truth.square().sum())  # fmt: skip
        total += torch.stack(sums)
    toward, off, eager_toward, eager_off, size, difference, square = total.tolist()
    if not size or not math.isfinite(toward + off + eager_toward + eager_off + size):
        return None
    return Lean(
        toward / size, off / size, eager_toward / size, eager_off / size,
        (difference / square) ** 0.5, exact.numel(),
    )  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of a parameter: its name without numbers of layers, experts and adapters' names."""
    short = re.sub(r"\.(default\.)?weight$", "", name)
    return re.sub(r"(^|.*\.)\d+\.", "", short)


@dataclass(frozen=True)
class Drift:
    """The mean bias of some tensors' gradients in one direction; all relative to their size.

    Attributes:
        kind: of the tensors (``kind_of``); empty: all of them.
        direction: ``"size"`` or ``"offset"``.
        bias: signed mean over tensors and steps.
        eager: that of eager mode.
        error: standard error of their difference.
        allowed: how far ``bias`` may be from ``eager``.
        least: up to which ``bias`` is none, or no more than that of eager mode.
    """

    kind: str
    direction: str
    bias: float
    eager: float
    error: float
    allowed: float
    least: float

    @property
    def exceeded(self) -> bool:
        """Whether the errors have a bias that neither chance nor eager mode explains."""
        return abs(self.bias - self.eager) > self.allowed and abs(self.bias) > self.least

    @property
    def is_suspect(self) -> bool:
        """Whether more steps could show a bias: chance makes one so large in one of ten."""
        off = abs(self.bias - self.eager)
        return off > _SUSPECT / _ERRORS * self.allowed and abs(self.bias) > self.least

    def text(self) -> str:
        """What was measured, as a clause."""
        return (
            f"the gradients of {self.kind or 'all tensors'} are "
            f"{_WORDS[self.direction, self.bias > 0]} by {abs(self.bias):.1e} of their size on "
            f"average (eager mode {self.eager:+.1e}, standard error {self.error:.1e})"
        )


_WORDS = {
    ("size", True): "too large", ("size", False): "too small",
    ("offset", True): "rounded up", ("offset", False): "rounded down",
}  # fmt: skip

Step = Mapping[str, Lean]
"""The leans of one step's gradients, by parameter."""


def drifts(steps: Sequence[Step], dtype: torch.dtype, tokens: int) -> list[Drift]:
    """The bias of gradients in both directions: of all tensors, then of each kind of them.

    Of fewer than two tensors nothing can be said, so that there may be none.

    Args:
        steps: one or more, each at the same weights in all of its gradients.
        dtype: in which the gradients are computed.
        tokens: that are trained in all steps together.
    """
    groups = {"": list(steps), **_by_kind(steps)}
    return [
        drift
        for kind, some in groups.items()
        for direction in ("size", "offset")
        if (drift := _drift(kind, direction, some, dtype, tokens)) is not None
    ]


def _by_kind(steps: Sequence[Step]) -> dict[str, list[Step]]:
    kinds: dict[str, list[dict[str, Lean]]] = defaultdict(lambda: [{} for _ in steps])
    for i, step in enumerate(steps):
        for name, each in step.items():
            kinds[kind_of(name)][i][name] = each
    return {kind: list(some) for kind, some in kinds.items()} if len(kinds) > 1 else {}


def _drift(
    kind: str, direction: str, steps: Sequence[Step], dtype: torch.dtype, tokens: int
) -> Drift | None:
    of_steps, variances = [], []
    for step in steps:
        leans = list(step.values())
        differences = [
            getattr(each, direction) - getattr(each, f"eager_{direction}") for each in leans
        ]
        if len(leans) > 1:
            of_steps.append(_mean(differences))
            independent = sum(each.rms**2 / each.elements for each in leans) / len(leans) ** 2
            variances.append(max(_standard_error(differences) ** 2, independent))
    if not of_steps:
        return None
    number = len(of_steps)
    every = [each for step in steps for each in step.values()]
    bias = _mean(getattr(each, direction) for each in every)
    eager = _mean(getattr(each, f"eager_{direction}") for each in every)
    # of tensors, by their spread; and of what they have in common, which that does not show: each
    # token's error is in all of them
    common = _mean(each.rms for each in every) * (_UNEVEN / max(1, tokens)) ** 0.5
    error = max(math.hypot(sum(variances) ** 0.5 / number, common), _standard_error(of_steps))
    scalar = 0.0
    if direction == "size":
        most = min(_ERRORS * _SCALAR / number**0.5, _SCALAR_MOST)
        scalar = most * unit(torch.promote_types(dtype, torch.float32))
    least = budget(abs(eager), _LEAST * unit(dtype))
    return Drift(kind, direction, bias, eager, error, _ERRORS * error + scalar, least)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
