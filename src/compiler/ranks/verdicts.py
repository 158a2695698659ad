"""One verdict for all ranks: the first to reach a site verifies it, the others read the result.

Verdicts pass through the key-value store of the process group, as JSON; nothing is unpickled. This
is no collective: a rank that never reaches the site is not awaited, and one that waits in vain
verifies by itself. Whatever happens, the ranks agree: who verifies a site that has a valid verdict
by then takes that one instead. It works wherever ``torch.distributed`` has several ranks: in
``fusewright train`` as in a script of the user's own.

That a rewrite is right is also kept for later processes, in the folder of compiled kernels, unless
``FUSEWRIGHT_VERDICTS=fresh``. That it is not is found out anew: there may have been no memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from ...graph import facts
from ...kernels.choice import triton_version
from ...kernels.launch import interpreting
from ...kernels.native import library as native
from ...kernels.native.build import kept_folder, sources, write_whole
from ...kernels.processor import processor
from ...report import Figures
from ...rewrite.engine import Candidate, Verdict
from ...rewrite.verify import structure
from ...sharding import has_peers

PATIENCE = 30.0
"""Seconds that a rank waits for the verdict of another one."""

_PAUSE = 0.05
"""Seconds between two looks at the store, at most."""

_ABANDONED = "abandoned"
"""In place of a verdict: the rank that was to give it has failed."""

_NUMBERS = tuple(f.name for f in fields(Figures))


@dataclass
class SharedVerdicts:
    """The verdicts of all ranks of a job.

    ``silent`` are ranks that were waited for in vain; it is not done again. Once the store has
    failed (``is_lost``), every site is verified here.
    """

    patience: float = field(default_factory=lambda: PATIENCE)
    silent: set[int] = field(default_factory=set)
    is_lost: bool = False
    keeps: bool = False

    def __call__(
        self, candidate: Candidate, traced: bool, verify: Callable[[], Verdict]
    ) -> Verdict:
        """The verdict on ``candidate``: another process's, or that of ``verify``."""
        store = None if self.is_lost else job_store()
        try:
            key = site_key(candidate, traced) if self.keeps or store is not None else None
            others = packages(candidate) if self.keeps and key is not None else None
        except Exception:  # of a rule of the user's, most likely: verification says why
            key = others = None
        if key is None:
            return verify()
        if others is not None:
            verify = functools.partial(_kept, f"{key} {others}", verify)
        return verify() if store is None else self.decide(store, dist.get_rank(), key, verify)

    def decide(self, store: Any, rank: int, key: str, verify: Callable[[], Verdict]) -> Verdict:
        """The verdict under ``key`` in ``store``; that of ``verify`` where there is none."""
        name = entry_name(key)
        seen = self._guarded(lambda: self._read(store, rank, name))
        existing = _parsed(seen, key)
        if existing is not None:
            return existing
        try:
            verdict = verify()
        except BaseException:
            self._guarded(lambda: store.compare_set(name, seen, _ABANDONED))
            raise
        current = self._guarded(lambda: _published(store, name, seen, _text(verdict, key), key))
        return _parsed(current, key) or verdict

    def _read(self, store: Any, rank: int, name: str) -> str:
        """What ``name`` holds, once its owner has written it; empty if that is this rank."""
        owner = int(store.compare_set(f"{name}-owner", "", str(rank)))
        pause, end = 0.001, time.monotonic() + self.patience
        while not store.check([name]):
            if owner == rank or owner in self.silent:
                return ""
            if time.monotonic() > end:
                self.silent.add(owner)
                return ""
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        return str(store.get(name), "utf-8")

    def _guarded(self, work: Callable[[], str]) -> str:
        """What ``work`` returns; nothing, from now on, if the store cannot be used."""
        if self.is_lost:
            return ""
        try:
            return work()
        except Exception:  # it was another process's, which has ended, or it knows no compare_set
            self.is_lost = True
            return ""


def job_store() -> Any:
    """The key-value store of the process group, for verdicts; None with one rank."""
    if not has_peers():
        return None
    # imported here: a PyTorch that was built without it has no such module
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    try:
        return PrefixStore("fusewright-verdicts", _get_default_store())
    except Exception:  # a group without one, as MPI's
        return None


def entry_name(key: str) -> str:
    """The name under which the verdict on ``key`` is stored."""
    return hashlib.sha256(key.encode()).hexdigest()


def _published(store: Any, name: str, seen: str, text: str, key: str) -> str:
    """Put ``text`` in the place of what was ``seen``; returns what is stored then."""
    for _ in range(2):  # another rank may have given up in between
        current = str(store.compare_set(name, seen, text), "utf-8")
        if _parsed(current, key) is not None:
            break
        seen = current
    return current


def _text(verdict: Verdict, key: str) -> str:
    return json.dumps({"key": key, "reason": verdict.reason, "figures": asdict(verdict.figures)})


def _parsed(text: str, key: str) -> Verdict | None:
    """The verdict that ``text`` holds; None unless it is a complete one, under this key."""
    try:
        data = json.loads(text)
        reason, figures = data["reason"], data["figures"]
        numbers = [figures[name] for name in _NUMBERS]
        has_key = data["key"] == key
    except (ValueError, TypeError, KeyError):
        return None
    valid = (
        has_key
        and (reason is None or isinstance(reason, str))
        and len(figures) == len(_NUMBERS)
        and all(n is None or isinstance(n, float | int) for n in numbers)
    )
    return Verdict(reason, Figures(**figures)) if valid else None


# --- what is kept for later processes -------------------------------------------------------------

PREFIX = "verdict-"
"""Of the files of verdicts, in the folder of compiled kernels."""


def _kept(key: str, verify: Callable[[], Verdict]) -> Verdict:
    """The verdict under ``key`` of an earlier process; that of ``verify`` where there is none."""
    name = f"{PREFIX}{entry_name(key)}.json"
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        text = (kept_folder() / name).read_text()
        verdict = _parsed(text, key)
        if verdict is not None and verdict.reason is None:
            return verdict
    verdict = verify()
    if verdict.reason is None:
        with contextlib.suppress(OSError, RuntimeError):  # such as a folder that is read-only
            write_whole(kept_folder() / name, _text(verdict, key).encode())
    return verdict


_IN_KEY = ("fusewright", "torch", "builtins", "operator", "_operator", "math")
"""Packages whose version, or source, is a part of every key."""


def packages(candidate: Candidate) -> str | None:
    """The versions of other packages whose functions a formula calls; None if one has none.

    Code that is no installed package may change from one process to the next, and its verdicts are
    not kept: a rule of the user's own, or a model's remote code.
    """
    nodes = [*candidate.replacement().nodes, *candidate.interior]
    for body in filter(None, map(facts.body, candidate.interior)):
        nodes += [n for inner in facts.nested(body) for n in inner.graph.nodes]
    return versions([type(candidate.rule), *called(nodes)])


def called(nodes: Iterable[fx.Node]) -> list[Any]:
    """The functions that nodes call."""
    return [n.target for n in nodes if n.op == "call_function"]


def versions(functions: Iterable[Any]) -> str | None:
    """The versions of the packages of ``functions``; None if the code of one has no version.

    PyTorch's and this package's are in ``environment``.
    """
    roots = {_root(function) for function in functions} - set(_IN_KEY)
    found = {root: _version(root) for root in sorted(roots)}
    return None if None in found.values() else str(found)


def _root(target: Any) -> str:
    """The package of a function in a graph."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(target).partition(".")[0]
        return name if name in sys.modules else "torch"  # as its own namespaces: aten, prims
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "torch"
    return str(getattr(target, "__module__", None) or type(target).__module__).partition(".")[0]


@functools.cache
def _version(package: str) -> str | None:
    """The version of an installed package; None if it is none, or its source is worked on."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    if not file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        return None
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


# --- the key of a verdict: what two processes must have in common to share it ---------------------


_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
"""In the text of an object that only this process has."""

_DEVICE = re.compile(r"type=\\*'(\w+)\\*', index=(\d+)|\b(cuda|xpu|hpu|mps):(\d+)")
"""A device in a text; its quotes may be escaped."""


def site_key(candidate: Candidate, traced: bool) -> str | None:
    """The formula, its replacement, and everything around them that the verdict depends on.

    That is the structure by which one process remembers verdicts (graph, shapes, dtypes, layouts,
    and the settings that it is verified under), the graph of the replacement, the versions of
    PyTorch and of this package, and the kinds of processor and GPU. Devices are numbered in order
    of appearance: each rank has its own GPU. ``traced``: whether the form that ops have under a
    compiler is verified, too. None if the text would name something that no other process can know,
    such as a function that was made in a call of another one.
    """
    rule = type(candidate.rule)
    replacement = [
        (n.op, portable_name(n.target), str(n.args), str(n.kwargs))
        for n in candidate.replacement().nodes
    ]
    text = repr(
        (
            structure(candidate, portable_name),
            f"{rule.__module__}.{rule.__qualname__}",
            replacement,
            traced,
            _devices(candidate),
            has_native_kernels(),
            environment(),
            processor(),
        )
    )
    return None if _ADDRESS.search(text) else _DEVICE.sub(_numbered(), text)


def portable_name(target: Any) -> str:
    """The name by which any process can import ``target``; else its own text."""
    if not callable(target) or isinstance(target, str):
        return str(target)
    try:
        name = fx.node._get_qualified_name(target)
        module, _, attribute = name.rpartition(".")
        return name if getattr(_imported(module), attribute) is target else str(target)
    except Exception:  # it has no name, or another function has it
        return str(target)


def _imported(name: str) -> Any:
    """A module, or a class in one, by its full name."""
    if name in sys.modules:
        return sys.modules[name]
    outer, _, attribute = name.rpartition(".")
    return getattr(_imported(outer), attribute) if outer else None


@functools.cache
def environment() -> tuple[str, ...]:
    """The versions, the sources of all that changes a graph or judges it, and the architecture."""
    root = Path(__file__).parents[2]
    rooms = ("compiler", "graph", "kernels", "memory", "passes", "rewrite")
    return (
        f"fusewright {sources(*(root / room for room in rooms))}",
        f"torch {torch.__version__} {torch.version.git_version}",
        f"python {platform.python_version()}",
        platform.machine(),
        f"triton {triton_version()}{', interpreted' * interpreting()}",
    )


def has_native_kernels() -> bool | None:
    """Whether ops in bf16 on the CPU run their kernels in C++; None where nobody has asked."""
    if not (native.has_started() or torch.is_autocast_enabled("cpu")):
        return None
    return native.problem() is None


def _devices(candidate: Candidate) -> list[str]:
    """The kinds of GPU that the formula runs on."""
    tensors = [t for n in candidate.inputs if (t := facts.tensor(n)) is not None]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    return [torch.cuda.get_device_name(d) for d in sorted(devices, key=str)]


def _numbered() -> Callable[[re.Match[str]], str]:
    """Replaces each device by its kind and the number of its first appearance."""
    numbers: dict[str, int] = {}

    def name(match: re.Match[str]) -> str:
        kind, index = match[1] or match[3], match[2] or match[4]
        return f"{kind} {numbers.setdefault(f'{kind}:{index}', len(numbers))}"

    return name
