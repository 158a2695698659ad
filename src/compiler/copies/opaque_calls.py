"""Letting TorchDynamo see other functions than those that a module's forward calls.

A scan is replaced by a leaf, and a look-up that TorchDynamo cannot follow by one that it can
(``graph/opaque/functions.py``). While a block is captured, and for that call only, each submodule
whose forward calls such a function runs a copy of this forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ...graph.opaque.functions import (
    convention,
    leaf,
    reads_weight,
    segmented_convention,
    segmented_leaf,
    stand_in,
)
from ...graph.opaque.hub_kernels import is_replaced
from .forward_copies import FunctionCopies
from .parameter_adapters import functional
from .towers import with_boundaries


def opaque_copies() -> FunctionCopies:
    """Makes copies of forwards that call what is captured whole by way of leaves."""
    return FunctionCopies(_replacement, finish=_with_kernels, unwrap=True)


def _with_kernels(module: nn.Module, copy: Any) -> Any:
    return functional(module, None if is_replaced(module) else copy)


def segmented_copies(slot: Any) -> FunctionCopies:
    """Makes copies of forwards that give the segments in ``slot.value`` to what takes them."""

    @functools.cache
    def segmented(function: Callable[..., Any]) -> Callable[..., Any]:
        node = segmented_leaf(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            # an attribute that TorchDynamo makes an input of the graph, read at each call
            return node(slot.value, *args, **kwargs)

        return call

    def replacement(value: Any, names: set[str]) -> Any:
        if takes_segments(value):
            return segmented(value)
        return _gives_none if _has(_does_all, value) else _replacement(value, names)

    return FunctionCopies(replacement, finish=functional, unwrap=True)


def _gives_none(*args: Any, **kwargs: Any) -> None:
    """In place of a library's kernel of a whole mixer, which takes no segments."""
    # models take the way of scan and convolution where the library is not there, and it gives None


@functools.cache
def _does_all(function: Callable[..., Any]) -> bool | None:
    """True if a function does a convolution, a scan and a projection in one; or None."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # no signature
        return None
    projects = bool(names & {"out_proj_weight", "outproj_weight"})
    return True if projects and names >= {"conv1d_weight", "A"} else None


def takes_segments(value: Any) -> bool:
    """Whether a global is a function that takes segments."""
    return _has(segmented_convention, value)


def callers_of_mixers() -> FunctionCopies:
    """Has copies of those forwards that call what takes segments, and of no others."""
    return FunctionCopies(lambda value, names: takes_segments(value) or None)


def _replacement(value: Any, names: set[str]) -> Any:
    """What is called in place of a global function while a block is captured, or None."""
    if (replaced := with_boundaries(value, names)) is not None:
        return replaced
    if not callable(value) or isinstance(value, type):
        return None
    if _has(convention, value):
        return leaf(value)
    return stand_in(value) if reads_weight(value) else None


def _has(find: Callable[[Any], Any], value: Any) -> bool:
    if not callable(value) or isinstance(value, type):
        return False
    try:
        return find(value) is not None
    except TypeError:  # not hashable
        return False
