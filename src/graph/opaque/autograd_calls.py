"""Running the autograd functions that TorchDynamo has captured.

PyTorch's own way makes a class of each call. It holds what the function saved, and is part of a
circle of references: activations, and the weights that ZeRO-3 has gathered, stay until Python's
collector comes by, which may be many steps later. Here, backward frees them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from .autograd_functions import is_wrapped

_DIFFERENTIABLE = "fusewright_differentiable"
_NEEDED = {"saved_for_backward_idx", "non_differentiable_idx"}


def free_in_backward(graph: fx.Graph) -> None:
    """Let the captured autograd functions that are called in ``graph`` free what they save."""
    for node in graph.nodes:
        if is_wrapped(node):
            node.target = applied


def applied(forward: fx.GraphModule, backward: fx.GraphModule, *args: Any, **indices: Any) -> Any:
    """What the higher-order operator ``autograd_function_apply`` returns, of the same arguments.

    Args:
        forward: of ``args``; returns the function's outputs, and what it saves.
        backward: of the outputs' gradients and of what was saved; returns those of ``args``.
        args: of the function.
        indices: which of what is saved the function gave to ``save_for_backward``, and which of its
            outputs are not differentiable, or are inputs that it has written to.
    """
    known = _NEEDED <= indices.keys() <= _NEEDED | {"dirty_idx"}  # other versions have others
    if not known or torch._C._are_functorch_transforms_active():
        original: Any = torch.ops.higher_order.autograd_function_apply
        return original(forward, backward, *args, **indices)
    return _Applied.apply(forward, backward, indices, *args)  # type: ignore[no-untyped-call]


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, forward: fx.GraphModule, backward: fx.GraphModule, indices: Any, *args: Any
    ) -> Any:
        outputs, saved = forward(*args)
        results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        ctx.mark_dirty(*(results[i] for i in indices.get("dirty_idx", ())))
        ctx.mark_non_differentiable(*(results[i] for i in indices["non_differentiable_idx"]))
        to_autograd = {i for i in indices["saved_for_backward_idx"] if isinstance(saved[i], Tensor)}
        ctx.save_for_backward(*(v for i, v in enumerate(saved) if i in to_autograd))
        # a function that keeps a tensor as an attribute of its context keeps it as long as that
        ctx.attributes = tuple((i, v) for i, v in enumerate(saved) if i not in to_autograd)
        ctx.body = backward
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = list(ctx.saved_tensors)
        for i, value in ctx.attributes:
            saved.insert(i, value)
        run = _differentiable(ctx.body) if torch.is_grad_enabled() else ctx.body
        found = run(*grads, *saved)
        return None, None, None, *(found if isinstance(found, (tuple, list)) else (found,))


def _differentiable(backward: fx.GraphModule) -> fx.GraphModule:
    """``backward`` without the switches around it that keep it from being differentiated again.

    TorchDynamo captures a backward as it runs when nobody asks for second derivatives.
    """
    known = backward.meta.get(_DIFFERENTIABLE)
    if known is None:
        graph = copy.deepcopy(backward.graph)
        body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        if len(body) > 1 and _sets(body[0], False) and _sets(body[-1], True):
            graph.erase_node(body[0])
            graph.erase_node(body[-1])
        known = backward.meta[_DIFFERENTIABLE] = fx.GraphModule(backward, graph)
    return known


def _sets(node: fx.Node, enabled: bool) -> bool:
    name = getattr(node.target, "__name__", "")
    return "set_grad_enabled" in name and node.args == (enabled,)
