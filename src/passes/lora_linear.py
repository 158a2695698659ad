"""LoRA linears: the base projection and the adapter's low-rank update as one unit.

Hu et al., "LoRA", 2021; rsLoRA (Kalajdzievski, 2023) is another scale.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..graph import facts
from ..graph.canon import canonical, is_cast_of
from ..kernels.linear.projections import Linear
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule
from .quant_linear import sample_weight


class LoRALinear(Rule):
    """``W x + b + scale * B(A(x))`` as PEFT writes it, with or without dropout before A.

    Several active adapters are joined into one.
    """

    name = op = "lora_linear"
    inner_may_stay = True  # the cast of x that the adapters of one input share

    def patterns(
        self, p: Builder, x: Pattern, w: Pattern, bias: Pattern, a: Pattern, b: Pattern,
        scale: Pattern, lora_bias: Pattern, x_lora: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """A dropped-out input stays a separate node: random numbers are used as before."""
        columns = p.var("columns", lambda v: isinstance(v, fx.Node))
        cast_x = p.maybe_cast(x)
        rows = p.capture("product", p.addmm(bias, p.reshape(cast_x, p.anything), columns))
        # bitsandbytes' layers cast by themselves, and PEFT clones what they return
        packed = p.capture("product", p.quant_linear(x, w, bias, p.var("compute"), p.anything))
        base = p.either(
            p.maybe_cast(p.capture("product", p.linear(cast_x, w, bias))),
            p.reshape(rows, p.anything),
            p.clone(p.maybe_cast(packed), p.anything),
            p.maybe_cast(packed),
        )
        plain = p.linear(p.linear(p.maybe_cast(x), a), b, lora_bias)
        dropped = p.linear(p.linear(x_lora, a), b, lora_bias)
        for spelling, update in (("plain", plain), ("dropout", dropped)):
            total = base + p.maybe_cast(update * scale)
            yield spelling, p.maybe_cast(total)
            for more in range(1, MOST):
                yield spelling, p.maybe_cast(with_more(p, total, x, more))

    def check(self, m: Match) -> None:
        """Constant scales, a result in the product's dtype or a wider one."""
        for node in m.nodes:
            external_users = [u for u in node.users if u not in m.nodes]
            may_share = node is m.root or not external_users or is_cast_of(node, m.x)
            m.require(
                may_share,
                f"{node.name} inside the formula is also used by "
                f"{external_users[0].name if external_users else ''}",
                node,
            )
        weight = m.get("columns", m.get("w"))
        packed = isinstance(weight, tuple)
        m.require(packed or facts.ndim(weight) == 2, "the weight is not a matrix", m.root)
        check_adapters(m, adapters(m))
        x, result = facts.tensor(m.x), facts.tensor(m.root)
        if x is None or result is None:
            m.require(False, "x is not a tensor")
            return
        product = facts.dtype(m.product) or x.dtype
        wide = torch.promote_types(result.dtype, product) is result.dtype
        m.require(wide, f"returns {result.dtype} from a product in {product}", m.root)
        x_lora = facts.tensor(m.get("x_lora"))
        if m.spelling == "dropout":
            m.require(
                x_lora is not None and x_lora.shape == x.shape, "the adapter reads another input"
            )
        m.require(not _more_adapters(m.root), _SEVERAL, m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; bias, dropout input and adapter bias are passed where they exist."""
        weight: Any = m.get("w") if m.get("w") is not None else ops.method("t", m.columns)
        one = joined(adapters(m), ops)
        low = m.get("compute") or facts.dtype(m.x if isinstance(weight, tuple) else m.product)
        dtype = None if facts.dtype(m.root) is low else facts.dtype(m.root)
        packed = isinstance(weight, tuple)
        linear = Linear(
            weight, m.bias, one.a, one.b, one.scale, one.bias, one.x,
            m.compute if packed else None, dtype,
        )  # fmt: skip
        return ops.lora_linear(m.x, linear)

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Bytes and scales of a packed weight."""
        weight = m.get("w")
        return sample_weight(weight, node, generator, shape) if isinstance(weight, tuple) else None

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """A linear of another linear of low rank, scaled or not, that is added to something."""
        for node in graph.nodes:
            total = _sum_of(node) if _is_update(node) else None
            if total is not None:
                more = _is_adapted(total)
                yield node, _SEVERAL if more else "a low-rank update of a projection"


_SEVERAL = "several adapters are active on one linear"


def _is_update(node: Any) -> bool:
    """Whether ``node`` is ``B(A(x))`` with A narrower than x and than B's result."""
    outer = canonical(node)
    if outer is None or outer.name != "linear":
        return False
    inner = canonical(outer.args[0])
    if inner is None or inner.name != "linear":
        return False
    rank, into, out = (
        facts.size(inner.args[1], 0), facts.size(inner.args[1], 1), facts.size(outer.args[1], 0)
    )  # fmt: skip
    return rank is not None and rank * 2 <= min(into or 0, out or 0)


def _sum_of(node: fx.Node) -> fx.Node | None:
    # The sum of which ``node``, or a multiple of it, is one side.
    for user in node.users:
        canon = canonical(user)
        if canon is None:
            continue
        total = _sum_of(user) if canon.name in ("mul", "cast") else None
        total = user if canon.name == "add" else total
        if total is not None:
            return total
    return None


def _more_adapters(root: fx.Node) -> bool:
    sums = [u for u in root.users if (c := canonical(u)) is not None and c.name == "add"]
    return any(_is_scaled_update(side) for s in sums for side in _sides(s) if side is not root)


def _is_adapted(total: fx.Node) -> bool:
    inner = [side for side in _sides(total) if _sides(side)]
    return any(_is_scaled_update(side) for s in inner for side in _sides(s))


def _sides(node: Any) -> tuple[Any, ...]:
    canon = canonical(node)
    return canon.args[:2] if canon is not None and canon.name == "add" else ()


def _is_scaled_update(node: Any) -> bool:
    canon = canonical(node)
    if canon is not None and canon.name == "cast":
        canon = canonical(canon.args[0])
    return canon is not None and canon.name == "mul" and any(_is_update(a) for a in canon.args)


# -- several adapters on one linear, as one whose rank is the sum of theirs ------------------------
# Σ scaleᵢ·(x·Aᵢᵀ)·Bᵢᵀ = (x·Aᵀ)·Bᵀ,   A = [A₁; A₂; …],   B = [scale₁·B₁, scale₂·B₂, …]

MOST = 8
"""How many adapters on one linear are looked for."""


class Adapter(NamedTuple):
    """The parts of one adapter: nodes, and a constant scale."""

    a: Any  # (r, in)
    b: Any  # (out, r)
    scale: Any
    bias: Any  # (out,), of B, or None
    x: Any  # the adapter's input (after dropout), or None


def with_more(p: Builder, total: Pattern, x: Pattern, count: int) -> Pattern:
    """``total`` and ``count`` further adapters, added one after the other."""
    for i in range(2, count + 2):
        a, b, scale, bias, x_lora = (p.var(f"{part}_{i}") for part in Adapter._fields)
        narrow = p.either(p.linear(p.maybe_cast(x), a), p.linear(x_lora, a))
        total = p.maybe_cast(p.linear(narrow, b, bias) * scale) + total
    return total


def adapters(m: Match) -> list[Adapter]:
    """The adapters of a match, in the order in which the model adds them."""
    first = Adapter(m.a, m.b, m.scale, m.lora_bias, m.get("x_lora"))
    further = [
        Adapter(*(m.get(f"{part}_{i}") for part in Adapter._fields))
        for i in range(2, MOST + 1)
        if m.get(f"a_{i}") is not None
    ]
    return [first, *further]


def check_adapters(m: Match, given: Sequence[Adapter]) -> None:
    """Decline adapters that the ops cannot take, or that cannot be joined."""
    ranks = 0
    for one in given:
        m.require(isinstance(one.scale, (int, float)), "the scale is not a constant", one.scale)
        for name, matrix in (("a", one.a), ("b", one.b)):
            m.require(facts.ndim(matrix) == 2, f"{name} is not a matrix", m.root)
        ranks += facts.size(one.a, 0) or 0
    # only what goes in counts: a gate of one feature may have a wider adapter
    wide = facts.size(m.x, -1)
    m.require(wide is not None and 0 < ranks <= wide, "the update is not of low rank", m.root)
    if len(given) > 1:
        kinds = {facts.dtype(t) for one in given for t in (one.a, one.b)}
        m.require(len(kinds) == 1, "the adapters have several dtypes", m.root)
        have_dropout = any(one.x is not None for one in given)
        m.require(not have_dropout, "several adapters have dropout of their own", m.root)


def joined(given: Sequence[Adapter], ops: Emit) -> Adapter:
    """One adapter for all of them; a scale that they do not share goes onto the B's."""
    if len(given) == 1:
        return given[0]._replace(scale=float(given[0].scale))
    scales = {float(one.scale) for one in given}
    scale = scales.pop() if len(scales) == 1 else 1.0

    def scaled(t: Any, by: Any) -> Any:
        return t if float(by) == scale else ops.computed(operator.mul, t, float(by))

    biases = [scaled(one.bias, one.scale) for one in given if one.bias is not None]
    bias = biases[0] if biases else None
    for other in biases[1:]:
        bias = ops.computed(operator.add, bias, other)
    a = ops.computed(torch.cat, [one.a for one in given], 0)
    b = ops.computed(torch.cat, [scaled(one.b, one.scale) for one in given], 1)
    return Adapter(a, b, scale, bias, None)
