"""Applying rules to a graph: finding, checking, verifying, splicing, accounting.

The engine, not the rule, answers: is a value inside the formula used outside it? does anything
write in place between its nodes? where can the replacement stand? what is dead afterwards?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..graph import facts, traffic
from ..graph.cleanup import prune
from ..graph.effects import draws, switches_mode, writes
from ..graph.fakes import fake, hint
from ..kernels.op import Op
from ..report import Figures
from .conditions import require_one_mode, require_plain, require_pure, require_unshared
from .findings import Finding, missed, outside
from .matcher import Trace
from .rule import Declined, Emit, Left, Match, NoMatch, Rule


@dataclass(frozen=True)
class Verdict:
    """The result of a candidate's verification."""

    reason: str | None = None  # None when it may be installed, else why not
    # its errors, and bytes kept for backward before and after
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True)
class Candidate:
    """A match that passed the rule's check and the engine's, ready to be verified."""

    rule: Rule
    match: Match
    inputs: tuple[fx.Node, ...]  # the values that the formula reads from outside, in order
    interior: tuple[fx.Node, ...]  # the nodes it replaces, in graph order
    outputs: tuple[fx.Node, ...]  # the interior nodes whose values are used outside
    table: Mapping[str, Callable[..., Any]]  # op name -> function, for ``Emit``
    # the arguments of each that was entered around the formula
    autocast: tuple[tuple[Any, ...], ...] = ()

    def replacement(self) -> fx.Graph:
        """The rewrite alone, as a graph over placeholders for ``inputs``."""
        return self.emitted()[0]

    def emitted(self) -> tuple[fx.Graph, Emit]:
        """``replacement``, and what the rule added to it."""
        graph = fx.Graph()
        env, emit = _placeholders(graph, self.inputs), self.emit(graph)
        graph.output(_as_tuple(self.rule.rewrite(self.match.mapped(lambda n: env.get(n, n)), emit)))
        return graph, emit

    def original(self) -> fx.Graph:
        """The formula alone, as a graph over placeholders for ``inputs``."""
        graph = fx.Graph()
        env = _placeholders(graph, self.inputs)
        for node in self.interior:
            env[node] = graph.node_copy(node, lambda n: env[n])
        graph.output(tuple(env[n] for n in self.outputs))
        return graph

    def emit(self, graph: fx.Graph) -> Emit:
        """An ``Emit`` by which the rule adds nodes to ``graph``."""
        return Emit(graph, self.table, self.rule.name)


@dataclass
class Fuel:
    """How many rewrites may still be made (None: any number); for bisecting a bad one."""

    left: int | None = None

    def take(self) -> bool:
        """Use one unit; False when there is none."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


def apply(
    module: fx.GraphModule,
    rules: Sequence[Rule],
    table: Mapping[str, Callable[..., Any]],
    verify: Callable[[Candidate], Verdict] | None,
    fuel: Fuel,
) -> list[Finding]:
    """Apply ``rules`` in order to ``module`` and every graph nested in it, in place.

    Each rule sees the work of those before it. ``table`` maps op names to functions; ``verify``, if
    not None, is called for each candidate before it is installed; ``fuel`` limits the number of
    rewrites. Returns one finding per formula: rewritten, refused, missed or left.
    """
    findings: list[Finding] = []
    settled: set[fx.GraphModule] = set()  # parts of formulas that were found outside of them
    for inner in facts.nested(module, settled):
        graph_findings: list[Finding] = []
        with facts.unchanged(inner.graph):
            for rule in rules:
                graph_findings += _apply_rule(
                    inner.graph, rule, table, verify, fuel, graph_findings
                )
            graph_findings += missed(inner.graph, rules, graph_findings)
        inner.graph.lint()
        inner.recompile()
        findings += graph_findings
        settled |= facts.bodies(inner.graph, {name for f in graph_findings for name in f.claimed})
    return findings


def _apply_rule(
    graph: fx.Graph,
    rule: Rule,
    table: Mapping[str, Callable[..., Any]],
    verify: Callable[[Candidate], Verdict] | None,
    fuel: Fuel,
    before: list[Finding],
) -> list[Finding]:
    findings: list[Finding] = []
    erased_nodes: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in erased_nodes or node.op not in ("call_function", "call_method"):
            continue
        refusal: Finding | None = None
        for m in rule.find(node, Trace()):
            try:
                candidate = _candidate(graph, rule, m, table)
                _require_support(candidate)
                verdict = verify(candidate) if verify else Verdict()
                if verdict.reason:
                    raise Declined(verdict.reason)
            except NoMatch:
                continue
            except Declined as no:
                status = "left" if isinstance(no, Left) else "refused"
                refusal = refusal or _finding(rule, m, status, str(no))
                continue
            if not fuel.take():
                refusal = _finding(rule, m, "refused", "FUSEWRIGHT_FUEL is used up")
                break
            finding = _finding(rule, m, "rewritten", "")
            finding.figures = replace(
                verdict.figures,
                moved_before=traffic.node_by_node(candidate.interior),
                moved_after=traffic.fused(candidate.inputs, candidate.outputs),
            )
            with facts.changing():
                erased, names = _splice(graph, candidate)
            erased_nodes |= erased
            findings = outside(findings, finding)
            finding.claimed |= names
            _absorb(rule, finding, before, findings)
            findings.append(finding)
            refusal = None
            break
        if refusal is not None and not any(refusal.claimed & f.claimed for f in findings):
            findings.append(refusal)
    findings.reverse()
    return findings


def _candidate(
    graph: fx.Graph, rule: Rule, m: Match, table: Mapping[str, Callable[..., Any]]
) -> Candidate:
    try:
        rule.check(m)
    except Declined:
        raise
    except Exception as error:  # most likely of a user's rule: it must not end the capture
        raise Declined(f"the rule's check failed: {type(error).__name__}: {error}") from error
    order = {n: i for i, n in enumerate(graph.nodes)}
    interior = tuple(sorted(m.nodes, key=order.__getitem__))
    inside, outputs = set(interior), set(m.outputs)
    for node in interior:
        external_users = [u for u in node.users if u not in inside]
        m.require(
            node in outputs or rule.inner_may_stay or not external_users,
            f"{node.name} inside the formula is also used by "
            f"{external_users[0].name if external_users else ''}",
            node,
        )
    inputs = tuple(dict.fromkeys(i for n in interior for i in n.all_input_nodes if i not in inside))
    require_pure(graph, m, interior, inputs, order)
    require_plain(m, inputs)
    require_unshared(m, inputs, m.outputs)
    uses = [u for n in outputs for u in n.users if u not in inside]
    first_use = min(uses, key=order.__getitem__, default=None)
    if first_use is not None and any(order[i] >= order[first_use] for i in inputs):
        advanced = _advance(inputs, first_use, inside, order)
        m.require(advanced, "an output is used before the last input exists")
        order = {n: i for i, n in enumerate(graph.nodes)}
    autocast = require_one_mode(graph, m, interior, _place(m.outputs, inputs, order))
    return Candidate(rule, m, inputs, interior, m.outputs, table, autocast)


def _advance(
    inputs: tuple[fx.Node, ...], place: fx.Node, inside: set[fx.Node], order: dict[fx.Node, int]
) -> bool:
    # Move those of ``inputs`` that come after ``place`` before it, with all that makes them: an
    # adapter's matrices are made in its own module, which may be called after others' results are
    # used. Not where that could change anything.
    late = {i for i in inputs if order[i] >= order[place]}
    queue = list(late)
    while queue:
        new = [i for i in queue.pop().all_input_nodes if order[i] >= order[place] and i not in late]
        late.update(new)
        queue += new
    if place in late or late & inside or any(draws(n) for n in late):
        return False
    node, last = place, max(late, key=order.__getitem__)
    while node is not last.next:
        if writes(node) or switches_mode(node):
            return False
        node = node.next
    with facts.changing():
        for node in sorted(late, key=order.__getitem__):
            place.prepend(node)
    return True


def _require_support(c: Candidate) -> None:
    try:
        calls = c.emitted()[1].ops
    except Exception:  # verification, which runs the rewrite, says why
        return
    try:
        reasons = "; ".join(dict.fromkeys(unsupported(calls, c.autocast)))
    except Exception as error:  # most likely of a user's op: it must not end the capture
        raise Declined(f"its op's check failed: {type(error).__name__}: {error}") from error
    c.match.leave(c.rule.optional and bool(reasons), reasons)
    c.match.require(not reasons, reasons, c.match.root)


def _place(
    outputs: tuple[fx.Node, ...], inputs: tuple[fx.Node, ...], order: Mapping[fx.Node, int]
) -> fx.Node:
    """The node before which a replacement stands: the first output, or what follows the inputs."""
    start = min(outputs, key=order.__getitem__)
    last = max(inputs, key=order.__getitem__, default=start)
    return last.next if order[last] > order[start] else start


def _splice(graph: fx.Graph, c: Candidate) -> tuple[set[fx.Node], frozenset[str]]:
    # At the first output, or after the last input if that is later, the replacement runs in the
    # mode of the formula, and after all writes that the formula came after. Returns the nodes that
    # went, and the names of those that came.
    order = {n: i for i, n in enumerate(graph.nodes)}
    emit = c.emit(graph)
    with graph.inserting_before(_place(c.outputs, c.inputs, order)):
        results = _as_tuple(c.rule.rewrite(c.match, emit))
    if len(results) != len(c.outputs):
        raise RuntimeError(
            f"{c.rule.name}.rewrite returned {len(results)} values for {len(c.outputs)} outputs"
        )
    for new in emit.nodes:
        new.meta.setdefault("nn_module_stack", c.match.root.meta.get("nn_module_stack"))
        new.meta.setdefault("stack_trace", c.match.root.meta.get("stack_trace"))
    for old, new in zip(c.outputs, results, strict=True):
        new.meta.setdefault("example_value", old.meta.get("example_value"))
        if new in emit.nodes:
            new.meta["fusewright_replaces"] = facts.captured_name(old)
        old.replace_all_uses_with(new)
    dead = sorted(c.interior, key=order.__getitem__, reverse=True)
    return prune(graph, dead), frozenset(n.name for n in emit.nodes)


def _absorb(rule: Rule, done: Finding, before: list[Finding], findings: list[Finding]) -> None:
    # Drop the findings whose nodes this rewrite consumed, where the rule says so.
    if not rule.absorbs:
        return
    absorbed = [
        f for f in (*before, *findings) if f.rule in rule.absorbs and f.claimed & done.claimed
    ]
    done.formulas = max(1, sum(f.formulas for f in absorbed))
    for f in absorbed:
        (before if f in before else findings).remove(f)
        done.figures = done.figures.after([f.figures])


def _finding(rule: Rule, m: Match, status: str, reason: str) -> Finding:
    return Finding(
        rule.name,
        rule.op,
        status,
        facts.common_home(m.unshared_nodes()),
        reason,
        node=m.root.name,
        claimed=frozenset(n.name for n in m.nodes),
    )


def _placeholders(graph: fx.Graph, inputs: tuple[fx.Node, ...]) -> dict[fx.Node, fx.Node]:
    env = {}
    for i, node in enumerate(inputs):
        env[node] = graph.placeholder(f"input_{i}")
        env[node].meta = {"example_value": facts.value(node)}
    return env


def _as_tuple(value: Any) -> tuple[fx.Node, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# ------------------------------------------------------- whether ops take the tensors of the site


def unsupported(ops: Mapping[fx.Node, Op], autocast: tuple[tuple[Any, ...], ...]) -> list[str]:
    """The reasons of the first of ``ops`` that cannot take its arguments; empty if all can.

    ``ops`` are nodes of one graph over placeholders with example values. They are asked with fake
    tensors of the sizes that the graph was captured with, so that no comparison of sizes becomes a
    guard of the captured graph. ``autocast`` holds the arguments of each autocast around them.
    """
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            example = facts.value(node)
            values[node] = run(node) if example is None else fake(example, hint)
        return values[node]

    def run(node: fx.Node) -> Any:  # what another call of the rewrite returns
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    with ExitStack() as around:
        around.enter_context(torch._guards.tracing(None))
        around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for settings in autocast:
            around.enter_context(torch.autocast(*settings))
        for node, op in ops.items():
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            if reasons := op.unsupported(*args, **kwargs):
                return reasons  # later ops may need what this one cannot compute
        return []
