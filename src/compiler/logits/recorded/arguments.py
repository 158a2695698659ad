"""Calls of recorded functions: whether their arguments are those that are known."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class WrongArguments(Exception):
    """A call that no handler is for."""


def binding(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function raise ``WrongArguments`` for a call with other arguments than its own."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            raise WrongArguments from None
        return function(*args, **kwargs)

    return run
