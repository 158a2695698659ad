"""Small graphs without TorchDynamo: traced symbolically, with example values on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = result = super().run_node(n)
        return result


def trace(fn: Callable[..., Any], *shapes: tuple[int, ...], grad: bool = False) -> fx.GraphModule:
    """The graph of ``fn`` over tensors of ``shapes``, whose gradients are wanted with ``grad``."""
    module = fx.symbolic_trace(fn)
    _Recorder(module).run(*(torch.empty(s, device="meta", requires_grad=grad) for s in shapes))
    return module


def last(module: fx.GraphModule) -> fx.Node:
    """The node that a graph returns."""
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    return output.args[0]


def named(module: fx.GraphModule, name: str) -> fx.Node:
    """The node of a name."""
    return next(n for n in module.graph.nodes if n.name == name)
