"""The errors that fusewright raises on purpose. Each message says what, where, and what to do."""

from __future__ import annotations


class FusewrightError(Exception):
    """Base of every error below."""


class RecipeError(FusewrightError):
    """A recipe that cannot be run: a key, a type, a path. The message has file, key and line."""


class DataError(FusewrightError):
    """A dataset that cannot be used. The message has file, line and field."""


class ModelError(FusewrightError):
    """A model that cannot be found, built or loaded. The message has its name."""


class OptimizeError(FusewrightError):
    """``optimize`` was asked for something it cannot do, or ``strict=True`` found a gap."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
