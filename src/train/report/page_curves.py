"""The curves of the report page: what was logged and validated, over the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .page_chart import Chart, Series, chart
from .run_facts import Facts


@dataclass(frozen=True)
class Curve:
    """A chart with its title, and how its values are written.

    Attributes:
        title: of the chart.
        series: its curves.
        show: writes a value.
        from_zero: whether the axis begins at zero.
        what: the values are, for the names of columns in a table.
    """

    title: str
    series: list[Series]
    show: Callable[[float], str]
    from_zero: bool = True
    what: str = "loss"

    def lay_out(self) -> Chart | None:
        """The chart; None: there is nothing to draw."""
        return chart(self.title, self.series, self.show, self.from_zero)

    def columns(self) -> list[Series]:
        """The curves for a table: what the title says belongs to the name."""
        if len(self.series) == 1 and self.from_zero:
            return [Series(self.title, self.series[0].points)]
        return [Series(f"{s.name} {self.what}", s.points) for s in self.series]


def curves_of(facts: Facts) -> list[Curve]:
    """All curves that the run has points for, the most important ones first."""

    def three(value: float) -> str:
        return f"{value:.3f}"

    figure = facts.figure
    judged = [Series("training", facts.history(figure), smoothed=True)]
    judged += [Series(name, facts.history(k), dots=True) for k, name in facts.validations()]
    title = "Loss" if facts.task is not None else "Loss per trained token"
    found = [Curve(title if figure == "loss" else "Reward", judged, three, False, figure)]
    if figure != "loss":
        found.append(Curve(title, [Series("training", facts.history("loss"), True)], three, False))
    found += _of_preferences(facts)
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
        found.append(Curve(title, [series], show))
    used = facts.history("cuda_mb") or facts.history("rss_mb")
    gib = [(step, mib / 1024) for step, mib in used]
    found.append(Curve("Memory in use, GiB", [Series("memory", gib)], lambda v: f"{v:.2f}"))
    return [
        Curve(c.title, [s for s in c.series if s.points], c.show, c.from_zero, c.what)
        for c in found
        if any(s.points for s in c.series)
    ]


_MEASURED = (
    ("Accuracy", ("rewards/accuracies", "accuracy"), False),
    ("Margin of rewards", ("rewards/margins", "margin"), False),
    ("Rewards of answers", ("rewards/chosen", "rewards/rejected"), True),
    ("Log-probabilities of answers", ("logps/chosen", "logps/rejected"), True),
)
"""Titles, and the figures of preference methods in each; last: whether curves are named by them."""


def _of_preferences(facts: Facts) -> list[Curve]:
    """What preference methods measure of answers, in training and in validation."""
    found = []
    for title, keys, named in _MEASURED:
        series = []
        for key in keys:
            of = f"{key.rpartition('/')[2]}, " if named else ""
            series.append(Series(f"{of}training", facts.history(key), smoothed=True))
            series.append(Series(f"{of}validation", facts.history(f"eval_{key}"), dots=True))
        found.append(Curve(title, series, lambda v: f"{v:.3f}", False, title.lower()))
    return found
