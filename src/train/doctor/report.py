"""``fusewright doctor``: run all checks, print their results, and the remedy for each gap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..terminal import Terminal, announce, say
from .child import CHECKS, ask
from .imports import NEEDED
from .result import RERUN, CheckResult

_SECONDS = 180
"""How long all checks may take together; they do where a disk is slow or a library hangs."""

_TITLES = {
    "Versions": ("packages",),
    "Machine": ("machine",),
    "Libraries": (
        *(f"import {module}" for module in NEEDED),
        "compiler",
        "Triton",
        "bitsandbytes",
        "attention",
        "communication",
    ),
    "Code generation": ("codegen",),
}
"""Title of a table -> the checks that it shows."""

_COLOURS = {
    "ok": "green",
    "missing": "yellow",
    "broken": "red",
    "unused": "dim",
    "unknown": "yellow",
}

_LEGEND = (
    "Triton, CPU: fusewright's kernel. ATen: fusewright's formula in PyTorch operators. reference: "
    "the model's own operations are kept."
)


@dataclass(frozen=True)
class Diagnosis:
    """The results of each check, and one row for each rewrite and op."""

    sections: dict[str, list[CheckResult]]
    rules: list[dict[str, str]] = field(default_factory=list)

    def gaps(self) -> list[CheckResult]:
        """What to mend: first what training needs, and no command twice."""
        gaps = [f for results in self.sections.values() for f in results if f.is_gap()]
        lines = {one.mend or f"{one.name}: {one.note}": one for one in reversed(gaps)}
        return sorted(reversed(lines.values()), key=lambda one: not one.needed)

    def can_train(self) -> bool:
        """Whether nothing is missing that training needs."""
        return not any(gap.needed for gap in self.gaps())

    def unknown(self) -> list[CheckResult]:
        """The checks that did not finish in time."""
        return [f for results in self.sections.values() for f in results if f.state == "unknown"]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``--json``."""
        sections = {name: [asdict(f) for f in results] for name, results in self.sections.items()}
        gaps = [asdict(gap) for gap in self.gaps()]
        return {**sections, "rules": self.rules, "gaps": gaps, "can_train": self.can_train()}


def run(as_json: bool = False, console: Console | None = None) -> int:
    """Run all checks and print the results, as JSON and nothing else with ``as_json``.

    The exit code is 1 if something that training needs is missing or broken. What is not known does
    not count.
    """
    announce("checking this machine: up to half a minute, longer where libraries load slowly")
    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        show(diagnosis, console or Terminal(highlight=False))
    return 0 if diagnosis.can_train() else 1


def diagnose() -> Diagnosis:
    """Run all checks. Nothing on the machine is changed."""
    raw = ask(list(CHECKS), _SECONDS)
    rows = raw.pop("rules")
    if rows and "rule" not in rows[0]:  # the ops could not be checked
        raw["codegen"] += rows
        rows = []
    sections = {name: [CheckResult.of(one) for one in records] for name, records in raw.items()}
    return Diagnosis(sections, rows)


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the tables, then the gaps with the commands that mend them."""
    for title, names in _TITLES.items():
        say(console, title)
        console.print(_table([f for name in names for f in diagnosis.sections[name]]))
    if diagnosis.rules:
        say(console, "Rewrites, and what runs each of them here")
        console.print(_rules(diagnosis.rules))
        say(console, f"{_LEGEND}\n")
    gaps, unknown = diagnosis.gaps(), diagnosis.unknown()
    if not gaps and not unknown:
        say(console, "no gaps: everything that this machine can use is installed and works")
    for gap in gaps:
        what = "training needs this" if gap.needed else "optional"
        notes = f": {gap.note}" if gap.note else ""
        say(console, f"{gap.name}: {gap.value} ({what}){notes}")
        if gap.mend:
            say(console, f"  mend: {gap.mend}")
    if unknown:
        say(console, f"not known: {', '.join(one.name for one in unknown)}; {RERUN}")


def _table(findings: Sequence[CheckResult]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("", "found", "state"):
        table.add_column(header, no_wrap=True)
    table.add_column("note", min_width=30)
    for one in findings:
        state = f"[{_COLOURS[one.state]}]{one.state}[/]"
        table.add_row(escape(one.name), escape(one.value), state, escape(one.note))
    return table


def _rules(rows: Sequence[dict[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("rewrite", "op", "float32", "bfloat16"):
        table.add_column(header, no_wrap=True)
    table.add_column("note", min_width=20)
    for row in rows:
        table.add_row(*(escape(row[k]) for k in ("rule", "op", "float32", "bfloat16", "note")))
    return table
