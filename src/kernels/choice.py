"""Which form of a computation is the fastest on this machine: each is checked, timed, and kept.

A ``Question`` has candidates. They are *raced* on tensors of its own making, never on a caller's:
a candidate that cannot run here, fails, needs too much memory or is not as exact as the plain form
is left out with the reason; the others take turns under the clock, and the fastest is chosen, or
the one that the project's own measurements name (``fixed``) unless another is faster by more than
``MARGIN``. A choice is made once for a machine: it is kept in the folder of compiled kernels, and
the ranks of a job take the one that was published first. ``FUSEWRIGHT_CHOICES=fixed`` measures
nothing.

The rule by which candidates are found right is that of rewrites (``tolerance.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import FusewrightError, first_line
from ..sharding import has_peers
from .native.build import kept_folder, write_whole
from .tolerance import exceeded

VARIABLE = "FUSEWRIGHT_CHOICES"
"""``fixed``: nothing is measured; ``raced``, the default."""

MARGIN = 0.03
"""So much faster a candidate must be than the fixed one, or than an earlier one, to take its place.

Less is noise, and a choice that changes from run to run would change the last digits of results.
"""

ROUNDS = 5
"""So often each candidate is timed, in turns; its fastest time counts."""

BUDGET = 2.0
"""Seconds that one race may take: then no more rounds begin, and one is enough."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """One form of a computation.

    ``run`` takes the question's inputs and returns a tensor or several. ``unavailable`` says why it
    cannot run on this machine; empty if it can.
    """

    name: str
    run: Callable[..., Tensor | Sequence[Tensor]]
    unavailable: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Question:
    """What is to be chosen.

    Attributes:
        name: as it is kept and shown, with what the choice depends on besides the machine, such as
            ``"products in bfloat16"``.
        candidates: of which the last is the plain form, as PyTorch computes it.
        inputs: makes the tensors that they run on, from a generator.
        fixed: the name of the candidate that is taken where nothing is measured.
    """

    name: str
    candidates: tuple[Contender, ...]
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    fixed: str


@dataclass(frozen=True)
class Choice:
    """The answer to a question.

    Attributes:
        question: its name.
        candidate: the name of the chosen one.
        source: ``raced``, ``fixed``, ``kept`` (raced by an earlier process), ``shared`` (by another
            rank) or ``resumed`` (by the run that is continued).
        microseconds: of each candidate that was timed, its fastest.
        refused: why others were not, by name.
    """

    question: str
    candidate: str
    source: str = "raced"
    microseconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = sorted(self.microseconds.items(), key=lambda item: item[1])
        timed = ", ".join(f"{name} {time:,.0f} us" for name, time in times)
        why = "; ".join(f"{name} refused: {reason}" for name, reason in self.refused.items())
        text = f"{self.question}: {self.candidate} ({self.source}"
        return text + (f"; {timed}" if timed else "") + (f"; {why}" if why else "") + ")"


_CHOICES: dict[str, Choice] = {}
"""By question: what this process has chosen."""


_KEPT: dict[str, Choice] = {}
"""By the name of its file: of those, what is kept for the machine."""


def files() -> dict[str, str]:
    """What this process has chosen and keeps for the machine, as files: name and content."""
    return {name: json.dumps(asdict(choice)) for name, choice in _KEPT.items()}


def choices() -> list[Choice]:
    """What this process has chosen so far."""
    return list(_CHOICES.values())


def is_fixed() -> bool:
    """Whether nothing may be measured.

    Raises FusewrightError if the variable has another value than the two that it knows.
    """
    value = os.environ.get(VARIABLE, "raced")
    if value not in ("raced", "fixed"):
        raise FusewrightError(f"{VARIABLE}={value!r} is neither raced nor fixed")
    return value == "fixed"


def adopt(earlier: Iterable[dict[str, Any]]) -> None:
    """Choose as the run that is continued did, so that it continues bit for bit.

    What is not the record of a choice is left out: it was written by another version.
    """
    for record in earlier:
        choice = _read(record, "resumed")
        if choice is not None:
            _CHOICES[choice.question] = choice


def records() -> list[dict[str, Any]]:
    """What ``adopt`` takes, for a run's files."""
    return [asdict(choice) for choice in _CHOICES.values()]


def choose(question: Question, machine: str = "") -> Choice:
    """The choice for ``question``; at the first call in a process it may be raced.

    ``machine``: all that the choice depends on besides versions, for the file in which it is kept.
    """
    known = _CHOICES.get(question.name)
    if known is not None and _is_of(known, question):
        return known
    if is_fixed():
        return Choice(question.name, question.fixed, "fixed")
    names = ",".join(c.name for c in question.candidates)
    version = f"{torch.__version__} {torch.version.git_version}"
    text = "\0".join((question.name, names, machine, version))
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    kept = _kept(key)
    chosen = kept if kept is not None and _is_of(kept, question) else None
    if chosen is None:
        chosen = race(question)
        _keep(key, chosen)
    chosen = _agreed(key, chosen, question)
    _CHOICES[question.name] = chosen
    _KEPT[_file(key)] = chosen
    return chosen


# --- the race -------------------------------------------------------------------------------------


def race(question: Question, clock: Clock = time.perf_counter) -> Choice:
    """Check and time the candidates."""
    with _alone():
        return _race(question, clock)


def _race(question: Question, clock: Clock) -> Choice:
    inputs = question.inputs(torch.Generator().manual_seed(0))
    plain = question.candidates[-1]
    refused: dict[str, str] = {}
    eager = _results(plain, inputs, refused)
    exact = None
    if eager is not None:
        exact = _results(plain, tuple(_widened(t) for t in inputs), refused)
    if eager is None or exact is None:  # there is nothing to compare with
        return Choice(question.name, question.fixed, "fixed", {}, refused)
    running = []
    for candidate in question.candidates:
        if why := candidate.unavailable():
            refused[candidate.name] = why
            continue
        results = eager if candidate is plain else _results(candidate, inputs, refused)
        if results is None:
            continue
        if candidate is not plain:
            wrong = next(filter(None, map(exceeded, results, eager, exact)), None)
            if wrong is not None or len(results) != len(eager):
                refused[candidate.name] = f"not as exact as eager: {wrong or 'other results'}"
                continue
        running.append(candidate)
    times = _timed(running, inputs, refused, clock)
    return Choice(question.name, _fastest(question, times), "raced", times, refused)


def _timed(
    running: Sequence[Contender], inputs: tuple[Tensor, ...], refused: dict[str, str], clock: Clock
) -> dict[str, float]:
    """The fastest time of each candidate, in microseconds; they take turns."""
    best: dict[str, float] = {}
    begun = clock()
    for number in range(ROUNDS):
        if number and clock() - begun > BUDGET:
            break
        for candidate in running:
            if candidate.name in refused:
                continue
            start = clock()
            if _results(candidate, inputs, refused) is None:
                best.pop(candidate.name, None)
                continue
            taken = 1e6 * (clock() - start)
            best[candidate.name] = min(best.get(candidate.name, taken), taken)
    return best


def _fastest(question: Question, times: dict[str, float]) -> str:
    """The name of the fastest; of those that are as fast, the fixed one, or the earliest."""
    if not times:
        return question.fixed
    limit = min(times.values()) * (1 + MARGIN)
    if times.get(question.fixed, limit + 1) <= limit:
        return question.fixed
    return next(c.name for c in question.candidates if times.get(c.name, limit + 1) <= limit)


def _results(
    candidate: Contender, inputs: tuple[Tensor, ...], refused: dict[str, str]
) -> tuple[Tensor, ...] | None:
    """What a candidate computes; None if it fails, with the reason in ``refused``."""
    try:
        results = candidate.run(*inputs)
    except (RuntimeError, NotImplementedError, MemoryError, ImportError) as error:
        # out of memory is one of the first
        refused[candidate.name] = first_line(error) or type(error).__name__
        return None
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _widened(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the modes, the autocast and the gradient mode of whoever asks, who may be tracing."""
    state = torch.random.get_rng_state()
    with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        try:
            yield
        finally:
            torch.random.set_rng_state(state)


# --- what is kept and shared ----------------------------------------------------------------------


def _is_of(choice: Choice, question: Question) -> bool:
    return any(c.name == choice.candidate for c in question.candidates)


def _read(record: Any, source: str) -> Choice | None:
    """A choice from its record; None if it is none."""
    try:
        times = {str(n): float(t) for n, t in record["microseconds"].items()}
        refused = {str(n): str(why) for n, why in record["refused"].items()}
        question, candidate = record["question"], record["candidate"]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    if not isinstance(question, str) or not isinstance(candidate, str):
        return None
    return Choice(question, candidate, source, times, refused)


def _file(key: str) -> str:
    return f"choice-{key}.json"


def _kept(key: str) -> Choice | None:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return _read(json.loads((kept_folder() / _file(key)).read_text()), "kept")
    return None


def _keep(key: str, choice: Choice) -> None:
    """Write a choice for later processes, of which each sees all of it or nothing."""
    with contextlib.suppress(OSError, RuntimeError):  # such as a folder that is read-only
        write_whole(kept_folder() / _file(key), json.dumps(asdict(choice)).encode())


def _agreed(key: str, mine: Choice, question: Question) -> Choice:
    """The choice that a rank of the job has published first; this one's if none has."""
    if not has_peers():
        return mine
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    try:
        store = PrefixStore("fusewright-choices", _get_default_store())
        text = store.compare_set(key, "", json.dumps(asdict(mine))).decode()
        first = _read(json.loads(text), "shared")
    except Exception:  # a group without a store, as MPI's, or one whose owner has ended
        return mine
    if first is None or not _is_of(first, question):
        return mine
    return mine if first.candidate == mine.candidate else first
