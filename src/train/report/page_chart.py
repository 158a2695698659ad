"""Curves for the report page: plain geometry, in thousandths of the plot's width and height.

The plot is stretched to whatever room there is, with lines of constant width, and the labels stand
beside it as text: so it is readable on a phone and on a wide screen, and needs no script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .format import Smooth

SIZE = 1000
"""The plot's width and height in its own units."""
MOST = 400
"""Points of a line: more than a screen has pixels for are thinned out."""
STRIPS = 100
"""Places of a plot that tell their values when they are pointed at."""
MANY = 25
"""From so many points on, a noisy curve also gets a smoothed one."""

Point = tuple[float, float]
"""A step and a value, which may be NaN or infinite."""


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend.
        points: in the order of their steps.
        smoothed: draw a running mean over it, when it is long.
        dots: draw the points themselves, for curves of few points.
    """

    name: str
    points: Sequence[Point]
    smoothed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Tick:
    """A place on an axis: ``at`` in percent from the left or the top, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A drawn line: ``path`` as in SVG, ``series`` from 0, ``faint`` below a smoothed one."""

    path: str
    series: int
    faint: bool = False


@dataclass(frozen=True)
class Strip:
    """A vertical strip that tells its values: ``left`` and ``width``, the text, and the marks."""

    left: float
    width: float
    text: str
    marks: tuple[tuple[int, float, float], ...]
    """``(series, x, y)`` of each value."""


@dataclass(frozen=True)
class Chart:
    """All that a template needs to draw a chart.

    Attributes:
        title: what it shows, with its unit.
        summary: the same in words, for those who cannot see it.
        legend: names of the curves, in their order.
        x: ticks of the steps.
        y: ticks of the values.
        lines: from back to front.
        dots: ``(series, x, y)``.
        lost: x of steps whose value is not a number.
        strips: from left to right.
    """

    title: str
    summary: str
    legend: tuple[str, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    dots: tuple[tuple[int, float, float], ...] = ()
    lost: tuple[float, ...] = ()
    strips: tuple[Strip, ...] = field(default=(), repr=False)


def chart(
    title: str,
    series: Sequence[Series],
    show: Callable[[float], str],
    from_zero: bool = True,
) -> Chart | None:
    """Lay out a chart; None when there is no point to draw.

    Args:
        title: with the unit.
        series: the curves; empty ones are left out.
        show: writes a value.
        from_zero: let the axis begin at 0.
    """
    series = [s for s in series if s.points]
    values = [y for s in series for _, y in s.points if math.isfinite(y)]
    steps = [x for s in series for x, _ in s.points]
    if not values:
        return None
    low, high, ys = _axis(min(0.0, *values) if from_zero else min(values), max(values), 4)
    first, last = min(steps), max(steps)
    span = (last - first) or 1.0
    _, _, xs = _axis(first, last, 5, whole=True)

    def place(point: Point) -> Point:
        x = (point[0] - first) / span if last > first else 0.5
        return x * SIZE, (high - point[1]) / (high - low) * SIZE

    return Chart(
        title,
        _summary(series, show),
        tuple(s.name for s in series),
        tuple(Tick(place((x, 0))[0] / 10, f"{x:,.0f}") for x in xs if first <= x <= last),
        tuple(Tick(place((first, y))[1] / 10, _label(y)) for y in ys),
        tuple(line for i, s in enumerate(series) for line in _lines(i, s, place)),
        tuple(
            _mark(i, place(p))
            for i, s in enumerate(series)
            for p in s.points
            if math.isfinite(p[1]) and (s.dots or len(s.points) == 1)
        ),
        tuple(
            sorted({_round(place((x, 0))[0]) for s in series for x, y in s.points if not _ok(y)})
        ),
        tuple(_strips(series, place, show)),
    )


def _label(value: float) -> str:
    """A tick's value, as short as it is exact."""
    if value and abs(value) < 1e-2:
        digits, _, power = f"{value:.6e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.12g}"


def _ok(value: float) -> bool:
    return math.isfinite(value)


def _round(value: float) -> float:
    return round(value, 1)


def _mark(index: int, at: Point) -> tuple[int, float, float]:
    return index, _round(at[0]), _round(at[1])


def _axis(
    low: float, high: float, ticks: int, whole: bool = False
) -> tuple[float, float, list[float]]:
    """Round limits around ``low`` and ``high``, and the ticks between them, in steps of 1, 2, 5."""
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if whole or low == 0 else (low * 0.9, high * 1.1)
        low, high = min(low, high), max(low, high)
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # one rounding for all, so that 3 x 0.1 is 0.3
    return begin * step, end * step, [float(f"{i * step:.12g}") for i in range(begin, end + 1)]


def _lines(index: int, series: Series, place: Callable[[Point], Point]) -> Iterator[Line]:
    points = list(series.points)
    smoothed = series.smoothed and len(points) >= MANY
    yield Line(_path(_thinned(points), place), index, faint=smoothed)
    if smoothed:
        mean, over = Smooth(), []
        for x, y in points:
            mean.add(y)
            over.append((x, mean.value))
        yield Line(_path(_thinned(over), place), index)


def _path(points: Sequence[Point], place: Callable[[Point], Point]) -> str:
    """An SVG path through the points, broken where a value is not a number."""
    parts, down = [], False
    for point in points:
        if not _ok(point[1]):
            down = False
            continue
        x, y = place(point)
        parts.append(f"{'L' if down else 'M'}{_round(x):g} {_round(y):g}")
        down = True
    return "".join(parts)


def _thinned(points: list[Point]) -> list[Point]:
    """At most ``MOST`` points: the lowest and the highest of each bucket, and what is lost."""
    if len(points) <= MOST:
        return points
    kept = []
    for bucket in _buckets(points, MOST // 2):
        good = [p for p in bucket if _ok(p[1])]
        ends = [min(good, key=lambda p: p[1]), max(good, key=lambda p: p[1])] if good else []
        lost = [p for p in bucket if not _ok(p[1])][:1]
        kept += sorted({*ends, *lost}, key=lambda p: p[0])
    return kept


def _buckets(points: Sequence[Point], number: int) -> Iterator[Sequence[Point]]:
    size = len(points) / min(number, len(points))
    for i in range(min(number, len(points))):
        yield points[round(i * size) : round((i + 1) * size)]


def _strips(
    series: Sequence[Series], place: Callable[[Point], Point], show: Callable[[float], str]
) -> Iterator[Strip]:
    """Strips side by side, each around one step."""
    steps = sorted({p[0] for s in series for p in s.points})
    centres = [bucket[-1][0] for bucket in _buckets([(x, 0.0) for x in steps], STRIPS)]
    known = [dict(s.points) for s in series]
    centres_at = [place((step, 0))[0] for step in centres]
    borders = [(a + b) / 2 for a, b in itertools.pairwise(centres_at)]
    edges = [0.0, *borders, float(SIZE)]
    for step, left, right in zip(centres, edges[:-1], edges[1:], strict=True):
        points = [(i, s.name, known[i][step]) for i, s in enumerate(series) if step in known[i]]
        words = ", ".join(f"{name} {show(y) if _ok(y) else y}" for _, name, y in points)
        marks = tuple(_mark(i, place((step, y))) for i, _, y in points if _ok(y))
        yield Strip(_round(left), _round(right - left), f"step {step:,.0f}: {words}", marks)


def _summary(series: Sequence[Series], show: Callable[[float], str]) -> str:
    """What the curves do, in a sentence each."""
    said = []
    for s in series:
        good = [p for p in s.points if _ok(p[1])]
        if not good:
            said.append(f"{s.name}: no value is a number.")
            continue
        (x0, y0), (x1, y1) = good[0], good[-1]
        lowest, highest = min(y for _, y in good), max(y for _, y in good)
        said.append(
            f"{s.name}: {show(y0)} at step {x0:,.0f}, {show(y1)} at step {x1:,.0f}; "
            f"between {show(lowest)} and {show(highest)}."
        )
    return " ".join(said)


# --- what preference methods measure -------------------------------------------------------------

MEASURED = (
    ("Accuracy", ("rewards/accuracies", "accuracy"), False),
    ("Margin of rewards", ("rewards/margins", "margin"), False),
    ("Rewards of answers", ("rewards/chosen", "rewards/rejected"), True),
    ("Log-probabilities of answers", ("logps/chosen", "logps/rejected"), True),
)
"""Titles, and the figures in each; last: whether curves are named by them."""


def measured(history: Callable[[str], Sequence[Point]]) -> Iterator[tuple[str, list[Series]]]:
    """The titles and curves of what is measured of answers, in training and in validation.

    Args:
        history: gives the points of a figure.
    """
    for title, keys, named in MEASURED:
        series = []
        for key in keys:
            of = f"{key.rpartition('/')[2]}, " if named else ""
            series.append(Series(f"{of}training", history(key), smoothed=True))
            series.append(Series(f"{of}validation", history(f"eval_{key}"), dots=True))
        yield title, series
