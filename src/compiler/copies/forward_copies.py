"""Copies of forwards that see other globals: for one call, without patching a class or a module.

A copy with the same code and other globals runs the same with the replacements. While a region is
called, and for that call only, the modules in it run such copies of their forwards. Classes,
modules and globals stay what they are, and nothing is left to restore.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...graph.opaque.hub_kernels import behind
from ...graph.signatures import names_in

ForwardCopies = list[tuple[nn.Module, Callable[..., Any]]]
"""Modules, each with the copy of its forward."""

Replacement = Callable[[Any, set[str]], Any]
"""The value of a global, and all names in the code that reads it -> its replacement, or None."""


@contextmanager
def using_copies(copies: ForwardCopies) -> Iterator[None]:
    """For one call, let modules run copies of their forwards."""
    bound = []
    for m, copy in copies:
        bound.append((m, m.__dict__.get("forward"), types.MethodType(copy, m)))
        m.__dict__["forward"] = bound[-1][2]
    try:
        yield
    finally:
        for m, previous, ours in bound:
            if m.__dict__.get("forward") is not ours:
                continue  # somebody has put in another one meanwhile
            if previous is None:
                del m.__dict__["forward"]
            else:
                m.__dict__["forward"] = previous


class FunctionCopies:
    """Copies of functions, made with one kind of replacement.

    One copy serves all modules, so that equal blocks share a graph. They live as long as this
    object does: a function that was made for one module holds it in its closure.
    """

    def __init__(
        self,
        replacement: Replacement,
        live: bool = False,
        finish: Callable[[nn.Module, Any], Any] = lambda module, copy: copy,
        unwrap: bool = False,
    ) -> None:
        """Make none yet.

        ``finish`` takes a module and the copy that its forward has, or None; it gives the copy that
        this module runs.

        With ``live``, copies read the other globals where the function does, at each call. Else
        they have them from the time when they were made, which a tracer can follow: when one that
        the code reads is another now, a new copy is made.

        With ``unwrap``, they call the functions that kernels of the Hub may be in the place of.
        """
        self._replacement, self._live, self._finish = replacement, live, finish
        self._unwrap = unwrap
        self._copied = functools.lru_cache(maxsize=4096)(self._make)

    def below(self, module: nn.Module) -> ForwardCopies:
        """The modules below ``module`` whose forwards have copies, with these."""
        copies, stack = [], [c for c in module._modules.values() if c is not None]
        while stack:
            m = stack.pop()
            copy = self.of_forward(m)
            if copy is not None:
                copies.append((m, copy))
            stack += [c for c in m._modules.values() if c is not None]
        return copies

    def of_forward(self, module: nn.Module) -> Any:
        """A copy of the function behind a module's forward, or None."""
        return self._finish(module, self.of(function_of(module)))

    def of(self, function: Any) -> Any:
        """A copy of ``function``, wrappers included; None if nothing in it is replaced."""
        copy = self._copied(function) if isinstance(function, types.FunctionType) else None
        if copy is not None and not copy.is_current():
            self._copied.cache_clear()
            copy = self._copied(function)
        return None if copy is None else copy.function

    def _make(self, function: Any) -> _Copy | None:
        read: list[tuple[dict[str, Any], str, Any]] = []
        copy = self._copy(function, frozenset(), read)
        return None if copy is None else _Copy(copy, tuple(read))

    def _copy(self, function: Any, outer: frozenset[Any], read: list[Any]) -> Any:
        if not isinstance(function, types.FunctionType) or function in outer:
            return None
        outer |= {function}
        if (plain := behind(function)) is not function:
            return self._copy(plain, outer, read) or (plain if self._unwrap else None)
        cells = function.__closure__ or ()
        wrapped = [self._copy(cell_contents(cell), outer, read) for cell in cells]
        names, scope = names_in(function.__code__), function.__globals__
        replaced = ((n, self._replaced(scope.get(n), names, outer, read)) for n in names)
        replacements = {n: value for n, value in replaced if value is not None}
        if not replacements and not any(wrapped):
            return None
        if replacements:
            if sets_globals(function.__code__):  # in a copy they would be lost
                return None
            read += [(scope, n, scope.get(n)) for n in (replacements if self._live else names)]
            scope = _overlay(scope, replacements) if self._live else _frozen(scope, replacements)
        # by its code Dynamo tells this copy from an earlier one that has other globals
        result = clone_function(function, scope, wrapped, f"_{next(_serial)}")
        if not self._live:  # either way, a tracer would get to the original
            result.__dict__.pop("__wrapped__", None)
            result.__module__ = scope.get("__name__")  # type: ignore[assignment]
        return result

    def _replaced(self, value: Any, names: set[str], outer: frozenset[Any], read: list[Any]) -> Any:
        """What a copy calls in place of a global, or None."""
        function = behind(value)
        found = self._replacement(function, names)
        if found is not None or function is value:
            return found
        return self._copy(function, outer, read) or (function if self._unwrap else None)


def clone_function(
    function: types.FunctionType,
    scope: dict[str, Any] | None = None,
    contents: Sequence[Any] = (),
    suffix: str = "",
) -> types.FunctionType:
    """A function that runs the code of ``function``, and is its equal in all that is not changed.

    ``scope`` are other globals; ``contents`` is what its cells hold, with None for each that it
    shares with ``function``. With a ``suffix`` for its name, the clone has a code object to itself.
    """
    code, closure = function.__code__, function.__closure__
    if suffix:
        code = code.replace(co_name=code.co_name + suffix)
    if closure is not None and contents:
        closure = tuple(
            cell if new is None else types.CellType(new)
            for cell, new in zip(closure, contents, strict=True)
        )
    scope = function.__globals__ if scope is None else scope
    result = types.FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(result, function)
    del result.__dict__["__wrapped__"]  # the clone wraps what ``function`` does
    result.__dict__.update(function.__dict__)
    return result


class _Globals(dict[str, Any]):
    """Globals of a copy: those that are replaced, and all others where the function has them."""

    def __init__(self, scope: dict[str, Any], found: dict[str, Any]) -> None:
        super().__init__(found)
        self._scope = scope

    def __missing__(self, name: str) -> Any:
        return self._scope[name]


def _overlay(scope: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return _Globals(scope, {"__builtins__": scope.get("__builtins__", builtins), **found})


def _frozen(scope: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    # by its name Dynamo would look up the globals in the real module
    return {name: value for name, value in {**scope, **found}.items() if name != "__name__"}


@dataclass(frozen=True)
class _Copy:
    """A copy of a function, and which values of which globals it was made with."""

    function: Any
    read: tuple[tuple[dict[str, Any], str, Any], ...]

    def is_current(self) -> bool:
        return all(scope.get(name) is value for scope, name, value in self.read)


_serial = itertools.count(1)


def sets_globals(code: types.CodeType) -> bool:
    """Whether ``code`` may set globals, which in a clone with others would be lost."""
    stores = ("STORE_GLOBAL", "DELETE_GLOBAL")
    return "globals" in names_in(code) or any(
        i.opname in stores for c in _codes(code) for i in dis.get_instructions(c)
    )


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """``code`` and what it defines."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def function_of(module: nn.Module) -> Any:
    """The function behind a module's forward; None where it is no method of this module."""
    method = module.__dict__.get("forward")
    if method is not None:
        return method.__func__ if getattr(method, "__self__", None) is module else None
    plain = inspect.getattr_static(type(module), "forward", None)
    return plain if isinstance(plain, types.FunctionType) else None


def cell_contents(cell: types.CellType) -> Any:
    """What a closure's cell holds, or None."""
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None
