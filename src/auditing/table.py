"""An audit in words: a line, rows of text, a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .checks import CHECKS
from .findings import Audit, Finding

_SUBJECTS = 3
"""Most subjects of a finding that a row names."""


def headline(findings: Iterable[Finding]) -> str:
    """How many questions had which answer, in a line."""
    verdicts = [f.verdict for f in findings]
    failed = verdicts.count("fail")
    return (
        f"audit: {f'{failed} failed, ' if failed else ''}"
        f"{verdicts.count('pass')} questions passed, {verdicts.count('skipped')} skipped"
    )


def rows(findings: Iterable[Finding]) -> list[tuple[str, str, str, str]]:
    """Verdict, question, what was found, and what to do; what is wrong comes first."""
    order = ("fail", "skipped", "pass")
    return [
        (f.verdict, f.check, _found(f), _advice(f) if f.verdict == "fail" else "")
        for f in sorted(findings, key=lambda f: order.index(f.verdict))
    ]


def table(audit: Audit) -> Any:
    """The rows as a table of rich."""
    from rich.table import Table
    from rich.text import Text

    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("verdict", "question", "found", "what to do"):
        result.add_column(name)
    for cells in rows(audit.findings):
        result.add_row(*map(Text, cells))
    return result


def _found(finding: Finding) -> str:
    names = ", ".join(finding.subjects[:_SUBJECTS])
    more = len(finding.subjects) - _SUBJECTS
    if finding.verdict != "fail" or not names:
        return finding.reason
    return f"{finding.reason}: {names}{f' and {more} more' if more > 0 else ''}"


def _advice(finding: Finding) -> str:
    return finding.advice or CHECKS[finding.check].advice
