"""Letting TorchDynamo see other functions than those that a module's forward calls.

A scan is replaced by a leaf, and a look-up that TorchDynamo cannot follow by one that it can
(``graph/opaque/functions.py``). While a block is captured, and for that call only, each submodule
whose forward calls such a function runs a copy of this forward.
"""

from __future__ import annotations

from typing import Any

from ...graph.opaque.functions import asks_for_place, convention, leaf, stand_in
from .forward_copies import FunctionCopies


def opaque_copies() -> FunctionCopies:
    """Makes copies of forwards that call what is captured whole by way of leaves."""
    return FunctionCopies(_replacement)


def _replacement(value: Any, names: set[str]) -> Any:
    """What is called in place of a global function while a block is captured, or None."""
    if not callable(value) or isinstance(value, type):
        return None
    return leaf(value) if _is_opaque(value) else stand_in(value) if asks_for_place(value) else None


def _is_opaque(function: Any) -> bool:
    try:
        return convention(function) is not None
    except TypeError:  # not hashable
        return False
