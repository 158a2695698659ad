"""Commands one after another within a number of seconds: what ``gpu.py`` runs.

Each stage has a limit, and at most what is left of the whole. Whatever a stage does (fails, hangs,
cannot run here), the next one has its turn, and the summary says so.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LEAST = 20.0
"""Seconds without which a stage is not started."""

TIMED_OUT = 124
"""The status of a command that its limit has ended, as ``timeout`` has it."""

GRACE = 10.0
"""Seconds in which an interrupted command may say what it has."""


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage and of its log.
        command: the program and its arguments; ``{seconds}`` stands for the whole seconds it has.
        limit: seconds that it may take.
        missing: why it cannot run here, empty if it can. That is no failure.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    Attributes:
        stage: the stage.
        seconds: how long it ran.
        skipped: why it was not started, or empty.
        failed: why it counts as failed, or empty. What had no time left was skipped *and* failed.
    """

    stage: Stage
    seconds: float = 0.0
    skipped: str = ""
    failed: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.stage.name}: skipped, {self.skipped}"
        ending = f"failed, {self.failed}" if self.failed else "passed"
        return f"{self.stage.name}: {ending} after {self.seconds:.0f} s"


Execute = Callable[[Sequence[str], float, str], int]
"""Runs a command of that name within so many seconds; returns its status, or ``TIMED_OUT``."""


def run_stages(
    stages: Sequence[Stage],
    budget: float,
    execute: Execute,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run ``stages`` in order, within ``budget`` seconds of all together.

    Returns:
        One outcome for each stage.
    """
    start, outcomes = clock(), list[Outcome]()
    for stage in stages:
        began = clock()
        left = budget - (began - start)
        if stage.missing:
            outcome = Outcome(stage, skipped=stage.missing)
        elif left < LEAST:
            reason = f"only {max(left, 0):.0f} s are left"
            outcome = Outcome(stage, skipped=reason, failed=reason)
        else:
            limit = min(stage.limit, left)
            command = [part.replace("{seconds}", f"{limit:.0f}") for part in stage.command]
            say(f"=== {stage.name} (at most {limit:.0f} s): {shlex.join(command)}")
            status = execute(command, limit, stage.name)
            outcome = Outcome(stage, clock() - began, failed=_failure(status, limit))
        say(f"=== {outcome}")
        outcomes.append(outcome)
    return outcomes


def _failure(status: int, limit: float) -> str:
    if status == TIMED_OUT:
        return f"over {limit:.0f} s"
    return f"status {status}" if status else ""


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """1 when a stage failed or had no time, else 0: what cannot run here is no failure."""
    return int(any(outcome.failed for outcome in outcomes))


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line for each stage, and what became of all."""
    lines = [f"  {outcome}" for outcome in outcomes]
    ending = "failed" if exit_status(outcomes) else "passed"
    return "\n".join([*lines, f"=== {ending}"])


@dataclass(frozen=True)
class Execution:
    """Runs commands in a process group of their own; what they print is shown, and kept in a file.

    Attributes:
        logs: stage name -> file.
        folder: where commands run.
        environment: theirs.
    """

    logs: Callable[[str], Path]
    folder: Path
    environment: dict[str, str]

    def __call__(self, command: Sequence[str], limit: float, name: str) -> int:
        """Run ``command``; end it, and all that it has started, after ``limit`` seconds."""
        with _interruptible():
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        with self.logs(name).open("w") as log:
            copying = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
            copying.start()
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return TIMED_OUT
            finally:
                _end(process)
                copying.join(GRACE)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let what is started heed SIGINT: what a script puts into the background inherits not to."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def _copy(source: IO[str], log: IO[str]) -> None:
    for line in source:
        sys.stdout.write(line)
        sys.stdout.flush()
        log.write(line)


def _end(process: subprocess.Popen[str]) -> None:
    """End what is left of the command's process group: pytest, interrupted, prints its failures."""
    running = process.poll() is None
    for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        if number == signal.SIGINT and not running:
            continue
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
