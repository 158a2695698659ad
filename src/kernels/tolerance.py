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
"""The word in that sentence for the largest error, not the one of all elements together."""

FACTOR = 1.5
"""How many times eager's own error a rewrite may have."""

ROUNDING = 1000
"""Errors up to so many units of float64 are called rounding, not a fault."""

_IN_FLOAT64 = (
    "float64 is what errors are measured against: in it, only rewrites that round exactly as eager "
    "does are installed"
)


def budget(eager: float, slack: float) -> float:
    """How large an error may be, where eager's own is ``eager``."""
    return FACTOR * eager + slack


@dataclass
class Pooled:
    """Errors of several tensors, or of several draws of them, as if they were one.

    The error of few numbers is a matter of luck, for eager as for what is compared with it; that
    of many draws is not.
    """

    size: float = 0.0  # sum of squares of the oracle
    off: float = 0.0  # sum of squares of the difference

    def add(self, size: float, off: float) -> None:
        """Add the sums of squares of one more."""
        self.size, self.off = self.size + size, self.off + off

    @property
    def rms(self) -> float:
        """The norm of the difference over the oracle's; alone where that is zero."""
        return float(self.off**0.5 / (self.size**0.5 or 1.0))


@dataclass(frozen=True)
class Errors:
    """The distance of a tensor from its fp64 oracle, relative to the oracle's size."""

    rms: float  # Frobenius norm of the difference over the oracle's Frobenius norm
    peak: float  # largest difference over the oracle's largest value; root mean square over draws
    largest: float  # the largest difference of all draws, over the oracle's largest value


def errors(actual: Tensor, oracle: Tensor, draws: int = 1) -> Errors:
    """Measure how far ``actual`` is from ``oracle`` (same shape, any dtypes).

    Values that are not finite are left out where both have them (a mean over no labels is nan);
    where only one has them, the error is infinite. ``draws`` random draws are stacked along the
    first dimension. Where softmax is nearly sure of a class, their errors differ a hundredfold, and
    the largest of all is that of a single one: a matter of luck, for both.
    """
    pooled, peak, off_peaks, largest = Pooled(), 0.0, 0.0, 0.0
    parts = [(oracle, actual)]
    if draws > 1:
        parts = list(zip(oracle.unbind(), actual.unbind(), strict=True))
    for exact, ours in parts:
        off_peak = 0.0
        for each in zip(_pieces(exact), _pieces(ours), strict=True):
            sums = _sums(*each)
            if sums is None:
                return Errors(float("inf"), float("inf"), float("inf"))
            pooled.add(*sums[:2])
            peak, off_peak = max(peak, sums[2]), max(off_peak, sums[3])
        off_peaks, largest = off_peaks + off_peak**2, max(largest, off_peak)
    off_peak, scale = (off_peaks / len(parts)) ** 0.5, peak or 1.0
    return Errors(pooled.rms, off_peak / scale, largest / scale)


def _sums(exact: Tensor, ours: Tensor) -> tuple[float, float, float, float] | None:
    """Squares of ``exact`` and of the difference, then the largest of both; None: not finite."""
    finite = torch.isfinite(exact)
    if not torch.equal(torch.isfinite(ours), finite):
        return None
    if not bool(finite.all()):
        exact, ours = exact[finite], ours[finite]
    if not exact.numel():
        return 0.0, 0.0, 0.0, 0.0
    off = ours - exact
    squares = exact.square().sum().item(), off.square().sum().item()
    return *squares, exact.abs().max().item(), off.abs().max().item()


def _pieces(t: Tensor, elements: int = 1 << 20) -> Iterator[Tensor]:
    """``t`` in fp64, a piece at a time: the gradient of a large weight is not copied whole."""
    real = torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()
    for piece in real.reshape(-1).split(elements):
        yield piece.to(torch.float64)


def unit(dtype: torch.dtype) -> float:
    """One unit of rounding of ``dtype``: the spacing of floats just above 1; 0 of integers."""
    has_rounding = dtype.is_floating_point or dtype.is_complex
    return torch.finfo(dtype).eps if has_rounding else 0.0


def exceeded(ours: Tensor, eager: Tensor, oracle: Tensor, draws: int = 1) -> str | None:
    """Why ``ours`` is outside the budget, in a sentence with the figures; None when it is inside.

    ``eager`` is the original's result, in the same dtype and from the same inputs, ``oracle`` the
    one in fp64; ``draws`` are stacked as for ``errors``.
    """
    if ours.shape != eager.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(eager.shape)}"
    if ours.dtype != eager.dtype:
        return f"dtype {ours.dtype} instead of {eager.dtype}"
    if not torch.equal(torch.isfinite(ours), torch.isfinite(eager)):
        return "it is finite where the original is not, or the other way round"
    our_errors, eager_errors = errors(ours, oracle, draws), errors(eager, oracle, draws)
    slack = unit(eager.dtype)
    for name, a, b, factor in (
        ("rms", our_errors.rms, eager_errors.rms, FACTOR),
        (PEAK, our_errors.peak, eager_errors.peak, FACTOR),
        (
            f"largest {PEAK}",
            our_errors.largest,
            eager_errors.largest,
            FACTOR if draws == 1 else 2 * FACTOR,
        ),
    ):
        if not a <= factor * b + slack:
            text = f"{name} error {a:.2e} {EXCEEDS} {factor} x eager's {b:.2e} + {slack:.1e}"
            # eager computes the oracle itself there: it has no error that could be compared with
            rounds = eager.dtype is torch.float64 and a <= ROUNDING * slack
            return f"{_IN_FLOAT64} ({text})" if rounds else text
    return None
