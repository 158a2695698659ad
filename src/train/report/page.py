"""The report page of a run: ``report.html``, one file that needs nothing else.

It holds its own style and its curves as SVG, runs no script and fetches nothing (its content
security policy forbids both, whatever a model may have answered). It is readable on a phone, in the
dark and on paper. Every entry of the run may be missing: a run that ended early has a page, too.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from ..output_files import write_atomically
from ..printable import printable
from ..recipe.written import Folded, folded
from . import page_sections as sections
from .format import duration, memory
from .page_chart import Chart, Series, chart, measured
from .run_facts import Facts

NAME = "report.html"

_CONTENTS = (
    ("curves", "Curves", "charts"), ("sample", "Answers", "sample"),
    ("completions", "Completions", "completions"), ("use", "Use it", "usage"),
    ("data", "Data and model", "data"), ("optimize", "Rewrites", "optimize"),
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
    """All that the template shows, as text; what is empty or None is left out."""

    title: str
    line: str
    ending: sections.Ending
    footer: str
    problems: list[str] = field(default_factory=list)
    headline: list[Headline] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    numbers: sections.Table | None = None
    sample: dict[str, str | None] | None = None
    completions: list[sections.ShownCompletion] = field(default_factory=list)
    usage: sections.Rows = field(default_factory=list)
    sets: sections.Table | None = None
    data: sections.Rows = field(default_factory=list)
    model: sections.Rows = field(default_factory=list)
    optimize: sections.Rewrites | None = None
    resources: sections.Rows = field(default_factory=list)
    times: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    recipe: Folded | None = None
    machine: sections.Rows = field(default_factory=list)

    @property
    def contents(self) -> list[tuple[str, str]]:
        """``(id, name)`` of the sections that there are."""
        return [(id_, name) for id_, name, attribute in _CONTENTS if getattr(self, attribute)]


def write(result: Any, folder: str | Path) -> Path:
    """Write the page of a run, whole or not at all.

    Args:
        result: a ``RunResult``, a mapping like ``run.json``, or the path of one or of its folder.
        folder: where ``report.html`` goes.

    Returns:
        The file.

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
        completions=sections.completions(facts),
        usage=usage,
        sets=sets,
        data=counts,
        model=sections.model(facts),
        optimize=sections.rewrites(facts),
        resources=sections.resources(facts),
        times=sections.times(facts),
        warnings=sections.warnings(facts),
        recipe=folded(facts.recipe) if facts.recipe else None,
        machine=sections.machine(facts),
    )


def _line(facts: Facts) -> str:
    """The line below the title."""
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


# --- the large figures ---------------------------------------------------------------------------


def _headline(facts: Facts) -> list[Headline]:
    found = (_loss(facts), _speed(facts), _memory(facts), _time(facts))
    return [f for f in found if f is not None]


def _loss(facts: Facts) -> Headline | None:
    figure = facts.figure
    validation, validated = f"Validation {figure}", f"val_{figure}"
    checks = [point for point in facts.history(f"eval_{figure}") if math.isfinite(point[1])]
    if facts.number(f"{validated}_after") is None and len(checks) > 1:  # stopped between two
        (_, begun), (step, at) = checks[0], checks[-1]
        return _fall(validation, begun, at, f"at step {step:,.0f}")
    for name, first, last in (
        (validation, f"{validated}_before", f"{validated}_after"),
        ("Training loss", "loss_first", "loss_last"),
    ):
        before, after = facts.number(first), facts.number(last)
        if before is not None and after is not None:
            return _fall(name, before, after, "over the run")
    only = facts.number(f"{validated}_before")
    return None if only is None else Headline(f"{validation} before", f"{only:.3f}", "")


def _fall(name: str, before: float, after: float, where: str) -> Headline:
    change = f"{after - before:+.3f}".replace("-", "−")
    return Headline(name, f"{before:.3f} → {after:.3f}", f"{change} {where}")


def _speed(facts: Facts) -> Headline | None:
    rate, step = facts.number("trained_tokens_per_s"), facts.number("median_step_s")
    if not rate:
        return None
    whole = facts.number("tokens_per_s")
    more = [f"{whole:,.0f} tokens/s in all"] if whole else []
    if step:
        more.append(f"a step takes {_seconds(step)}")
    shares = [share for _, share in facts.history("mfu")[1:] if share > 0]
    if shares:
        more.append(f"MFU about {statistics.median(shares):.1%}")
    return Headline("Trained tokens per second", f"{rate:,.0f}", ", ".join(more))


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
    known = [v for v in parts.values() if isinstance(v, int | float)]
    if not known:
        return None
    first = facts.number("first_step_s")
    more = f"the first step took {_seconds(first)}" if first else ""
    return Headline("Time", duration(sum(known)), more)


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:,.0f} ms"
    return f"{value:.1f} s" if value < 60 else duration(value)


# --- the curves ----------------------------------------------------------------------------------


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
        """The curves for a table: what the title says belongs to the name."""
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
    found = [_Curve(title if figure == "loss" else "Reward", judged, three, False, figure)]
    if figure != "loss":
        found.append(_Curve(title, [Series("training", facts.history("loss"), True)], three, False))
    for title, several in measured(facts.history):
        found.append(_Curve(title, several, three, False, title.lower()))
    for title, key, show in (
        ("Divergence from the reference model", "kl", three),
        ("Entropy of a token", "entropy", three),
        ("Tokens of a completion", "completions/mean_length", lambda v: f"{v:,.0f}"),
        ("Learning rate", "learning_rate", lambda v: f"{v:.2e}"),
        ("Gradient norm", "grad_norm", three),
        ("Trained tokens per second", "trained_tokens_per_s", lambda v: f"{v:,.0f}"),
    ):
        smoothed = key != "learning_rate"
        series = Series(title.lower(), facts.history(key), smoothed)
        found.append(_Curve(title, [series], show))
    used = facts.history("cuda_mb") or facts.history("rss_mb")
    gib = [(step, mib / 1024) for step, mib in used]
    found.append(_Curve("Memory in use, GiB", [Series("memory", gib)], lambda v: f"{v:.2f}"))
    return [
        _Curve(c.title, [s for s in c.series if s.points], c.show, c.from_zero, c.what)
        for c in found
        if any(s.points for s in c.series)
    ]
