"""Patterns: what a rule looks for, built by calling functions and operators on pattern objects.

    h = p.maybe_cast(x)
    n = h * p.rsqrt(p.mean(h ** 2, -1, keepdim=True) + eps)

builds a tree; nothing is traced or run. A pattern object that is used twice (``h``) must match the
same node both times. Operands of commutative operations match in either order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..graph.operations import SPECS


class Pattern:
    """Base of all patterns; the operators build calls."""

    def __add__(self, other: Any) -> Pattern:
        return call("add", self, other)

    def __radd__(self, other: Any) -> Pattern:
        return call("add", other, self)

    def __sub__(self, other: Any) -> Pattern:
        return call("sub", self, other)

    def __mul__(self, other: Any) -> Pattern:
        return call("mul", self, other)

    def __rmul__(self, other: Any) -> Pattern:
        return call("mul", other, self)

    def __truediv__(self, other: Any) -> Pattern:
        return call("div", self, other)

    def __pow__(self, other: Any) -> Pattern:
        return call("pow", self, other)

    def __neg__(self) -> Pattern:
        return call("neg", self)

    def __or__(self, other: Pattern) -> Pattern:
        return Either((self, other))


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """Matches anything (that passes ``where``) as ``name``; one name must be one thing."""

    name: str
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True, eq=False)
class Anything(Pattern):
    """Matches anything and captures nothing."""


@dataclass(frozen=True, eq=False)
class Literal(Pattern):
    """Matches a constant equal to ``value`` (``2`` equals ``2.0``)."""

    value: Any


@dataclass(frozen=True, eq=False)
class Call(Pattern):
    """Matches a canonical operation."""

    name: str  # as in ``graph.canon``
    args: tuple[Pattern, ...]  # a pattern for each argument
    capture: str | None = None  # a name under which the node itself is captured


@dataclass(frozen=True, eq=False)
class Sequence(Pattern):
    """Matches a tuple or list of arguments, item by item."""

    items: tuple[Pattern, ...]


@dataclass(frozen=True, eq=False)
class Half(Pattern):
    """Matches the first (0) or second (1) half of ``x`` along its last dimension."""

    x: Pattern
    index: int
    pairs: bool = False  # the halves are the even and the odd features


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """Matches the first option that leads to a whole match."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True, eq=False)
class FanOut(Pattern):
    """Matches a node all of whose users match one pattern; the users are the match's outputs."""

    source: Pattern
    user: Pattern  # of each user; its captures are collected per user in ``m.users``


def roots(pattern: Pattern) -> frozenset[str] | None:
    """The canonical operations that ``pattern`` can match at its root; None: any node."""
    if isinstance(pattern, Call):
        return frozenset((pattern.name,))
    if isinstance(pattern, Half):
        return frozenset(("slice", "stride"))
    if isinstance(pattern, FanOut):
        return roots(pattern.source)
    if isinstance(pattern, Either):
        options = [roots(option) for option in pattern.options]
        return None if None in options else frozenset().union(*(f for f in options if f))
    return None


def lift(value: Any) -> Pattern:
    """A pattern from a pattern, a constant, or a tuple of them."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (tuple, list)):
        return Sequence(tuple(lift(v) for v in value))
    return Literal(value)


def call(name: str, *args: Any, **named: Any) -> Call:
    """A pattern of the canonical operation ``name``; arguments left out must be the defaults."""
    spec = SPECS[name]
    bound = spec.bind(args, named)
    if bound is None:
        raise TypeError(f"{name} takes {spec.params}, not {len(args)} arguments and {set(named)}")
    return Call(name, tuple(lift(a) for a in bound))


class Builder:
    """The ``p`` of ``Rule.patterns``: ``p.NAME(...)`` is a pattern of the operation NAME."""

    anything = Anything()

    def __getattr__(self, name: str) -> Callable[..., Call]:
        if name not in SPECS:
            hint = "see graph/operations.py; graph.canon.register adds one"
            raise AttributeError(f"no canonical operation is named {name!r} ({hint})")
        return lambda *args, **named: call(name, *args, **named)

    def cast(self, x: Any, dtype: torch.dtype | None = None) -> Call:
        """A change of dtype: to ``dtype``, or to any."""
        return Call("cast", (lift(x), self.anything if dtype is None else Literal(dtype)))

    def maybe_cast(self, x: Any) -> Either:
        """``x``, or ``x`` in another dtype."""
        return Either((self.cast(x), lift(x)))

    def either(self, *options: Any) -> Either:
        """Any of the options, tried in order."""
        return Either(tuple(lift(o) for o in options))

    def half(self, x: Any, index: int) -> Half:
        """The first (0) or second (1) half of ``x`` along the last dimension."""
        return Half(lift(x), index)

    def every_other(self, x: Any, index: int) -> Half:
        """The even (0) or odd (1) features of ``x``."""
        return Half(lift(x), index, pairs=True)

    def var(self, name: str, where: Callable[[Any], bool] | None = None) -> Var:
        """A capture that is not a parameter of ``patterns``."""
        return Var(name, where)

    def capture(self, name: str, pattern: Call) -> Call:
        """Capture the node that ``pattern`` matches as ``name``."""
        return Call(pattern.name, pattern.args, name)

    def fan_out(self, source: Pattern, user: Pattern) -> FanOut:
        """A node and all its users, which must all match ``user``."""
        return FanOut(source, user)
