"""Blocks of linears: the gated MLP as one unit, and the linears that read one input.

The patterns use the ops of the rules before them (``glu``, ``lora_linear``, ``quant_linear``)
and PyTorch's linears.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..kernels.linear.projections import MIXED, Linear
from ..rewrite.matcher import Trace
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match
from .quant_linear import OfLinears

_OTHER_INPUT = "an adapter has an input of its own, after dropout"
_NARROW_INPUT = "what an adapter's B reads is made by other operations than its A"


class MLPBlock(OfLinears):
    """``down(act(gate(x)) * up(x))``, each linear with an adapter or without."""

    name = op = "mlp_block"

    def patterns(
        self, p: Builder, x: Pattern, activation: Pattern, gate_first: Pattern
    ) -> Iterable[Any]:
        """Gate and up from two linears, or from one."""
        two = p.glu(_linear(p, x, "gate"), _linear(p, x, "up"), activation)
        yield "two", _linear(p, two, "down")
        packed = p.glu_packed(_linear(p, x, "gate"), activation, gate_first)
        yield "packed", _linear(p, packed, "down")

    def check(self, m: Match) -> None:
        """Matrices, no adapter with a separate input, and a gradient that is needed."""
        linears = [_captured(m, role) for role in _roles(m)]
        _leave_own_inputs(m, linears)  # of down, it is also a use of the MLP's own value
        packed = [isinstance(v["weight"], tuple) for v in linears]
        m.leave(any(packed) and not all(packed), MIXED)
        external_users = [
            n for n in m.nodes if n is not m.root and not set(n.users) <= set(m.nodes)
        ]
        m.leave(bool(external_users), "a value inside the MLP is also used outside it")
        last = canonical(m.root)
        inputs = [*[m.x] * (len(linears) - 1), last.args[0] if last else m.x]
        kinds = {_kinds(x, v) for x, v in zip(inputs, linears, strict=True)}
        m.leave(len(kinds) > 1, "the linears compute, or return, in several dtypes")
        _check(m, m.x, linears)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op. What it keeps is chosen later, by the keyword ``keep`` of its node."""
        layout = "two" if m.spelling == "two" else ("gate" if m.gate_first else "up") + " first"
        linears = _records(m.x, [_captured(m, role) for role in _roles(m)])
        return ops.mlp_block(m.x, linears, m.activation, layout, keep="gate_up")


class QKVBlock(OfLinears):
    """Several linears on one input, at least one of them with an adapter."""

    name = op = "qkv_block"

    def patterns(self, p: Builder, x: Pattern) -> Iterable[Any]:
        """One of them; ``find`` adds the others."""
        yield _linear(p, x, "one")

    def find(self, node: fx.Node, trace: Trace) -> Iterator[Match]:
        """All linears that read what ``node``, the last of them, reads."""
        for m in super().find(node, trace):
            if not isinstance(m.x, fx.Node):
                continue
            linears = [
                own for user in m.x.users for own in super(QKVBlock, self).find(user, Trace())
            ]
            group = [o for o in linears if o.x is m.x and _is_packed(o) == _is_packed(m)]
            kinds = _kinds(m.x, _captured(m, "one"))
            group = [o for o in group if _kinds(m.x, _captured(o, "one")) == kinds]
            order = {n: i for i, n in enumerate(node.graph.nodes)}
            group.sort(key=lambda own: order[own.root])
            if len(group) < 2 or group[-1].root is not node:
                continue
            nodes = tuple(dict.fromkeys(n for own in group for n in own.nodes))
            users = tuple(_captured(own, "one") for own in group)
            yield Match(node, "", {"x": m.x}, nodes, tuple(g.root for g in group), users)

    def check(self, m: Match) -> None:
        """Matrices, no adapter with a separate input, and one adapter at least."""
        m.pass_over(all(user["lora_a"] is None for user in m.users))  # nothing is gained by it
        _leave_own_inputs(m, m.users)
        _check(m, m.x, m.users)

    def rewrite(self, m: Match, ops: Emit) -> tuple[fx.Node, ...]:
        """One op with one output per linear."""
        block = ops.qkv_block(m.x, _records(m.x, m.users), keep="all")
        return tuple(ops.item(block, i) for i in range(len(m.users)))


def _linear(p: Builder, x: Any, role: str) -> Pattern:
    linear = weight, bias, *_, compute, dtype = [p.var(f"{role}_{f}") for f in Linear._fields]
    return p.either(
        p.linear(x, weight, bias),
        p.lora_linear(x, linear),
        p.quant_linear(x, weight, bias, compute, dtype),
    )


def _is_packed(m: Match) -> bool:
    return isinstance(m.one_weight, tuple)


def _kinds(x: Any, linear: Mapping[str, Any]) -> tuple[Any, Any]:
    # The dtypes in which a linear computes and returns; None where the ops know by themselves.
    # Only products with quantized weights are told: others run in the weight's, or autocast's.
    if not isinstance(linear["weight"], tuple):
        return None, linear["dtype"]
    compute = linear["compute"] or facts.dtype(x)
    return compute, linear["dtype"] or compute


def _roles(m: Match) -> tuple[str, ...]:
    return ("gate", "up", "down") if m.spelling == "two" else ("gate", "down")


def _captured(m: Match, role: str) -> Mapping[str, Any]:
    return {part: m.get(f"{role}_{part}") for part in Linear._fields}


def _records(x: Any, linears: Sequence[Mapping[str, Any]]) -> list[Linear]:
    compute, dtype = _kinds(x, linears[0])
    dtype = None if dtype is compute else dtype
    compute = None if compute is facts.dtype(x) else compute
    return [
        Linear(
            v["weight"], v["bias"], v["lora_a"], v["lora_b"],
            1.0 if v["scale"] is None else v["scale"], v["lora_bias"], None, compute, dtype,
        )
        for v in linears
    ]  # fmt: skip


def _leave_own_inputs(m: Match, linears: Sequence[Mapping[str, Any]]) -> None:
    own = [v for v in linears if v["x_lora"] is not None]
    m.leave(any(v["lora_a"] is None for v in own), _NARROW_INPUT)
    m.leave(bool(own), _OTHER_INPUT)


def _check(m: Match, x: Any, linears: Sequence[Mapping[str, Any]]) -> None:
    # The requirements of both ops on their linears.
    for v in linears:
        quantized = isinstance(v["weight"], tuple)  # which its own pattern judged
        matrix = quantized or facts.ndim(v["weight"]) == 2
        m.require(matrix, "a linear's weight is not a matrix", m.root)
    needs = [facts.tensor(n) for v in (*linears, {"x": x}) for n in v.values()]
    m.pass_over(not any(t is not None and t.requires_grad for t in needs))
