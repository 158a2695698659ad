"""Masks of samples that share a row, as nodes that make them of first keys (``first_keys.py``).

A block is captured with the first keys in place of the mask, which a node makes of them. Rules take
both for attention that needs no mask of all pairs. Where other code reads the mask, the block runs
its original code: transformers makes one mask for all blocks, and not one in each.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ..kernels.attention.first_keys import sample_mask
from . import facts
from .effects import CHECKPOINT


def sink_masks(module: fx.GraphModule) -> None:
    """Let nested graphs (of checkpoints) make the masks that they are given."""
    for node in list(module.graph.nodes):
        body = facts.body(node.args[0]) if node.target is CHECKPOINT else None
        if body is None:
            continue
        inputs = body.graph.find_nodes(op="placeholder")
        operands = node.args[1 : 1 + len(inputs)]
        for operand, placeholder in zip(operands, inputs, strict=False):
            if isinstance(operand, fx.Node) and operand.target is sample_mask:
                _sink(node, operand, placeholder)
        body.recompile()
        sink_masks(body)
    for node in module.graph.find_nodes(op="call_function", target=sample_mask):
        if not node.users:
            module.graph.erase_node(node)


def _sink(call: fx.Node, mask: fx.Node, placeholder: fx.Node) -> None:
    first = mask.args[0]
    after = next(n for n in placeholder.graph.nodes if n.op != "placeholder")
    with placeholder.graph.inserting_before(after):
        inner = placeholder.graph.call_function(sample_mask, (placeholder, *mask.args[1:]))
    placeholder.replace_all_uses_with(inner, delete_user_cb=lambda user: user is not inner)
    inner.meta = {**placeholder.meta, "example_value": facts.value(mask)}
    placeholder.meta = {"example_value": facts.value(first)}
    call.args = tuple(first if a is mask else a for a in call.args)


def masks_left(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of masks that something reads."""
    for graph in facts.nested(module):
        for node in graph.graph.find_nodes(op="call_function", target=sample_mask):
            if node.users:
                yield node
