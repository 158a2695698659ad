"""Which inputs of a block's graph have a gradient, compiled as in eager mode.

The first block's input mostly needs none: it is given one, where nobody sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...graph import facts
from ...graph.edit import modes
from ...graph.effects import writes


def with_input_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the first block's input need a gradient too, so that all blocks share one graph.

    The embedding below a LoRA model is frozen, so its output needs none. The extra gradient costs
    less than compiling a second graph for one block; it ends in a leaf that nobody sees.

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
    if x is None or x.requires_grad or not _is_hidden(x):
        return args, kwargs
    if not any(p.requires_grad for p in module.parameters()):
        return args, kwargs
    leaf = x.detach().requires_grad_()
    return ((leaf, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: leaf})


def _is_hidden(x: Tensor) -> bool:
    return x.dim() == 3 and x.is_floating_point()


def require_gradients_of_others(module: fx.GraphModule) -> None:
    """Refuse a graph that has an output with a gradient of such an input alone.

    In eager mode that output needs none: the block uses what is trained under ``no_grad``, or not
    at all.

    Raises:
        NotImplementedError: with the reason.
    """
    needs: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            needed = _needs(node) and not _is_leaf(node)
        else:
            needed = _needs(node) and any(n in needs for n in node.all_input_nodes)
        if needed or (node.op == "get_attr" and _needs(node)):
            needs.add(node)
    for node in module.graph.output_node().all_input_nodes:
        if _needs(node) and node not in needs:
            raise NotImplementedError("only the block's input gives its output a gradient")


def inputs_without_gradient(module: fx.GraphModule) -> list[int]:
    """The inputs that need a gradient and get none: what is used under ``no_grad`` alone.

    Eager mode does not know of them. A compiled graph would call their hooks, with None.
    """
    graph = module.graph
    mode = modes(graph)
    reached = {graph.output_node()}
    for node in reversed(graph.nodes):
        passes = (node in reached and node.target not in _DETACH) or writes(node)
        if passes and (node.op == "output" or mode[node][0]):
            reached.update(node.all_input_nodes)
    inputs = enumerate(graph.find_nodes(op="placeholder"))
    return [i for i, n in inputs if _needs(n) and n not in reached]


_DETACH = ("detach", torch.detach, Tensor.detach)


def with_detached_inputs(run: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """``run``, a region's graph, with its arguments at ``places`` detached."""
    if not places:
        return run

    def call(*args: Any) -> Any:
        given = list(args)
        for i in places:
            given[i] = args[i].detach()
        return run(*given)

    return call


def _is_leaf(node: fx.Node) -> bool:
    t = facts.tensor(node)
    return t is not None and t.is_leaf and not isinstance(t, nn.Parameter) and _is_hidden(t)


def _needs(node: fx.Node) -> bool:
    found = facts.value(node)
    values = found if isinstance(found, (tuple, list)) else (found,)
    return any(isinstance(t, Tensor) and t.requires_grad for t in values)
