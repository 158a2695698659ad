"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

State = Literal["ok", "missing", "broken", "unused", "unknown"]
"""``unused``: it is missing or does not run here, but nothing on this machine would use it.
``unknown``: the check did not finish in time.
"""

USERS_CACHE = "FUSEWRIGHT_USERS_CACHE"
"""The variable by which a child knows the user's TORCHINDUCTOR_CACHE_DIR; its own is temporary."""

RERUN = "run fusewright doctor again: it is faster once the libraries are in the page cache"
"""What to do about a check that did not finish in time."""


@dataclass(frozen=True)
class CheckResult:
    """The result for one thing.

    Attributes:
        note: the reason, or what follows from it.
        mend: the command, or the key of a recipe, that closes the gap; empty if there is none.
        needed: training does not work at all without it.
    """

    name: str
    value: str
    state: State = "ok"
    note: str = ""
    mend: str = ""
    needed: bool = False

    def is_gap(self) -> bool:
        """Whether there is something to mend."""
        return self.state in ("missing", "broken")

    @classmethod
    def of(cls, values: dict[str, Any]) -> CheckResult:
        """The record of ``dataclasses.asdict``."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def reason(error: BaseException) -> str:
    """An error in one line, with its class."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__
