"""Which form of a computation is the fastest on this machine: each is checked, timed, and kept.

A ``Question`` has candidates. They are *raced* on tensors of its own making, never on a caller's:
a candidate that cannot run here, fails, needs too much memory or is not as exact as the plain form
is left out with the reason; the others take turns under the clock, and the fastest is chosen, or
the one that the project's own measurements name (``fixed``) unless another is faster by more than
``MARGIN``. A choice is made once for a machine: it is kept in the folder of compiled kernels, and
the ranks of a job take the one that was published first. Where other programs take the CPU away
from a race, another candidate than ``fixed`` must be faster by the clock and in processor time, and
the choice is not kept. ``FUSEWRIGHT_CHOICES=fixed``
measures nothing, and when the races of a process have taken ``ALLOWANCE``, no more begin.

What is asked of a CPU is in ``candidates.py``, of the calls of ops in ``raced_op.py``, of whole
blocks in ``compiler/block_races.py``. The rule by which candidates are found right is that of
rewrites (``tolerance.py``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..errors import FusewrightError, first_line
from ..sharding import has_peers
from .fork_lock import ForkLock
from .native.build import kept_folder, sources, write_whole
from .saved_tensors import without_saved_tensor_hooks
from .tolerance import EXCEEDS, PEAK, exceeded

resource: Any
try:
    import resource
except ImportError:  # on Windows
    resource = None

VARIABLE = "FUSEWRIGHT_CHOICES"
"""``fixed``: nothing is measured; ``ops``: all but whole blocks; ``raced``, the default: all."""

MARGIN = 0.03
"""So much faster a candidate must be than the fixed one, or than an earlier one, to take its place.

Less is noise, and a choice that changes from run to run would change the last digits of results.
"""

ROUNDS = 5
"""So often each candidate is timed, in turns; its fastest time counts."""

DRAWS = 4
"""Of inputs, that judge a candidate whose largest error alone is outside the tolerance."""

BUDGET = 2.0
"""Seconds that one race may take: then no more rounds begin, and one is enough."""

ALLOWANCE = 60.0
"""Seconds that all races of a process may take; what the fixed candidate needs to compile, which a
run pays anyway, is not counted."""

FEW, DISTURBED = 3, 30.0
"""So often, and so often in a second, the CPU may be taken from a thread of a race on a machine
with nothing else to do; where other programs compete for it, it is some hundred times."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """How candidates are timed.

    Attributes:
        rounds: so often each of them is, in turns; its fastest time counts.
        least: rounds that are made however long they take.
        seconds: after which no more rounds begin.
        margin: so much faster another one must be than the fixed one.
        with_host: on a GPU, the time until its host has launched everything counts. That is noisy:
            another one must also be faster by more than the fastest times of each form differ.
    """

    rounds: int = ROUNDS
    least: int = 1
    seconds: float = BUDGET
    margin: float = MARGIN
    with_host: bool = False


_CPU = torch.device("cpu")


def _itself(inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> Sequence[Tensor]:
    return results


@dataclass(frozen=True)
class Contender:
    """One form of a computation.

    ``run`` takes the question's inputs and returns a tensor or several. ``unavailable`` is given
    them, too, and says why they cannot be taken here; empty if they can.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[..., str] = lambda *_: ""


@dataclass(frozen=True)
class Question:
    """What is to be chosen.

    Attributes:
        name: as it is kept and shown, with what the choice depends on besides the machine, such as
            ``"products in bfloat16"``.
        candidates: of which the last is the plain form, as PyTorch computes it.
        inputs: makes what they run on, from a generator of ``device``: tensors and constants.
        fixed: the name of the candidate that is taken where nothing is measured.
        device: where they run.
        exact: the dtype in which the plain form's results count as the truth; None where all
            candidates are known to be right, and ``inputs`` has called them.
        compared: what of the inputs and a candidate's results is compared, by default the results.
        timing: how they are timed.
    """

    name: str
    candidates: tuple[Contender, ...]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    fixed: str
    device: torch.device = _CPU
    exact: torch.dtype | None = torch.float64
    compared: Callable[[tuple[Any, ...], tuple[Tensor, ...]], Sequence[Tensor]] = _itself
    timing: Timing = Timing()


@dataclass(frozen=True)
class Choice:
    """The answer to a question.

    Attributes:
        question: its name.
        candidate: the name of the chosen one.
        source: ``raced``, ``BUSY`` (raced while other programs had the CPU), ``fixed``, ``kept``
            (raced by an earlier process), ``shared`` (by another rank, which will keep it),
            ``resumed`` (by the run that is continued) or ``LATE`` (no race began any more).
        microseconds: of each candidate that was timed, its fastest; of the processor where the
            source is ``BUSY``.
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
        if timed and times[0][0] != self.candidate:
            timed += f", where {times[0][0]} is not faster by more than the margin and noise"
        return text + (f"; {timed}" if timed else "") + (f"; {why}" if why else "") + ")"


_CHOICES: dict[tuple[str, str], Choice] = {}
"""By hash of the machine, and question: what this process chose, or a run that it continues."""

ANY = "any"
"""The machine of a choice that ``adopt`` takes on every one: benchmarks force them."""

_choosing = ForkLock()
"""Held while one thread chooses: races side by side would time each other."""

NO_MEMORY = "out of memory"
"""Why a candidate is refused for which there was none; there may be in the next process."""

LATE = f"fixed: races have had their {ALLOWANCE:.0f} s"
"""The source of what was chosen after the races' time."""


BUSY = "raced by the clock and by processor time, as other programs took the CPU, and not kept"
"""The source of what was chosen meanwhile."""

_PASSING = ("fixed", LATE, BUSY)
"""Sources of what another process would choose by races of its own."""


class _Spent:
    """What the races of this process have taken."""

    seconds = 0.0


_spent = _Spent()


_KEPT: dict[str, dict[str, Any]] = {}
"""By the name of its file: of those, what is kept for the machine."""


def files() -> dict[str, str]:
    """What this process has chosen and keeps for the machine, as files: name and content."""
    return {name: json.dumps(record) for name, record in _KEPT.items()}


def choices(machine: str | None = None) -> list[Choice]:
    """What this process has chosen so far; with a ``machine``, only what depends on just that."""
    hashes = {on for on, _ in _CHOICES} if machine is None else {ANY, _hash(machine)}
    return [choice for (on, _), choice in _CHOICES.items() if on in hashes]


def is_fixed() -> bool:
    """Whether nothing may be measured.

    Raises FusewrightError if the variable has another value than those that it knows.
    """
    return _raced() == "fixed"


def are_blocks_raced() -> bool:
    """Whether whole blocks may be measured; raises as ``is_fixed``."""
    return _raced() == "raced"


def _raced() -> str:
    value = os.environ.get(VARIABLE, "raced")
    if value not in ("raced", "ops", "fixed"):
        raise FusewrightError(f"{VARIABLE}={value!r} is neither raced nor ops nor fixed")
    return value


def adopt(earlier: Iterable[dict[str, Any]]) -> None:
    """Choose as the run that is continued did, so that it continues bit for bit.

    On another machine its choices are neither right nor fast by what is known, and it races anew.
    What is not the record of a choice is left out: it was written by another version.
    """
    for record in earlier:
        choice = _read(record, "resumed")
        if choice is not None and isinstance(record.get("machine"), str):
            _CHOICES[record["machine"], choice.question] = choice


def records() -> list[dict[str, Any]]:
    """What ``adopt`` takes, for a run's files."""
    return [asdict(choice) | {"machine": machine} for (machine, _), choice in _CHOICES.items()]


def known(question: Question, machine: str = "") -> Choice | None:
    """What this process has chosen; None if it has not, or by candidates that are not there."""
    found = (_CHOICES.get((on, question.name)) for on in (ANY, _hash(machine)))
    return next((c for c in found if c is not None and _is_of(c, question)), None)


def choose(question: Question, machine: str = "") -> Choice:
    """The choice for ``question``; at the first call in a process it may be raced.

    ``machine``: all that the choice depends on besides versions, for the file in which it is kept.
    """
    if is_fixed():
        return known(question, machine) or Choice(question.name, question.fixed, "fixed")
    with _choosing:
        return known(question, machine) or _chosen(question, machine)


def _chosen(question: Question, machine: str) -> Choice:
    names = ",".join(c.name for c in question.candidates)
    version = f"{torch.__version__} {torch.version.git_version} {_sources()}"
    text = "\0".join((question.name, names, machine, version))
    key = _hash(text)
    kept = _kept(key)
    chosen = kept if kept is not None and _is_of(kept, question) else None
    if chosen is None and _spent.seconds > ALLOWANCE:
        chosen = Choice(question.name, question.fixed, LATE)
    if chosen is None:
        chosen = race(question)
        if _is_lasting(chosen):
            _keep(key, chosen, machine)
    chosen = _agreed(key, chosen, question)
    _CHOICES[_hash(machine), question.name] = chosen
    if _is_lasting(chosen):
        _KEPT[_file(key)] = _record(chosen, machine)
    return chosen


@functools.lru_cache(maxsize=64)
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_lasting(choice: Choice) -> bool:
    """Whether all that could be raced was raced: another process would find the same."""
    return choice.source not in _PASSING and not any(
        NO_MEMORY in why for why in choice.refused.values()
    )


@functools.cache
def triton_version() -> str:
    """The version of Triton, which is not imported; empty without one."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


@functools.cache
def _sources() -> str:
    return sources(Path(__file__).parent)


# --- the race -------------------------------------------------------------------------------------


def race(question: Question, clock: Clock = time.perf_counter) -> Choice:
    """Check and time the candidates."""
    try:
        with _alone(question.device):
            return _race(question, clock)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _not_raced(question, error)


def _not_raced(question: Question, error: Exception) -> Choice:
    refused = {"every other": f"could not be raced: {first_line(error)}"}
    return Choice(question.name, question.fixed, "fixed", {}, refused)


def _race(question: Question, clock: Clock) -> Choice:
    plain = question.candidates[-1]
    refused: dict[str, str] = {}
    try:
        inputs = question.inputs(torch.Generator(question.device).manual_seed(0))
    except Exception as error:  # there may be no memory for them
        return _not_raced(question, error)
    begun = clock()
    running = list(question.candidates)
    if question.exact is not None:
        eager = _compared(question, plain, inputs, refused)
        exact = None if eager is None else _exact(question, inputs, refused)
        if eager is None or exact is None:  # there is nothing to compare with
            return Choice(question.name, question.fixed, "fixed", {}, refused)
        running.clear()
        for candidate in question.candidates:
            start = clock()
            if candidate is plain or _is_right(question, candidate, inputs, eager, exact, refused):
                running.append(candidate)
            if candidate.name == question.fixed:  # which is compiled for the run in any case
                begun += clock() - start
        del eager, exact
    times, busy = _timed(question, running, inputs, refused, clock)
    _spent.seconds += clock() - begun
    fastest, source = _fastest(question, times), "raced"
    if busy:
        # the clock counts other programs, the processor's time all threads of a form together
        if fastest != _fastest(question, busy) and question.fixed in times:
            fastest = question.fixed
        times, source = busy, BUSY
    best = {name: min(taken) for name, taken in times.items()}
    return Choice(question.name, fastest, source, best, refused)


def _is_right(
    question: Question, candidate: Contender, inputs: tuple[Any, ...], eager: Sequence[Tensor],
    exact: Sequence[Tensor], refused: dict[str, str],
) -> bool:  # fmt: skip
    """Whether a candidate takes the inputs and is as exact as the plain form; why not is noted."""
    if why := candidate.unavailable(*inputs):
        refused[candidate.name] = why
        return False
    results = _compared(question, candidate, inputs, refused)
    if results is None:
        return False
    wrong = "other results"
    if len(results) == len(eager):
        wrong = next(filter(None, map(exceeded, results, eager, exact)), "")
    del results
    if EXCEEDS in wrong and PEAK in wrong:  # a matter of luck
        wrong = _wrong_in_several(question, candidate)
    if wrong:
        refused[candidate.name] = f"not as exact as eager: {wrong}"
    return candidate.name not in refused


def _exact(
    question: Question, inputs: tuple[Any, ...], refused: dict[str, str]
) -> list[Tensor] | None:
    with _full_precision(question.device):
        assert question.exact is not None
        wide = tree_map_only(Tensor, functools.partial(_widened, question.exact), inputs)
        return _compared(question, question.candidates[-1], wide, refused)


def _wrong_in_several(question: Question, candidate: Contender) -> str:
    """What is wrong in several draws together, as in ``rewrite/verify.py``; empty: nothing is."""
    runs, failed = list[list[list[Tensor]]](), dict[str, str]()
    for seed in range(DRAWS):
        inputs = question.inputs(torch.Generator(question.device).manual_seed(seed))
        forms = candidate, question.candidates[-1]
        run = [*(_compared(question, form, inputs, failed) for form in forms)]
        run.append(_exact(question, inputs, failed))
        if failed:
            return f"in {DRAWS} draws of inputs, {'; '.join(failed.values())}"
        runs.append([results for results in run if results is not None])
    kinds = [[torch.stack(t) for t in zip(*kind, strict=True)] for kind in zip(*runs, strict=True)]
    judge = functools.partial(exceeded, draws=DRAWS)
    return next(filter(None, map(judge, *kinds)), "")


def _timed(
    question: Question, running: Sequence[Contender], inputs: tuple[Any, ...],
    refused: dict[str, str], clock: Clock,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:  # fmt: skip
    """The times of each candidate, in microseconds, by the clock and of the processor.

    They take turns. The latter are empty unless other programs have taken the CPU.
    """
    times: dict[str, list[float]] = {}
    by_processor: dict[str, list[float]] = {}
    begun, taken_away, timing = clock(), _switches(), question.timing
    on_gpu = question.device.type == "cuda"
    stopwatch = _Events(question.device, timing.with_host) if on_gpu else _Wall(clock)
    for number in range(timing.rounds):
        if number >= timing.least and clock() - begun > timing.seconds:
            break
        for candidate in running:
            if candidate.name in refused:
                continue
            stopwatch.start()
            cpu = time.process_time()
            if _results(candidate, inputs, refused) is None:
                times.pop(candidate.name, None)
                by_processor.pop(candidate.name, None)
                continue
            times.setdefault(candidate.name, []).append(1e6 * stopwatch.seconds())
            spent = 1e6 * (time.process_time() - cpu)
            by_processor.setdefault(candidate.name, []).append(spent)
    often = FEW + DISTURBED * torch.get_num_threads() * (clock() - begun)
    busy = not on_gpu and _switches() - taken_away > often
    return times, by_processor if busy else {}


def _switches() -> int:
    """How often the CPU was taken from a thread of this process, as far as the system says."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class _Wall:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def start(self) -> None:
        self._begun = self._clock()

    def seconds(self) -> float:
        return self._clock() - self._begun


class _Events:
    """The time that a GPU takes, with nothing of earlier calls in its cache."""

    # The host, which is slower than small kernels, gets ahead while the GPU sleeps (about 4 ms):
    # what is timed is the GPU, also where a step waits for its host. CUDA graphs are for that.
    # Without the sleep, all that the GPU waits for its host is in the time.
    CYCLES = 8_000_000

    def __init__(self, device: torch.device, with_host: bool = False) -> None:
        self._device, self._sleeps = device, not with_host
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flushed = torch.empty(2 * cache, dtype=torch.int8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._flushed.zero_()
        if self._sleeps:
            torch.cuda._sleep(self.CYCLES)
        else:  # nor is the GPU to be busy with what was before
            torch.cuda.synchronize(self._device)
        self._begin.record()

    def seconds(self) -> float:
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


def _fastest(question: Question, times: dict[str, list[float]]) -> str:
    """The name of the fastest; of those that are as fast, the fixed one, or the earliest."""
    if not times:
        return question.fixed
    margin, best = question.timing.margin, {name: min(taken) for name, taken in times.items()}
    if question.timing.with_host:
        margin = max(margin, *map(_noise, times.values()))
    limit = min(best.values()) * (1 + margin)
    if best.get(question.fixed, limit + 1) <= limit:
        return question.fixed
    return next(c.name for c in question.candidates if best.get(c.name, limit + 1) <= limit)


def _noise(taken: Sequence[float]) -> float:
    """By how much of it the fastest time is faster than the second one."""
    first, second = sorted(taken)[:2] if len(taken) > 1 else (1.0, 1.0)
    return second / first - 1


def _compared(
    question: Question, candidate: Contender, inputs: tuple[Any, ...], refused: dict[str, str]
) -> list[Tensor] | None:
    results = _results(candidate, inputs, refused)
    if results is None:
        return None
    try:
        return list(question.compared(inputs, results))
    except Exception as error:  # what is no result of the plain form's kind
        refused[candidate.name] = first_line(error) or type(error).__name__
        return None


def _results(
    candidate: Contender, inputs: tuple[Any, ...], refused: dict[str, str]
) -> tuple[Tensor, ...] | None:
    """What a candidate computes; None if it fails, with the reason in ``refused``."""
    try:
        results = candidate.run(*inputs)
    except (torch.OutOfMemoryError, MemoryError):
        refused[candidate.name] = NO_MEMORY
        return None
    except Exception as error:  # also of a library's or of Triton's own kind
        refused[candidate.name] = first_line(error) or type(error).__name__
        return None
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _widened(dtype: torch.dtype, t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.detach().to(dtype).requires_grad_(t.requires_grad)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Without tf32 in products of fp32: what is computed is the truth."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Without the modes, hooks, autocast and gradient mode of whoever asks, who may be tracing."""
    state = torch.random.get_rng_state()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_saved_tensor_hooks())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.random.fork_rng([device]))
            stack.enter_context(torch.cuda.device(device))  # whose stream is timed
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


def earlier(machine: str) -> list[Choice]:
    """What processes have raced on ``machine``, with any version, by question."""
    found = []
    with contextlib.suppress(OSError, RuntimeError):
        for path in kept_folder().glob("choice-*.json"):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_text())
                if isinstance(record, dict) and record.get("machine") == machine:
                    found.append(_read(record, "kept"))
    return sorted(filter(None, found), key=lambda choice: choice.question)


def _record(choice: Choice, machine: str) -> dict[str, Any]:
    return asdict(choice) | {"machine": machine}


def _file(key: str) -> str:
    return f"choice-{key}.json"


def _kept(key: str) -> Choice | None:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return _read(json.loads((kept_folder() / _file(key)).read_text()), "kept")
    return None


def _keep(key: str, choice: Choice, machine: str) -> None:
    """Write a choice for later processes, of which each sees all of it or nothing."""
    with contextlib.suppress(OSError, RuntimeError):  # such as a folder that is read-only
        text = json.dumps(_record(choice, machine))
        write_whole(kept_folder() / _file(key), text.encode())


def _agreed(key: str, mine: Choice, question: Question) -> Choice:
    """The choice that a rank of the job has published first; this one's if none has."""
    if not has_peers():
        return mine
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    try:
        store = PrefixStore("fusewright-choices", _get_default_store())
        text = store.compare_set(key, "", json.dumps(asdict(mine))).decode()
        record = json.loads(text)
        source = record.get("source")
        first = _read(record, source if source in _PASSING else "shared")
    except Exception:  # a group without a store, as MPI's, or one whose owner has ended
        return mine
    if first is None or not _is_of(first, question):
        return mine
    return mine if first.candidate == mine.candidate else first
