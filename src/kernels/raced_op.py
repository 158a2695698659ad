"""Calls of an op by the fastest of its candidates, on the machine and for the sizes at hand.

An op that launches a kernel of ours may have *contenders*: what libraries have for the same, with
the op's own signature. They are raced (``choice.py``) with the kernel and the plain form at the
first real call of a *bucket*: its dtypes, layouts and features, and its tokens up to a power of
two. Forward and backward are ops, and buckets, of their own: all forms of the one keep what all
forms of the other read.

Every form follows the chosen one, the plain form last. So where a form fails later, the next one
computes the call (``fallback.py``), and where nothing may be measured, they run in the order in
which they are written. That is where a compiler traces, a CUDA graph is captured, a rewrite is
verified, or choices are fixed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from .choice import Choice, Contender, Question, choose, is_fixed, known, triton_version
from .fallback import (
    UNABLE,
    LaunchError,
    attempt,
    is_capturing,
    is_launch_failure,
    is_of_device,
    is_strict,
)
from .processor import instruction_set

OWN, PLAIN = "own", "plain"
"""The names of the op's kernel and of its plain form among the candidates."""

_MOST = 4096
"""Kinds of calls that are remembered: batches whose lengths vary have many."""

Results = tuple[Tensor, ...]


def drawn(args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    """Arguments like those of a call: other floating-point numbers, equal whole ones.

    A call's own numbers may be zeros, as the gradients of an adapter are in its first step: by
    these, every candidate is right.
    """
    result: tuple[Any, ...] = tree_map_only(Tensor, functools.partial(_redrawn, generator), args)
    return result


def _redrawn(generator: torch.Generator, t: Tensor) -> Tensor:
    new, sizes = like(t)
    if t.is_floating_point():
        new.normal_(generator=generator)
    else:
        new.copy_(t.detach().as_strided(sizes, t.stride(), t.storage_offset()))
    return new.expand(t.shape)


def like(t: Tensor) -> tuple[Tensor, list[int]]:
    """Memory in the layout of ``t``, and its shape, which is 1 where ``t`` is expanded."""
    sizes = [1 if s == 0 else n for n, s in zip(t.shape, t.stride(), strict=True)]
    return torch.empty_strided(sizes, t.stride(), dtype=t.dtype, device=t.device), sizes


def wide_enough(dtype: torch.dtype) -> torch.dtype:
    """In which results of ``dtype`` are exact: GPUs for games take 64 times as long in fp64."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def _results_themselves(args: tuple[Any, ...], results: Results) -> Sequence[Tensor]:
    return results


@dataclass(frozen=True)
class Contest:
    """Whom an op's kernel is raced with, and how.

    Attributes:
        contenders: with the op's signature and results, the one that is likely to win first.
        sizes: of a call, its tokens, and all that they are not: features, heads, experts.
        inputs: makes the arguments of the race from those of the call.
        compared: what of arguments and results must be exact, by default the results.
        exact: the dtype in which the plain form is the truth, by the arguments of a call.
        first: which runs where nothing is measured, by the arguments; by default our kernel.
        kind: what of the arguments' values decides who takes them, and is not to be read while a
            CUDA graph is captured: it would replay the kernels for those of its capture.
        devices: where calls are raced.
    """

    contenders: tuple[Contender, ...]
    sizes: Callable[..., tuple[int, tuple[int, ...]]]
    inputs: Callable[[tuple[Any, ...], torch.Generator], tuple[Any, ...]] = drawn
    compared: Callable[[tuple[Any, ...], Results], Sequence[Tensor]] = _results_themselves
    exact: Callable[..., torch.dtype] = lambda *_: torch.float64
    first: Callable[..., str] = lambda *_: OWN
    kind: Callable[..., str] = lambda *_: ""
    devices: tuple[str, ...] = ("cuda",)


CONTESTS: dict[str, RacedOp] = {}
"""By library op: what is raced, for reports and benchmarks."""


_ours = 0


@contextlib.contextmanager
def our_kernels() -> Iterator[None]:
    """Run our kernels, whoever is the fastest, in all threads: for tests of theirs."""
    global _ours
    _ours += 1
    try:
        yield
    finally:
        _ours -= 1


class RacedOp:
    """An op with contenders.

    Args:
        name: of the library op.
        own: launches the op's kernel.
        plain: its plain form.
        contest: see ``Contest``.
        declared: from arguments, results as compilers plan for them, on the device ``meta``.
    """

    def __init__(
        self, name: str, own: Callable[..., Any], plain: Callable[..., Any], contest: Contest,
        declared: Callable[..., Any],
    ) -> None:  # fmt: skip
        self.name, self.contest, self._declared = name, contest, declared
        self.candidates = (*contest.contenders, Contender(OWN, own), Contender(PLAIN, plain))
        self._orders: dict[Any, tuple[Contender, ...]] = {}
        self._checked = tuple(replace(c, run=self._in_layout(c.run)) for c in self.candidates)
        CONTESTS[name] = self

    def __call__(self, *args: Any) -> Any:
        """The results of the first candidate that runs."""
        raced = _device(args).type in self.contest.devices and not _ours
        order = self._order(args) if raced else self.candidates[-2:]
        for i, contender in enumerate(order, 1):
            if contender.name == PLAIN:
                return contender.run(*args)
            if contender.name == OWN:
                has_next = i < len(order) and order[i].name != PLAIN
                instead = None if has_next else "plain PyTorch"
                result = attempt(self.name, contender.run, args, is_launch_failure, instead)
            else:
                name = f"{self.name} by {contender.name}"
                result = attempt(name, contender.run, args, _is_of_the_call, None)
            if result is not UNABLE:
                return result
        raise LaunchError(f"no kernel of {self.name} could be compiled or launched")

    # --- who runs first ---------------------------------------------------------------------------

    def _order(self, args: tuple[Any, ...]) -> tuple[Contender, ...]:
        kind = self.contest.kind(*args), _kind(args)
        key = (_device(args), torch.are_deterministic_algorithms_enabled(), *kind)
        order = self._orders.get(key)
        if order is None:
            order, stays = self._decided(args)
            if stays:
                if len(self._orders) >= _MOST:
                    self._orders.clear()
                self._orders[key] = order
        if is_strict() and len(order) > 1:  # alone, the plain form stands in for no kernel
            return order[:-1]
        return order

    def _decided(self, args: tuple[Any, ...]) -> tuple[tuple[Contender, ...], bool]:
        """The candidates in the order in which they are tried, and whether it stays so."""
        if is_fixed():
            return self._by(None, args), True
        question = self.question(*args)
        here = machine(_device(args))
        choice = known(question, here)
        if choice is None and _may_race(args):
            choice = choose(question, here)
        return self._by(choice, args), choice is not None

    def _by(self, choice: Choice | None, args: tuple[Any, ...]) -> tuple[Contender, ...]:
        """Those that can take the call: the chosen one, the first one, then as they are written."""
        refused = {} if choice is None else choice.refused
        leading = [self.contest.first(*args)]
        leading = leading if choice is None else [choice.candidate, *leading]
        able = [
            c
            for c in self.candidates
            if c.name == PLAIN or (c.name not in refused and not c.unavailable(*args))
        ]
        able.sort(key=lambda c: leading.index(c.name) if c.name in leading else len(leading))
        names = [c.name for c in able]
        return tuple(able[: names.index(PLAIN) + 1])  # which never fails

    def forget(self) -> None:
        """Ask again who runs first: choices have been adopted."""
        self._orders.clear()

    def question(self, *args: Any) -> Question:
        """Which candidate is the fastest for calls like this one?"""
        contest = self.contest

        def inputs(generator: torch.Generator) -> tuple[Any, ...]:
            return contest.inputs(args, generator)

        return Question(
            _bucket(self.name, contest, args),
            self._checked,
            inputs,
            contest.first(*args),
            _device(args),
            contest.exact(*args),
            contest.compared,
        )

    def _in_layout(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, which fails where a compiler would read its results in other strides."""

        def checked(*args: Any) -> Any:
            results = run(*args)
            pairs = zip(_listed(results), _listed(self._declared(*args)), strict=True)
            for ours, declared in pairs:
                if ours.shape != declared.shape or ours.dtype is not declared.dtype:
                    raise RuntimeError(
                        f"{ours.dtype} {tuple(ours.shape)} instead of {declared.dtype} "
                        f"{tuple(declared.shape)}"
                    )
                if ours.numel() and ours.stride() != declared.stride():
                    raise RuntimeError(f"strides {ours.stride()} instead of {declared.stride()}")
            return results

        return checked


def _is_of_the_call(error: Exception) -> bool:
    """Whether a library's form failed by itself, and neither memory nor the GPU is the reason."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return False
    return not is_of_device(error) or is_launch_failure(error)


# --- calls ----------------------------------------------------------------------------------------


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


def _device(args: tuple[Any, ...]) -> torch.device:
    first = args[0]
    device: torch.device = first.device if type(first) is Tensor else _tensors(args)[0].device
    return device


def _may_race(args: tuple[Any, ...]) -> bool:
    if is_strict() or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if any(type(t) not in (Tensor, Parameter) for t in _tensors(args)):
        return False
    return may_wait(_device(args))


def may_wait(device: torch.device) -> bool:
    """Whether the host may wait for a device here: not for a CUDA graph, or where it is watched."""
    if device.type != "cuda":
        return not is_capturing()
    return not torch.cuda.get_sync_debug_mode() and not is_capturing()


def _kind(args: Iterable[Any]) -> tuple[Any, ...]:
    """Equal for calls that are alike in all but their values: made at each call."""
    key: list[Any] = []
    for a in args:
        kind = type(a)  # Tensor's isinstance takes as long as all else here
        if kind is Tensor or kind is Parameter:
            key += (a.dtype, a.shape, a.stride())
        elif kind is list or kind is tuple:
            key.append(_kind(a))
        elif issubclass(kind, Tensor):  # which would be kept alive
            key += (kind, a.dtype, a.shape, a.stride())
        else:
            key.append(a)
    return tuple(key)


def _bucket(name: str, contest: Contest, args: tuple[Any, ...]) -> str:
    tokens, features = contest.sizes(*args)
    most = 1 << max(0, tokens - 1).bit_length()
    sizes = " x ".join(f"{n:,}" for n in features)
    strict = ", deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    kind = ", ".join(filter(None, [" ".join(_layouts(args)), contest.kind(*args)]))
    return f"{name} of {sizes} for {most:,} tokens{strict} ({kind})"


def _layouts(args: Iterable[Any]) -> list[str]:
    """Of each argument what matters besides its sizes: dtype and order in memory, or a flag."""
    texts = []
    for a in args:
        if isinstance(a, Tensor):
            order = sorted(range(a.dim()), key=lambda i, t=a: (-t.stride(i), i))  # type: ignore[misc]
            plain = order == list(range(a.dim())) and 0 not in a.stride()
            dims = (
                "" if plain else "/" + "".join("_" if a.stride(i) == 0 else str(i) for i in order)
            )
            texts.append(str(a.dtype).removeprefix("torch.") + dims)
        elif isinstance(a, (list, tuple)):
            texts.append(f"[{' '.join(_layouts(a))}]")
        elif isinstance(a, bool) or not isinstance(a, (int, float)):
            texts.append("-" if a is None else str(a))
        else:
            texts.append("n")
    return texts


@functools.cache
def machine(device: torch.device) -> str:
    """What a choice on ``device`` depends on besides versions of this package and of PyTorch."""
    if device.type == "cpu":
        return f"{instruction_set()}\0{torch.get_num_threads()}"
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version()
    versions = torch.version.cuda, torch.version.hip, cudnn, triton_version()
    return f"{properties.name}\0{properties.major}.{properties.minor}\0{versions}"
