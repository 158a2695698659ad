"""The report page of a run: ``report.html``, a self-contained file.

It holds its own style and its curves as SVG, runs no script and fetches nothing (its content
security policy forbids both, whatever a model may have answered). It is readable on a phone, in the
dark and on paper. Every entry of the run may be missing: a run that ended early has a page, too.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from ..output_files import write_atomically
from ..printable import printable
from ..recipe.written import Folded, folded
from . import page_sections as sections
from .format import Smooth, change, duration, memory, rate
from .run_facts import Facts

# --- plots: plain geometry, in thousandths of the width and height -------------------------------
SIZE = 1000
"""The plot's width and height in its own units."""
MOST = 400
"""Points of a line: more than a screen has pixels for are thinned out."""
STRIPS = 100
"""Places of a plot that show their values on hover."""
MANY = 25
"""From so many points on, a noisy curve also gets a smoothed one."""

Point = tuple[float, float]
"""A step and a value, which may be NaN or infinite."""


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
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
    """A vertical strip that shows its values: ``left`` and ``width``, the text, and the marks."""

    left: float
    width: float
    text: str
    marks: tuple[tuple[int, float, float], ...]
    """``(series, x, y)`` of each value."""


@dataclass(frozen=True)
class Chart:
    """The data of a chart, for the template.

    Attributes:
        summary: the same in words, for those who cannot see it.
        dots: ``(series, x, y)``.
        lost: x of steps whose value is not a number.
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

    ``show`` formats a value; with ``from_zero`` the axis begins at 0.
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
    """At most ``MOST`` points: of each bucket the lowest, the highest, and one that is lost."""
    if len(points) <= MOST:
        return points
    thinned = []
    for bucket in _buckets(points, MOST // 2):
        good = [p for p in bucket if _ok(p[1])]
        ends = [min(good, key=lambda p: p[1]), max(good, key=lambda p: p[1])] if good else []
        lost = [p for p in bucket if not _ok(p[1])][:1]
        thinned += sorted({*ends, *lost}, key=lambda p: p[0])
    return thinned


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
    maps = [dict(s.points) for s in series]
    centres_at = [place((step, 0))[0] for step in centres]
    borders = [(a + b) / 2 for a, b in itertools.pairwise(centres_at)]
    edges = [0.0, *borders, float(SIZE)]
    for step, left, right in zip(centres, edges[:-1], edges[1:], strict=True):
        points = [(i, s.name, maps[i][step]) for i, s in enumerate(series) if step in maps[i]]
        words = ", ".join(f"{name} {show(y) if _ok(y) else y}" for _, name, y in points)
        marks = tuple(_mark(i, place((step, y))) for i, _, y in points if _ok(y))
        yield Strip(_round(left), _round(right - left), f"step {step:,.0f}: {words}", marks)


def _summary(series: Sequence[Series], show: Callable[[float], str]) -> str:
    sentences = []
    for s in series:
        good = [p for p in s.points if _ok(p[1])]
        if not good:
            sentences.append(f"{s.name}: no value is a number.")
            continue
        (x0, y0), (x1, y1) = good[0], good[-1]
        lowest, highest = min(y for _, y in good), max(y for _, y in good)
        sentences.append(
            f"{s.name}: {show(y0)} at step {x0:,.0f}, {show(y1)} at step {x1:,.0f}; "
            f"between {show(lowest)} and {show(highest)}."
        )
    return " ".join(sentences)


# --- figures of preference methods ---------------------------------------------------------------

MEASURED = (
    ("Accuracy", ("rewards/accuracies", "accuracy"), False),
    ("Margin of rewards", ("rewards/margins", "margin"), False),
    ("Rewards of answers", ("rewards/chosen", "rewards/rejected"), True),
    ("Log-probabilities of answers", ("logps/chosen", "logps/rejected"), True),
)
"""Titles, and the figures in each; last: whether curves are named by them."""


def measured(history: Callable[[str], Sequence[Point]]) -> Iterator[tuple[str, list[Series]]]:
    """The titles and curves of the figures of answers, in training and in validation.

    ``history`` returns the points of a figure.
    """
    for title, keys, by_figure in MEASURED:
        series = []
        for key in keys:
            of = f"{key.rpartition('/')[2]}, " if by_figure else ""
            series.append(Series(f"{of}training", history(key), smoothed=True))
            series.append(Series(f"{of}validation", history(f"eval_{key}"), dots=True))
        yield title, series


NAME = "report.html"

_CONTENTS = (
    ("curves", "Curves", "charts"), ("sample", "Answers", "sample"),
    ("completions", "Completions", "completions"), ("use", "Use it", "usage"),
    ("data", "Data and model", "data"), ("audit", "Audit", "audit"),
    ("optimize", "Rewrites", "optimize"),
    ("resources", "Memory and time", "resources"), ("keys", "Worth knowing", "warnings"),
    ("recipe", "Recipe", "recipe"), ("machine", "Versions", "machine"),
)  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """One of the large figures at the top."""

    name: str
    value: str
    more: str


@dataclass(frozen=True)
class Page:
    """The content of the template, as text; what is empty or None is left out."""

    title: str
    line: str
    ending: sections.Ending
    footer: str
    problems: list[str] = field(default_factory=list)
    headline: list[Headline] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    numbers: sections.Table | None = None
    sample: dict[str, str | None] | None = None
    image: sections.ShownImage | None = None
    completions: list[sections.ShownCompletion] = field(default_factory=list)
    usage: sections.Rows = field(default_factory=list)
    sets: sections.Table | None = None
    data: sections.Rows = field(default_factory=list)
    model: sections.Rows = field(default_factory=list)
    audit: sections.Table | None = None
    optimize: sections.Rewrites | None = None
    resources: sections.Rows = field(default_factory=list)
    times: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    recipe: Folded | None = None
    machine: sections.Rows = field(default_factory=list)

    @property
    def contents(self) -> list[tuple[str, str]]:
        """``(id, name)`` of the sections that are not empty."""
        return [(id_, name) for id_, name, attribute in _CONTENTS if getattr(self, attribute)]


def write(result: Any, folder: str | Path) -> Path:
    """Write the page of a run to ``report.html`` in ``folder``, whole or not at all.

    ``result`` is a ``RunResult``, a mapping like ``run.json``, or the path of one or of its folder.

    Raises:
        DataError: ``result`` is a path, and there is no record of a run.
        OSError: the file cannot be written.
    """
    path = Path(folder) / NAME
    write_atomically(path, render(Facts.of(result)), errors="replace")
    return path


def render(facts: Facts) -> str:
    """The page as HTML."""
    return _template().render(p=compose(facts))


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.j2")


def _breakable(name: str) -> Markup:
    """Let a long name break after its underscores."""
    return Markup("_<wbr>").join(escape(part) for part in printable(str(name)).split("_"))


def compose(facts: Facts) -> Page:
    """Gather what the page shows."""
    usage = sections.use(facts)  # it needs to know where the base model is
    facts = facts.published()
    curves = _curves(facts)
    sets, counts = sections.data(facts)
    sample = facts.mapping("sample")
    version = facts.mapping("versions").get("fusewright")
    return Page(
        title=f"{facts.base}, {facts.method}" if facts.recipe else "A training run",
        line=_line(facts),
        ending=sections.ending(facts),
        footer=f"Written by fusewright{f' {version}' if version else ''}. "
        "The same figures are in run.json.",
        problems=sections.problems(facts),
        headline=_headline(facts),
        charts=[c for c in (curve.lay_out() for curve in curves) if c is not None],
        numbers=sections.numbers([(s.name, [*s.points]) for c in curves for s in c.columns()]),
        sample={
            k: None if sample.get(k) is None else str(sample[k])
            for k in ("question", "before", "after")
        }
        if sample
        else None,
        image=sections.image(facts),
        completions=sections.completions(facts),
        usage=usage,
        sets=sets,
        data=counts,
        model=sections.model(facts),
        audit=sections.audit(facts),
        optimize=sections.rewrites(facts),
        resources=sections.resources(facts),
        times=sections.times(facts),
        warnings=sections.warnings(facts),
        recipe=folded(facts.recipe) if facts.recipe else None,
        machine=sections.machine(facts),
    )


def _line(facts: Facts) -> str:
    steps, planned = facts.number("steps"), facts.number("steps_planned")
    parts = []
    if steps is not None and planned:
        parts.append(f"{steps:,.0f} of {planned:,.0f} steps")
    resumed = facts.number("resumed_from")
    if resumed:
        parts.append(f"resumed at step {resumed:,.0f}")
    if facts.text("started"):
        started = facts.text("started").replace("T", " ").removesuffix("+00:00")[:16]
        parts.append(f"started {started} UTC")
    best = facts.number("best_step")
    if best:
        parts.append(f"the weights are those of step {best:,.0f}, the best checkpoint")
    if facts.folder:
        parts.append(PurePath(facts.folder).name)
    return " · ".join(parts)


# --- headlines -----------------------------------------------------------------------------------


def _headline(facts: Facts) -> list[Headline]:
    headlines = (_loss(facts), _speed(facts), _memory(facts), _time(facts))
    return [f for f in headlines if f is not None]


def _loss(facts: Facts) -> Headline | None:
    figure = facts.figure
    validation, validated = f"Validation {figure}", f"val_{figure}"
    checks = [point for point in facts.history(f"eval_{figure}") if math.isfinite(point[1])]
    if facts.number(f"{validated}_after") is None and len(checks) > 1:  # stopped between two
        (_, begun), (step, at) = checks[0], checks[-1]
        return _fall(validation, begun, at, f"at step {step:,.0f}")
    only, after = (facts.number(f"{validated}_{when}") for when in ("before", "after"))
    if only is not None and after is not None:
        return _fall(validation, only, after, "over the run")
    if (trained := facts.training_loss()) is not None:
        first, last, of = trained
        return _fall("Training loss", first, last, f"over the run ({of})")
    return None if only is None else Headline(f"{validation} before", f"{only:.3f}", "")


def _fall(name: str, before: float, after: float, where: str) -> Headline:
    difference = change(before, after).replace("-", "−")
    return Headline(name, f"{before:.3f} → {after:.3f}", f"{difference} {where}")


def _speed(facts: Facts) -> Headline | None:
    trained, step = facts.number("trained_tokens_per_s"), facts.number("median_step_s")
    if not trained:
        return None
    whole = facts.number("tokens_per_s")
    more = [f"{rate(whole)} tokens/s in all"] if whole else []
    if step:
        more.append(f"a step takes {_seconds(step)}")
    shares = [share for _, share in facts.history("mfu")[1:] if share > 0]
    if shares:
        more.append(f"MFU about {statistics.median(shares):.1%}")
    return Headline("Trained tokens per second", rate(trained), ", ".join(more))


def _memory(facts: Facts) -> Headline | None:
    gpu, peak = facts.number("peak_cuda_mb"), facts.number("peak_rss_mb")
    loaded = facts.number("loaded_rss_mb")
    if gpu:
        return Headline("Peak GPU memory", memory(gpu), f"{memory(peak)} of RAM" if peak else "")
    if not peak:
        return None
    more = f"{memory(loaded)} once the model was loaded" if loaded else ""
    return Headline("Peak memory", memory(peak), more)


def _time(facts: Facts) -> Headline | None:
    parts = facts.mapping("seconds")
    seconds = [v for v in parts.values() if isinstance(v, int | float)]
    if not seconds:
        return None
    first = facts.number("first_step_s")
    more = f"the first step took {_seconds(first)}" if first else ""
    return Headline("Time", duration(sum(seconds)), more)


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:,.0f} ms"
    return f"{value:.1f} s" if value < 60 else duration(value)


# --- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    title: str
    series: list[Series]
    show: Callable[[float], str]
    from_zero: bool = True
    what: str = "loss"

    def lay_out(self) -> Chart | None:
        return chart(self.title, self.series, self.show, self.from_zero)

    def columns(self) -> list[Series]:
        """The curves for a table, where the names include what the title says."""
        if len(self.series) == 1 and self.from_zero:
            return [Series(self.title, self.series[0].points)]
        return [Series(f"{s.name} {self.what}", s.points) for s in self.series]


def _curves(facts: Facts) -> list[_Curve]:
    def three(value: float) -> str:
        return f"{value:.3f}"

    figure = facts.figure
    judged = [Series("training", facts.history(figure), smoothed=True)]
    judged += [Series(name, facts.history(k), dots=True) for k, name in facts.validations()]
    title = "Loss" if facts.task is not None else "Loss per trained token"
    curves = [_Curve(title if figure == "loss" else "Reward", judged, three, False, figure)]
    if figure != "loss":
        curves.append(
            _Curve(title, [Series("training", facts.history("loss"), True)], three, False)
        )
    for title, several in measured(facts.history):
        curves.append(_Curve(title, several, three, False, title.lower()))
    for title, key, show in (
        ("Divergence from the reference model", "kl", three),
        ("Entropy of a token", "entropy", three),
        ("Tokens of a completion", "completions/mean_length", lambda v: f"{v:,.0f}"),
        ("Learning rate", "learning_rate", lambda v: f"{v:.2e}"),
        ("Gradient norm", "grad_norm", three),
        ("Trained tokens per second", "trained_tokens_per_s", rate),
    ):
        smoothed = key != "learning_rate"
        series = Series(title.lower(), facts.history(key), smoothed)
        curves.append(_Curve(title, [series], show))
    used = facts.history("cuda_mb") or facts.history("rss_mb")
    gib = [(step, mib / 1024) for step, mib in used]
    curves.append(_Curve("Memory in use, GiB", [Series("memory", gib)], lambda v: f"{v:.2f}"))
    return [
        _Curve(c.title, [s for s in c.series if s.points], c.show, c.from_zero, c.what)
        for c in curves
        if any(s.points for s in c.series)
    ]
