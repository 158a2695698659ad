"""The error budget: how far a rewrite may be from the exact result.

Low precision rounds, and eager PyTorch rounds too. So the question is never "how close to
eager?" but "how close to the truth, compared with eager?": both are measured against the same
computation in fp64. The scheme is the one of Apple's cut-cross-entropy tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EXCEEDS = "exceeds"
"""The word in ``exceeded``'s sentence when the figures are the reason."""

PEAK = "peak"
"""The word beside it when the largest error is, and not the one of all elements together."""

FACTOR = 1.5
"""How many times eager's own error a rewrite may have."""


@dataclass(frozen=True)
class Errors:
    """The distance of a tensor from its fp64 oracle, relative to the oracle's size.

    Attributes:
        rms: Frobenius norm of the difference over the oracle's Frobenius norm.
        peak: largest absolute difference over the oracle's largest absolute value.
    """

    rms: float
    peak: float


def errors(actual: Tensor, oracle: Tensor) -> Errors:
    """Measure how far ``actual`` is from ``oracle`` (same shape, any dtypes).

    Values that are not finite are left out where both have them (a mean over no labels is nan);
    where only one has them, the error is infinite.
    """
    size = peak = off = off_peak = 0.0
    for exact, ours in zip(_pieces(oracle), _pieces(actual), strict=True):
        finite = torch.isfinite(exact)
        if not torch.equal(torch.isfinite(ours), finite):
            return Errors(float("inf"), float("inf"))
        if not bool(finite.all()):
            exact, ours = exact[finite], ours[finite]
        if not exact.numel():
            continue
        difference = ours - exact
        size += exact.square().sum().item()
        off += difference.square().sum().item()
        peak = max(peak, exact.abs().max().item())
        off_peak = max(off_peak, difference.abs().max().item())
    norm, distance = size**0.5, off**0.5
    return Errors(distance / norm if norm else distance, off_peak / peak if peak else off_peak)


def _pieces(t: Tensor, elements: int = 1 << 20) -> Iterator[Tensor]:
    """``t`` in fp64, a piece at a time: the gradient of a large weight is not copied whole."""
    real = torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()
    for piece in real.reshape(-1).split(elements):
        yield piece.to(torch.float64)


def unit(dtype: torch.dtype) -> float:
    """One unit of rounding of ``dtype``: the spacing of floats just above 1; 0 of integers."""
    has_rounding = dtype.is_floating_point or dtype.is_complex
    return torch.finfo(dtype).eps if has_rounding else 0.0


def exceeded(ours: Tensor, eager: Tensor, oracle: Tensor) -> str | None:
    """Say why ``ours`` is outside the budget, or return None when it is inside.

    Args:
        ours: the rewrite's result.
        eager: the original's result, in the same dtype and from the same inputs.
        oracle: the original's result computed in fp64.

    Returns:
        None, or a sentence with the figures.
    """
    if ours.shape != eager.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(eager.shape)}"
    if ours.dtype != eager.dtype:
        return f"dtype {ours.dtype} instead of {eager.dtype}"
    if not torch.equal(torch.isfinite(ours), torch.isfinite(eager)):
        return "it is finite where the original is not, or the other way round"
    mine, theirs, slack = errors(ours, oracle), errors(eager, oracle), unit(eager.dtype)
    for name, a, b in (("rms", mine.rms, theirs.rms), (PEAK, mine.peak, theirs.peak)):
        if not a <= FACTOR * b + slack:
            return f"{name} error {a:.2e} {EXCEEDS} {FACTOR} x eager's {b:.2e} + {slack:.1e}"
    return None
