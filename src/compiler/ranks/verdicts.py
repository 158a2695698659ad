"""One verdict for all ranks: the first that meets a site verifies it, the others read the result.

Verdicts pass through the key-value store of the process group, as JSON; nothing is written to disk
and nothing is unpickled. This is no collective: a rank that never meets the site is not waited for,
and one that waits in vain verifies by itself. Whatever happens, the ranks agree: who verifies a
site that has a valid verdict by then takes that one instead.

It works wherever ``torch.distributed`` is initialized with several ranks: in ``fusewright train``
as in a script of the user's own.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch.distributed as dist

from ...report import Figures
from ...rewrite.engine import Candidate, Verdict
from .job import job_store
from .site_key import site_key

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

    Attributes:
        patience: seconds to wait for another rank.
        silent: ranks that were waited for in vain; it is not done again.
        is_lost: whether the store has failed; every site is verified here from then on.
    """

    patience: float = field(default_factory=lambda: PATIENCE)
    silent: set[int] = field(default_factory=set)
    is_lost: bool = False

    def __call__(
        self, candidate: Candidate, traced: bool, verify: Callable[[], Verdict]
    ) -> Verdict:
        """The verdict on ``candidate``: another rank's, or that of ``verify``."""
        store = None if self.is_lost else job_store()
        try:
            key = None if store is None else site_key(candidate, traced)
        except Exception:  # of a rule of the user's, most likely: verification says why
            key = None
        return verify() if key is None else self.decide(store, dist.get_rank(), key, verify)

    def decide(self, store: Any, rank: int, key: str, verify: Callable[[], Verdict]) -> Verdict:
        """The verdict under ``key`` in ``store``; that of ``verify`` where there is none.

        Args:
            store: a key-value store of ``torch.distributed``.
            rank: of this process.
            key: what verdicts have in common that are one.
            verify: makes the verdict.
        """
        name = entry_name(key)
        seen = self._guarded(lambda: self._read(store, rank, name))
        found = _parsed(seen, key)
        if found is not None:
            return found
        try:
            verdict = verify()
        except BaseException:
            self._guarded(lambda: store.compare_set(name, seen, _ABANDONED))
            raise
        kept = self._guarded(lambda: _published(store, name, seen, _text(verdict, key), key))
        return _parsed(kept, key) or verdict

    def _read(self, store: Any, rank: int, name: str) -> str:
        """What stands under ``name``, once its owner has written it; empty if that is this rank."""
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


def entry_name(key: str) -> str:
    """The name under which the verdict on ``key`` is stored."""
    return hashlib.sha256(key.encode()).hexdigest()


def _published(store: Any, name: str, seen: str, text: str, key: str) -> str:
    """Put ``text`` in the place of what was ``seen``; returns what stands there then."""
    for _ in range(2):  # another rank may have given up in between
        kept = str(store.compare_set(name, seen, text), "utf-8")
        if _parsed(kept, key) is not None:
            break
        seen = kept
    return kept


def _text(verdict: Verdict, key: str) -> str:
    return json.dumps({"key": key, "reason": verdict.reason, "figures": asdict(verdict.figures)})


def _parsed(text: str, key: str) -> Verdict | None:
    """The verdict that ``text`` holds; None unless it is a complete one, under this key."""
    try:
        data = json.loads(text)
        reason, figures = data["reason"], data["figures"]
        numbers = [figures[name] for name in _NUMBERS]
        own = data["key"] == key
    except (ValueError, TypeError, KeyError):
        return None
    valid = (
        own
        and (reason is None or isinstance(reason, str))
        and len(figures) == len(_NUMBERS)
        and all(n is None or isinstance(n, float | int) for n in numbers)
    )
    return Verdict(reason, Figures(**figures)) if valid else None
