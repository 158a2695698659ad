"""What a graph does besides giving its values: writes into memory, random draws, modes, anything.

Of a node this is read from the schema of the operator that it calls, with its arguments in their
places: a keyword's name alone says nothing (``F.relu(g, True)`` writes), and neither does a
function's. ``Effects`` reads all nodes of a graph, once, and answers for the whole.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx

from . import facts
from .canon import canonical
from .opaque.functions import is_leaf
from .signatures import (
    Parameter,
    bound,
    defaults,
    is_builtin,
    is_torch,
    module_of,
    name_of,
    names_in,
    overloads,
    packet,
)


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes into whose memory ``node`` writes; for an opaque one, all tensors it is given."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return ()
    if is_opaque(node):
        candidates: Iterable[Any] = node.all_input_nodes
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        candidates = _written_within(node)
    else:
        candidates = _written(node)
    return tuple(dict.fromkeys(n for n in _nodes(candidates) if _may_be_tensor(n)))


def draws(node: fx.Node) -> bool:
    """Whether ``node`` takes numbers from a random generator, or changes its state."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(draws(n) for body in _bodies(node) for n in body.graph.nodes)
    if not _may_draw(node.op, node.target):
        return False
    bindings = bound(node)
    return not bindings or any(_is_active(node, each) for each in bindings)


def is_opaque(node: fx.Node) -> bool:
    """Whether nothing is known of what ``node`` does besides giving its value."""
    if node.op == "call_module":
        return True
    if node.op != "call_function" or "fusewright_rule" in node.meta or is_leaf(node.target):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return not _bodies(node)
    ours = module_of(node.target).partition(".")[0] == __name__.partition(".")[0]
    return not ours and not is_builtin(node.target) and canonical(node) is None


def has_effect(node: fx.Node) -> bool:
    """Whether ``node`` does something besides giving its value, so that it is never dead."""
    return is_opaque(node) or bool(writes(node)) or draws(node)


CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def is_reentrant(checkpoint: fx.Node) -> bool:
    """Whether a captured checkpoint is one with ``use_reentrant=True``."""
    return checkpoint.kwargs.get("use_reentrant") is not False


def switches_mode(node: fx.Node) -> bool:
    """Whether what follows the node runs in another mode: gradients, autocast, inference, vmap."""
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return (
        name.startswith(("_enter_", "_exit_"))
        or "set_grad_enabled" in name
        or name.endswith(("_increment_nesting", "_decrement_nesting", "_hooks_disable"))
    )


def modes(graph: fx.Graph) -> dict[fx.Node, tuple[Any, ...]]:
    """The mode in which each node runs: gradients on or off, and what was entered and not left.

    Two nodes of a graph with equal modes run alike, whatever was switched between them. The graph
    begins in the mode in which it is captured.
    """
    grad: Any = torch.is_grad_enabled()
    entered: tuple[Any, ...] = ()
    result = {}
    for node in graph.nodes:
        result[node] = (grad, *entered)
        if not switches_mode(node):
            continue
        name = getattr(node.target, "__name__", "")
        if "set_grad_enabled" in name:
            grad = node.args[0]
        elif name.startswith("_exit_") and entered and node.args[:1] == entered[-1:]:
            entered = entered[:-1]
        else:  # entered, or something that is not known to be undone
            entered = (*entered, node)
    return result


def _written(node: fx.Node) -> Iterator[Any]:
    """The arguments of a known function that it writes into; nodes, or lists of them."""
    if _named_as_write(node):
        yield from node.args[:1] or list(node.kwargs.values())[:1]
    yield node.kwargs.get("out")
    for binding in bound(node):
        yield from (value for p, value in binding.items() if p.written)
        by_name = {p.name: value for p, value in binding.items()}
        if by_name.get("inplace", False) is not False:
            yield next(iter(binding.values()))
        if by_name.get("max_norm") is not None:  # an embedding shortens the rows that it reads
            yield by_name.get("weight")
        # operators that keep statistics do not say so in their schema
        by_default = {**defaults(node.target), **by_name}
        flags = (by_default.get(flag, True) for flag in ("training", "use_input_stats"))
        if all(flag is not False for flag in flags):
            yield from (v for name, v in by_name.items() if name.startswith("running_"))


_IN_PLACE = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor",
    "lshift", "rshift", "concat",
)  # fmt: skip
_OPERATORS = {
    operator.setitem, operator.delitem, *(getattr(operator, f"i{name}") for name in _IN_PLACE)
}  # fmt: skip
_DUNDERS = {"__setitem__", "__delitem__", *(f"__i{name}__" for name in _IN_PLACE)}


def _named_as_write(node: fx.Node) -> bool:
    """Whether it is ``+=`` or the like, or its name says that it writes into the first argument."""
    # so does every method and function of PyTorch whose name ends in an underscore, those without a
    # schema too (``requires_grad_``, the functions of ``nn.init``)
    if node.op == "call_function" and node.target in _OPERATORS:
        return True
    name = name_of(node.target)
    ends = name.endswith("_") and not name.endswith("__") and not name.startswith("_")
    is_torch = node.op == "call_method" or module_of(node.target).partition(".")[0] == "torch"
    return (ends and is_torch) or (node.op == "call_method" and name in _DUNDERS)


@functools.cache
def _may_draw(op: str, target: Any) -> bool:
    """Whether the function draws at least with some arguments."""
    # of one in Python, the names in its code say which operators it may call
    operators = overloads(op, target)
    if operators:
        return any(_is_seeded(o) for o in operators)
    if module_of(target) == "torch.random":
        return True
    code = getattr(target, "__code__", None)
    if code is None or not is_torch(target):
        return False
    packets = (packet(name) for name in names_in(code))
    return any(_is_seeded(getattr(p, o)) for p in packets if p is not None for o in p.overloads())


def _is_seeded(overload: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in overload.tags


def _is_active(node: fx.Node, given: Mapping[Parameter, Any]) -> bool:
    """Whether a function that may draw does so: no dropout does in evaluation, or of nothing."""
    by_name = {p.name: value for p, value in given.items()}
    if any(by_name.get(flag) is False for flag in ("train", "training")):
        return False
    default = defaults(node.target)
    share = "p" if "dropout" in name_of(node.target) else "dropout_p"
    for name in (share, "dropout"):
        if name in by_name or name in default:
            return by_name.get(name, default.get(name)) != 0
    if "training" in default and "training" not in by_name:
        return default["training"] is not False
    return True


def _written_within(node: fx.Node) -> list[fx.Node]:
    """Which inputs of a node the graphs that it runs write into."""
    bodies = _bodies(node)
    if name_of(node.target) == "autograd_function_apply":
        bodies = bodies[:1]  # the other one is its backward, which has other inputs
    memory = set()
    for body in bodies:
        inner = {m for n in body.graph.find_nodes(op="placeholder") for m in facts.memories(n)}
        targets = (t for n in body.graph.nodes for t in writes(n))
        memory |= {m for t in targets for m in facts.memories(t)} & inner
    inputs = [n for n in node.all_input_nodes if facts.body(n) is None]
    return [n for n in inputs if memory & facts.memories(n)] or (inputs if memory else [])


def _bodies(node: fx.Node) -> list[fx.GraphModule]:
    return [body for n in node.all_input_nodes if (body := facts.body(n)) is not None]


def _nodes(values: Iterable[Any]) -> Iterator[fx.Node]:
    for value in values:
        if isinstance(value, fx.Node):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _nodes(value)


def _may_be_tensor(node: fx.Node) -> bool:
    value = facts.value(node)
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor) or (value is None and facts.body(node) is None)


# ------------------------------------------------------------------------ of a graph, as a whole

_T = TypeVar("_T")
_Sources = frozenset[int] | tuple[frozenset[int], ...]
"""The numbers of the inputs that a node is made of, or those of each of its values."""


class _Answer(Generic[_T]):
    """An attribute of ``Effects`` that is computed once, and refused when the graph was edited."""

    def __init__(self, find: Callable[[Any], _T]) -> None:
        self._find = find

    def __get__(self, effects: Effects, owner: object = None) -> _T:
        return effects.answer(self._find)


class Effects:
    """What a graph and the graphs nested in it do. Nodes and graphs are in order, outer first.

    It speaks of the graph as it is when it is made; it raises RuntimeError when it is asked later.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graphs = tuple(facts.nested(module))
        self._state = _state(self.graphs)
        self._answers: dict[Callable[[Any], Any], Any] = {}

    def is_current(self) -> bool:
        """Whether no node was added, removed, moved, or given other arguments."""
        now = _state(tuple(facts.nested(self.module)))
        return len(now) == len(self._state) and all(map(operator.is_, now, self._state))

    def answer(self, find: Callable[[Effects], _T]) -> _T:
        """What ``find`` says of the graph."""
        if not self.is_current():
            raise RuntimeError("the graph was edited after its effects were read")
        if find not in self._answers:
            self._answers[find] = find(self)
        result: _T = self._answers[find]
        return result

    @_Answer
    def writes(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """The nodes that write -> those into whose memory they do."""
        return {n: targets for n in self._nodes() if (targets := writes(n))}

    @_Answer
    def lasting_writes(self) -> list[tuple[fx.Node, fx.Node]]:
        """(node, what it writes into) of all writes that outlive the graph, or may do so."""
        sources = (n for n in self._nodes() if n.op in ("placeholder", "get_attr"))
        inputs = {memory for n in sources for memory in facts.memories(n)}
        pairs = ((node, t) for node, targets in self.writes.items() for t in targets)
        return [(n, t) for n, t in pairs if not (m := facts.memories(t)) or m & inputs]

    @_Answer
    def last_writes(self) -> dict[fx.Graph, dict[int, fx.Node]]:
        """For each graph: memory -> the last of its nodes that writes into it."""
        last: dict[fx.Graph, dict[int, fx.Node]] = {inner.graph: {} for inner in self.graphs}
        for node, targets in self.writes.items():
            for target in targets:
                last[node.graph].update(dict.fromkeys(facts.memories(target), node))
        return last

    @_Answer
    def returned(self) -> set[int]:
        """The memory that the graph returns."""
        outputs = self.module.graph.output_node().all_input_nodes
        return {memory for n in outputs for memory in facts.memories(n)}

    @_Answer
    def open_inputs(self) -> list[int]:
        """The inputs that the graph's caller may write into, and the graph lets alone.

        They are floating, and neither parameters, nor written or returned by the graph.
        """
        protected = self.returned.union(self.last_writes[self.module.graph])
        return [
            i
            for i, node in enumerate(self.module.graph.find_nodes(op="placeholder"))
            if (t := facts.tensor(node)) is not None
            and t.is_floating_point()
            and not isinstance(t, torch.nn.Parameter)
            and not facts.memories(node) & protected
        ]

    @_Answer
    def draws(self) -> list[fx.Node]:
        """The nodes that draw random numbers; those that run such graphs, too."""
        return [n for n in self._nodes() if draws(n)]

    @_Answer
    def unused_draws(self) -> list[fx.Node]:
        """Of those in nested graphs, the ones that nothing uses."""
        unused, writing, drawing = [], self.writes, set(self.draws)
        for inner in self.graphs[1:]:
            live = set(inner.graph.output_node().all_input_nodes)
            for node in reversed(inner.graph.nodes):
                if node in live or node in writing:
                    live.update(node.all_input_nodes)
                elif node in drawing:
                    unused.append(node)
        return unused

    @_Answer
    def opaque(self) -> list[fx.Node]:
        """The nodes of which it is not known what they do."""
        return [n for n in self._nodes() if is_opaque(n)]

    @_Answer
    def leaves(self) -> list[fx.Node]:
        """The calls of functions that were captured as one node."""
        return [n for n in self._nodes() if is_leaf(n.target)]

    @_Answer
    def convolved_lengths(self) -> list[fx.Node]:
        """The convolutions over lengths that differ from call to call."""
        named = [n for n in self._nodes() if getattr(n.target, "__name__", "") in _CONVOLUTIONS]
        inputs = [facts.tensor(n.args[0]) if n.args else None for n in named]
        return [
            n for n, t in zip(named, inputs, strict=True)
            if t is not None and any(type(s) is not int for s in t.shape[2:])
        ]  # fmt: skip

    @_Answer
    def targets(self) -> set[Any]:
        """What the nodes call."""
        return {n.target for n in self._nodes()}

    @_Answer
    def checkpoints(self) -> list[fx.Node]:
        """The checkpoints, those in others too."""
        return [n for n in self._nodes() if n.target is CHECKPOINT]

    @_Answer
    def modes(self) -> dict[fx.Node, tuple[Any, ...]]:
        """``modes`` of all nodes."""
        return {n: mode for inner in self.graphs for n, mode in modes(inner.graph).items()}

    @_Answer
    def inputs_of_outputs(self) -> list[frozenset[int]] | None:
        """For each output the numbers of the inputs it is made of; checkpoints are followed.

        A set may be too large and is never too small. None where a node writes into another one,
        which nothing in the graph says.
        """
        return None if self.writes else _sources_of_outputs(self.module)

    @_Answer
    def inputs_without_gradient(self) -> list[int]:
        """The inputs that need a gradient and get none: what is used under ``no_grad`` alone."""
        # Eager mode does not know of them. A compiled graph would call their hooks, with None. Of
        # a graph as captured, TorchDynamo knows what needs a gradient, but for what it did not
        # look into
        is_known = not self.leaves and not any(
            isinstance(n.target, torch._ops.HigherOrderOperator) and n.target is not CHECKPOINT
            for n in self._nodes()
        )
        reached = _reached(self.module.graph, is_known, self.writes, self.modes)
        inputs = enumerate(self.module.graph.find_nodes(op="placeholder"))
        return [i for i, n in inputs if needs_gradient(n) and n not in reached]

    def gives_gradient_alone(self, inputs: set[fx.Node]) -> bool:
        """Whether an output, of it or of a checkpoint in it, has a gradient of ``inputs`` alone."""
        return _is_alone(self.module.graph, inputs)

    def _nodes(self) -> Iterator[fx.Node]:
        return (n for inner in self.graphs for n in inner.graph.nodes)


def _state(graphs: Iterable[fx.GraphModule]) -> list[Any]:
    """What edits replace: nodes, and the objects that hold their arguments."""
    nodes = (n for inner in graphs for n in inner.graph.nodes)
    return [part for n in nodes for part in (n, n.target, n.args, n.kwargs)]


def needs_gradient(node: Any) -> bool:
    """Whether a value of the node, or one in it, needs a gradient."""
    return _any_needs(facts.value(node))


def _any_needs(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_any_needs, value))
    return isinstance(value, Tensor) and value.requires_grad


def _reached(
    graph: fx.Graph, is_known: bool, writing: Container[fx.Node], mode: Mapping[fx.Node, Any]
) -> set[fx.Node]:
    """The nodes that a gradient of the outputs, or of what is written, may reach."""
    reached = {graph.output_node()}
    for node in reversed(graph.nodes):
        is_write = node in writing
        # according to TorchDynamo, where that is known
        stops = is_known and facts.value(node) is not None and not needs_gradient(node)
        if node.op == "output":
            stops = False
        if not is_write and (node not in reached or node.target in _DETACH or stops):
            continue
        if node.op != "output" and not mode[node][0]:
            continue
        body = facts.body(node.args[0]) if node.target is CHECKPOINT and not is_write else None
        if body is None:
            reached.update(node.all_input_nodes)
            continue
        inner = _reached(body.graph, is_known, writing, mode)
        pairs = zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True)
        reached.update(n for p, n in pairs if p in inner and isinstance(n, fx.Node))
    return reached


def _is_alone(graph: fx.Graph, inputs: set[fx.Node]) -> bool:
    needs: set[fx.Node] = set()
    for node in graph.nodes:
        is_source = node.op in ("placeholder", "get_attr") and node not in inputs
        if needs_gradient(node) and (is_source or any(n in needs for n in node.all_input_nodes)):
            needs.add(node)
        body = facts.body(node.args[0]) if node.target is CHECKPOINT else None
        if body is not None:
            parts = zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True)
            if _is_alone(body.graph, {p for p, n in parts if n not in needs}):
                return True
    outputs = graph.output_node().all_input_nodes
    return any(needs_gradient(node) and node not in needs for node in outputs)


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_DETACH = ("detach", torch.detach, Tensor.detach)


def _sources_of_outputs(module: fx.GraphModule) -> list[frozenset[int]]:
    sets: dict[fx.Node, _Sources] = {}
    inputs = 0
    for node in module.graph.nodes:
        if node.op == "placeholder":
            sets[node] = frozenset({inputs})
            inputs += 1
        elif node.op == "output":
            result = node.args[0]
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            return [_sources_of_value(value, sets) for value in outputs]
        else:
            sets[node] = _sources_of_node(node, sets)
    return []


def _sources_of_node(node: fx.Node, sources: dict[fx.Node, _Sources]) -> _Sources:
    if node.target is operator.getitem:
        whole = sources.get(node.args[0])  # type: ignore[arg-type]  # 2026-11-28: it is a node
        if isinstance(whole, tuple) and isinstance(node.args[1], int):
            return whole[node.args[1]]
    # a reentrant one gives zeros for a gradient that is missing, in eager mode too
    if node.target is CHECKPOINT and not is_reentrant(node):
        holder, *operands = node.args
        body = facts.body(holder)
        if body is not None and len(body.graph.find_nodes(op="placeholder")) == len(operands):
            each = [_sources_of_value(value, sources) for value in operands]
            inner = _sources_of_outputs(body)
            return tuple(frozenset[int]().union(*(each[i] for i in of)) for of in inner)
    return _sources_of_value([node.args, node.kwargs], sources)


def _sources_of_value(value: Any, sources: dict[fx.Node, _Sources]) -> frozenset[int]:
    """Of all nodes inside an argument."""
    sets: list[frozenset[int]] = []

    def add(node: fx.Node) -> fx.Node:
        of = sources.get(node, frozenset())
        sets.extend(of if isinstance(of, tuple) else (of,))
        return node

    fx.node.map_arg(value, add)
    return frozenset[int]().union(*sets)
