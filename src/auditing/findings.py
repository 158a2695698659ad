"""What an audit answers: ``AuditFinding``, ``Audit``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .checks import CHECKS, Check

__all__ = ["Audit", "AuditFinding", "Check", "Verdict"]

Verdict = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class AuditFinding:
    """The answer to one question.

    Attributes:
        check: name of the ``Check``.
        verdict: ``"skipped"``: it could not be asked here; ``reason`` says why.
        reason: what was found, with figures; one clause or sentence, without a period.
        subjects: parameters, modules or tokens that it is about, the worst first.
        advice: what to do, if that is more than the check's own says.
        figures: what was measured, by name; values that JSON can hold.
    """

    check: str
    verdict: Verdict
    reason: str
    subjects: tuple[str, ...] = ()
    advice: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Audit:
    """All findings about one model.

    Attributes:
        model: name of its class.
        findings: in the order of the checks.
        facts: how it was audited: tokens and rows of the slice, dtype and memory of the reference,
            seconds.
    """

    model: str
    findings: list[AuditFinding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, findings: Iterable[AuditFinding]) -> None:
        """Append findings; of a check that was answered before, the worse answer stays."""
        order = {"fail": 0, "pass": 1, "skipped": 2}
        for finding in findings:
            earlier = next((f for f in self.findings if f.check == finding.check), None)
            if earlier is None:
                self.findings.append(finding)
            elif order[finding.verdict] < order[earlier.verdict]:
                self.findings[self.findings.index(earlier)] = finding

    @property
    def failed(self) -> Iterator[AuditFinding]:
        """Those that found something wrong."""
        return (f for f in self.findings if f.verdict == "fail")

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong, as far as could be asked."""
        return not any(self.failed)

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "model": self.model,
            "passed": self.passed,
            "findings": [asdict(f) for f in self.findings],
            "facts": self.facts,
        }

    @property
    def headline(self) -> str:
        """How many questions had which answer, in a line."""
        verdicts = [f.verdict for f in self.findings]
        failed = verdicts.count("fail")
        return (
            f"audit: {f'{failed} failed, ' if failed else ''}"
            f"{verdicts.count('pass')} questions passed, {verdicts.count('skipped')} skipped"
        )

    def __str__(self) -> str:
        """A table: what is wrong, why, and what to do; what is right; what was not asked."""
        failed = list(self.failed)
        verdicts = [f.verdict for f in self.findings]
        asked, rest = len(verdicts) - verdicts.count("skipped"), verdicts.count("skipped")
        lines = [
            f"Audit of {self.model}: "
            + (f"{len(failed)} of {asked} checks failed" if failed
               else f"{asked} checks found no fault")
            + f", {rest} could not be answered" * (rest > 0)
        ]  # fmt: skip
        for finding in failed:
            lines += ["", f"FAIL  {finding.check}: {finding.reason}"]
            if finding.subjects:
                more = len(finding.subjects) - _SHOWN
                shown = ", ".join(finding.subjects[:_SHOWN])
                lines.append(f"      in    {shown}" + (f" and {more} more" if more > 0 else ""))
            lines.append(f"      do    {finding.advice or CHECKS[finding.check].advice}")
        for verdict, words in (("pass", "passed"), ("skipped", "not answered, and why")):
            here = [f for f in self.findings if f.verdict == verdict]
            if here:
                width = max(len(f.check) for f in here)
                lines += ["", words]
                lines += [f"  {f.check:{width}}  {f.reason}" for f in here]
        lines += [
            "",
            *(f"{_FACTS[k]}: {_shown(v)}" for k, v in self.facts.items() if k in _FACTS and v),
        ]
        return "\n".join(lines)


_SHOWN = 3
"""So many subjects of a finding are printed; ``to_dict`` has all."""

_FACTS = {
    "slice": "compared on", "reference": "plain model in", "exchanged": "exchanged in libraries",
    "not_compared": "trained, but not in the plain model", "seconds": "seconds",
}  # fmt: skip
"""The facts that are printed, and what they are called."""


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        more = len(value) - _SHOWN
        return ", ".join(map(str, value[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
    return f"{value:.1f}" if isinstance(value, float) else str(value)
