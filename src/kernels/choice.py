"""Choose between the implementations of an op: libraries' kernels, ours, and the plain form.

At the first real call of a *bucket* (dtypes, layouts, and sizes up to powers of two), each
candidate is verified against the plain form in higher precision, by the rule that judges rewrites
(``tolerance.py``), and timed. Both are done on tensors that this module draws. The fastest
candidate runs from then on: ours, unless another one is faster by more than ``MARGIN``. If it fails
later, the next one computes the call (``fallback.py``), the plain form last.

A choice is made once for a machine. It is kept as a file in the folder of compiled kernels, which
later processes read; while one process measures, others wait. The ranks of a job do not wait for
each other: they would block collectives. They measure, and take the choice that was kept first.
If the plain form cannot be run for comparison, our kernel runs and nothing is kept. Nothing is
measured while a compiler traces, a CUDA graph is captured or a rewrite is verified.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..errors import first_line
from .fallback import (
    UNABLE,
    LaunchError,
    attempt,
    is_capturing,
    is_launch_failure,
    is_of_device,
    is_strict,
)
from .fork_lock import ForkLock
from .native.build import kept_folder, sources, write_whole
from .processor import instruction_set
from .saved_tensors import without_saved_tensor_hooks
from .tolerance import exceeded

OWN, PLAIN = "own", "plain"
"""The names of the op's kernel and of its plain form among the candidates."""

MARGIN = 0.03
"""A candidate replaces ours only if it is faster by more than this share; less is noise."""

ROUNDS = 5
"""Calls of a candidate that are timed on a CPU; the fastest counts."""

DEVICES = ("cuda",)
"""The types of devices where candidates are measured; elsewhere, ours and the plain form run."""

DRAWS = 4
"""Draws of inputs that decide on a candidate whose error is too large in one draw."""

PATIENCE = 120.0
"""Seconds to wait for another process that measures."""

_MOST = 4096
"""Kinds of calls that an op remembers: batches whose lengths vary have many."""


@dataclass(frozen=True)
class Implementation:
    """An implementation of an op.

    ``run`` has the op's signature. ``unavailable`` takes the same arguments, and returns the reason
    why this implementation cannot compute the call, or an empty string.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[..., str] = lambda *_: ""


def drawn(args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    """Draw arguments like those of a call: random floating-point numbers, equal integers."""
    # a call's own numbers may be zeros, as the gradients of an adapter are in its first step: by
    # these, every candidate is right
    result: tuple[Any, ...] = tree_map_only(Tensor, functools.partial(_redrawn, generator), args)
    return result


def _redrawn(generator: torch.Generator, t: Tensor) -> Tensor:
    sizes = [1 if s == 0 else n for n, s in zip(t.shape, t.stride(), strict=True)]
    new = torch.empty_strided(sizes, t.stride(), dtype=t.dtype, device=t.device)
    if t.is_floating_point():
        new.normal_(generator=generator)
    else:
        new.copy_(t.detach().as_strided(sizes, t.stride(), t.storage_offset()))
    return new.expand(t.shape)


@dataclass(frozen=True)
class Choice:
    """The candidate that was chosen for a bucket.

    Attributes:
        bucket: the op and the kind of calls.
        candidate: the name of the chosen one.
        source: ``measured``, ``kept`` (by an earlier process or another rank), ``resumed`` (by the
            run that is continued) or ``unmeasured`` (the plain form or ours ran out of memory).
        microseconds: the time of each candidate that was timed.
        refused: the reasons why others were not, by name.
    """

    bucket: str
    candidate: str
    source: str = "measured"
    microseconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = sorted(self.microseconds.items(), key=lambda item: item[1])
        parts = [self.source, ", ".join(f"{name} {time:,.0f} us" for name, time in times)]
        parts += [f"{name} refused: {reason}" for name, reason in self.refused.items()]
        return f"{self.bucket}: {self.candidate} ({'; '.join(filter(None, parts))})"


_CHOICES: dict[tuple[str, str], Choice] = {}
"""By hash of the machine, and bucket: choices of this process, or of a run that it continues."""

_OPS: dict[str, CandidateOp] = {}
"""The ops with candidates, by name."""

_choosing = ForkLock()
"""Held while a thread measures: measurements side by side would disturb each other."""


def choices(device: torch.device) -> list[Choice]:
    """The choices of this process for devices like ``device``."""
    here = _hash(machine(device))
    return [choice for (on, _), choice in _CHOICES.items() if on == here]


def records() -> list[dict[str, Any]]:
    """The choices of this process, for ``adopt``."""
    return [asdict(choice) | {"machine": on} for (on, _), choice in _CHOICES.items()]


def adopt(earlier: Iterable[dict[str, Any]]) -> None:
    """Choose as the run did that is continued. Damaged records are left out."""
    for record in earlier:
        choice = _read(record, "resumed")
        if choice is not None and isinstance(record.get("machine"), str):
            _CHOICES[record["machine"], choice.bucket] = choice
    for op in _OPS.values():
        op.forget()


class CandidateOp:
    """A library op with several implementations.

    Args:
        name: of the library op.
        own: launches the op's kernel.
        plain: its plain form, with the same signature.
        libraries: the other implementations.
        inputs: draws arguments like those of a call.
        declared: from arguments, results as compilers plan for them, on the device ``meta``.
    """

    def __init__(
        self, name: str, own: Callable[..., Any], plain: Callable[..., Any],
        libraries: Sequence[Implementation], inputs: Callable[..., tuple[Any, ...]],
        declared: Callable[..., Any],
    ) -> None:  # fmt: skip
        self.name, self._inputs, self._declared = name, inputs, declared
        self.candidates = (*libraries, Implementation(OWN, own), Implementation(PLAIN, plain))
        self._orders: dict[Any, tuple[Implementation, ...]] = {}
        _OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        """Return the results of the first candidate that runs."""
        order = self._order(args) if _device(args).type in DEVICES else self.candidates[-2:]
        for i, candidate in enumerate(order, 1):
            if candidate.name == PLAIN:
                return candidate.run(*args)
            if candidate.name == OWN:
                has_next = i < len(order) and order[i].name != PLAIN
                instead = None if has_next else "plain PyTorch"
                result = attempt(self.name, candidate.run, args, is_launch_failure, instead)
            else:
                name = f"{self.name} by {candidate.name}"
                result = attempt(name, candidate.run, args, _is_of_the_call, None)
            if result is not UNABLE:
                return result
        raise LaunchError(f"no kernel of {self.name} could be compiled or launched")

    def forget(self) -> None:
        """Decide again which candidate runs first: choices were adopted."""
        self._orders.clear()

    def bucket(self, args: tuple[Any, ...]) -> str:
        """The name of the kind of calls that share a choice."""
        deterministic, precision = _modes()
        modes = ", deterministic" * deterministic + f", {precision}" * (precision == "tf32")
        return f"{self.name}({', '.join(_kinds(args))}){modes}"

    def _order(self, args: tuple[Any, ...]) -> tuple[Implementation, ...]:
        """The candidates in the order in which they are tried."""
        key = _device(args), _modes(), _key(args)
        order = self._orders.get(key)
        if order is None:
            choice = self._choice(args)
            order = self._sorted(choice, args)
            if choice is not None:
                if len(self._orders) >= _MOST:
                    self._orders.clear()
                self._orders[key] = order
        if is_strict() and len(order) > 1:  # then the plain form replaces no kernel
            return order[:-1]
        return order

    def _sorted(self, choice: Choice | None, args: tuple[Any, ...]) -> tuple[Implementation, ...]:
        """Return the implementations that can compute the call: the chosen one, ours, others."""
        refused = {} if choice is None else choice.refused
        leading = [OWN] if choice is None else [choice.candidate, OWN]
        able = [
            c
            for c in self.candidates
            if c.name == PLAIN or (c.name not in refused and not c.unavailable(*args))
        ]
        able.sort(key=lambda c: leading.index(c.name) if c.name in leading else len(leading))
        names = [c.name for c in able]
        return tuple(able[: names.index(PLAIN) + 1])  # which never fails

    def _choice(self, args: tuple[Any, ...]) -> Choice | None:
        """The choice for the bucket of a call; None while it may not be made."""
        here, bucket = _hash(machine(_device(args))), self.bucket(args)
        found = self._valid(_CHOICES.get((here, bucket)))
        if found is not None or not _may_measure(args):
            return found
        names = ",".join(c.name for c in self.candidates)
        version = f"{torch.__version__} {torch.version.git_version} {_sources()}"
        file = f"choice-{_hash(chr(0).join((bucket, names, here, version)))}.json"
        with _choosing:
            found = self._valid(_CHOICES.get((here, bucket)))  # of another thread
            found = found or self._kept(file)
            measured = None
            if found is None and _has_peers():  # measuring waits for the GPU, which waits for them
                measured = self.measure(args)
            if found is None:
                with _folder_alone():
                    found = self._kept(file) or self._keep(file, measured or self.measure(args))
            _CHOICES[here, bucket] = found
        return found

    def _kept(self, file: str) -> Choice | None:
        """The choice that a process has kept in a file."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            return self._valid(_read(json.loads((kept_folder() / file).read_text()), "kept"))
        return None

    def _keep(self, file: str, found: Choice) -> Choice:
        """Keep a choice in a file, if another process would choose alike."""
        if found.source == "measured" and NO_MEMORY not in found.refused.values():
            with contextlib.suppress(OSError, RuntimeError):
                write_whole(kept_folder() / file, json.dumps(asdict(found)).encode())
        return found

    def _valid(self, choice: Choice | None) -> Choice | None:
        names = [c.name for c in self.candidates]
        return choice if choice is not None and choice.candidate in names else None

    # --- measuring --------------------------------------------------------------------------------

    def measure(self, args: tuple[Any, ...]) -> Choice:
        """Verify and time the candidates on tensors like ``args``.

        Raises:
            Exception: an error of the device, which may come from an earlier call.
        """
        device, times, refused = _device(args), dict[str, float](), dict[str, str]()
        with _alone(device):
            for candidate in self.candidates:
                try:
                    why = candidate.unavailable(*args)
                    if not why and candidate.name != PLAIN and self._error(candidate, args, 1):
                        why = self._error(candidate, args, DRAWS)  # one draw is a matter of luck
                    if not why:
                        inputs = self._drawn(args, 0)
                        run = functools.partial(candidate.run, *inputs)
                        times[candidate.name] = timed(device, run)
                except Exception as error:  # also of a library's or of Triton's own kind
                    if is_of_device(error) and not is_launch_failure(error):
                        raise
                    is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
                    if isinstance(error, _Unjudged) or (is_memory and candidate.name == OWN):
                        return Choice(self.bucket(args), OWN, "unmeasured", times, refused)
                    why = NO_MEMORY if is_memory else first_line(error) or type(error).__name__
                if why:
                    refused[candidate.name] = why
        limit = min(times.values(), default=0.0) * (1 + MARGIN)
        fast = [name for name, taken in times.items() if taken <= limit] or [OWN]
        chosen = OWN if OWN in fast else fast[0]
        return Choice(self.bucket(args), chosen, "measured", times, refused)

    def _drawn(self, args: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
        return self._inputs(args, torch.Generator(_device(args)).manual_seed(seed))

    def _error(self, candidate: Implementation, args: tuple[Any, ...], draws: int) -> str:
        """Why the results of a candidate are wrong in several draws; empty if they are right."""
        runs, plain = [], self.candidates[-1]
        for seed in range(draws):
            try:
                inputs = self._drawn(args, seed)
                declared, theirs = _listed(self._declared(*inputs)), _listed(plain.run(*inputs))
                with _without_tf32(_device(args)):
                    truth = _listed(plain.run(*tree_map_only(Tensor, _widened, inputs)))
            except Exception as error:
                if is_of_device(error):
                    raise
                raise _Unjudged(first_line(error)) from error
            mine = _listed(candidate.run(*inputs))
            if why := next(filter(None, map(_other_layout, mine, declared)), ""):
                return str(why)
            runs.append((mine, theirs, truth))
        kinds = [list(zip(*kind, strict=True)) for kind in zip(*runs, strict=True)]
        for results in zip(*kinds, strict=True):
            ours, eager, exact = (torch.stack(t) if draws > 1 else t[0] for t in results)
            inexact = exceeded(ours, eager, exact, draws)
            if inexact is not None:
                return f"not as exact as eager: {inexact}"
        return ""


class _Unjudged(Exception):
    """The plain form, with which candidates are compared, cannot be run."""


NO_MEMORY = "out of memory"
"""The reason for refusing a candidate that another process may be able to run."""


def timed(device: torch.device, run: Callable[[], Any]) -> float:
    """The microseconds of a call, the least of several."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e3 * float(do_bench(run, return_mode="min"))
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return 1e6 * min(times)


def _other_layout(ours: Tensor, declared: Tensor) -> str:
    """Describe how a result differs from the one that a compiler has planned for."""
    if ours.shape != declared.shape or ours.dtype is not declared.dtype:
        return f"{ours.dtype} {tuple(ours.shape)}, not {declared.dtype} {tuple(declared.shape)}"
    if ours.numel() and ours.stride() != declared.stride():
        return f"strides {ours.stride()} instead of {declared.stride()}"
    return ""


def _widened(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.to(torch.float32 if t.dtype.itemsize < 4 else torch.float64)


@contextlib.contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Without the caller's modes, hooks, autocast and gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_saved_tensor_hooks())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if device.type == "cuda":
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if device.type == "cuda":
            matmul.fp32_precision = before


def _modes() -> tuple[bool, str]:
    """PyTorch's modes that decide which kernels run, and how fast."""
    precision = str(torch.backends.cuda.matmul.fp32_precision)
    return torch.are_deterministic_algorithms_enabled(), precision


def _has_peers() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def _folder_alone() -> Iterator[None]:
    """Hold the lock of the folder of choices, unless it is held for too long."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, RuntimeError):  # TimeoutError is an OSError
            lock = FileLock(kept_folder() / "choices.lock", mode=0o600, timeout=PATIENCE)
            stack.enter_context(lock)
        yield


def _read(record: Any, source: str) -> Choice | None:
    """A choice from its record; None if it is none."""
    try:
        times = {str(n): float(t) for n, t in record["microseconds"].items()}
        refused = {str(n): str(why) for n, why in record["refused"].items()}
        bucket, candidate = record["bucket"], record["candidate"]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    if not isinstance(bucket, str) or not isinstance(candidate, str):
        return None
    return Choice(bucket, candidate, source, times, refused)


@functools.lru_cache(maxsize=64)
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    return sources(Path(__file__).parent)


@functools.cache
def triton_version() -> str:
    """The version of Triton, which is not imported; empty without one."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


@functools.cache
def machine(device: torch.device) -> str:
    """Return what a choice on ``device`` depends on, besides PyTorch's and our versions."""
    if device.type == "cpu":
        return f"{instruction_set()}\0{torch.get_num_threads()}"
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version()
    versions = torch.version.cuda, torch.version.hip, cudnn, triton_version()
    return f"{properties.name}\0{properties.major}.{properties.minor}\0{versions}"


# --- calls ----------------------------------------------------------------------------------------


def _is_of_the_call(error: Exception) -> bool:
    """True if a library failed by itself, not for lack of memory or because of the GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return False
    return not is_of_device(error) or is_launch_failure(error)


def _may_measure(args: tuple[Any, ...]) -> bool:
    if is_strict() or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if any(type(t) not in (Tensor, Parameter) for t in _tensors(args)):
        return False
    # nothing may wait for a GPU while a CUDA graph is captured, or where waiting is an error
    is_watched = _device(args).type == "cuda" and torch.cuda.get_sync_debug_mode()
    return not is_watched and not is_capturing()


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found += _tensors(a)
    return found


def _device(args: Sequence[Any]) -> torch.device:
    first = args[0]
    device: torch.device = first.device if type(first) is Tensor else _tensors(args)[0].device
    return device


def _key(args: Iterable[Any]) -> tuple[Any, ...]:
    """Equal for calls that are alike in all but their values: made at each call."""
    key: list[Any] = []
    for a in args:
        kind = type(a)  # Tensor's isinstance takes as long as all else here
        if kind is Tensor or kind is Parameter:
            key += (a.dtype, a.shape, a.stride())
        elif kind is list or kind is tuple:
            key.append(_key(a))
        elif issubclass(kind, Tensor):  # which would be kept alive
            key += (kind, a.dtype, a.shape, a.stride())
        else:
            key.append(a)
    return tuple(key)


def _kinds(args: Iterable[Any]) -> list[str]:
    """For each argument, its part of the bucket: dtype, sizes and order in memory, or a flag."""
    texts = []
    for a in args:
        if isinstance(a, Tensor):
            sizes = "x".join(str(1 << max(0, n - 1).bit_length()) for n in a.shape)
            order = sorted(range(a.dim()), key=lambda i, t=a: (-t.stride(i), i))  # type: ignore[misc]
            plain = order == list(range(a.dim())) and 0 not in a.stride()
            dims = "" if plain else "/" + "".join("_" if not a.stride(i) else str(i) for i in order)
            texts.append(f"{str(a.dtype).removeprefix('torch.')}[{sizes}]{dims}")
        elif isinstance(a, (list, tuple)):
            texts.append(f"[{', '.join(_kinds(a))}]")
        elif isinstance(a, (int, float)) and not isinstance(a, bool):
            texts.append("n" if a else "0")
        else:
            texts.append("-" if a is None else str(a))
    return texts
