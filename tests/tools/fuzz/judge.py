"""Judging what was observed of a step: eager, optimized, and in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.tolerance import EXCEEDS, FACTOR, errors, exceeded, unit

_NOISE = 0.5
"""Relative error of eager's result above which it is nothing but rounding."""

DRAWS = (12, 96, 480)
"""How many draws judge together what fewer have found too far away.

The errors of a whole model are heavy-tailed, and one draw's are a matter of luck, for eager as for
ours: a ReLU takes the one side or the other. Over many draws luck evens out, and the factor of the
budget needs no change. Each has weights of its own, for a vocabulary has few different rows.
"""

_PARTS = 4
"""Into how many parts many draws are divided, each compared for itself."""

EAGER_LIMITS = ("modified by an inplace operation", "is a view and is being modified inplace")
"""What autograd says of programs that eager cannot differentiate, and that ours may."""


@dataclass
class Failure:
    """How the optimized model differs from eager.

    Attributes:
        kind: ``"wrong value"``, ``"crash"``, ``"no error"``, ``"structure"``, ``"state"`` ...
        place: the step, and the result's name.
        detail: figures, or a traceback.
    """

    kind: str
    place: str
    detail: str


@dataclass
class Outcome:
    """What is observable of one step: results and gradients by name, and everything else."""

    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    trace: str = ""


def stacked(outcomes: list[Outcome]) -> Outcome:
    """The tensors of several steps, each as one; what is no tensor is the first one's."""
    first = next((o for o in outcomes if o.error), outcomes[0])
    if first.error:
        return first
    tensors = {
        name: None if t is None else torch.stack([o.tensors[name] for o in outcomes])  # type: ignore[misc]
        for name, t in first.tensors.items()
    }
    return Outcome(tensors, first.others)


def judge(place: str, eager: Outcome, ours: Outcome, oracle: Outcome) -> Failure | None:
    if eager.error is not None:
        if ours.error is None and not any(t in eager.trace for t in EAGER_LIMITS):
            return Failure("no error", place, f"eager raises {eager.error}\n{eager.trace}")
        return Failure("end", place, "")
    if ours.error is not None:
        return Failure("crash", place, ours.trace)
    for name in eager.others.keys() | ours.others.keys():
        a, b = ours.others.get(name), eager.others.get(name)
        if a != b:
            said = "differs" if name == "random state" else f"{a} instead of {b}"
            return Failure("state", f"{place}, {name}", said)
    if oracle.error is not None:
        return Failure("end", place, "")  # the fp64 form cannot run: nothing to judge by
    for name, b in eager.tensors.items():
        a, o = ours.tensors.get(name), oracle.tensors.get(name)
        if a is None and "or an error" in name:
            continue
        if (a is None) != (b is None):
            return Failure("structure", f"{place}, {name}", f"{a} instead of {b}")
        if a is None or b is None or o is None or torch.equal(a, b):
            continue
        if not b.is_floating_point():
            return Failure("wrong value", f"{place}, {name}", f"{a} instead of {b}")
        if "draws" in place:
            a, b, o = _without_overflow(a, b, o)
        elif not len(_without_overflow(a[None], b[None], o[None])[0]):
            continue
        problem = exceeded(a, b, o)
        if problem is None or _is_noise(a, b, o):
            continue
        if "draws" in place and problem.startswith("peak"):
            continue  # the largest of thousands: what is wrong shows in the mean, too
        kind = "too far" if EXCEEDS in problem else "structure"
        if kind == "too far" and "draws" in place:
            if f"{DRAWS[-1]} draws" in place and _is_luck(a, b, o):
                continue
            ours_far, eager_far = _distances(a, o), _distances(b, o)
            if ours_far.min() > 3 * eager_far.max():
                kind = "wrong value"  # no more draws are needed
        return Failure(kind, f"{place}, {name}", problem)
    return None


def _without_overflow(ours: Tensor, eager: Tensor, oracle: Tensor) -> tuple[Tensor, ...]:
    """The draws without those in which eager leaves the range of fp16 where ours stays in it.

    They say nothing: what is exact is in the range, and ours leaves it nowhere that eager does not.
    """
    finite = [torch.isfinite(t).reshape(len(t), -1) for t in (ours, eager, oracle)]
    leaves_more = (finite[1] & ~finite[0]).any(1)
    judged = (finite[0] == finite[1]).all(1) | leaves_more | ~finite[2].all(1)
    return ours[judged], eager[judged], oracle[judged]


def _is_noise(ours: Tensor, eager: Tensor, oracle: Tensor) -> bool:
    """Whether a result is nothing but rounding in eager, and is no larger in ours."""
    if ours.shape != eager.shape or not torch.isfinite(ours).all():
        return False
    return errors(eager, oracle).rms > _NOISE and bool(
        ours.double().norm() <= 3 * eager.double().norm() + 1e-30
    )


def _is_luck(ours: Tensor, eager: Tensor, oracle: Tensor) -> bool:
    """Whether a few of many draws outweigh the others, and as many of eager's as of ours.

    One ReLU that takes the other side does, and where attention is saturated, the errors of draws
    differ by a million: their rms is that of the worst few, and says nothing of the others. So
    draws are compared with draws in which nearly as much is lost: in each quarter of them, from the
    furthest to the nearest, ours are no further than the budget allows, in the geometric mean.
    """
    if not torch.isfinite(ours).all():
        return False
    far = [_distances(t, oracle) for t in (ours, eager)]
    order = torch.maximum(*far).argsort(descending=True)
    few = order[: len(order) // 20]
    further = int((far[0] > far[1])[few].sum())
    if 2 * further - len(few) > 3 * len(few) ** 0.5:
        return False
    slack = unit(eager.dtype) * _distances(torch.zeros_like(oracle), oracle) + 1e-300
    ratios = ((far[0] + slack) / (far[1] + slack)).log()
    return all(bool(part.mean() <= math.log(FACTOR)) for part in ratios[order].chunk(_PARTS))


def _distances(results: Tensor, oracle: Tensor) -> Tensor:
    """How far the result of each draw is from the exact one."""
    return (results.double() - oracle.double()).reshape(len(results), -1).norm(dim=1)
