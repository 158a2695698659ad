"""``python -m tests.tools.mutation [FILE ...] [--every N]``: change one thing, and see a test fail.

Mutants are made by Cosmic Ray (``pip install cosmic-ray``): a comparison, an operator, a number, a
condition of a file of ``src``. Each runs in a process of its own, forked from one that has torch
and transformers loaded, against the tests that ``TESTS`` names for the file. A mutant that no test
notices survives: either a test is missing, or the change means nothing (``EQUIVALENT`` says why).

This takes minutes per file, so it is run by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from .targets import EQUIVALENT, TESTS

ROOT = pathlib.Path(__file__).parents[3]

_OTHER = ("Exception", "Decorator", "Variable", "Eq_Is", "NotEq_IsNot")
"""Operators of Cosmic Ray that want arguments, or that change no logic."""


_OPTIONS = [
    "-x", "-q", "-pno:cacheprovider", "--override-ini=addopts=", "-mnot zoo and not slow"
]  # fmt: skip
"""One process, up to the first failure, without the plugins that ``main`` keeps out."""


@dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Attributes:
        file: below ``src``.
        operator: Cosmic Ray's name of the change.
        occurrence: which place of the file it was made at.
        code: the changed file.
        diff: the changed lines.
    """

    file: str
    operator: str
    occurrence: int
    code: str
    diff: str


def mutants(file: str) -> Iterator[Mutant]:
    """All mutants of a file; of the many replacements of one operator, one per place."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / "src" / file).read_text()
    kinds: dict[str, list[str]] = {}
    for name in sorted(plugins.operator_names()):
        if any(t in name for t in _OTHER):
            continue
        if "Operator_" in name:  # core/ReplaceBinaryOperator_Add_Sub: by what is replaced
            kinds.setdefault(name.rsplit("_", 1)[0], []).append(name)
        elif name.startswith("core/"):
            kinds[name] = [name]
    for kind, names in kinds.items():
        occurrence = 0
        while True:
            name = random.Random(f"{file} {kind} {occurrence}").choice(names)
            code = mutate_code(source, plugins.get_operator(name)(), occurrence)
            if code is None:
                break
            lines = difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=0)
            changed = [
                line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")
            ]
            if not _is_annotation(changed):
                yield Mutant(file, name, occurrence, code, "\n".join(changed))
            occurrence += 1


def _is_annotation(changed: Sequence[str]) -> bool:
    """Whether a change is one of types only: ``X | None`` is an operator, too."""
    return any(" | " in line for line in changed if line[0] == "-") and not any(
        t in "".join(changed) for t in ("= {", "set(", "{*")
    )


class _Loader(importlib.abc.Loader):
    """Loads a module from the code of a mutant."""

    def __init__(self, path: str, code: str) -> None:
        self.path, self.code = path, code

    def exec_module(self, module: object) -> None:
        exec(compile(self.code, self.path, "exec"), module.__dict__)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as its mutant."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = "fusewright." + mutant.file.removesuffix(".py").replace("/", ".")
        self.loader = _Loader(str(ROOT / "src" / mutant.file), mutant.code)

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.loader.path, loader=self.loader)


def _run(mutant: Mutant | None, tests: Sequence[str], limit: float) -> str:
    """Run the tests in a fork; returns ``killed``, ``survived`` or ``timeout``."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.setsid()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(io.StringIO()):
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                if mutant is not None:
                    sys.meta_path.insert(0, _Finder(mutant))
                status = int(pytest.main([*_OPTIONS, *tests]))
        finally:
            os._exit(status)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _is_excused(mutant: Mutant) -> bool:
    """Whether the change is one that means nothing."""
    known = [*EQUIVALENT.get(mutant.file, {}), *EQUIVALENT["any file"]]
    added = [line for line in mutant.diff.splitlines() if line[0] == "+"]
    return any(text in line for text in known for line in added)


def _preload() -> None:
    """Import what is heavy and none of ours, once for all; no collection looks at it again."""
    import hypothesis
    import peft
    import torch._dynamo
    import torch._inductor.config
    import transformers.models.llama.modeling_llama

    heavy = (hypothesis, peft, torch._dynamo, torch._inductor.config, transformers)
    torch.set_num_threads(1)
    torch.compile(torch.neg, backend="eager")(torch.ones(2))  # the first one takes longest
    ours = [m for m in sys.modules if m.split(".")[0] == "fusewright"]
    assert not ours, f"loaded with {heavy} and before the mutant: {ours}"
    gc.collect()
    gc.freeze()


def main() -> int:
    """Print the survivors and the score; the exit status is 1 when one is not explained."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.mutation")
    parser.add_argument("files", nargs="*", default=list(TESTS), help="below src")
    parser.add_argument("--every", type=int, default=1, help="take only one mutant in so many")
    parser.add_argument("--at", type=int, nargs="*", help="take only those of these numbers")
    parser.add_argument("--verbose", action="store_true", help="show the verdict on each")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    _preload()
    total = killed = excused = 0
    for file in args.files:
        start = time.monotonic()
        if _run(None, TESTS[file], 900) != "survived":
            print(f"{file}: its tests fail without a change", flush=True)
            return 2
        limit = 20 + 3 * (time.monotonic() - start)
        own = [0, 0, 0]
        for number, mutant in list(enumerate(mutants(file)))[:: args.every]:
            if args.at is not None and number not in args.at:
                continue
            verdict = _run(mutant, TESTS[file], limit)
            own[0] += 1
            if args.verbose:
                print(f"{file}: {number} {verdict}", file=sys.stderr, flush=True)
            if verdict != "survived":
                own[1] += 1
            elif _is_excused(mutant):
                own[2] += 1
            else:
                print(f"{file}: {number} {mutant.operator}\n{mutant.diff}", flush=True)
        print(f"{file}: {own[1]} of {own[0]} killed, {own[2]} mean nothing", flush=True)
        total, killed, excused = total + own[0], killed + own[1], excused + own[2]
    print(f"score {killed / max(total - excused, 1):.1%}: {killed} of {total}, {excused} excused")
    return int(killed + excused < total)


if __name__ == "__main__":
    raise SystemExit(main())
