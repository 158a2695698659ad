"""The record of a published bug."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fusewright.auditing.checks import CHECKS
from fusewright.auditing.findings import Audit


class Auditable(Protocol):
    """What a builder makes: something with a fault, or its healthy twin."""

    def audit(self) -> Audit:
        """What the audit finds."""


Build = Callable[[bool, ExitStack], Auditable]


@dataclass(frozen=True)
class Bug:
    """A published bug.

    Attributes:
        name: of the fixture.
        published: where, as ``owner/repository#number``.
        wrong: what went wrong; one sentence.
        check: name of the question whose answer must be no.
        build: (faulty, until the end of the test) -> what is audited.
    """

    name: str
    published: tuple[str, ...]
    wrong: str
    check: str
    build: Build


BUGS: list[Bug] = []

B = TypeVar("B", bound=Build)


def bug(check: str, *published: str) -> Callable[[B], B]:
    """Record a builder: its name is the bug's, its docstring says what went wrong."""
    assert check in CHECKS, check

    def record(build: B) -> B:
        wrong = " ".join((build.__doc__ or "").split())
        BUGS.append(Bug(build.__name__.replace("_", "-"), published, wrong, check, build))
        return build

    return record
