"""Runs the checks in a child process: a broken library may raise, hang, print, or end the process.

The child writes a line of JSON before and after each check. If it ends during a check, that is the
finding of this check, and another child makes the remaining ones.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import Any

from .compiler import REINSTALL
from .imports import NEEDED, OPTIONAL, broken, culprit, first_cause, reinstall, try_import
from .result import RERUN, USERS_CACHE, CheckResult, reason

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve()"
)

_ENDS = "it ends the process"
"""The beginning of the note of a check during which the child ended."""

_EACH = 15
"""Seconds that one check may take."""

_SLOW = 60
"""Seconds for a check that reads libraries from a disk, or compiles."""

_READ = (*(f"import {module}" for module in NEEDED), "compiler", "Triton", "bitsandbytes")
"""The checks that may take so long; so may the first one of each process."""

_LIBRARY_OF = {
    **dict.fromkeys(("machine", "attention", "communication", "codegen", "rules"), "torch"),
    "Triton": "triton",
    "bitsandbytes": "bitsandbytes",
}
"""Name of a check -> the library that is at fault where the check ends the process."""

Sections = dict[str, list[dict[str, Any]]]
"""Name of a check -> its records."""


def ask(names: Sequence[str], seconds: float) -> Sections:
    """Run checks of ``CHECKS``, in order, within ``seconds`` for all of them."""
    done: Sections = {}
    end = time.monotonic() + seconds
    rest = list(names)
    while rest:
        for name, records in _child(rest, end):
            done[name] = records
        done |= _skipped(rest, done)
        rest = [name for name in rest if name not in done]
        if rest and time.monotonic() >= end:
            note = f"not checked: doctor reached its limit of {seconds:.0f} seconds"
            done |= {name: [asdict(_unknown(name, note))] for name in rest}
            break
    return {name: done[name] for name in names}


def _skipped(names: Sequence[str], sections: Sections) -> Sections:
    """The imports to skip: an earlier one ended the process, and they would, too."""
    imports = [name for name in names if name.startswith("import ")]
    bad = next(
        (n for n in imports if n in sections and sections[n][0]["note"].startswith(_ENDS)), None
    )
    if bad is None:
        return {}
    note = f"{bad} ends the process"
    skipped = imports[imports.index(bad) + 1 :]
    return {name: [asdict(CheckResult(name, "not tried", "unused", note))] for name in skipped}


def _child(names: Sequence[str], end: float) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run one child; yield the results of each check, or how the child ended during it."""
    start = _START.format(module=__name__)
    command = [sys.executable, "-c", start, json.dumps(sys.path), *names]
    current, late, nothing = names[0], "", subprocess.DEVNULL

    def limit() -> int:
        return _SLOW if current in (names[0], *_READ) else _EACH

    with (
        tempfile.TemporaryDirectory(prefix="fusewright-") as folder,
        subprocess.Popen(
            command, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, env=_environment(folder)
        ) as child,
    ):
        try:
            for line in _lines(child, limit, end):
                message = json.loads(line)
                if "found" in message:
                    yield message["name"], message["found"]
                    current = ""
                else:
                    current = message["name"]
        except TimeoutError as error:
            late = str(error)
        child.kill()
        code = child.wait()
    if current:
        yield current, [asdict(_unknown(current, late) if late else _ended(current, code))]


def _unknown(name: str, note: str) -> CheckResult:
    return CheckResult(name, "not known", "unknown", note, RERUN)


def _ended(name: str, code: int) -> CheckResult:
    module = name.removeprefix("import ")
    by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    note = f"{_ENDS} ({by})"
    mend = REINSTALL if name == "compiler" else ""
    if name in _LIBRARY_OF:
        mend = reinstall(_LIBRARY_OF[name])
    if module in NEEDED:
        mend = f"python -X faulthandler -c 'import {module}' shows which library does that"
    return CheckResult(name, "fails", "broken", note, mend, needed=module in NEEDED)


def _environment(folder: str) -> dict[str, str]:
    """The variables of a child that leaves no files behind and does not use the network."""
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    variables[USERS_CACHE] = os.environ.get(caches[0], "")
    return {**os.environ, **variables, **dict.fromkeys(caches, folder)}


def _lines(
    child: subprocess.Popen[bytes], limit: Callable[[], float], end: float
) -> Iterator[bytes]:
    """The lines of the child until it closes its output; raises a TimeoutError at either limit."""
    assert child.stdout is not None  # it is a pipe
    rest = b""
    while True:
        seconds = max(0.0, min(end - time.monotonic(), limit()))
        ready, _, _ = select.select([child.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError(f"not finished after {seconds:.0f} seconds")
        data = os.read(child.stdout.fileno(), 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


# --- in the child --------------------------------------------------------------------------------


def serve() -> None:
    """Run the checks that the command line names, and write the results."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps what libraries print out of the JSON
    for name in sys.argv[2:]:
        print(json.dumps({"name": name}), file=out, flush=True)
        try:
            results = CHECKS[name]()
        except Exception as error:  # a check did not expect it
            results = [_failed(name, error)]
        records = [one if isinstance(one, dict) else asdict(one) for one in results]
        print(json.dumps({"name": name, "found": records}), file=out, flush=True)
    out.close()
    os._exit(0)  # does not wait for the threads of broken libraries


def _failed(name: str, error: Exception) -> CheckResult:
    first = first_cause(error)
    if isinstance(first, ImportError) or culprit(first) in OPTIONAL:
        return broken(name, "torch", error)
    return CheckResult(name, "fails", "broken", reason(error))


def _lazily(module: str, function: str) -> Callable[[], Sequence[Any]]:
    """A check whose module is imported when it is run."""

    def check() -> Sequence[Any]:
        records: Sequence[Any] = getattr(import_module(f".{module}", __package__), function)()
        return records

    return check


CHECKS: dict[str, Callable[[], Sequence[Any]]] = {
    "packages": _lazily("packages", "packages"),
    **{f"import {module}": partial(try_import, module) for module in NEEDED},
    "machine": _lazily("machine", "machine"),
    "compiler": _lazily("compiler", "compiler"),
    "Triton": _lazily("libraries", "triton"),
    "bitsandbytes": _lazily("libraries", "bitsandbytes"),
    "attention": _lazily("libraries", "attention"),
    "communication": _lazily("libraries", "communication"),
    "codegen": _lazily("rules", "codegen"),
    "rules": _lazily("rules", "rules"),
}
"""The checks by name."""
