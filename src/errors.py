"""The errors that fusewright raises on purpose. Each message says what, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FusewrightError(Exception):
    """Base of every error below; a command ends with ``exit_code``."""

    exit_code = 2


class RecipeError(FusewrightError):
    """A recipe that cannot be run: a key, a type, a path. The message has file, key and line."""


class PackingError(RecipeError):
    """Samples of a pack see each other in the plain model, and would not in the optimized one."""


class DataError(FusewrightError):
    """A dataset that cannot be used. The message has file, line and field."""


class RewardError(FusewrightError):
    """A reward that has failed, or has not judged each completion. The message has its name."""


class ModelError(FusewrightError):
    """A model that cannot be found, built or loaded. The message has its name."""


class ProcessLostError(FusewrightError):
    """Another process of the run has ended, or cannot be reached."""

    exit_code = 1


class OptimizeError(FusewrightError):
    """``optimize`` was asked for something it cannot do, or ``strict=True`` found a gap."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was meant to be, or None if none is really near.

    Near is one that differs in case alone; else names that begin with the same letter and are
    spelled almost alike, those with the same first word before others; else a short name that has
    one word more, if at most two have.
    """
    names, words = list(known), _words(name)
    folded = [n for n in names if n.casefold() == name.casefold()]
    if folded:
        return folded[0]
    same = [n for n in names if n[:1] == name[:1]]
    alike = difflib.get_close_matches(name, same, 5, 0.8)
    alike = alike or [n for n in same if sorted(n) == sorted(name)]
    if alike:
        return next((n for n in alike if _words(n)[0] == words[0]), alike[0])
    short = [n for n in names if len(n) <= 2 * len(name)]
    longer = [n for n in short if len(_words(n)) == len(words) + 1 and {*words} < {*_words(n)}]
    return min(longer, key=len) if 0 < len(longer) <= 2 else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question after the nearest known name, or an empty string."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else ""


def _words(name: str) -> list[str]:
    return re.split(r"[-_.:]", name)
