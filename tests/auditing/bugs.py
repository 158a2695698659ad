"""All published bugs that are recreated here, and the page about them.

    python -m tests.auditing.bugs [FILE]

writes ``docs/audit-bugs.md``. What a record plants does what the published bug did; no code of the
engines is in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import loops, steps
from .published import BUGS, Bug

__all__ = ["BUGS", "Bug", "loops", "steps"]

PAGE = Path(__file__).parents[2] / "docs" / "audit-bugs.md"

INTRODUCTION = """\
# Published bugs that the audit finds

Bugs of training engines that were published, recreated on tiny models
([tests/auditing](../tests/auditing)): in each, the [audit](audit.md) must answer the question in
the last column with no, and the healthy twin must pass every question. The page is written by
`python -m tests.auditing.bugs`.
"""


def page() -> str:
    """The page, in Markdown."""
    lines = [INTRODUCTION, "| what went wrong | published | question |", "|---|---|---|"]
    for bug in BUGS:
        links = ", ".join(map(_link, bug.published))
        lines.append(f"| {bug.wrong} | {links} | `{bug.check}` |")
    return "\n".join(lines) + "\n"


def _link(place: str) -> str:
    repository, number = place.split("#")
    return f"[{place}](https://github.com/{repository}/issues/{number})"


if __name__ == "__main__":
    Path(*sys.argv[1:2] or [PAGE]).write_text(page(), encoding="utf-8")
