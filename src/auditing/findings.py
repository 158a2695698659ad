"""What an audit asks (``Check``), and what it answers (``Finding``, ``Audit``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Check:
    """One question of an audit.

    Attributes:
        name: by which it is known in tables, JSON and docs, such as ``"gradient-scale"``.
        question: what a pass answers with yes.
        advice: what to do if the answer is no; one sentence, without a period.
    """

    name: str
    question: str
    advice: str


@dataclass(frozen=True)
class Finding:
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
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        """Append findings; of a check that was answered before, the worse answer stays."""
        order = {"fail": 0, "pass": 1, "skipped": 2}
        for finding in findings:
            earlier = next((f for f in self.findings if f.check == finding.check), None)
            if earlier is None:
                self.findings.append(finding)
            elif order[finding.verdict] < order[earlier.verdict]:
                self.findings[self.findings.index(earlier)] = finding

    @property
    def failed(self) -> Iterator[Finding]:
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
