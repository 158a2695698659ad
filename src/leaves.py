"""Letting TorchDynamo see a leaf (``graph/whole.py``) where a module's forward calls a scan.

While a block is captured, and for that call only, each submodule whose forward calls a function
that is to be captured whole runs a copy of this forward. The copy has globals of its own, in which
leaves stand for such functions. Classes, modules and globals stay what they are, and nothing is
left to restore.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .graph.whole import convention, leaf


@contextmanager
def scans_whole(modules: list[nn.Module]) -> Iterator[None]:
    """For one call, let ``modules`` (of ``scanning``) run forwards that call leaves."""
    before = [m.__dict__.get("forward") for m in modules]
    for m in modules:
        m.__dict__["forward"] = types.MethodType(_with_leaves(_function(m)), m)
    try:
        yield
    finally:
        for m, own in zip(modules, before, strict=True):
            if own is None:
                del m.__dict__["forward"]
            else:
                m.__dict__["forward"] = own


def scanning(module: nn.Module) -> list[nn.Module]:
    """The modules below ``module`` whose forwards call a function that is captured whole."""
    found, stack = [], [c for c in module._modules.values() if c is not None]
    while stack:
        m = stack.pop()
        if _with_leaves(_function(m)) is not None:
            found.append(m)
        stack += [c for c in m._modules.values() if c is not None]
    return found


def _function(module: nn.Module) -> Any:
    """The function behind a module's forward; None where it is no method of one."""
    own = module.__dict__.get("forward")
    return type(module).forward if own is None else getattr(own, "__func__", None)


@functools.lru_cache(maxsize=4096)
def _with_leaves(function: Any) -> Any:
    """A copy of ``function`` that calls leaves, wrappers included; None if there are none to call.

    One copy serves all modules, so that equal blocks share a graph.
    """
    return _copy(function, frozenset())


def _copy(function: Any, outer: frozenset[Any]) -> Any:
    if not isinstance(function, types.FunctionType) or function in outer:
        return None
    outer |= {function}
    cells = function.__closure__ or ()
    wrapped = [_copy(_content(cell), outer) for cell in cells]
    names = _names(function.__code__)
    found = {n: f for n in names if (f := function.__globals__.get(n)) is not None and _scans(f)}
    if not found and not any(wrapped):
        return None
    scope = function.__globals__
    if found:
        scope = {**scope, **{name: leaf(f) for name, f in found.items()}}
        # by this name Dynamo would look up the globals in the real module
        scope.pop("__name__", None)
    closure = tuple(
        cell if copy is None else types.CellType(copy)
        for cell, copy in zip(cells, wrapped, strict=True)
    )
    made = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__,
        closure if function.__closure__ is not None else None,
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return made


def _scans(value: Any) -> bool:
    return isinstance(value, Callable) and not isinstance(value, type) and _known(value)  # type: ignore[arg-type]


def _known(function: Any) -> bool:
    try:
        return convention(function) is not None
    except TypeError:  # not hashable
        return False


def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in ``code`` and in what it defines."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None
