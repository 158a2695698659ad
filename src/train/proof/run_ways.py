"""Each way is run in processes of its own: no state is shared, and memory is counted from zero."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..consent import Consent
from ..processes.launch import rank_environment
from ..processes.world import PARENT
from ..recipe.recipe import Recipe
from .settings import recipe_of
from .ways import Way
from .worker import RESULT, Job

_POLL = 0.1
_OTHERS = 20.0
"""Seconds that the other processes of a way get to end, once one has failed."""
_LAST = 12
"""Lines of what a process printed that are shown when a signal has ended it: where it was."""
_ERROR = re.compile(r"(?:\[rank\d+\]:\s)?(\w[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)")
"""The last line of a traceback."""


@dataclass
class Run:
    """How one way went.

    Attributes:
        way: which.
        status: ``"trained"``; ``"skipped"``: it cannot be run here; ``"failed"``: it should have.
        reason: why it was skipped or failed.
        folder: where its tensors are.
        figures: what its worker has counted; see ``worker``.
        seconds: that it took, loading included.
    """

    way: Way
    status: str
    reason: str = ""
    folder: Path = Path()
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_way(
    recipe: Recipe, way: Way, steps: int, folder: Path, consent: Consent, say: Callable[[str], None]
) -> Run:
    """Run one way to its end.

    Args:
        recipe: the user's.
        way: with a layout, unless it is skipped.
        steps: how many.
        folder: of all ways; it has the samples, and gets a folder for this one.
        consent: what the caller allows.
        say: prints a line.

    Returns:
        How it went. Its processes have ended, whatever happens here.
    """
    if way.layout is None:
        return Run(way, "skipped", way.skipped)
    own = folder / way.name.replace(" ", "-")
    own.mkdir()
    changed = recipe_of(recipe, way, steps, str(own / "out"))
    keys = changed.model_dump(mode="json", exclude_defaults=True)
    Job(keys, consent, way.exact, way.layout.sequences).write(own)
    start = time.monotonic()
    with _started(own, way.layout.processes) as processes:
        code = _wait(processes, own, say)
    return _ended(way, own, code, time.monotonic() - start)


def _ended(way: Way, folder: Path, code: int, seconds: float) -> Run:
    result: dict[str, Any] = {}
    if (folder / RESULT).exists():
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if code == 0 and result.get("status") == "trained":
        return Run(way, "trained", "", folder, result, seconds)
    if result.get("status") == "refused":
        status = "skipped" if way.optional else "failed"
        return Run(way, status, str(result["reason"]), folder, result, seconds)
    return Run(way, "failed", _reason(folder, code), folder, {}, seconds)


def _reason(folder: Path, code: int) -> str:
    printed = [
        [line.rstrip() for line in text.splitlines() if line.strip()]
        for path in sorted(folder.glob("*.err"))
        if (text := path.read_text(encoding="utf-8", errors="replace"))
    ]
    if code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return "its process was killed by SIGKILL (the system does that when memory is short)"
        said = "\n  ".join(line for lines in printed for line in _last(lines)) or "nothing"
        return f"its process was killed by {name}; what was last printed:\n  {said}"
    lines = [line for own in printed for line in own]
    errors = [found[1] for line in lines if (found := _ERROR.match(line))]
    causes = [said for said in errors if "ProcessLostError" not in said] or errors
    said = causes[0] if causes else (lines or ["it printed nothing"])[-1].strip()
    return f"its process ended with exit code {code}: {said}"


def _last(lines: list[str]) -> list[str]:
    """What a process printed around its end: what faulthandler begins with, if it wrote that."""
    fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python")), None)
    return lines[-_LAST:] if fatal is None else lines[max(fatal - 4, 0) : fatal + _LAST]


@contextlib.contextmanager
def _started(folder: Path, number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of a worker; none is left afterwards, whatever ends the block."""
    worker = ["-P", "-X", "faulthandler", "-m", "fusewright.train.proof.worker", str(folder)]
    command = [sys.executable, *worker]
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        store = _store() if number > 1 else None
        try:
            for rank in range(number):
                out = stack.enter_context((folder / f"rank-{rank}.out").open("wb"))
                err = stack.enter_context((folder / f"rank-{rank}.err").open("wb"))
                environ = {**os.environ, PARENT: str(os.getpid())}
                if store is not None:
                    environ = rank_environment(rank, number, store.port)
                # in a session of its own: Ctrl-C in a terminal is this process's to deal with
                processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                        env=environ, start_new_session=True,
                    )
                )  # fmt: skip
            yield processes
        finally:
            _kill(processes)


def _store() -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # 2026-11-27: not in its list

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes, and those that they have started (compilers, readers)."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], folder: Path, say: Callable[[str], None]
) -> int:
    """Wait for all, and pass on what rank 0 prints; the exit code of the first that failed."""
    since: float | None = None
    first = 0
    with (folder / "rank-0.out").open(encoding="utf-8", errors="replace") as lines:
        rest = ""
        while True:
            running = [process for process in processes if process.poll() is None]
            *whole, rest = (rest + lines.read()).split("\n")
            for line in whole:
                say(f"  {line}")
            first = first or next((p.returncode for p in processes if p.returncode), 0)
            if not running:
                return first
            if first:
                since = since or time.monotonic()
                if time.monotonic() - since > _OTHERS:
                    return first
            time.sleep(_POLL)
