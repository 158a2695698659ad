"""The forwards of autograd functions that TorchDynamo has captured."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .. import facts

_ASIDE = ("numel", "size", "dim", "view", "reshape")
"""What else the forward of such a function calls: it computes nothing."""

_PRODUCTS = ("matmul", "mm", "t", "transpose", "sum", "unsqueeze")
_MODES = ("_enter_autocast", "_exit_autocast")


def is_wrapped(node: Any) -> bool:
    """Whether a node is a captured autograd function."""
    return is_captured(getattr(node, "target", None))


def is_captured(target: Any) -> bool:
    """Whether a node with this target is a captured autograd function."""
    return target is not None and target is torch.ops.higher_order.autograd_function_apply


@dataclass(frozen=True)
class Forward:
    """The forward of a captured autograd function with one result, a node of the inner graph."""

    call: fx.Node
    result: fx.Node

    def outside(
        self, args: Iterable[Any], chain: Iterable[fx.Node]
    ) -> tuple[tuple[Any, ...], tuple[fx.Node, ...]] | None:
        """The arguments ``args`` of an operation and its nodes, in the graph around the function.

        None unless the operation, with its ``chain``, is the whole forward.
        """
        inner = self.result.graph
        parts = {self.result, *chain}
        if not all(node in parts or _is_aside(node) for node in inner.nodes):
            return None
        outer = dict(zip(inner.find_nodes(op="placeholder"), self.call.args[2:], strict=True))
        inner_args: Any = tuple(args)
        used: list[fx.Node] = []
        fx.node.map_arg(inner_args, used.append)
        if any(n not in outer for n in used):
            return None
        bodies = tuple(a for a in self.call.args[:2] if isinstance(a, fx.Node))
        return fx.node.map_arg(inner_args, outer.__getitem__), (self.call, *bodies)

    def multiplies_backward(self) -> bool:
        """Whether the function's backward does nothing but multiply matrices, and sum."""
        inner = facts.body(self.call.args[1])
        return inner is not None and all(
            _is_aside(node)
            or (node.op == "call_method" and node.target in _PRODUCTS)
            or getattr(node.target, "__name__", "") in _MODES
            for node in inner.graph.nodes
        )


def forward(node: fx.Node) -> Forward | None:
    """The forward of the function whose only result ``node`` is; None for any other node."""
    if node.target is not operator.getitem or node.args[1] != 0 or not is_wrapped(node.args[0]):
        return None
    call: Any = node.args[0]
    inner = facts.body(call.args[0])
    if inner is None:
        return None
    returned: Any = inner.graph.output_node().args[0]
    results = returned[0]
    if len(results) != 1 or not isinstance(results[0], fx.Node):
        return None
    return Forward(call, results[0])


def drop_unread_results(graph: fx.Graph) -> None:
    """Let captured autograd functions return nothing after the last of their results that is read.

    PyTorch 2.11 returns, after a function's own results, each tensor that is made inside: those
    would stay as long as the results do, and patterns would take them for read.
    """
    for node in filter(is_wrapped, graph.nodes):
        _drop_unread(node)


def _drop_unread(call: fx.Node) -> None:
    forward, backward = map(facts.body, call.args[:2])
    if forward is None or backward is None:
        return
    output = forward.graph.output_node()
    returned: Any = output.args[0]
    results, saved = returned
    if not isinstance(results, (tuple, list)) or not call.kwargs.keys() >= _NEEDED:
        return
    kept = {-1, *call.kwargs.get("dirty_idx", ())}  # type: ignore[misc]
    for user in call.users:
        if user.target is not operator.getitem:
            return
        kept.add(user.args[1])  # type: ignore[arg-type]
    count = max(kept) + 1
    unread = backward.graph.find_nodes(op="placeholder")[count : len(results)]
    if not unread or any(gradient.users for gradient in unread):
        return
    for gradient in unread:
        backward.graph.erase_node(gradient)
    output.args = ((tuple(results[:count]), saved),)
    indices: Any = call.kwargs["non_differentiable_idx"]
    call.kwargs = {**call.kwargs, "non_differentiable_idx": [i for i in indices if i < count]}
    call.meta["example_value"] = call.meta["example_value"][:count]
    forward.recompile()
    backward.recompile()


def result_of(node: fx.Node) -> fx.Node:
    """The one result of a captured autograd function; any other node itself."""
    users = list(node.users) if is_wrapped(node) else []
    return users[0] if len(users) == 1 and users[0].target is operator.getitem else node


def _is_aside(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    harmless: tuple[Callable[..., Any], ...] = (operator.eq, operator.getitem)
    return (
        node.target in harmless
        or (node.op == "call_method" and node.target in _ASIDE)
        or "set_grad_enabled" in getattr(node.target, "__name__", "")
    )


# --- running the autograd functions that TorchDynamo has captured ---------------------------------
#
# PyTorch's own way makes a class of each call. It holds what the function saved, and is part of a
# circle of references: activations, and the weights that ZeRO-3 has gathered, stay until Python's
# collector comes by, which may be many steps later. Here, backward frees them.

_DIFFERENTIABLE = "fusewright_differentiable"
_NEEDED = {"saved_for_backward_idx", "non_differentiable_idx"}


def free_in_backward(graph: fx.Graph) -> None:
    """Let the captured autograd functions that are called in ``graph`` free what they save."""
    for node in graph.nodes:
        if is_wrapped(node):
            node.target = applied


def applied(forward: fx.GraphModule, backward: fx.GraphModule, *args: Any, **indices: Any) -> Any:
    """What the operator ``autograd_function_apply`` returns, for the same arguments.

    ``forward``, of ``args``, returns the function's outputs, and what it saves; ``backward``, of
    the outputs' gradients and of what was saved, the gradients of ``args``. ``indices`` say which
    of what is saved the function gave to ``save_for_backward``, and which of its outputs are not
    differentiable, or are inputs that it has written to.
    """
    is_known = _NEEDED <= indices.keys() <= _NEEDED | {"dirty_idx"}  # other versions have others
    if not is_known or torch._C._are_functorch_transforms_active():
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
        result = run(*grads, *saved)
        return None, None, None, *(result if isinstance(result, (tuple, list)) else (result,))


def _differentiable(backward: fx.GraphModule) -> fx.GraphModule:
    """``backward`` without the switches around it that keep it from being differentiated again."""
    # TorchDynamo captures a backward as it runs when nobody asks for second derivatives
    module = backward.meta.get(_DIFFERENTIABLE)
    if module is None:
        graph = copy.deepcopy(backward.graph)
        body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        if len(body) > 1 and _sets(body[0], False) and _sets(body[-1], True):
            graph.erase_node(body[0])
            graph.erase_node(body[-1])
        module = backward.meta[_DIFFERENTIABLE] = fx.GraphModule(backward, graph)
    return module


def _sets(node: fx.Node, enabled: bool) -> bool:
    name = getattr(node.target, "__name__", "")
    return "set_grad_enabled" in name and node.args == (enabled,)
