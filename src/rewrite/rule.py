"""Rewrite rules, and what they work with: matches, and emitters of new nodes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..graph import facts
from ..graph.canon import canonical
from ..graph.effects import writes
from ..graph.opaque.autograd_functions import result_of
from ..kernels.op import Op
from .matcher import State, Trace, match
from .op_table import OF_CALL
from .pattern import Builder, FanOut, Pattern, Var, roots


class Declined(Exception):
    """A check said no; raised by ``Match.require``."""

    def __init__(self, reason: str, at: Any = None) -> None:
        super().__init__(reason)
        self.at = at


class Left(Declined):
    """A check said that the formula is better left as it is; raised by ``Match.leave``."""


class NoMatch(Declined):
    """A check said that this is another formula; raised by ``Match.pass_over``."""


class Match:
    """One match of a rule. Captures are attributes: ``m.x``, ``m.eps``.

    Attributes:
        root: the last node of the formula (the source, for a fan-out).
        spelling: the name that the rule yielded with the pattern.
        nodes: all matched nodes; they are replaced.
        outputs: the nodes whose values the rewrite must return, in order.
        users: for a fan-out, the captures of each user, in order; else empty.
    """

    def __init__(
        self,
        root: fx.Node,
        spelling: str,
        captures: Mapping[str, Any],
        nodes: tuple[fx.Node, ...],
        outputs: tuple[fx.Node, ...],
        users: tuple[Mapping[str, Any], ...] = (),
    ) -> None:
        self.root, self.spelling, self.nodes = root, spelling, nodes
        self.outputs, self.users, self.captures = outputs, users, dict(captures)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["captures"][name]
        except KeyError:
            raise AttributeError(f"the pattern captures no {name!r}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """A capture that not every spelling has."""
        return self.captures.get(name, default)

    def unshared_nodes(self) -> list[fx.Node]:
        """The nodes that are not shared with others, as is a cast in another module."""
        inside = set(self.nodes)
        nodes = [n for n in self.nodes if n in self.outputs or set(n.users) <= inside]
        return nodes or list(self.nodes)

    def require(self, condition: bool | None, reason: str, at: Any = None) -> None:
        """Decline the match with ``reason`` unless ``condition`` holds."""
        if not condition:
            raise Declined(reason, at)

    def leave(self, condition: bool, reason: str) -> None:
        """Leave the formula as it is when ``condition`` holds: no gap, only a remark."""
        if condition:
            raise Left(reason)

    def pass_over(self, condition: bool) -> None:
        """Take the match for none when ``condition`` holds: another formula, nothing to report."""
        if condition:
            raise NoMatch("another formula")

    def mapped(self, change: Callable[[Any], Any]) -> Match:
        """The same match over other nodes: every captured node replaced by ``change(node)``."""

        def walk(v: Any) -> Any:
            return fx.node.map_arg(v, change) if not isinstance(v, fx.Node) else change(v)

        captures = {k: walk(v) for k, v in self.captures.items()}
        users = tuple({k: walk(v) for k, v in u.items()} for u in self.users)
        return Match(self.root, self.spelling, captures, self.nodes, self.outputs, users)


class Emit:
    """The ``ops`` of ``Rule.rewrite``: ``ops.NAME(...)`` adds a call of the op NAME."""

    def __init__(self, graph: fx.Graph, table: Mapping[str, Callable[..., Any]], rule: str) -> None:
        self._graph, self._table, self._rule = graph, table, rule
        self.nodes: list[fx.Node] = []  # the nodes added, in order
        self.ops: dict[fx.Node, Op] = {}  # those that call an op, and which

    def __getattr__(self, name: str) -> Callable[..., fx.Node]:
        if name.startswith("__") or name not in self._table:
            raise AttributeError(f"no op is named {name!r}")
        return lambda *args, **kwargs: self.call(self._table[name], *args, **kwargs)

    def call(self, function: Callable[..., Any] | Op, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of any function, or of an op that is not in the table."""
        op = function if isinstance(function, Op) else OF_CALL.get(function)
        target = function.call if isinstance(function, Op) else function
        node = self._keep(self._graph.call_function(target, args, kwargs))
        if op is not None:
            self.ops[node] = node.meta["fusewright_op"] = op
        return node

    def method(self, name: str, x: Any, *args: Any) -> fx.Node:
        """Add a call of a tensor method; its example value is worked out at once."""
        node = self._keep(self._graph.call_method(name, (x, *args)))
        before = facts.tensor(x)
        if before is not None and not any(isinstance(a, fx.Node) for a in args):
            node.meta["example_value"] = getattr(before, name)(*args)
        return node

    def computed(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a call of any function of tensors, as early as its arguments allow."""
        # So it can be an input of a larger formula. Its example value is worked out at once.
        place = self._earliest(args)
        with nullcontext() if place is None else self._graph.inserting_before(place):
            node = self.call(function, *args)
        node.meta["example_value"] = function(*fx.node.map_arg(args, facts.value))
        return node

    def _earliest(self, args: Any) -> fx.Node | None:
        # The node after ``args`` and the graph's inputs; None in a graph that writes in place.
        used: set[fx.Node] = set()
        fx.node.map_arg(args, used.add)
        place = None
        for node in self._graph.nodes:
            if writes(node):
                return None
            if node in used or node.op == "placeholder":
                place = node.next
        return place

    def cast(self, x: fx.Node, dtype: Any) -> fx.Node:
        """A change of dtype."""
        return self.method("to", x, dtype)

    def as_dtype(self, x: Any, dtype: Any) -> Any:
        """``x`` itself where it is of ``dtype`` or no floating-point tensor, else a cast of it."""
        t = facts.tensor(x)
        if t is None or dtype is None or not t.is_floating_point() or t.dtype is dtype:
            return x
        return self.cast(x, dtype)

    def item(self, x: fx.Node, index: int) -> fx.Node:
        """One of the values of a call that returns several."""
        return self._keep(self._graph.call_function(operator.getitem, (x, index)))

    def part(self, x: Any, index: Any) -> fx.Node:
        """A part of a tensor, by slices; its example value is worked out at once."""
        node = self._keep(self._graph.call_function(operator.getitem, (x, index)))
        before = facts.tensor(x)
        if before is not None:
            node.meta["example_value"] = before[index]
        return node

    def copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """Add ``node`` once more, over other arguments; its example value is taken over."""
        copy = self._keep(self._graph.create_node(node.op, node.target, args, kwargs))
        copy.meta["example_value"] = facts.value(node)
        return copy

    def _keep(self, node: fx.Node) -> fx.Node:
        for used in node.all_input_nodes:
            if used.graph is not self._graph:
                self._graph.erase_node(node)
                raise RuntimeError(
                    f"{self._rule}.rewrite uses {used.name}, which is no input of the formula"
                )
        node.meta["fusewright_rule"] = self._rule
        self.nodes.append(node)
        return node


class Rule:
    """One rewrite: what it looks for, when it declines, what it makes.

    A subclass gives ``name``, ``op``, ``patterns`` and ``rewrite``, and where needed ``check``,
    ``outputs``, ``sample`` and ``suspects``. The engine owns everything else: outside users,
    mutation, where the new nodes go, dead code, nested graphs, verification and the report.

    Attributes:
        name: as reports show it.
        op: the op that the rewrite calls.
        outputs: names of captured nodes (``p.capture``) that may be used outside the formula; the
            rewrite returns their values after the root's.
        optional: what the op does not take is left as it is, and is no gap: PyTorch is as good.
        inner_may_stay: inner nodes that are also used outside do not stop the rewrite; they stay.
        absorbs: names of rules whose sites this one replaces in the report, when it consumes
            their nodes.
    """

    name: ClassVar[str]
    op: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False
    inner_may_stay: ClassVar[bool] = False
    absorbs: ClassVar[tuple[str, ...]] = ()

    def patterns(self, *args: Any, **kwargs: Any) -> Iterable[Any]:
        """Yield patterns, or ``(spelling, pattern)`` pairs.

        Written as ``patterns(self, p, x, w, ...)``: a builder, and one capture per parameter.
        """
        raise NotImplementedError

    def check(self, m: Match) -> None:
        """Decline with ``m.require(condition, reason)``."""

    def rewrite(self, m: Match, ops: Emit) -> Any:
        """Add the new nodes; return one node per output (a single node, or a tuple)."""
        raise NotImplementedError

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """A test input for ``node`` where random numbers will not do (labels); None for those."""
        return None

    def fit(self, m: Match, values: Mapping[fx.Node, Any]) -> None:
        """Write into test inputs what depends on others (boundaries, on a length); none does."""

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """Nodes that look like this rule's formula and why; the unclaimed ones are reported."""
        return ()

    # the engine's side

    def compiled(self) -> list[tuple[str, Pattern, frozenset[str] | None]]:
        """All patterns with their spellings and the operations of their roots, built once."""
        cached = self.__dict__.get("_compiled")
        if cached is None:
            names = list(inspect.signature(self.patterns).parameters)[1:]
            patterns = self.patterns(Builder(), *(Var(n) for n in names))
            pairs = [m if isinstance(m, tuple) else ("", m) for m in patterns]
            cached = [(spelling, pattern, roots(pattern)) for spelling, pattern in pairs]
            self.__dict__["_compiled"] = cached
        return cached

    def find(self, node: fx.Node, trace: Trace) -> Iterator[Match]:
        """Every match whose root is ``node``, in the order of the spellings."""
        canon = canonical(node)
        name = canon and canon.name
        for spelling, pattern, possible in self.compiled():
            if possible is not None and name not in possible:
                continue
            if isinstance(pattern, FanOut):
                yield from self._find_fan_out(node, spelling, pattern, trace)
                continue
            for state in match(pattern, node, State(), trace):
                extra = tuple(state.captures[n] for n in self.outputs if n in state.captures)
                yield Match(node, spelling, state.captures, state.nodes, (node, *extra))

    def _find_fan_out(
        self, node: fx.Node, spelling: str, pattern: FanOut, trace: Trace
    ) -> Iterator[Match]:
        for state in match(pattern.source, node, State(), trace):
            seeded = state.with_capture("source", node).with_seen(pattern.source, node)
            users, nodes = [], list(state.nodes)
            results = tuple(result_of(user) for user in node.users)
            for user in results:
                end = next(match(pattern.user, user, seeded, trace), None)
                if end is None:
                    break
                users.append({k: v for k, v in end.captures.items() if k not in state.captures})
                nodes += [n for n in end.nodes if n not in nodes]
            else:
                if users:
                    yield Match(
                        node,
                        spelling,
                        state.captures,
                        tuple(nodes),
                        results,
                        tuple(users),
                    )
