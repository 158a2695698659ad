"""Division by a root, in every spelling, for the norms."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..graph import facts
from ..graph.canon import canonical
from ..rewrite.pattern import Builder, Pattern


def square(p: Builder, x: Pattern) -> Pattern:
    """``x²``."""
    return p.either(x**2, x * x)


def over_root(p: Builder, x: Pattern, v: Pattern) -> Pattern:
    """``x / √v``; the reciprocal root may be rounded before it is applied."""
    root = p.either(p.sqrt(v), v**0.5)
    inverse = p.either(p.rsqrt(v), v**-0.5, p.div(1, root), p.reciprocal(root))
    return p.either(x * p.maybe_cast(inverse), x / p.maybe_cast(root))


def under_root(node: fx.Node) -> fx.Node | None:
    """The sum or mean whose root a norm divides by, when ``node`` is such a root."""
    # A square root may be many things, so it counts only over a mean, a sum or a variance of rows.
    # A reciprocal root always counts, and is its own answer when there is no reduction under it.
    canon = canonical(node)
    if canon is None:
        return None
    power = canon.args[1] if canon.name == "pow" else None
    if canon.name not in ("rsqrt", "sqrt") and power not in (0.5, -0.5):
        return None
    inner = canon.args[0]
    below = canonical(inner)
    if below is not None and below.name == "add":  # the eps
        inner = next((a for a in below.args[:2] if isinstance(a, fx.Node)), inner)
        below = canonical(inner)
    if below is not None and below.name == "item":
        below = canonical(below.args[0])
    if below is not None and below.name in ("mean", "sum", "variance", "var_mean"):
        return inner if isinstance(inner, fx.Node) else None
    return node if canon.name == "rsqrt" else None


def is_variance(node: fx.Node) -> bool:
    """Whether a mean (from ``under_root``) is one of squares of differences, or a variance."""
    canon = canonical(node)
    if canon is not None and canon.name == "item":
        canon = canonical(canon.args[0])
    if canon is None or canon.name in ("variance", "var_mean"):
        return canon is not None
    squared = canonical(canon.args[0])
    if squared is None or squared.name not in ("pow", "mul"):
        return False
    base = canonical(squared.args[0])
    return base is not None and base.name == "sub"


def is_row(node: Any, ndim: int) -> bool:
    """Whether ``node`` may be a norm's weight: a tensor of fixed shape, of at most ``ndim``."""
    t = facts.tensor(node)
    if t is None or not 1 <= t.dim() <= ndim:
        return False
    return all(facts.size(node, d) is not None for d in range(t.dim()))
