"""Matching a pattern against a node: backtracking search over the canonical view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph import facts
from ..graph.canon import Canon, canonical
from ..graph.operations import SPECS
from .pattern import Anything, Call, Either, Half, Literal, Pattern, Sequence, Var


@dataclass(frozen=True)
class State:
    """The captures of a match so far; never changed, only extended."""

    captures: dict[str, Any] = field(default_factory=dict)  # name -> node or constant
    seen: dict[int, Any] = field(default_factory=dict)  # id of a pattern object -> what it matched
    nodes: tuple[fx.Node, ...] = ()  # the interior nodes matched so far

    def with_capture(self, name: str, value: Any) -> State:
        """This state with one capture more."""
        return State({**self.captures, name: value}, self.seen, self.nodes)

    def with_seen(self, pattern: Pattern, value: Any) -> State:
        """This state, remembering what ``pattern`` matched."""
        return State(self.captures, {**self.seen, id(pattern): value}, self.nodes)

    def with_nodes(self, *nodes: fx.Node) -> State:
        """This state with more interior nodes."""
        new = tuple(n for n in nodes if n not in self.nodes)
        return State(self.captures, self.seen, (*self.nodes, *new)) if new else self


@dataclass
class Trace:
    """The nearest miss: the attempt that matched most before it stopped."""

    depth: int = 0  # how many nodes had matched
    node: Any = None  # where it stopped
    reason: str = ""  # why
    nodes: tuple[fx.Node, ...] = ()  # what had matched

    def note(self, state: State, node: Any, reason: Callable[[], str]) -> None:
        """Keep this attempt when it came further than all before; only then its reason is made."""
        if len(state.nodes) > self.depth:
            self.depth, self.node, self.reason = len(state.nodes), node, reason()
            self.nodes = state.nodes


def same(a: Any, b: Any) -> bool:
    """Whether two captured things are the same node or equal constants."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, torch.dtype) or isinstance(b, torch.dtype):
        return a is b
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(type(a) is type(b) or (_number(a) and _number(b))) and bool(a == b)


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def match(pattern: Pattern, value: Any, state: State, trace: Trace) -> Iterator[State]:
    """Yield every way in which ``value`` (a node or a constant) matches ``pattern``."""
    if id(pattern) in state.seen and not isinstance(pattern, (Literal, Anything)):
        if same(state.seen[id(pattern)], value):
            yield state
        else:
            before = state.seen[id(pattern)]
            trace.note(
                state, value, lambda: f"{_text(value)} where {_text(before)} was seen before"
            )
        return
    for state_after in _match(pattern, value, state, trace):
        yield state_after.with_seen(pattern, value)


def _match(pattern: Pattern, value: Any, state: State, trace: Trace) -> Iterator[State]:
    match_kind = type(pattern)
    if match_kind is Anything:
        yield state
    elif isinstance(pattern, Literal):
        if same(pattern.value, value):
            yield state
        else:
            trace.note(state, value, lambda: f"{_text(value)} where {pattern.value} is expected")
    elif isinstance(pattern, Var):
        yield from _match_var(pattern, value, state, trace)
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from match(option, value, state, trace)
    elif isinstance(pattern, Sequence):
        if isinstance(value, (tuple, list)) and len(value) == len(pattern.items):
            yield from _match_all(pattern.items, tuple(value), state, trace)
        else:
            trace.note(state, value, lambda: f"{len(pattern.items)} items expected")
    elif isinstance(pattern, Half):
        yield from _match_half(pattern, value, state, trace)
    elif isinstance(pattern, Call):
        yield from _match_call(pattern, value, state, trace)
    else:
        raise TypeError(f"{match_kind.__name__} may only stand at the top of a pattern")


def _match_var(pattern: Var, value: Any, state: State, trace: Trace) -> Iterator[State]:
    if pattern.name in state.captures:
        if same(state.captures[pattern.name], value):
            yield state
        else:
            trace.note(
                state, value, lambda: f"{_text(value)} is not the {pattern.name} seen before"
            )
    elif pattern.where is None or pattern.where(value):
        yield state.with_capture(pattern.name, value)
    else:
        trace.note(state, value, lambda: f"{_text(value)} cannot be {pattern.name}")


def _match_half(pattern: Half, value: Any, state: State, trace: Trace) -> Iterator[State]:
    canon = canonical(value)
    if canon is not None and _is_half(canon, pattern):
        yield from match(pattern.x, canon.args[0], state.with_nodes(value, *canon.via), trace)
        return
    kind = "every other feature" if pattern.pairs else "half"
    trace.note(state, value, lambda: f"{_text(value)} is not {kind} {pattern.index} of a tensor")


def _is_half(canon: Canon, pattern: Half) -> bool:
    if canon.name not in ("slice", "stride") or canon.args[1] != -1:
        return False
    x, _, start, stop = canon.args
    full = facts.size(x, -1)
    if full is None or full % 2:
        return False
    if canon.name == "stride":
        return pattern.pairs and (start, stop) == (pattern.index, 2)
    half = full // 2
    return not pattern.pairs and (start, stop) == ((0, half), (half, full))[pattern.index]


def _match_call(pattern: Call, value: Any, state: State, trace: Trace) -> Iterator[State]:
    canon = canonical(value)
    if canon is None or canon.name != pattern.name:
        trace.note(state, value, lambda: f"{_text(value)} where {pattern.name} is expected")
        return
    inner = state.with_nodes(value, *canon.via)
    if pattern.capture is not None:
        inner = inner.with_capture(pattern.capture, value)
    for args in _orders(canon):
        yield from _match_all(pattern.args, args, inner, trace)


def _orders(canon: Canon) -> Iterator[tuple[Any, ...]]:
    yield canon.args
    if SPECS[canon.name].commutative and canon.args[0] is not canon.args[1]:
        yield (canon.args[1], canon.args[0], *canon.args[2:])


def _match_all(
    patterns: tuple[Pattern, ...], values: tuple[Any, ...], state: State, trace: Trace
) -> Iterator[State]:
    if not patterns:
        yield state
        return
    for state_after in match(patterns[0], values[0], state, trace):
        yield from _match_all(patterns[1:], values[1:], state_after, trace)


def _text(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    canon = canonical(value)
    if canon is not None:
        return f"{canon.name} ({value.name})"
    target = value.target
    kind = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"{'input' if value.op == 'placeholder' else kind} ({value.name})"
