"""LoRA linears: the base projection and the adapter's low-rank update as one unit.

Hu et al., "LoRA", 2021; rsLoRA (Kalajdzievski, 2023) is another scale.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..kernels.linear.projections import Linear
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match
from .quant_linear import OfLinears


class LoRALinear(OfLinears):
    """``W x + b`` and what adapters add to it: ``scale * B(A(x))``, or an update like it.

    - Several active adapters that read x are joined into one.
    - A vector between A and B (VeRA, AdaLoRA), or behind B, goes onto B.
    - Where something else makes the narrow h of ``B h`` (dropout of each adapter's own, a function
      between A and B, pooled inputs), that stays, and ``B h`` is added in the base's product.
    - ``W x + D x`` with a matrix D that other formulas make (HiRA, FourierFT) is ``(W + D) x``;
      ``W x + D x - W x`` is ``D x`` (GLoRA).
    - A trained vector around it (IA3, BEFT) stays as it is. The gradient of one that scales needs
      the product, which eager mode keeps, too, or another one as large as that of a weight.
    """

    name = op = "lora_linear"
    inner_may_stay = True  # the cast of x that the adapters of one input share

    def patterns(
        self, p: Builder, x: Pattern, w: Pattern, bias: Pattern, delta: Pattern,
        other_bias: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """A dropped-out input stays a separate node: random numbers are used as before."""
        columns = p.var("columns", lambda v: isinstance(v, fx.Node))
        cast_x = p.maybe_cast(x)
        rows = p.capture("product", p.addmm(bias, p.reshape(cast_x, p.anything), columns))
        # bitsandbytes' layers cast by themselves, and PEFT clones what they return
        packed = p.capture("product", p.quant_linear(x, w, bias, p.var("compute"), p.anything))
        plain = p.capture("product", p.linear(cast_x, w, bias))
        base = p.either(
            p.maybe_cast(plain),
            p.reshape(rows, p.anything),
            p.clone(p.maybe_cast(packed), p.anything),
            p.maybe_cast(packed),
        )
        for count in range(1, MOST + 1):
            yield "plain", _with_adapters(p, base, [_adapter(p, i, x) for i in range(1, count + 1)])
        yield "dropout", _with_adapters(p, base, [_adapter(p, 1, None)])
        other = p.linear(p.maybe_cast(x), delta, other_bias)
        yield "replaced", p.maybe_cast((plain + other) - plain * 1)
        yield "matrix", p.maybe_cast(plain + p.linear(p.maybe_cast(x), delta))
        for count in range(1, MOST + 1):
            yield "narrow", _with_adapters(p, base, [_narrow(p, i) for i in range(1, count + 1)])
        vector = p.var("vector", _is_trained_vector)
        yield "shifted", p.maybe_cast(plain) + vector
        yield "scaled", p.maybe_cast(plain) * vector
        yield "scaled", p.linear(p.maybe_cast(p.maybe_cast(x) * vector), w, bias)

    def check(self, m: Match) -> None:
        """A result in the product's dtype or a wider one, and updates of low rank."""
        self.require_alone(m)
        weight = m.get("columns", m.get("w"))
        packed = isinstance(weight, tuple)
        m.require(packed or facts.ndim(weight) == 2, "the weight is not a matrix", m.root)
        if m.get("vector") is not None:
            projection = m.get("product", m.root)
            # a norm's vector scales what a layer reads, too; an adapter's does so around its layer
            around = f"{facts.home(projection)}.".startswith(f"{facts.home(_reader(m.vector))}.")
            m.pass_over(not _is_frozen(projection) or not around)
            m.leave(m.spelling == "scaled", _SCALED)
            m.leave(True, _SHIFTED)
        x, result = facts.tensor(m.x), facts.tensor(m.root)
        if x is None or result is None:
            m.require(False, "x is not a tensor")
            return
        product = facts.dtype(m.product) or x.dtype
        if m.spelling in ("matrix", "replaced"):
            base = (m.w, m.bias) if m.spelling == "replaced" else ()
            trained = any(isinstance(n, fx.Node) and _needs_gradient(n) for n in base)
            m.require(not trained, "a weight that cancels out is trained", m.root)
            kinds = {facts.dtype(n) for n in (weight, m.delta, m.product, m.root)}
            m.pass_over(facts.ndim(m.delta) != 2 or not _is_made(m.delta))
            m.require(len(kinds) == 1, "the weight and what is added to it differ in dtype", m.root)
            return
        check_adapters(m, adapters(m))
        wide = torch.promote_types(result.dtype, product) is result.dtype
        m.require(wide, f"returns {result.dtype} from a product in {product}", m.root)
        if m.spelling == "dropout":
            own = facts.tensor(m.x_1)
            m.require(own is not None and own.shape == x.shape, "the adapter reads another input")
        m.require(not _more_adapters(m.root), _SEVERAL, m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; bias, dropout input and adapter bias are passed where they exist."""
        weight: Any = m.get("w") if m.get("w") is not None else ops.method("t", m.columns)
        if m.spelling == "replaced":
            return ops.call(F.linear, m.x, m.delta, m.other_bias)
        if m.spelling == "matrix":
            return ops.call(F.linear, m.x, ops.computed(operator.add, weight, m.delta), m.bias)
        one = joined(adapters(m), ops)
        low = m.get("compute") or facts.dtype(m.x if isinstance(weight, tuple) else m.product)
        dtype = None if facts.dtype(m.root) is low else facts.dtype(m.root)
        packed = isinstance(weight, tuple)
        linear = Linear(
            weight, m.bias, one.a, one.b, one.scale, one.bias, one.x,
            m.compute if packed else None, dtype,
        )  # fmt: skip
        return ops.lora_linear(m.x, linear)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """Low-rank updates, and what else trained parameters do around a frozen projection."""
        wrapped: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            total = _sum_of(node) if _is_update(node) else None
            if total is not None:
                more = _is_adapted(total)
                yield node, _SEVERAL if more else "a low-rank update of a projection"
            elif _is_remade(node):
                yield node, "a projection by a weight that trained parameters change at each call"
            elif _is_frozen(node):
                wrapper, _, name = facts.home(node).rpartition(".")
                wrapped.setdefault(wrapper if name else "", []).append(node)
        reading = [n for n in graph.nodes if any(map(_trains, n.all_input_nodes))]
        ends = dict.fromkeys(end for n in reading for end in _ends(n))
        readers = [n for n in ends if "fusewright_rule" not in n.meta]
        for wrapper, (projection, *others) in wrapped.items():
            inside = [n for n in readers if f"{facts.home(n)}.".startswith(f"{wrapper}.")]
            is_base = (c := canonical(projection)) is not None and c.name != "lora_linear"
            if wrapper and inside and not others and is_base and not all(map(_scales, inside)):
                names = " and ".join(dict.fromkeys(map(_text, inside)))
                yield projection, f"parameters are trained around a frozen projection: {names}"


_SCALED = "a trained vector scales a projection or its input: one op would do no less"
_SHIFTED = "a trained vector is added: as a bias it would keep the norm before its layer apart"
_SEVERAL = "several adapters are active on one linear"


def _is_frozen(node: Any) -> bool:
    # Whether it is a projection by a stored weight that is not trained.
    canon = canonical(node)
    if canon is None or canon.name not in ("linear", "quant_linear", "lora_linear"):
        return False
    weight = canon.args[1]
    return not isinstance(weight, fx.Node) or (weight.op == "placeholder" and not _trains(weight))


def _needs_gradient(node: fx.Node) -> bool:
    t = facts.tensor(node)
    return t is not None and t.requires_grad


def _is_trained_vector(value: Any) -> bool:
    return isinstance(value, fx.Node) and facts.ndim(value) == 1 and _needs_gradient(value)


def _reader(vector: fx.Node) -> fx.Node:
    # The last node that reads it where it scales or shifts something.
    return max(vector.users, key=list(vector.graph.nodes).index)


def _scales(node: fx.Node) -> bool:
    # Whether it is a trained vector that only scales or shifts other values.
    names = {u: c.name for u in node.users if (c := canonical(u)) is not None}
    simple = all(names.get(u) in ("mul", "add") or _scales(u) for u in node.users)
    return simple and _is_trained_vector(node)


def _trains(node: fx.Node) -> bool:
    is_parameter = node.op == "placeholder" and not facts.is_argument(node)
    return is_parameter and _needs_gradient(node)


def _is_remade(node: fx.Node) -> bool:
    # Whether it is a projection by a weight that is made of a stored one and trained parameters.
    canon = canonical(node)
    if canon is None or canon.name != "linear" or "fusewright_rule" in node.meta:
        return False
    weight, above = canon.args[1], {canon.args[1]}
    queue = [weight] if isinstance(weight, fx.Node) and weight.op != "placeholder" else []
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in above]
        above.update(new)
        queue += new
    stored = [n for n in above if n.op == "placeholder" and not facts.is_argument(n)]
    sizes = {facts.size(weight, 0), facts.size(weight, 1)}
    alike = [n for n in stored if {facts.size(n, 0), facts.size(n, 1)} == sizes]
    return any(map(_trains, stored)) and not all(map(_trains, alike))


def _ends(node: fx.Node) -> list[fx.Node]:
    """The nodes that read what ``node`` is a view of; itself if it is none."""
    if _text(node) not in _VIEWS:
        return [node]
    return [end for user in node.users for end in _ends(user)]


def _text(node: fx.Node) -> str:
    canon = canonical(node)
    return canon.name if canon else getattr(node.target, "__name__", str(node.target))


_VIEWS = ("cast", "reshape", "transpose", "permute", "unsqueeze", "expand", "slice")


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
    """The parts of one adapter: nodes, and scales, which are constants, numbers or vectors."""

    a: Any  # (r, in), or None where ``x`` is narrow
    b: Any  # (out, r)
    scale: Any = None
    bias: Any = None  # (out,), of B, or None
    x: Any = None  # the adapter's input (after dropout), or None; without an A, what B reads
    between: Any = None  # a scale of what A returns
    divisor: Any = None  # of the scale
    columns: Any = None  # (r, out), instead of ``b``


def _scaled(p: Builder, update: Pattern, name: str) -> Pattern:
    scaled = update * p.var(name)
    return p.either(scaled / p.var(name.replace("scale", "divisor")), scaled, update)


def _adapter(p: Builder, i: int, x: Pattern | None) -> Pattern:
    # The i-th adapter, on ``x``, or after dropout on an input that it does not share.
    a, b, bias = (p.var(f"{part}_{i}") for part in ("a", "b", "bias"))
    narrow: Pattern = p.linear(p.var(f"x_{i}") if x is None else p.maybe_cast(x), a)
    if x is not None:
        narrow = _scaled(p, narrow, f"between_{i}")
    return _scaled(p, p.linear(narrow, b, bias), f"scale_{i}")


def _narrow(p: Builder, i: int) -> Pattern:
    # The i-th product of a narrow value.
    h, b, bias, columns = (p.var(f"{part}_{i}") for part in ("x", "b", "bias", "columns"))
    return _scaled(p, p.either(p.linear(h, b, bias), p.matmul(h, columns)), f"scale_{i}")


def _with_adapters(p: Builder, total: Pattern, updates: Sequence[Pattern]) -> Pattern:
    for update in updates:
        total = p.maybe_cast(update) + total
    return p.maybe_cast(total)


def adapters(m: Match) -> list[Adapter]:
    """The adapters of a match, in the order in which the model adds them."""
    return [
        Adapter(*(m.get(f"{part}_{i}") for part in Adapter._fields))
        for i in range(1, MOST + 1)
        if m.get(f"b_{i}", m.get(f"columns_{i}")) is not None
    ]


def check_adapters(m: Match, given: Sequence[Adapter]) -> None:
    """Decline adapters that the ops cannot take, or that cannot be joined."""
    ranks, wide = 0, facts.size(m.x, -1)
    for one in given:
        matrix, sides = (one.b, (0, 1)) if one.columns is None else (one.columns, (1, 0))
        out, rank = (facts.size(matrix, side) for side in sides)
        m.require(facts.ndim(matrix) == 2, "b is not a matrix", m.root)
        if one.a is None:  # a product of anything narrow: else it would be any other projection
            m.pass_over(rank is None or rank * 2 > min(wide or 0, out or 0))
        else:
            m.require(facts.ndim(one.a) == 2, "a is not a matrix", m.root)
        for scale, size in ((one.scale, out), (one.between, rank), (one.divisor, 1)):
            m.require(_is_scale(scale, size), "the scale is no number and no vector", scale)
        if one.a is not None and wide and out and rank and rank * 8 > wide:
            # RandLoRA's: slower in one op, by a tenth; not an adapter of a gate of few features
            m.leave(rank >= max(min(wide, out), 16), "the update is of full rank")
        ranks += rank or 0
    # only what goes in counts: a gate of one feature may have a wider adapter
    m.require(wide is not None and 0 < ranks <= wide, "the update is not of low rank", m.root)
    matrices = [t for one in given for t in (one.a, one.b, one.columns) if t is not None]
    kinds = {facts.dtype(t) for t in matrices}
    m.require(len(kinds) == 1 or len(given) == 1, "the adapters have several dtypes", m.root)


def _is_scale(scale: Any, size: int | None) -> bool:
    # A constant, or a tensor of one number, or of one for each feature.
    if scale is None or isinstance(scale, (int, float)):
        return True
    t = facts.tensor(scale)
    if t is None or not t.is_floating_point():
        return False
    return t.dim() == 0 or (t.dim() == 1 and facts.size(scale, 0) in (1, size))


def joined(given: Sequence[Adapter], ops: Emit) -> Adapter:
    """One adapter for all of them; scales that they do not share go onto the B's."""
    scales = {
        None if isinstance(one.scale, fx.Node) or one.divisor is not None else _scale(one)
        for one in given
    }
    shared = scales.pop() if len(scales) == 1 else None
    scale = 1.0 if shared is None else shared

    def times(t: Any, by: Any) -> Any:
        return t if by == scale else ops.computed(operator.mul, t, by)

    bs, biases = [], []
    for one in given:
        b, by = one.b, _scale(one)
        if one.columns is not None:
            b = ops.computed(torch.t, one.columns)
        if one.between is not None:
            b = ops.computed(operator.mul, b, one.between)
        if one.divisor is not None:
            by = ops.computed(operator.truediv, by, one.divisor)
        if one.bias is not None:
            biases.append(times(one.bias, by))
        over_rows = isinstance(by, fx.Node) and facts.ndim(by) == 1
        bs.append(times(b, ops.computed(torch.unsqueeze, by, -1) if over_rows else by))
    bias = biases[0] if biases else None
    for other in biases[1:]:
        bias = ops.computed(operator.add, bias, other)
    if len(given) == 1:
        return given[0]._replace(b=bs[0], scale=scale, bias=bias)
    b = ops.computed(torch.cat, bs, 1)
    if given[0].a is None:
        return Adapter(None, b, scale, bias, ops.call(torch.cat, [one.x for one in given], -1))
    return Adapter(ops.computed(torch.cat, [one.a for one in given], 0), b, scale, bias)


def _scale(one: Adapter) -> Any:
    # A number, or the node of one or of a vector.
    if isinstance(one.scale, fx.Node):
        return one.scale
    return 1.0 if one.scale is None else float(one.scale)


def _is_made(matrix: Any) -> bool:
    # Whether other nodes compute a matrix: a second stored weight is another layer.
    return isinstance(matrix, fx.Node) and matrix.op in ("call_function", "call_method")
