"""Run what the core of the tests leaves out, part by part, and record the results.

    .ci/nightly                    # every part that has not passed for this commit
    .ci/nightly slow-1 fuzz        # these, again if they have passed
    .ci/nightly --list             # the parts, with what is known of them for this commit

A part takes at most 40 minutes on 2 cores. The state of a commit is kept below
``.git/nightly/COMMIT``: ``PART.log`` is the output, and ``PART`` the result, once the part has
ended, so that a run can be stopped and continued. Each part that ends appends a line to
``tests/nightly.txt``; commits of that file alone do not count as other commits. A part that lacks
what it needs is "not run", with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..parts import PARTS as PARTS_OF_PYTEST
from .house import ROOT

RECORD = Path("tests/nightly.txt")
"""The results, a line for each part that has ended, relative to the root of the checkout."""

_VERSIONS = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: its name on the command line.
        command: what runs it, given the number of the commit's first eight hexadecimal digits.
        missing: why it cannot run here, or None.
    """

    name: str
    command: Callable[[int], Sequence[str]]
    missing: Callable[[], str | None] = lambda: None


def _tests(name: str) -> Part:
    command = [sys.executable, "-m", "pytest", "--part", name, "--durations=20"]
    return Part(name, lambda commit: command)


def _fuzz(name: str, count: int, *options: str) -> Part:
    command = [sys.executable, "-m", "tests.tools.fuzz"]
    # other seeds for each commit, the same ones for the same commit
    return Part(name, lambda commit: [*command, str(commit), str(count), *options])


def _corner(name: str, *arguments: str) -> Part:
    return Part(f"corner-{name}", lambda commit: [".ci/corner", name, *arguments])


def _twins() -> Part:
    folder = os.environ.get("AXOLOTL_EXAMPLES", "")
    missing = None
    if not Path(folder, "llama-3").is_dir():
        missing = "AXOLOTL_EXAMPLES does not name the folder of Axolotl's examples"
    command = [sys.executable, "-m", "tests.tools.twins", folder, "--jobs", "2"]
    return Part("twins", lambda commit: command, lambda: missing)


def _no_gpu() -> str | None:
    return None if shutil.which("nvidia-smi") else "no NVIDIA GPU (nvidia-smi is not there)"


PARTS = (
    *map(_tests, PARTS_OF_PYTEST),
    _fuzz("fuzz", 300),
    _fuzz("fuzz-inductor", 30, "--codegen", "inductor"),
    _corner("oldest"),
    _corner("newest"),
    _corner("latest"),
    _twins(),
    Part("gpu", lambda commit: [sys.executable, "-m", "pytest", "-m", "gpu"], _no_gpu),
)
"""All parts, in the order in which they run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts; the exit status is 1 where one failed, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog=".ci/nightly", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--list", action="store_true", help="print the parts and their results")
    options = parser.parse_args(arguments)
    by_name = {part.name: part for part in PARTS}
    if unknown := [name for name in options.parts if name not in by_name]:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(by_name)}")
    commit = _git("log", "-1", "--format=%H", "--", ".", f":!{RECORD}")
    folder = ROOT / _git("rev-parse", "--git-common-dir") / "nightly" / commit
    if options.list:
        for part in PARTS:
            print(f"{part.name:16} {_result(folder, part) or part.missing() or '-'}")
        return 0
    if changed := _git("status", "--porcelain", "--", ".", f":!{RECORD}"):
        parser.error(f"commit first, since results are recorded by commit:\n{changed}")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [by_name[name] for name in options.parts] or [
        part for part in PARTS if not (_result(folder, part) or "").startswith("passed")
    ]
    return max([_run(part, commit, folder) for part in chosen], default=0)


def _result(folder: Path, part: Part) -> str | None:
    file = folder / part.name
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _run(part: Part, commit: str, folder: Path) -> int:
    """Run a part, and record its result; the exit status is 1 where it failed."""
    result, log = folder / part.name, folder / f"{part.name}.log"
    result.unlink(missing_ok=True)
    code = 0
    if (reason := part.missing()) is not None:
        text = f"not run: {reason}"
    else:
        print(f"=== {part.name}", flush=True)
        start = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                part.command(int(commit[:8], 16)), cwd=ROOT, text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                print(line, end="", file=file, flush=True)
            code = int(process.wait() != 0)
        minutes = (time.monotonic() - start) / 60
        text = f"{'failed' if code else 'passed'}: {_counts(log)}, {minutes:.0f} min"
    result.write_text(f"{text}\n", encoding="utf-8")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS]
    python = f"Python {platform.python_version()}"
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    words = [day, commit[:8], part.name, f"{text} ({', '.join([python, *versions])})"]
    if part.name.startswith("corner-"):  # it has versions of its own, which its log begins with
        words[-1] = f"{text} ({_first_line(log)})"
    print(" ".join(words), flush=True)
    with (ROOT / RECORD).open("a", encoding="utf-8") as file:
        print(" ".join(words), file=file)
    return code


def _counts(log: Path) -> str:
    """Return the numbers with which pytest, the fuzzer or another program ended."""
    lines = log.read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):
        if counts := re.findall(r"\b\d+ (?:passed|failed|errors?|skipped|xfailed)\b", line):
            return ", ".join(counts)
    return lines[-1] if lines else "no output"


def _first_line(log: Path) -> str:
    return next(iter(log.read_text(encoding="utf-8").splitlines()), "no output")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
