"""Whether a function looks at what it is given under a name that its signature does not have.

Models hand all keywords of their own call down to their parts, for any of them to pick from. One
that a function takes among "any others" and never looks at says nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def overlooks(function: Callable[..., Any], given: Mapping[str, Any], name: str) -> bool:
    """Whether ``function`` takes the keyword ``name`` beside ``given``, and never looks at it.

    It is called twice, without the keyword and with a value that tells when somebody looks at it.
    What can be seen without looking (it is there; it is not None) changes the result, or else
    nothing.
    """
    value = _Watched()
    try:
        with _disable_current_modes(), torch.no_grad():
            plain, other = function(**given), function(**given, **{name: value})
    except Exception:  # it asks for more, or refuses the value
        return False
    return not object.__getattribute__(value, "seen") and _equal(plain, other)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


class _Watched:
    """A value that remembers, and raises, when it is looked at: its class, truth, attributes."""

    def __init__(self) -> None:
        object.__setattr__(self, "seen", False)

    def __getattribute__(self, name: str) -> NoReturn:
        object.__setattr__(self, "seen", True)
        raise RuntimeError(name)

    def __bool__(self) -> NoReturn:
        raise self.truth  # looked at: reading any attribute raises

    def __eq__(self, other: object) -> NoReturn:
        raise self.equality  # looked at: reading any attribute raises

    def __hash__(self) -> NoReturn:
        raise self.hash  # looked at: reading any attribute raises

    def __repr__(self) -> NoReturn:
        raise self.text  # looked at: reading any attribute raises
