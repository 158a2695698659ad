"""Logits that a graph returns with a fused loss: lazy, and joined with the loss."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ...graph import facts
from ...graph.canon import Canon, canonical
from ...graph.cleanup import prune
from ...graph.effects import writes
from ...graph.opaque.autograd_functions import is_wrapped
from ...kernels.linear.projections import Linear
from ...rewrite.findings import Finding
from .head_call import Plan, head_parts
from .joined_loss import logits_alone, loss_and_logits
from .reads import Reads

NodesBefore = Mapping[str, fx.Node]
"""The nodes of a graph before it was rewritten, by their names."""


def copy_if_loss(module: fx.GraphModule) -> NodesBefore:
    """A copy of the graph, if there is a loss in it that a rule may fuse; else nothing."""
    if not any((c := canonical(n)) and c.name == "cross_entropy" for n in module.graph.nodes):
        return {}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "output":
            env[node] = graph.node_copy(node, lambda n: env[n])
    return {old.name: new for old, new in env.items()}


def defer_logits(
    module: fx.GraphModule,
    before: NodesBefore,
    findings: Sequence[Finding],
    lazy: bool,
    model: Callable[[], nn.Module | None] = lambda: None,
    reads: Reads | None = None,
    is_alone: bool = False,
) -> int:
    """Join fused losses with the logits that are returned with them.

    A returned value is logits when it is a projection (and scalings, soft cap and casts of it) that
    reads the same head as a ``linear_cross_entropy`` of this graph, and when nothing but the
    graph's output uses it. In eager mode the loss is computed from them: so hooks on them, and
    gradients with respect to them, are the loss's. ``joined_loss.py`` makes it so. The graph of a
    head without a loss returns logits alone: then no projection needs to read the same head.

    ``before`` is what ``copy_if_loss`` returned before the rules, ``findings`` what they did. With
    ``lazy`` the logits are computed only when they are read. ``model`` gives the model of the
    graph, whose weights may be sharded. ``is_alone``: it is a causal LM's head in a call without
    labels. Returns how many outputs were joined, or became lazy.
    """
    graph = module.graph
    output = graph.output_node()
    written = {m for n in graph.nodes for t in writes(n) for m in facts.memories(t)}
    count, plan = 0, _planner(model, Reads() if reads is None else reads)
    for node in dict.fromkeys(output.all_input_nodes):
        fused = [n for n in graph.nodes if (c := canonical(n)) and c.name == "linear_cross_entropy"]
        heads = None if is_alone and not before else {n.args[1] for n in fused}
        chain = logits_chain(node, heads)
        if not chain or any(u is not output and u not in chain for n in chain for u in n.users):
            continue
        if any(facts.memories(n) & written for c in chain for n in (c, *c.all_input_nodes)):
            continue
        ours = [
            (n, root)
            for n in fused
            if (root := _replaced_loss(n, before, findings, node)) is not None
        ]
        if len(ours) == 1:
            was = before[facts.captured_name(node)]
            is_lazy = _join_loss(module, node, chain, *ours[0], was, lazy, plan)
        else:
            is_lazy = lazy and not ours and _defer(module, node, chain, plan)
        count += is_lazy
    restored = _restore_losses(module, before, findings, output)
    if count or restored:
        graph.lint()
        module.recompile()
    return count


def _planner(model: Callable[[], nn.Module | None], reads: Reads) -> Callable[..., Plan]:
    """What makes the plan of logits from their chain and inputs."""

    def plan(chain: list[fx.Node], inputs: list[fx.Node], lazy: bool, others: int) -> Plan:
        dtype, small = facts.dtype(chain[-1]), history_is_small(chain)
        assert dtype is not None
        parts = head_parts(chain[-1], inputs)
        return Plan(lazy, small, dtype, len(inputs), others, model, parts, reads)

    return plan


def _restore_losses(
    module: fx.GraphModule, before: NodesBefore, findings: Sequence[Finding], output: fx.Node
) -> int:
    """Put losses back as they were, where a returned value would not lead to them any more."""
    # so it is where the graph uses its logits for something else as well: they exist then, but
    # hooks on them, and gradients with respect to them, would miss what comes from the loss
    graph, restored = module.graph, 0
    for fused in [
        n for n in graph.nodes if (c := canonical(n)) and c.name == "linear_cross_entropy"
    ]:
        finding = next((f for f in findings if fused.name in f.claimed), None)
        root = None if finding is None else before.get(finding.node)
        if finding is None or root is None:
            continue
        lost = [
            n for n in output.all_input_nodes
            if (was := before.get(facts.captured_name(n))) is not None
            and root in descendants(was) and fused not in descendants(n)
        ]  # fmt: skip
        if not lost or not _restore_loss(module, fused, root):
            continue
        finding.status, restored = "left", restored + 1
        finding.reason = f"{lost[0].name}, which is returned, is not only for the loss"
    return restored


def _restore_loss(module: fx.GraphModule, fused: fx.Node, root: fx.Node) -> bool:
    """Compute a loss from the nodes that there still are; False where one of them comes later."""
    graph = module.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    present = {facts.captured_name(n): n for n in graph.nodes}
    missing, queue = {root}, [root]
    env: dict[fx.Node, fx.Node] = {}
    while queue:
        for n in queue.pop().all_input_nodes:
            if n.name in present:
                env[n] = present[n.name]
            elif n not in missing:
                missing.add(n)
                queue.append(n)
    if any(order[n] > order[fused] for n in env.values()):
        return False
    with graph.inserting_before(fused):
        for n in root.graph.nodes:
            if n in missing:
                env[n] = graph.node_copy(n, lambda a: env[a])
    fused.replace_all_uses_with(env[root])
    prune(graph, [fused])
    return True


def _replaced_loss(
    fused: fx.Node, before: NodesBefore, findings: Sequence[Finding], logits: fx.Node
) -> fx.Node | None:
    """The loss that ``fused`` has replaced, if it was computed from ``logits``."""
    root = next((before.get(f.node) for f in findings if fused.name in f.claimed), None)
    was = before.get(facts.captured_name(logits))
    return root if root is not None and was is not None and root in descendants(was) else None


def _join_loss(
    module: fx.GraphModule,
    node: fx.Node,
    chain: list[fx.Node],
    fused: fx.Node,
    root: fx.Node,
    was: fx.Node,
    lazy: bool,
    plan: Callable[..., Plan],
) -> bool:
    """Let the fused loss and the logits be one node; False where that cannot be."""
    graph, canon = module.graph, canonical(fused)
    order = {n: i for i, n in enumerate(graph.nodes)}
    present = {facts.captured_name(n): n for n in graph.nodes}
    tail, names = loss_graph(root, was, present)
    others = [present[name] for name in names]
    logits, inputs = logits_graph(chain)
    linear = canonical(chain[0])
    operands = linear and rows_and_head(linear)
    if canon is None or linear is None or not operands or facts.dtype(node) is None:
        return False
    if any(order[n] > order[fused] for n in (*inputs, *others)):
        return False
    if any(writes(n) for n in tail.nodes):
        return False
    with graph.inserting_before(fused):
        bodies = (
            _add_submodule(module, logits, plan(chain, inputs, lazy, len(others))),
            _add_submodule(module, tail, None),
        )
        pair = graph.call_function(
            loss_and_logits, (*bodies, *operands, *inputs, *others, *canon.args)
        )
        loss, returned = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
    _copy_meta(pair, fused)
    _replace(fused, loss)
    _replace(node, returned)
    prune(graph, [fused, *reversed(chain), *linear.via])
    return True


def _defer(
    module: fx.GraphModule,
    node: fx.Node,
    chain: list[fx.Node],
    plan: Callable[..., Plan],
) -> bool:
    """Let logits that no loss is computed from be lazy."""
    graph = module.graph
    logits, inputs = logits_graph(chain)
    linear = canonical(chain[0])
    operands = linear and rows_and_head(linear)
    if linear is None or not operands or facts.dtype(node) is None:
        return False
    with graph.inserting_after(node):
        body = _add_submodule(module, logits, plan(chain, inputs, True, 0))
    with graph.inserting_after(body):
        returned = graph.call_function(logits_alone, (body, *operands, *inputs))
    _replace(node, returned)
    prune(graph, [*reversed(chain), *linear.via])
    return True


def _add_submodule(module: fx.GraphModule, body: fx.Graph, plan: Plan | None) -> fx.Node:
    """A submodule for a graph; returns the node that reads it."""
    index = sum(name.startswith("lazy_logits_") for name, _ in module.named_children())
    name = f"lazy_logits_{index}"
    submodule = fx.GraphModule(module, body)
    submodule.meta["plan"] = plan
    module.add_submodule(name, submodule)
    return module.graph.get_attr(name)


def _copy_meta(new: fx.Node, old: fx.Node) -> None:
    keys = ("nn_module_stack", "stack_trace", "example_value", "fusewright_rule")
    new.meta.update({k: old.meta[k] for k in keys if k in old.meta})


def _replace(old: fx.Node, new: fx.Node) -> None:
    """Replace ``old`` in all its users but ``new``."""
    _copy_meta(new, old)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


# ---------------------------------------------------------------------- graphs of logits and losses

_CHAIN = ("mul", "div", "tanh", "cast", "contiguous", "add")


def logits_chain(node: fx.Node, heads: set[Any] | None) -> list[fx.Node]:
    """The nodes from the projection to ``node``, or nothing when they are no logits."""
    # the projection is by one of ``heads``; where these are not known, one to a larger dimension
    chain: list[fx.Node] = []
    while True:
        canon = canonical(node)
        if canon is None:
            return []
        chain.append(node)
        if (operands := rows_and_head(canon)) is not None:
            head = operands[1]
            is_ours = _widens(head) if heads is None else head in heads
            return chain[::-1] if is_ours else []
        inner = [a for a in canon.args if isinstance(a, fx.Node)]
        if canon.name == "add":  # of a bias
            inner = [a for a in inner if facts.ndim(a) == facts.ndim(node) and not _is_row(a)]
        if canon.name not in _CHAIN or len(inner) != 1:
            return []
        node = inner[0]


def rows_and_head(canon: Canon) -> tuple[Any, Any] | None:
    """What a projection reads and its weight, adapted or not; None for anything else."""
    if canon.name not in ("linear", "lora_linear"):
        return None
    x, weight = canon.args[:2]
    return x, weight if canon.name == "linear" else Linear(*weight).weight


def _is_row(node: fx.Node) -> bool:
    return all(facts.size(node, d) == 1 for d in range((facts.ndim(node) or 1) - 1))


def _widens(weight: Any) -> bool:
    rows, columns = facts.size(weight, 0), facts.size(weight, 1)
    return rows is not None and columns is not None and rows > columns


def descendants(node: fx.Node) -> set[fx.Node]:
    """All nodes that are computed from a node."""
    result: set[fx.Node] = set()
    queue = [node]
    while queue:
        new = [u for u in queue.pop().users if u not in result]
        result.update(new)
        queue += new
    return result


def logits_graph(chain: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """The logits as a graph of their inputs, and these inputs."""
    body = fx.Graph()
    # an autograd function's, whose numbers are no tensors to save
    operands = _own_function(chain[0])
    first = chain[0].all_input_nodes if operands is None else [a for a in operands if a is not None]
    later = (i for n in chain[1:] for i in n.all_input_nodes if i not in chain)
    inputs = list(dict.fromkeys([*first, *later]))
    env = {n: body.placeholder(f"input_{i}") for i, n in enumerate(inputs)}
    for n in chain:
        if operands is not None and n is chain[0]:
            args = tuple(None if a is None else env[a] for a in operands)
            env[n] = body.call_function(F.linear, args)
            continue
        env[n] = body.node_copy(n, lambda a: env[a])
    body.output(env[chain[-1]])
    return body, inputs


def _own_function(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of a linear that is an autograd function; None for any other linear."""
    canon = canonical(node)
    return canon.args if canon is not None and any(map(is_wrapped, canon.via)) else None


def loss_graph(
    root: fx.Node, logits: fx.Node, present: Mapping[str, fx.Node]
) -> tuple[fx.Graph, list[str]]:
    """The loss as a graph of the logits and of nodes that there still are, and their names."""
    body, inside = fx.Graph(), descendants(logits)
    env = {logits: body.placeholder("logits")}
    nodes, queue = {root}, [root]
    inputs: list[fx.Node] = []
    while queue:
        for n in queue.pop().all_input_nodes:
            if n in nodes or n is logits:
                continue
            nodes.add(n)
            if n.op == "placeholder" or (n not in inside and n.name in present):
                inputs.append(n)
            else:
                queue.append(n)
    for i, n in enumerate(inputs):
        env[n] = body.placeholder(f"input_{i}")
    for n in root.graph.nodes:
        if n in nodes and n not in env:
            env[n] = body.node_copy(n, lambda a: env[a])
    body.output(env[root])
    return body, [n.name for n in inputs]


def history_is_small(chain: list[fx.Node]) -> bool:
    """Whether the history of the logits keeps nothing of their size."""
    return all(
        (c := canonical(n)) is not None and c.name != "tanh" and len(n.all_input_nodes) == 1
        for n in chain[1:]
    )
