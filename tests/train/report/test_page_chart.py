"""The curves of the report page, as geometry."""

from __future__ import annotations

import math
import re

import pytest

from fusewright.train.report.page import MOST, STRIPS, Series, chart


def three(value: float) -> str:
    return f"{value:.3f}"


def test_a_chart_is_to_scale() -> None:
    made = chart("x", [Series("a", [(0, 0.0), (50, 5.0), (100, 10.0)], dots=True)], three)
    assert made is not None
    assert made.lines[0].path == "M0 1000L500 500L1000 0"
    assert made.dots == ((0, 0.0, 1000.0), (0, 500.0, 500.0), (0, 1000.0, 0.0))
    assert [(t.at, t.label) for t in made.y] == [
        (100.0, "0"), (50.0, "5"), (0.0, "10"),
    ]  # fmt: skip
    assert [t.label for t in made.x] == ["0", "20", "40", "60", "80", "100"]
    assert made.summary == "a: 0.000 at step 0, 10.000 at step 100; between 0.000 and 10.000."
    assert [s.text for s in made.strips][1] == "step 50: a 5.000"
    assert sum(s.width for s in made.strips) == pytest.approx(1000)


def test_a_line_breaks_where_a_value_is_lost() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, math.inf)]
    made = chart("x", [Series("a", points)], three)
    assert made is not None
    assert made.lines[0].path.count("M") == 2
    assert made.lost == (500.0, 1000.0)


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    points = [(i, math.sin(i / 50) + (9.0 if i == 7777 else 0.0)) for i in range(20_000)]
    made = chart("x", [Series("a", points, smoothed=True)], three)
    assert made is not None
    faint, mean = made.lines
    assert faint.faint
    assert not mean.faint
    assert len(re.findall(r"[ML]", faint.path)) <= 1.5 * MOST
    top = min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", faint.path))
    highest, lowest = 10.0, made.y[0].at  # the axis ends at a round value above the peak
    assert top < 100 * (lowest - highest)
    assert len(made.strips) <= STRIPS


@pytest.mark.parametrize(
    "points",
    [[(3, 1.5)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 3e-9)], [(1, -2.0), (2, -2.0)],
     [(1, 1e30), (9, -1e30)], [(10**9, 1.0), (10**9 + 1, 2.0)]],
)  # fmt: skip
def test_odd_curves_stay_inside_the_plot(points: list[tuple[float, float]]) -> None:
    for from_zero in (True, False):
        made = chart("x", [Series("a", points, dots=True)], three, from_zero)
        assert made is not None
        assert len(made.y) >= 2
        for _, x, y in made.dots:
            assert 0 <= x <= 1000
            assert 0 <= y <= 1000
        labels = [t.label for t in made.y]
        assert len(set(labels)) == len(labels)


def test_no_chart_without_a_number() -> None:
    assert chart("x", [Series("a", []), Series("b", [(1, math.nan)])], three) is None
