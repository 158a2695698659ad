"""What was rewritten, what was not, and why: the result of ``explain(model)``."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Status = Literal["rewritten", "refused", "missed"]

THE_MODEL = "the model"
"""What the model itself is called, whose path is empty."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known about one rewrite in numbers; None where it was not measured.

    Attributes:
        error: relative rms error of the rewrite's outputs against fp64 (the worst output).
        grad_error: the same for the gradients.
        saved_before: bytes the original keeps for backward, per token.
        saved_after: bytes the rewrite keeps for backward, per token.
        moved_before: bytes the original's forward reads and writes, per token, each operation by
            itself (weights left out: they are read either way).
        moved_after: bytes the rewrite's forward reads and writes, per token, counted alike.
    """

    error: float | None = None
    grad_error: float | None = None
    saved_before: float | None = None
    saved_after: float | None = None
    moved_before: float | None = None
    moved_after: float | None = None

    def after(self, earlier: Iterable[Figures]) -> Figures:
        """The figures of a rewrite of rewrites: ``before`` is what the first original took."""
        figures = self
        for e in earlier:
            figures = replace(
                figures,
                saved_before=_shifted(figures.saved_before, e.saved_before, e.saved_after),
                moved_before=_shifted(figures.moved_before, e.moved_before, e.moved_after),
            )
        return figures


def _shifted(before: float | None, first: float | None, then: float | None) -> float | None:
    if before is None or first is None or then is None:
        return before
    return before + first - then


@dataclass(frozen=True)
class Site(Figures):
    """One formula at one place in the model, with its figures.

    Attributes:
        module: path of the module that holds the formula, as in ``model.named_modules()``.
        rule: name of the rule.
        op: name of the op that runs instead, or that would.
        status: ``"rewritten"``; ``"refused"`` (matched, but a check or the verification said no);
            ``"missed"`` (looks like the rule's formula, but no spelling matched).
        reason: why it was refused or missed; for a rewritten site a remark, or empty.
        formulas: how many formulas of its rule it joins (a rotary embedding of q and k joins two).
    """

    module: str
    rule: str
    op: str
    status: Status
    reason: str = ""
    formulas: int = 1


@dataclass(frozen=True)
class Bypass:
    """A module, by its path, that runs as it was, at least for some calls, and the reason.

    ``faster``: the reason is that these calls are too small to gain from a captured graph.
    """

    module: str
    reason: str
    faster: bool = False


@dataclass(frozen=True)
class Fallback:
    """An op whose kernel could not be compiled or launched in a call after its verification.

    It has computed that call in plain PyTorch, and does so from then on in this process, for all
    models. ``reason`` is the first line of the error.
    """

    op: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that ``optimize`` did to a model. Stable and public.

    Attributes:
        sites: every formula found, in the model's order.
        bypasses: modules that could not be captured, or whose calls were passed by, with reasons.
        regions: how many modules run a captured graph.
        graphs: how many distinct graphs were captured.
        codegen: what runs the nodes that no rule claimed, with the reason for the choice.
        memory: what the blocks keep for backward, and the predicted and measured peak.
        logits: what was computed of the logits in tiles, without making them, and how often.
        fallbacks: ops of this process that run in plain PyTorch, because their kernel failed.
        choices: how kernels were chosen in this process, for all of its models on such a device.
    """

    sites: tuple[Site, ...]
    bypasses: tuple[Bypass, ...] = ()
    regions: int = 0
    graphs: int = 0
    codegen: str = ""
    memory: str = ""
    logits: str = ""
    fallbacks: tuple[Fallback, ...] = ()
    choices: tuple[str, ...] = ()

    def by_rule(self) -> dict[str, int]:
        """Count the rewritten sites of each rule.

        A formula that was fused twice counts under both rules: a norm that became part of
        ``add_rms_norm`` is still a norm that was recognised.
        """
        return dict(Counter(s.rule for s in self.sites if s.status == "rewritten"))

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain, JSON-ready data."""
        return {**asdict(self), "by_rule": self.by_rule()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read what ``to_dict`` made, also with fewer or more entries than this version's."""
        sites = tuple(
            Site(**{**_NO_SITE, **_known(Site, entry)}) for entry in data.get("sites") or ()
        )
        bypasses = tuple(
            Bypass(str(b.get("module", "")), str(b.get("reason", "")), b.get("faster") is True)
            for b in data.get("bypasses") or ()
        )
        fallbacks = tuple(
            Fallback(str(f.get("op", "")), str(f.get("reason", "")))
            for f in data.get("fallbacks") or ()
        )
        texts = {"choices": tuple(map(str, data.get("choices") or ()))}
        lists = {"sites": sites, "bypasses": bypasses, "fallbacks": fallbacks, **texts}
        return cls(**{**_known(cls, data), **lists})

    def _sums(self, *names: str) -> list[float]:
        rewritten = [s for s in self.sites if s.status == "rewritten"]
        return [sum(getattr(s, name) or 0.0 for s in rewritten) for name in names]

    def gaps(self) -> tuple[Site, ...]:
        """The sites that were refused or missed."""
        return tuple(s for s in self.sites if s.status != "rewritten")

    def small(self) -> tuple[Bypass, ...]:
        """The modules that keep their original code in calls that are too small to gain."""
        return tuple(b for b in self.bypasses if b.faster)

    def headline(self) -> str:
        """How much was rewritten, in a line."""
        if not self.sites and not self.codegen:
            return "this model is not optimized"
        rewrites = _counted(sum(self.by_rule().values()), "rewrite")
        regions, graphs = _counted(self.regions, "region"), _counted(self.graphs, "graph")
        codegen = f", codegen {self.codegen}" if self.codegen else ""
        small = len({b.module for b in self.small()})
        others = f"; {_counted(small, 'module')} too small to gain in some calls" if small else ""
        return f"{rewrites} in {regions} ({graphs}){codegen}{others}"

    def table(self) -> list[tuple[str, ...]]:
        """The rules with their counts and largest errors, as text, below a head; or nothing."""
        return _table(self.sites)

    def remarks(self) -> list[tuple[str, str, str]]:
        """What does not run as a rewrite: ``(status, rule, where and why)``, equal reasons joined.

        A module inside one that failed at the same line of its code joins it, too. The status of a
        bypass is ``"runs as it was"``, that of a fallback ``"runs without its kernel"``, and their
        rule is empty.
        """
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for s in self.gaps():
            grouped.setdefault((s.status, s.rule, s.reason), []).append(s.module)
        for b, reason in _outermost_reasons(self.bypasses):
            grouped.setdefault(("runs as it was", "", reason), []).append(b.module)
        lines = [
            (status, rule, f"{_places(modules)}: {reason}")
            for (status, rule, reason), modules in grouped.items()
        ]
        return lines + [
            ("runs without its kernel", "", f"{f.op}: {f.reason}") for f in self.fallbacks
        ]

    def __str__(self) -> str:
        lines = [f"fusewright: {self.headline()}"]
        if table := self.table():
            lines += _aligned(table)
        elif self.regions:
            lines.append("  no formula was recognised")
        lines += [f"  {name} {text}" if name else f"  {text}" for name, text in self._notes()]
        for status, rule, text in self.remarks():
            lines.append(f"  {status}: {rule} in {text}" if rule else f"  {status}: {text}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        gaps = Counter(status for status, _, _ in self.remarks())
        remarks = "".join(f"; {status}: {count}" for status, count in gaps.items())
        return f"<Report: {self.headline()}{remarks}; print it for the table>"

    def _repr_html_(self) -> str:
        """What a notebook shows of it: the text of ``str`` with tables."""
        remarks = [(status, rule, text) for status, rule, text in self.remarks()]
        return (
            f"<p>fusewright: {html.escape(self.headline())}</p>{html_table(self.table())}"
            f"{html_table(self._notes(), head=False)}{html_table(remarks, head=False)}"
        )

    def _notes(self) -> list[tuple[str, str]]:
        """What is said below the table, with a name of each kind."""
        notes = [("", line) for line in self.gains()]
        about = (("memory", self.memory), ("logits", self.logits))
        notes += [(name, text) for name, text in about if text]
        notes += [("kernel:", choice) for choice in self.choices]
        return notes

    def gains(self) -> list[str]:
        """What the rewrites spare in memory and traffic, a line each."""
        lines = []
        before, after = self._sums("saved_before", "saved_after")
        if before:
            saved = f"{before / 1024:.1f} KiB per token before, {after / 1024:.1f} KiB after"
            lines.append(f"kept for backward by these formulas: {saved}")
        before, after = self._sums("moved_before", "moved_after")
        if before:
            moved = f"{before / 1024:.1f} KiB per token before, {after / 1024:.1f} KiB after"
            lines.append(f"read and written by their forward: {moved}")
        return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


_NO_SITE = {"module": "", "rule": "", "op": "", "status": "missed"}


def _known(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``data`` that ``kind`` has, as far as they are set."""
    names = {f.name for f in fields(kind)}
    return {k: v for k, v in data.items() if k in names and v is not None}


def _table(sites: tuple[Site, ...]) -> list[tuple[str, ...]]:
    rules = dict.fromkeys(s.rule for s in sites)
    if not rules:
        return []
    rows: list[tuple[str, ...]] = [
        ("rule", "rewritten", "refused", "missed", "error", "gradient error")
    ]
    for rule in rules:
        rule_sites = [s for s in sites if s.rule == rule]
        counts = Counter(s.status for s in rule_sites)
        rewritten = [s for s in rule_sites if s.status == "rewritten"]
        worst = max((s.error for s in rewritten if s.error is not None), default=None)
        grad = max((s.grad_error for s in rewritten if s.grad_error is not None), default=None)
        rows.append(
            (
                rule,
                *(str(counts[k]) for k in ("rewritten", "refused", "missed")),
                *("-" if e is None else f"{e:.1e}" for e in (worst, grad)),
            )
        )
    return rows


def html_table(rows: Sequence[tuple[str, ...]], head: bool = True) -> str:
    """Rows of text as an HTML table, the first of them as its ``head``; nothing without rows."""
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if head and i == 0 else "td"
        cells = (f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>' for cell in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]


def _outermost_reasons(bypasses: Iterable[Bypass]) -> Iterator[tuple[Bypass, str]]:
    """Each bypass with its reason, or with that of the outermost around it of the same cause."""
    seen: dict[tuple[str, Any], str] = {}
    for b in bypasses:  # in the model's order, so that the outermost comes first
        cause, path = _cause(b.reason), b.module.split(".")
        around = ((".".join(path[:depth]), cause) for depth in range(len(path) if b.module else 0))
        reason = next((seen[key] for key in around if key in seen), b.reason)
        seen.setdefault((b.module, cause), reason)
        yield b, reason


def _cause(reason: str) -> object:
    """What two reasons share that speak of one line of code, seen from two modules around it."""
    what, explained, _ = reason.partition(" Explanation: ")
    place = re.search(r"\(at ([^ )]+:\d+)", reason)
    return (what, place[1]) if explained and place else reason


def _places(modules: list[str]) -> str:
    names = list(dict.fromkeys(m or THE_MODEL for m in modules))
    inner = [n for n in names if any(n.startswith(f"{outer}.") for outer in names)]
    outer = [n for n in names if n not in inner]
    text = outer[0] if len(outer) == 1 else f"{outer[0]} and {len(outer) - 1} more"
    return (
        f"{text}, with {len(inner)} of {'its' if len(outer) == 1 else 'their'} parts"
        if inner
        else text
    )
