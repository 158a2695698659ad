"""Capturing small functions as graphs, the way the package captures blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fusewright.graph import facts
from fusewright.graph.cleanup import remove_noops
from fusewright.graph.functionalize import remove_writes
from fusewright.graph.opaque.autograd_functions import drop_unread_results
from fusewright.passes import PIPELINE
from fusewright.rewrite.engine import Fuel, apply
from fusewright.rewrite.findings import Finding
from fusewright.rewrite.op_table import TABLE
from fusewright.rewrite.rule import Rule
from fusewright.rewrite.verify import Verifier


def capture(fn: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """The graph that TorchDynamo makes of ``fn``."""
    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
    assert len(graphs) == 1
    for inner in facts.nested(graphs[0]):
        drop_unread_results(inner.graph)
    return graphs[0]


def rewrite(
    module: fx.GraphModule, rules: Sequence[Rule] = PIPELINE, fuel: int | None = None
) -> list[Finding]:
    """Run the pipeline on a captured graph, verified."""
    remove_writes(module)
    remove_noops(module)
    return apply(module, rules, TABLE, Verifier(), Fuel(fuel))


def rewritten(findings: list[Finding]) -> list[str]:
    """Names of the rules that rewrote something, once per site."""
    return sorted(f.rule for f in findings if f.status == "rewritten")
