"""The budget itself: 1.5 times eager's error and one unit of rounding, for each of two norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.kernels.tolerance import EXCEEDS, FACTOR, Errors, errors, exceeded, unit

from .faults import judged

EXACT = torch.ones(1000, dtype=torch.float64)


def _off(by: float) -> Tensor:
    return (EXACT + by).float()


@pytest.mark.parametrize(("times", "fits"), [(1.0, True), (1.49, True), (1.51, False), (2, False)])
def test_a_multiple_of_eagers_error(times: float, fits: bool) -> None:
    problem = exceeded(_off(0.01 * times), _off(0.01), EXACT)
    assert (problem is None) is fits
    assert fits or EXCEEDS in problem


@pytest.mark.parametrize(("units", "fits"), [(0.9, True), (1.1, False)])
def test_one_unit_of_rounding_beside_it(units: float, fits: bool) -> None:
    # what is exact in eager: every element is off by so many units of bfloat16's rounding
    ours = EXACT + units * unit(torch.bfloat16)
    eager = EXACT.bfloat16()
    assert FACTOR == 1.5
    assert errors(eager, EXACT).rms == 0
    mine = errors(ours, EXACT)
    assert (mine.rms <= unit(torch.bfloat16)) is fits
    assert (exceeded(_as(ours), eager, EXACT) is None) is fits


def _as(t: Tensor) -> Tensor:
    """``t`` rounded to bfloat16, up: away from the exact value."""
    rounded = t.bfloat16()
    return torch.where(rounded.double() < t, rounded + unit(torch.bfloat16), rounded)


@pytest.mark.parametrize(("off", "is_rounding"), [(1e-15, True), (1e-3, False)])
def test_rounding_in_float64_is_not_reported_as_a_fault(off: float, is_rounding: bool) -> None:
    problem = exceeded(EXACT + off, EXACT, EXACT)
    assert EXCEEDS in problem
    assert problem.startswith("float64 is what errors are measured against") is is_rounding


def test_one_element_that_is_far_off() -> None:
    # the rms error of a thousand elements does not show it
    ours = _off(0.01)
    ours[-1] += 0.02
    assert errors(ours, EXACT).rms < 1.5 * 0.01
    assert "peak error" in exceeded(ours, _off(0.01), EXACT)


def test_all_elements_a_little_off() -> None:
    # the peak error does not show it, because eager has one that is far off
    eager = _off(0.001)
    eager[0] += 1
    assert "rms error" in exceeded(_off(0.1), eager, EXACT)


def test_shape_and_dtype() -> None:
    assert exceeded(EXACT[None], EXACT, EXACT) == "shape (1, 1000) instead of (1000,)"
    assert exceeded(EXACT.float(), EXACT, EXACT) == "dtype torch.float32 instead of torch.float64"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_numbers_that_are_no_floats(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0, 1, 1, 0]).to(dtype)
    other = torch.tensor([0, 1, 1, 1]).to(dtype)
    assert exceeded(numbers, numbers, numbers) is None
    assert EXCEEDS in exceeded(other, numbers, numbers)
    assert unit(dtype) == (torch.finfo(dtype).eps if dtype.is_complex else 0)


def test_an_imaginary_part() -> None:
    numbers = torch.complex(torch.ones(4), torch.ones(4))
    assert EXCEEDS in exceeded(numbers.conj(), numbers, numbers)
    assert exceeded(numbers.conj(), numbers.conj().clone(), numbers.conj()) is None


def test_an_exact_zero() -> None:
    zero = torch.zeros(10)
    assert exceeded(zero, zero, zero.double()) is None
    assert exceeded(zero + 1e-8, zero, zero.double()) is None
    assert EXCEEDS in exceeded(zero + 1e-3, zero, zero.double())


def test_pieces_cover_everything() -> None:
    many = torch.ones((1 << 20) + 10)
    last = many.clone()
    last[-1] = 2
    found = errors(last, many.double())
    assert found.peak == 1.0
    assert found.rms == pytest.approx(many.numel() ** -0.5)


def test_values_that_are_not_finite_count_by_where_they_are() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert errors(nan, nan).rms == 0.0
    assert errors(torch.ones(2), nan).rms == float("inf")
    assert exceeded(torch.ones(2), nan, nan) is not None
    assert exceeded(nan, nan, nan) is None
    assert exceeded(nan * 2, nan, nan) is not None


def test_a_piece_without_a_finite_value_is_no_end() -> None:
    mostly = torch.full(((1 << 20) + 2,), torch.nan)
    mostly[-2:] = 1
    off = mostly.clone()
    off[-1] = 2
    assert errors(off, mostly.double()).peak == 1.0


def test_a_rewrite_a_little_worse_than_the_budget() -> None:
    # within a budget of six times eager's error, not of one and a half
    def worse(op: Any, *args: Any) -> Tensor:
        right = op(*args)
        noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
        return (right.double() * (1 + 2.2e-7 * noise.sign())).float()

    finding = judged("glu", worse)
    assert finding.status == "refused"
    assert "rms error" in finding.reason or "peak error" in finding.reason


@pytest.mark.parametrize(("last", "fits"), [(0.05, True), (1.0, False)])
def test_the_largest_errors_of_several_draws_are_averaged(last: float, fits: bool) -> None:
    """The largest of all draws would be that of a single one, in ours or in eager's."""
    exact = EXACT.repeat(16, 1)
    ours, eager = exact.clone(), exact.clone()
    ours[:, 0] += 0.03
    eager[:, 0] += 0.03
    ours[3, 0] = 1 + last
    problem = exceeded(ours.float(), eager.float(), exact, 16)
    assert (problem is None) is fits
    assert EXCEEDS in exceeded(ours.float(), eager.float(), exact)


def test_nothing_is_off_by_nothing() -> None:
    for nothing in (torch.empty(0), torch.full((3,), float("nan"))):
        assert errors(nothing, nothing.double()) == Errors(0, 0, 0)


def test_no_draw_is_off_by_more_than_twice_the_budget() -> None:
    exact = EXACT.repeat(64, 1)
    eager = exact.clone()
    eager[:, 0] += 0.01
    for last, fits in ((0.02, True), (0.04, False)):
        ours = eager.clone()
        ours[3, 0] = 1 + last
        problem = exceeded(ours.float(), eager.float(), exact, 64)
        assert (problem is None) is fits
        assert fits or "largest peak" in problem
