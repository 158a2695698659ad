"""Gated linear units: activation(gate) times up, from two tensors or the halves of one.

Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import pi
from typing import Any

from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


class GLU(Rule):
    """``act(gate) * up`` for silu, both gelus, relu, squared relu and sigmoid."""

    name = op = "glu"

    def patterns(self, p: Builder, gate: Pattern, up: Pattern, both: Pattern) -> Iterable[Any]:
        """One activation each; the packed form takes gate and up from one tensor."""

        def written_out(g: Pattern) -> Any:
            inner = (g + g**3 * p.var("cubic", _is(0.044715))) * p.var("root", _is((2 / pi) ** 0.5))
            return g * 0.5 * (p.tanh(inner) + 1)

        activations: dict[str, Callable[[Pattern], Any]] = {
            "silu": lambda g: p.either(p.silu(g, p.anything), g * p.sigmoid(g)),
            "gelu": lambda g: p.gelu(g, "none"),
            "gelu_tanh": lambda g: p.either(p.gelu(g, "tanh"), written_out(g)),
            "relu2": lambda g: p.relu(g, p.anything) ** 2,
            "relu": lambda g: p.relu(g, p.anything),
            "sigmoid": lambda g: p.sigmoid(g),
        }
        for name, act in activations.items():
            yield f"{name} packed", act(p.half(both, 0)) * p.half(both, 1)
            yield f"{name} packed last", act(p.half(both, 1)) * p.half(both, 0)
            yield name, act(gate) * up

    def check(self, m: Match) -> None:
        """Equal shapes, no broadcasting."""
        if m.get("both") is not None:
            return
        m.pass_over(_is_multiple(m.gate, m.up))  # an activation by itself, without a gate
        gate, up = facts.tensor(m.gate), facts.tensor(m.up)
        if m.spelling == "sigmoid":  # a weight for each row, or for each feature, is no gate
            m.pass_over(gate is None or up is None or gate.shape != up.shape)
        m.require(gate is not None and up is not None, "gate or up is not a tensor")
        if gate is not None and up is not None:
            m.require(gate.shape == up.shape, "gate and up differ in shape", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op, on two tensors or on the packed one."""
        activation = m.spelling.split(" ")[0]
        if m.get("both") is not None:
            return ops.glu_packed(m.both, activation, not m.spelling.endswith("last"))
        gate, up = (ops.as_dtype(n, facts.dtype(m.root)) for n in (m.gate, m.up))
        return ops.glu(gate, up, activation)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """A product whose sides come from two projections of one input, or two parts of one."""
        for node in graph.nodes:
            canon = canonical(node)
            if canon is None or canon.name != "mul":
                continue
            left, right = (_projections(side) for side in canon.args)
            if left != right and {x for x, _ in left} & {x for x, _ in right}:
                yield node, "a product of two projections of one input that looks like a gated unit"


def _is(number: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, float) and abs(v - number) < 1e-6


def _is_multiple(a: Any, b: Any) -> bool:
    canon = canonical(a)
    if a is b:
        return True
    if canon is None or canon.name not in ("mul", "div") or b not in canon.args[:2]:
        return False
    return any(isinstance(v, (int, float)) for v in canon.args[:2])


_LINEARS = ("linear", "lora_linear", "quant_linear")


def _projections(side: Any, depth: int = 6, part: Any = None) -> set[tuple[fx.Node, Any]]:
    # (input, which projection or part of one) of all that ``side`` is computed from element by
    # element.
    canon = canonical(side)
    if canon is None or depth == 0:
        return set()
    if canon.name in _LINEARS:
        return {(canon.args[0], (side, part))}
    if canon.name in ("matmul", "sdpa", "reshape", "transpose", "mean", "sum"):
        return set()
    if canon.name in ("slice", "stride"):
        part = canon.args[1:]
    results: set[tuple[fx.Node, Any]] = set()
    for arg in canon.args:
        if isinstance(arg, fx.Node):
            results |= _projections(arg, depth - 1, part)
    return results
