"""Whether the ops that a rewrite calls take the tensors of the site: each op is asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..graph import facts
from ..graph.fakes import fake, hint
from ..kernels.op import Op


def unsupported(ops: Mapping[fx.Node, Op], autocast: tuple[tuple[Any, ...], ...]) -> list[str]:
    """The reasons of the first of ``ops`` that cannot take its arguments; empty if all can.

    They are asked with fake tensors of the sizes that the graph was captured with, so that no
    comparison of sizes becomes a guard of the captured graph.

    Args:
        ops: the calls, nodes of one graph over placeholders with example values.
        autocast: the arguments of each autocast around them.
    """
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            example = facts.value(node)
            values[node] = run(node) if example is None else fake(example, hint)
        return values[node]

    def run(node: fx.Node) -> Any:  # what another call of the rewrite returns
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    with ExitStack() as around:
        around.enter_context(torch._guards.tracing(None))
        around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for settings in autocast:
            around.enter_context(torch.autocast(*settings))
        for node, op in ops.items():
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            if reasons := op.unsupported(*args, **kwargs):
                return reasons  # later ops may need what this one cannot compute
        return []
