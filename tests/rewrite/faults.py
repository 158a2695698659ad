"""Formulas of real rules, and ops with a fault each, to be put in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusewright.passes.glu import GLU
from fusewright.passes.linear_cross_entropy import LinearCrossEntropy
from fusewright.passes.lora_linear import LoRALinear
from fusewright.passes.rms_norm import AddRMSNorm, RMSNorm
from fusewright.passes.rope import Rope, RopePair
from fusewright.rewrite.engine import Candidate, Fuel, apply
from fusewright.rewrite.findings import Finding
from fusewright.rewrite.matcher import Trace
from fusewright.rewrite.op_table import TABLE
from fusewright.rewrite.rule import Rule
from fusewright.rewrite.verify import Verifier

from ..capturing import capture

Op = Callable[..., Any]
Fault = Callable[..., Any]
"""Called with the right op and its arguments, it gives what the wrong one would."""

D = 16


def _norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _add_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm(total, w), total


def _glu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def half(x: Tensor) -> Tensor:
        return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0


def _loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, w).float()
    return F.cross_entropy(logits.view(-1, w.shape[0]), labels.view(-1))


FORMULAS: dict[str, tuple[Callable[..., Any], Sequence[Rule], list[tuple[int, ...]]]] = {
    "rms_norm": (_norm, [RMSNorm()], [(2, 6, D), (D,)]),
    "add_rms_norm": (_add_norm, [RMSNorm(), AddRMSNorm()], [(2, 6, D), (2, 6, D), (D,)]),
    "glu": (_glu, [GLU()], [(2, 6, D), (2, 6, D)]),
    "rope": (_rope, [Rope(), RopePair()], [(2, 4, 6, D), (2, 2, 6, D), (2, 1, 6, D), (2, 1, 6, D)]),
    "lora_linear": (_lora, [LoRALinear()], [(2, 6, D), (24, D), (4, D), (24, 4)]),
    "linear_cross_entropy": (_loss, [LinearCrossEntropy()], [(2, 6, D), (40, D), (2, 6)]),
}
"""Op -> a formula, the rules that find it, and the shapes of its arguments."""


def given(op: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Arguments for a formula; batch and tokens have sizes that the graph does not know."""
    torch.manual_seed(0)
    made = []
    for shape in FORMULAS[op][2]:
        if op == "linear_cross_entropy" and shape == (2, 6):
            made.append(torch.randint(0, 40, shape))
        else:
            made.append(torch.randn(shape, dtype=dtype))
            # rope's tables are not learnt
            made[-1].requires_grad_(not (op == "rope" and len(made) > 2))
        if len(shape) > 2 or made[-1].dtype is torch.int64:
            of_any_size(made[-1], 2 if op == "rope" else 1)
    return made


def of_any_size(t: Tensor, tokens: int) -> Tensor:
    """``t``, whose batch (0) and ``tokens`` are dimensions that a graph does not know."""
    torch._dynamo.mark_dynamic(t, 0)
    torch._dynamo.mark_dynamic(t, tokens)
    return t


def graph_of(op: str, inputs: Sequence[Tensor] | None = None) -> fx.GraphModule:
    """The captured formula of ``op``."""
    return capture(FORMULAS[op][0], *(given(op) if inputs is None else inputs))


def judged(
    op: str, fault: Fault | None, graph: fx.GraphModule | None = None, **settings: Any
) -> Finding:
    """What becomes of the formula of ``op`` when its op has the fault; None: when it is right."""
    right = TABLE[op]

    @functools.wraps(right)
    def wrong(*args: Any, **kwargs: Any) -> Any:
        assert fault is not None
        return fault(right, *args, **kwargs)

    table = TABLE if fault is None else {**TABLE, op: wrong}
    verifier = settings.pop("verifier", None) or Verifier(**settings)
    graph = graph_of(op) if graph is None else graph
    findings = apply(graph, FORMULAS[op][1], table, verifier, Fuel())
    return next(f for f in findings if f.op == op)


def verdict(rule: Rule, graph: fx.GraphModule) -> str | None:
    """Why verification refuses the first match of ``rule``, whatever the engine says of it."""
    order = list(graph.graph.nodes)
    match = next(m for n in order for m in rule.find(n, Trace()))
    interior = tuple(sorted(match.nodes, key=order.index))
    reads = (i for n in interior for i in n.all_input_nodes if i not in interior)
    inputs = tuple(dict.fromkeys(reads))
    return Verifier()(Candidate(rule, match, inputs, interior, match.outputs, TABLE)).reason


class _Backward(torch.autograd.Function):
    """The identity, whose gradient goes through ``change``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor | None]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.change(grad), None


def with_gradient(x: Tensor, change: Callable[[Tensor], Tensor | None]) -> Tensor:
    """``x``, whose gradient is what ``change`` makes of it."""
    out: Tensor = _Backward.apply(x, change)
    return out


def changed(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The first tensor of ``result`` changed."""
    if isinstance(result, Tensor):
        return change(result)
    return (change(result[0]), *result[1:])


def off(t: Tensor) -> Tensor:
    """``t``, wrong by a hundredth."""
    return t * 1.01


def when(condition: Callable[[Tensor], bool]) -> Fault:
    """Wrong by a hundredth where ``condition`` holds of the first tensor."""

    def fault(op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        first = x if isinstance(x, Tensor) else x[0]
        result = op(x, *args, **kwargs)
        return changed(result, off) if condition(first) else result

    return fault
