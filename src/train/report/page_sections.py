"""The tables and lists of the report page: from a run's facts to rows of text."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...report import Report
from ..recipe.written import without_effect
from . import run_facts
from .format import duration, memory, parameter_counts, resumption
from .run_facts import Facts, number

Rows = list[tuple[str, str]]

_COUNTS = {
    "samples": "rows", "sequences": "sequences", "tokens": "tokens",
    "trained_tokens": "trained tokens",
}  # fmt: skip
_TONES = {
    "finished": ("good", "finished"),
    "interrupted": ("warn", "stopped early"),
    "watchdog": ("bad", "stopped by the loss watchdog"),
    "nan": ("bad", "stopped: not a number"),
    "disk full": ("bad", "stopped: the disk is full"),
}
_GAPS = ("refused", "missed")
MOST_ROWS = 60
"""Rows of the table of numbers, apart from those of validations."""


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row names it."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Ending:
    """How a run ended: ``tone`` is good, warn or bad."""

    tone: str
    label: str
    text: str


@dataclass(frozen=True)
class ShownCompletion:
    """A completion that was generated in training, and its rewards."""

    step: str
    prompt: str
    text: str
    rewards: str


@dataclass(frozen=True)
class ShownImage:
    """An image, as a data URL, and what it is for those who cannot see it."""

    url: str
    text: str


@dataclass(frozen=True)
class Rewrites:
    """The optimize report."""

    headline: str
    table: Table | None
    remarks: list[tuple[str, str, str]]
    gains: list[str]


def ending(facts: Facts) -> Ending:
    """How the run ended, and what results it left."""
    status = facts.text("status") or "unknown"
    tone, label = _TONES.get(status, ("warn", status))
    kind = "adapter" if facts.recipe.get("adapter") else "model"
    steps, planned = facts.number("steps"), facts.number("steps_planned")
    if status == "finished":
        reason = facts.text("reason").rstrip(".")
        early = reason and steps is not None and planned
        text = f"It ended after step {steps:,.0f} of {planned:,.0f}: {reason}." if early else ""
        return Ending(tone, label, text)
    sentences = []
    if steps is not None and planned and steps >= planned:
        sentences.append(
            f"All steps were done; the steps after training were interrupted{_by_signal(facts)}."
        )
    elif steps is not None and planned:
        sentences.append(f"It ended after step {steps:,.0f} of {planned:,.0f}{_by_signal(facts)}.")
    if facts.text("reason"):
        sentences.append(facts.text("reason").rstrip(".") + ".")
    if steps:
        sentences.append(f"The {kind} of the last complete step is saved and can be used.")
    if facts.text("checkpoint"):
        sentences.append(
            f"To resume from {facts.text('checkpoint')}, run the same recipe"
            f"{resumption(facts.recipe)}."
        )
    return Ending(tone, label, " ".join(sentences))


def _by_signal(facts: Facts) -> str:
    value = facts.number("signal")
    try:
        return "" if value is None else f", on {signal.Signals(int(value)).name}"
    except ValueError:
        return f", on signal {value:.0f}"


def problems(facts: Facts) -> list[str]:
    """Failures that did not end the run, and other things to notice."""
    lines = []
    check = facts.mapping("adapter_check")
    if check.get("exact") is False:
        lines.append(
            "The saved adapter is broken: plain PEFT gives other logits than the trained model."
        )
    for problem in facts.rows("problems"):
        if isinstance(problem, Mapping):
            lines.append(f"{problem.get('part', 'Something')} failed: {problem.get('error', '')}")
        else:
            lines.append(str(problem))
    return lines


def warnings(facts: Facts) -> list[str]:
    """Keys of the recipe that were subsumed or do not apply, and the run's warnings."""
    messages = without_effect(facts.recipe)
    for entry in facts.rows("warnings"):
        if isinstance(entry, Mapping):
            parts = (str(entry.get(k) or "") for k in ("key", "status", "note"))
            messages.append(": ".join(p for p in parts if p))
        else:
            messages.append(str(entry))
    return messages


def data(facts: Facts) -> tuple[Table | None, Rows]:
    """Counts of each set of rows as a table, and the others as a list."""
    sets: dict[str, dict[str, str]] = {}
    others: Rows = []
    for key, value in facts.mapping("data").items():
        count = number(value)
        text = str(value) if count is None or not math.isfinite(count) else f"{count:,.0f}"
        prefix, _, suffix = str(key).partition("_")
        if prefix == "test" and suffix.partition("_")[0].isdecimal():
            prefix, suffix = f"test {suffix.partition('_')[0]}", suffix.partition("_")[2]
        if suffix in _COUNTS:
            sets.setdefault(prefix, {})[suffix] = text
        else:
            others.append((str(key).replace("_", " "), text))
    if not sets:
        return None, others
    columns = [k for k in _COUNTS if any(k in s for s in sets.values())]
    rows = [(name, *(s.get(k, "-") for k in columns)) for name, s in sets.items()]
    head = ("set", *(_COUNTS[k] for k in columns))
    return Table("After dropping what cannot be trained on", head, rows), others


def model(facts: Facts) -> Rows:
    """The model and its parameters."""
    rows = [("base model", str(facts.recipe["base_model"]))] if "base_model" in facts.recipe else []
    if facts.recipe:
        rows.append(("method", facts.method))
    sizes = facts.mapping("parameters")
    trained, total = number(sizes.get("trained")), number(sizes.get("total"))
    if trained is not None and total:
        text = parameter_counts(trained, total, bool(facts.recipe.get("adapter")))
        rows.append(("parameters", text))
    check = facts.mapping("adapter_check")
    if check.get("exact") is True:
        text = "plain PEFT gives the same logits, bit for bit"
        difference = number(check.get("optimized_difference"))
        if difference:
            text += f"; the optimized model's differ by {difference:.1e} of the largest"
        rows.append(("saved adapter", text))
    return rows


def image(facts: Facts) -> ShownImage | None:
    """The image that the answers are about."""
    entry = facts.mapping("sample_image")
    url = str(entry.get("thumbnail") or "")
    if not url.startswith("data:image/jpeg;base64,"):  # run.json may be anybody's
        return None
    return ShownImage(url, f"The image that the question is about, {entry.get('name')}")


def completions(facts: Facts) -> list[ShownCompletion]:
    """Completions to look at, of the first generation and of the last one."""
    result = []
    for entry in facts.rows("completions"):
        if not isinstance(entry, Mapping):
            continue
        rewards = entry.get("rewards")
        by_name = rewards if isinstance(rewards, Mapping) else {}
        scores = [f"{name} {_figure(number(value))}" for name, value in by_name.items()]
        step, prompt, text = (str(entry.get(k) or "") for k in ("step", "prompt", "completion"))
        result.append(ShownCompletion(step, prompt, text, ", ".join(scores)))
    return result


def rewrites(facts: Facts) -> Rewrites | None:
    """The optimize report; None when the model was trained as it is."""
    entries = facts.mapping("optimize")
    if not entries:
        return None
    report = Report.from_dict(entries)
    head, *rows = report.table() or [()]
    idle = [n for i, n in enumerate(head) if n in _GAPS and all(r[i] == "0" for r in rows)]
    keep = [i for i, name in enumerate(head) if name not in idle]  # a phone has room for four
    never = f" (never {' or '.join(idle)})" if idle else ""
    caption = f"Rules, how often each was applied{never}, and its largest error against float64"
    cells = [tuple(row[i] for i in keep) for row in (head, *rows)]
    table = Table(caption, cells[0], cells[1:]) if rows else None
    return Rewrites(report.headline(), table, report.remarks(), report.gains())


def audit(facts: Facts) -> Table | None:
    """What the audit of the training found, what is wrong first; None without one."""
    findings = _findings(facts)
    rows = [
        tuple(str(f.get(name) or "") for name in ("check", "verdict", "reason"))
        for verdict in _VERDICTS
        for f in findings
        if f.get("verdict") == verdict
    ]
    return Table(audit_headline(facts), ("question", "answer", "found"), rows) if rows else None


def audit_headline(facts: Facts) -> str:
    """How many questions of the audit had which answer; empty without one."""
    findings = _findings(facts)
    counts = {v: [f for f in findings if f.get("verdict") == v] for v in _VERDICTS}
    parts = [f"{len(counts[v])} {words}" for v, words in _VERDICTS.items() if counts[v]]
    failed = ", ".join(str(f.get("check")) for f in counts["fail"])
    return ", ".join(parts) + (f" (failed: {failed})" if failed else "")


_VERDICTS = {"fail": "failed", "skipped": "not asked", "pass": "passed"}


def _findings(facts: Facts) -> list[Mapping[str, Any]]:
    findings = facts.mapping("audit").get("findings")
    entries = findings if isinstance(findings, list) else []
    return [f for f in entries if isinstance(f, Mapping)]


def resources(facts: Facts) -> Rows:
    """Memory: the measured peaks, and the plan."""
    rows = []
    for key, name in (
        ("loaded_rss_mb", "after loading"),
        ("peak_rss_mb", "peak"),
        ("peak_cuda_mb", "peak, GPU"),
    ):
        value = facts.number(key)
        if value:
            rows.append((name, memory(value)))
    plan = facts.mapping("optimize").get("memory")
    if plan:
        rows.append(("plan", str(plan)))
    return rows


def times(facts: Facts) -> list[tuple[str, str, str]]:
    """Each part of the run, its time, and its share in percent."""
    seconds = {str(k): number(v) for k, v in facts.mapping("seconds").items()}
    parts = {k: v for k, v in seconds.items() if v is not None and math.isfinite(v) and v >= 0}
    total = sum(parts.values())
    long = {k: v for k, v in parts.items() if v >= 0.5} or parts  # not the many that take no time
    return [(k, duration(v), f"{100 * v / total if total else 0:.1f}") for k, v in long.items()]


def use(facts: Facts) -> Rows:
    """Explanations, each with something to copy; none when nothing was trained."""
    if not facts.folder or not facts.number("steps"):
        return []
    rows = [
        (
            "With fusewright, in a terminal, in the folder of this page:",
            run_facts.commands(facts.recipe, bool(facts.images)),
        )
    ]
    code = run_facts.snippet(facts.recipe, ".", bool(facts.images), facts.stops)
    if code is not None:
        below = "PEFT" if facts.recipe.get("adapter") else "transformers"
        rows.append((f"With plain {below}, in Python, in the same folder:", code))
    return rows


def machine(facts: Facts) -> Rows:
    """Versions and the machine."""
    rows = [(str(k), str(v)) for k, v in facts.mapping("machine").items() if v is not None]
    return rows + [(str(k), str(v)) for k, v in facts.mapping("versions").items()]


def numbers(columns: Sequence[tuple[str, list[tuple[float, float]]]]) -> Table | None:
    """The curves as a table, of some ``MOST_ROWS`` steps where there are more."""
    values: list[dict[float, float]] = [dict(points) for _, points in columns]
    steps = sorted({step for points in values for step in points})
    if not steps:
        return None
    shown = steps
    if len(steps) > MOST_ROWS:  # evenly, and the few steps at which something else was logged
        stride = (len(steps) - 1) / (MOST_ROWS - 1)
        rare = {s for points in values if len(points) < MOST_ROWS / 2 for s in points}
        shown = sorted(rare | {steps[round(i * stride)] for i in range(MOST_ROWS)})
    rows = [(f"{s:,.0f}", *(_figure(points.get(s)) for points in values)) for s in shown]
    caption = "Logged figures" + (f", {len(shown)} of {len(steps):,} steps" * (shown != steps))
    return Table(caption, ("step", *(name for name, _ in columns)), rows)


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
