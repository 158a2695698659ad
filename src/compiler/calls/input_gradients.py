"""Which inputs of a block's graph have a gradient, compiled as in eager mode.

The first block's input mostly needs none. It is given one, where nobody sees it, so that all blocks
share one graph: the embedding below a LoRA model is frozen, and the extra gradient costs less than
compiling a second graph for one block.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...graph import facts
from ...graph.edit import needs_gradient
from ...graph.effects import writes
from ...memory.levels import CHECKPOINT


def with_input_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the first input, if it needs no gradient, by a leaf of the same memory that does.

    Args:
        module: the block.
        args: of its call.
        kwargs: of its call.

    Returns:
        The arguments; the same ones where nothing is to be done.
    """
    name: str | None = None
    x = args[0] if args else None
    if not isinstance(x, Tensor):
        tensors = ((k, v) for k, v in kwargs.items() if isinstance(v, Tensor))
        name, x = next(tensors, (None, None))
    # asked in this order because only the first block gets past it
    if x is None or x.requires_grad or not _is_hidden(x) or x.is_inference():
        return args, kwargs
    if not any(p.requires_grad for p in module.parameters()):
        return args, kwargs
    leaf = x.detach().requires_grad_()
    return ((leaf, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: leaf})


class Leaf(NamedTuple):
    """An input of a block, and the leaf that stands for it."""

    given: Tensor
    leaf: Tensor

    def taken_back(self, module: nn.Module, out: Any) -> Any:
        """What ``module`` returns, with the input where it returns or keeps the leaf."""
        for part in module.modules():
            kept = vars(part)
            for name in [n for n, value in kept.items() if value is self.leaf]:
                kept[name] = self.given
        if not any(t is self.leaf for t in pytree.tree_leaves(out)):
            return out
        return pytree.tree_map(lambda t: self.given if t is self.leaf else t, out)


def given_leaf(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: tuple[Any, ...], new_kwargs: dict[str, Any]
) -> Leaf | None:
    """Where ``with_input_gradient`` has made other arguments of these; None where it has not."""
    if new is args and new_kwargs is kwargs:
        return None
    pairs = zip((*args, *kwargs.values()), (*new, *new_kwargs.values()), strict=True)
    return next((Leaf(x, leaf) for x, leaf in pairs if x is not leaf), None)


def _is_hidden(x: Tensor) -> bool:
    return x.dim() == 3 and x.is_floating_point()


_QUESTIONS = {"requires_grad", "is_leaf", "grad_fn", "needs_input_grad"}
_TORCH = os.path.dirname(torch.__file__) + os.sep


def input_gradient_reason(module: fx.GraphModule) -> str | None:
    """Why a block's input must have the gradient that its caller gives it, or None.

    Args:
        module: the graph as it was captured, while it is compiled: the code is known then.
    """
    for code in torch._guards.TracingContext.get_traced_code() or ():
        if not code.co_filename.startswith(_TORCH):
            asked = _QUESTIONS.intersection((*code.co_names, *map(str, code.co_consts)))
            if asked:
                return f"{code.co_name} asks for {min(asked)}"
    inputs = {m for n in module.graph.nodes if _is_input(n) for m in facts.memories(n)}
    for inner in facts.nested(module):
        for node in inner.graph.nodes:
            if node.target is CHECKPOINT and node.kwargs.get("use_reentrant") is not False:
                return "a reentrant checkpoint looks at its inputs"
            if any(facts.memories(t) & inputs for t in writes(node)):
                return f"{node.name} writes into the input"
    return _without_others(module.graph)


def _without_others(graph: fx.Graph) -> str | None:
    """Whether an output has a gradient of such an input alone.

    In eager mode that output may need none: the block uses what is trained under ``no_grad``, or
    not at all.
    """
    needs: set[fx.Node] = set()
    for node in graph.nodes:
        own = node.op in ("placeholder", "get_attr") and not _is_input(node)
        if needs_gradient(node) and (own or any(n in needs for n in node.all_input_nodes)):
            needs.add(node)
    for node in graph.output_node().all_input_nodes:
        if needs_gradient(node) and node not in needs:
            return "only the input gives an output its gradient"
    return None


def _is_input(node: fx.Node) -> bool:
    """Whether a node is, or may be, the hidden states that a block is given."""
    t = facts.tensor(node)
    is_given = node.op == "placeholder" and t is not None and not isinstance(t, nn.Parameter)
    return is_given and t is not None and _is_hidden(t)
