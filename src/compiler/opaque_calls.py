"""Letting TorchDynamo see other functions than those that a module's forward calls.

A leaf (``graph/opaque/functions.py``) stands for a scan, and what can be followed
(``graph/opaque/own_weight.py``) for a look-up that cannot. While a block is captured, and for that
call only, each submodule whose forward calls such a function runs a copy of this forward. The copy
has globals of its own, in which the stand-ins are. Classes, modules and globals stay what they are,
and nothing is left to restore.
"""

from __future__ import annotations

import dis
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..graph.opaque.functions import convention, leaf
from ..graph.opaque.own_weight import asks_for_place, stand_in

ForwardCopies = list[tuple[nn.Module, Callable[..., Any]]]
"""Modules, each with the copy of its forward that calls leaves."""


@contextmanager
def using_copies(copies: ForwardCopies) -> Iterator[None]:
    """For one call, let the modules of ``forward_copies`` run forwards that call leaves."""
    put = []
    for m, copy in copies:
        put.append((m, m.__dict__.get("forward"), types.MethodType(copy, m)))
        m.__dict__["forward"] = put[-1][2]
    try:
        yield
    finally:
        for m, own, ours in put:
            if m.__dict__.get("forward") is not ours:
                continue  # somebody has put in another one meanwhile
            if own is None:
                del m.__dict__["forward"]
            else:
                m.__dict__["forward"] = own


def forward_copies(module: nn.Module) -> ForwardCopies:
    """The modules below ``module`` whose forwards call a function that is captured whole."""
    found, stack = [], [c for c in module._modules.values() if c is not None]
    while stack:
        m = stack.pop()
        copy = with_opaque_calls(_function(m))
        if copy is not None:
            found.append((m, copy))
        stack += [c for c in m._modules.values() if c is not None]
    return found


def _function(module: nn.Module) -> Any:
    """The function behind a module's forward; None where it is no method of one."""
    own = module.__dict__.get("forward")
    return type(module).forward if own is None else getattr(own, "__func__", None)


def with_opaque_calls(function: Any) -> Any:
    """A copy of ``function`` that calls leaves, wrappers included; None if there are none to call.

    One copy serves all modules, so that equal blocks share a graph. A copy has its globals from the
    time when it was made: when one that the code reads is another now, a new copy is made.
    """
    made = _copied(function) if isinstance(function, types.FunctionType) else None
    if made is not None and not made.is_current():
        _copied.cache_clear()
        made = _copied(function)
    return None if made is None else made.function


@dataclass(frozen=True)
class _Copy:
    """A copy of a function, and which values of which globals it was made with."""

    function: Any
    read: tuple[tuple[dict[str, Any], str, Any], ...]

    def is_current(self) -> bool:
        return all(scope.get(name) is value for scope, name, value in self.read)


@functools.lru_cache(maxsize=4096)
def _copied(function: Any) -> _Copy | None:
    read: list[tuple[dict[str, Any], str, Any]] = []
    made = _copy(function, frozenset(), read)
    return None if made is None else _Copy(made, tuple(read))


def _copy(function: Any, outer: frozenset[Any], read: list[Any]) -> Any:
    if not isinstance(function, types.FunctionType) or function in outer:
        return None
    outer |= {function}
    cells = function.__closure__ or ()
    wrapped = [_copy(cell_contents(cell), outer, read) for cell in cells]
    names, scope = names_in(function.__code__), function.__globals__
    found = {n: made for n in names if (made := _replacement(scope.get(n))) is not None}
    if not found and not any(wrapped):
        return None
    if found:
        if _sets_globals(function.__code__):  # in a copy they would be lost
            return None
        read += [(scope, name, scope.get(name)) for name in names]
        scope = {**scope, **found}
        # by this name Dynamo would look up the globals in the real module
        scope.pop("__name__", None)
    closure = tuple(
        cell if copy is None else types.CellType(copy)
        for cell, copy in zip(cells, wrapped, strict=True)
    )
    # by its code Dynamo tells this copy from an earlier one that has other globals
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(_serial)}")
    made = types.FunctionType(
        code, scope, function.__name__, function.__defaults__,
        closure if function.__closure__ is not None else None,
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return made


_serial = itertools.count(1)


def _sets_globals(code: types.CodeType) -> bool:
    return any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for i in dis.get_instructions(code))


def _replacement(value: Any) -> Any:
    """What is called in place of a global function while a block is captured, or None."""
    if not callable(value) or isinstance(value, type):
        return None
    return leaf(value) if _is_opaque(value) else stand_in(value) if asks_for_place(value) else None


def _is_opaque(function: Any) -> bool:
    try:
        return convention(function) is not None
    except TypeError:  # not hashable
        return False


def names_in(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in ``code`` and in what it defines."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(names_in(c) for c in inner))


def cell_contents(cell: types.CellType) -> Any:
    """What a closure's cell holds, or None."""
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None
