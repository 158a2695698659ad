"""Which inputs of a block's graph have a gradient, compiled as in eager mode.

The first block's input mostly needs none. It is given one, where nobody sees it, so that all blocks
share one graph: the embedding below a LoRA model is frozen, and the extra gradient costs less than
compiling a second graph for one block.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException

from ...graph import facts
from ...graph.effects import Effects, needs_gradient
from ..regions import first_tensor


def input_without_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The input of a block that is to be given a gradient; None where nothing is to be done."""
    x = first_tensor(args, kwargs)
    # asked in this order because only the first block gets past it
    if x is None or x.requires_grad or not _is_hidden(x) or x.is_inference():
        return None
    if isinstance(x, nn.Parameter) or not any(p.requires_grad for p in module.parameters()):
        return None
    return x


@contextmanager
def shown_with_gradient(x: Tensor, around: AbstractContextManager[None]) -> Iterator[None]:
    """Let TorchDynamo, which chooses the graph, see ``x`` as an input that needs a gradient.

    It stays the tensor that the caller gave: the block may keep it anywhere, return it, or read its
    attributes. The graph itself runs on ``with_leaf``.
    """
    random_state = random.getstate()
    x.requires_grad_()
    try:
        with around:
            yield
    except TorchDynamoException:  # the call is made again, and Python's numbers may be drawn
        random.setstate(random_state)
        raise
    finally:
        x.requires_grad_(False)


def with_leaf(args: Sequence[Any], x: Tensor) -> list[Any]:
    """The inputs of a graph, with a leaf of the same values in the place of ``x``."""
    # a copy: ``x`` may be a buffer that is filled again before backward
    leaf = x.detach().clone().requires_grad_()
    return [leaf if a is x else a for a in args]


def _is_hidden(x: Tensor) -> bool:
    return x.dim() == 3 and x.is_floating_point()


_QUESTIONS = {"requires_grad", "requires_grad_", "is_leaf", "grad_fn", "needs_input_grad"}


def input_gradient_reason(effects: Effects) -> str | None:
    """Why a block's input must have the gradient that its caller gives it, or None."""
    # The graph is as captured, and still being compiled: the code is known then. All code that was
    # traced is looked at, and a name anywhere in it is taken for a question about the input; only
    # one that is put together, or read from elsewhere (``getattr(x, self.name)``), is not seen.
    # Exact would be to capture the block a second time, without the gradient, and to compare: that
    # is most of what sharing the graph saves.
    for code in torch._guards.TracingContext.get_traced_code() or ():
        questions = _QUESTIONS.intersection((*code.co_names, *_texts(code.co_consts)))
        if questions:
            return f"{code.co_name} asks for {min(questions)}"
    graph = effects.module.graph
    placeholders = graph.find_nodes(op="placeholder")
    memories = {m for n in placeholders for m in facts.memories(n)}
    inputs = {n for n in placeholders if _is_input(n)}
    hidden = {m for n in inputs for m in facts.memories(n)}
    for node, targets in effects.writes.items():
        for memory in map(facts.memories, targets):
            if memory & hidden:
                return f"{node.name} writes into the input"
            if memory & memories and needs_gradient(node):
                return f"{node.name} writes what has a gradient into what outlives the call"
    for node in graph.output_node().all_input_nodes:
        if facts.memories(node) & hidden:
            return f"{node.name}, which it returns, is a view of the input"
    # in eager mode such an output may need none: the block uses what is trained under no_grad, or
    # not at all
    if effects.gives_gradient_alone(inputs):
        return "only the input gives an output its gradient"
    return None


def _texts(constants: Iterable[Any]) -> Iterator[str]:
    """The texts among constants, and in tuples and sets of them."""
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _texts(constant)


def _is_input(node: fx.Node) -> bool:
    """Whether a node is, or may be, the hidden states that a block is given."""
    t = facts.tensor(node)
    is_given = node.op == "placeholder" and t is not None and not isinstance(t, nn.Parameter)
    return is_given and t is not None and _is_hidden(t)
