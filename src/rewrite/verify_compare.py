"""What two runs differ in: the reason why a rewrite is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from .tolerance import exceeded
from .verify_runs import KINDS, STRIDES, UNWRITABLE, Outcome


def difference(
    ours: Outcome, theirs: Outcome, exact: Outcome, within_range: bool = False
) -> str | None:
    """Say in what the rewrite's run differs from the original's; None where it does not.

    Args:
        ours: the rewrite's.
        theirs: the original's.
        exact: the original's in fp64.
        within_range: compare only what is finite in the original and not below the smallest normal
            number of its dtype; elsewhere the rewrite may have anything.
    """
    return (
        _effects(ours, theirs)
        or _traits(ours, theirs)
        or _values(ours, theirs, exact, within_range)
    )


def _effects(ours: Outcome, theirs: Outcome) -> str | None:
    if len(ours.results[0]) != len(theirs.results[0]):
        return f"{len(ours.results[0])} outputs instead of {len(theirs.results[0])}"
    for kind, what in enumerate(KINDS):
        pairs = zip(ours.results[kind], theirs.results[kind], strict=True)
        for i, (a, b) in enumerate(pairs):
            if (a is None) == (b is None):
                continue
            which = "original" if a is None else "rewrite"
            if what == "input":
                return f"only the {which} writes to input {i}"
            return f"{what} {i}: only the {which} has it"
    if ours.random != theirs.random:
        return "the rewrite draws other random numbers than the original"
    return None


def _traits(ours: Outcome, theirs: Outcome) -> str | None:
    for a, b in zip(ours.results[0], theirs.results[0], strict=True):
        if a is not None and b is not None and (a.shape, a.dtype) != (b.shape, b.dtype):
            return None  # said with the values
    new = ours.traits - theirs.traits
    lost = {t for t in theirs.traits - ours.traits if not (t.endswith(UNWRITABLE) or STRIDES in t)}
    for which, found in (("rewrite", new), ("original", lost)):
        if found:
            return f"of the {which} only: {min(found)}"
    return None


def _values(ours: Outcome, theirs: Outcome, exact: Outcome, within_range: bool) -> str | None:
    for kind, what in enumerate(KINDS):
        # in fp64 one backward is enough: a second one has the same truth
        truth = exact.results[1 if "second" in what else kind]
        triples = zip(ours.results[kind], theirs.results[kind], truth, strict=True)
        for i, (a, b, o) in enumerate(triples):
            if a is None or b is None:
                continue
            if o is None:
                return f"{what} {i}: there is none in fp64"
            problem = _exceeded(a, b, o, within_range, ours.draws)
            if problem is not None:
                return f"{what} {i}: {problem}"
    return None


def _exceeded(
    ours: Tensor, eager: Tensor, exact: Tensor, within_range: bool, draws: int
) -> str | None:
    if within_range and ours.shape == eager.shape and eager.is_floating_point():
        there = torch.isfinite(eager) & torch.isfinite(exact)
        if not bool(torch.isfinite(ours[there]).all()):
            return "it is not finite where the original is"
        ours, eager, exact = (_within(t, there, eager.dtype) for t in (ours, eager, exact))
        if draws > 1:
            ours, eager, exact = (_levelled(t, exact) for t in (ours, eager, exact))
    return exceeded(ours, eager, exact, draws)


def _within(t: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` with 0 where it is not to be compared, or has no relative precision in ``dtype``."""
    return torch.where(there & (t.abs() >= torch.finfo(dtype).smallest_normal), t, 0)


def _levelled(t: Tensor, exact: Tensor) -> Tensor:
    """``t`` (draws, ...) with each draw scaled to about one, by a power of two: that is exact.

    Else the draw with the largest number would be the only one that counts.
    """
    largest = exact.reshape(exact.shape[0], -1).abs().amax(1)
    exponent = torch.where(largest > 0, largest.log2().floor(), 0)
    scale = torch.exp2(-exponent).to(t.dtype)
    return t * scale.view(-1, *[1] * (t.dim() - 1))
