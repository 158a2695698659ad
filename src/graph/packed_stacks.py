"""Weights of routed experts that a formula computes from packed tensors, one expert at a time."""

from __future__ import annotations

from torch import fx

from ..kernels.moe.moe_experts import moe_down, moe_up
from . import facts
from .cleanup import prune
from .opaque.quantized import stored_stack
from .opaque.stacks import packed_stack


def pack_stacks(module: fx.GraphModule) -> None:
    """Let the routed experts of ``module`` take weights by formula one expert at a time."""
    for inner in facts.nested(module):
        for node in list(inner.graph.nodes):
            weights = [n for n in node.all_input_nodes if node.target in (moe_up, moe_down)]
            for weight in weights:
                _pack(weight, node)
        inner.recompile()


def _pack(weight: fx.Node, user: fx.Node) -> None:
    stack, value = stored_stack(weight), facts.tensor(weight)
    if stack is None or value is None:
        return
    experts, graph, parts = value.shape[0], user.graph, []
    with graph.inserting_before(user):
        for t, rows in zip(stack.tensors, stack.rows, strict=True):
            sizes = (t, 0, (experts, rows)) if rows else (t, 0)
            part = graph.call_method("unflatten" if rows else "unsqueeze", sizes)
            if not rows:
                count = [-1] * (facts.ndim(t) or 0)
                part = graph.call_method("expand", (part, experts, *count))
            parts.append(part)
        packed = graph.call_function(packed_stack, (parts, stack.shape, 0, stack.kind, value.dtype))
    packed.meta["example_value"] = value
    user.replace_input_with(weight, packed)
    prune(graph, [weight])
