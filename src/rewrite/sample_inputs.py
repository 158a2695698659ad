"""Random inputs for verification: a formula's dtypes and layouts, at small sizes.

A rewrite may be right for numbers near one and wrong for others. So inputs are drawn in several
*regimes*: the unit normal, and magnitudes and shapes of values that occur in training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import facts
from ..graph.fakes import hint
from .engine import Candidate

_SIZES = (5, 7, 3, 2, 11)
"""Values of a graph's symbolic sizes, in the order of their first use."""

_EVEN = (4, 8, 2, 6, 12)
"""Their values in the regimes: some errors are of odd sizes only, some of even ones."""


@dataclass(frozen=True)
class Regime:
    """How activations are distributed: ``scale`` times a unit normal, plus ``offset``.

    Without a ``scale``, activations are as large as in the first call, and 16 at least, and weights
    as large as they are then.
    """

    name: str = ""  # for reasons; empty for the unit normal
    scale: float | None = 1.0
    offset: float = 0.0
    degenerate: bool = False  # the first row is zero, and the second is constant
    upstream: float = 1.0  # how large the upstream gradients are


NORMAL = Regime()

REGIMES = (
    Regime("near zero", 1e-3, degenerate=True),
    Regime("large", None),
    Regime("far below zero", 4.0, -20.0),
)
"""Regimes in which a rewrite is tried after the unit normal."""

SUBNORMAL = Regime("of unit size, and gradients near zero", upstream=2.0**-16)
"""And in fp16, whose smallest numbers have few digits: a rounding may not be multiplied there."""


def regimes(c: Candidate) -> tuple[Regime, ...]:
    """The regimes in which a candidate is tried after the unit normal."""
    has_half = any(facts.dtype(n) is torch.float16 for n in (*c.inputs, *c.interior))
    return (*REGIMES, SUBNORMAL) if has_half else REGIMES


_CACHED = 1 << 21
"""Elements of a draw that is kept: more would count in a run's memory."""


class UnitNormals(dict[Any, Tensor]):
    """``torch.randn`` with fresh generators, which keeps what it drew for the next regime."""

    def __call__(self, shape: Sequence[int], generator: torch.Generator, **kind: Any) -> Tensor:
        """Unit normals in memory of the caller's."""
        key = generator.initial_seed(), tuple(shape), *kind.values()
        values = self.get(key)
        if values is None:
            values = torch.randn(shape, generator=generator, **kind)
            if values.numel() > _CACHED:
                return values
            self[key] = values
        return values.clone()


def sample(
    c: Candidate, sizes: Sizes, draw: int = 0, regime: Regime = NORMAL, randn: Any = torch.randn
) -> list[Any]:
    """Random inputs for the candidate: its dtypes, its layouts, its sizes as ``sizes`` says."""
    inputs: list[Any] = []
    for i, node in enumerate(c.inputs):
        example = facts.value(node)
        if isinstance(example, Tensor):
            generator = torch.Generator().manual_seed(1000 * draw + i + 1)
            shape = tuple(sizes.of(s) for s in example.shape)
            values = c.rule.sample(c.match, node, generator, shape)
            if values is None:
                values = _random(example, shape, generator, randn)
                if example.is_floating_point():
                    _distribute(values, node, regime)
            inputs.append(values.to(example.device))
        else:
            inputs.append(sizes.of(example))
    c.rule.fit(c.match, dict(zip(c.inputs, inputs, strict=True)))
    return inputs


class Draws:
    """Draws of inputs by ``sample``, each when it is needed: together they would need memory."""

    def __init__(
        self, candidate: Candidate, small: bool, regime: Regime, count: int, normals: UnitNormals
    ) -> None:
        self._settings = candidate, small, regime, normals
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Any]]:
        candidate, small, regime, normals = self._settings
        for number in range(self._count):
            sizes = Sizes(small, even=regime is not NORMAL)
            yield sample(candidate, sizes, number, regime, normals)


def _random(
    example: Tensor, shape: tuple[int, ...], generator: torch.Generator, randn: Any
) -> Tensor:
    if example.dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if example.is_complex():
        parts = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
        return torch.view_as_complex(parts).to(example.dtype)
    if not example.is_floating_point():
        return torch.randint(0, 2, shape, generator=generator, dtype=example.dtype)
    return _laid_out(example, shape, generator, randn)


@dataclass(frozen=True)
class Layout:
    """How a tensor is laid out in memory, whatever its sizes."""

    order: tuple[int, ...]  # its dimensions, the one with the largest stride first
    broadcast: frozenset[int]  # dimensions along which each element is the same memory
    parts: frozenset[int]  # dimensions that are a part of a wider one: there are gaps
    apart: bool  # whether the innermost dimension has gaps between elements


def layout(t: Tensor) -> Layout:
    """The layout of ``t``, by the hints of its symbolic sizes."""
    strides, extent = [hint(s) for s in t.stride()], [hint(s) for s in t.shape]
    order = tuple(sorted(range(t.dim()), key=lambda d: -strides[d]))
    real = [d for d in order if strides[d] and extent[d] > 1]
    parts = {
        inner for outer, inner in itertools.pairwise(real)
        if strides[outer] > strides[inner] * extent[inner]
    }  # fmt: skip
    apart = bool(real) and strides[real[-1]] > 1
    return Layout(order, frozenset(d for d in order if not strides[d]), frozenset(parts), apart)


def _laid_out(
    example: Tensor, shape: tuple[int, ...], generator: torch.Generator, randn: Any
) -> Tensor:
    """Unit normals in the layout of ``example``; a part is the second half of a dimension."""
    its = layout(example)
    dense = [1 if d in its.broadcast else shape[d] for d in its.order]
    wide = [n * (1 + (d in its.parts)) for n, d in zip(dense, its.order, strict=True)]
    wide.append(1 + its.apart)
    values: Tensor = randn(wide, generator=generator, dtype=_drawn(example.dtype))
    values = values.to(example.dtype)[..., -1]
    for at, d in enumerate(its.order):
        if d in its.parts:
            values = values.narrow(at, dense[at], dense[at])
    inverse = [its.order.index(d) for d in range(len(shape))]
    return values.permute(inverse).expand(shape)


def _drawn(dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw in: the normal distribution is not there for the narrowest."""
    return dtype if dtype.itemsize > 1 else torch.float32


def _distribute(values: Tensor, node: fx.Node, regime: Regime) -> None:
    """Turn unit normals into values of ``regime``, in place: once each where they are broadcast."""
    distinct = values[tuple(slice(0, 1) if s == 0 else slice(None) for s in values.stride())]
    first_value = facts.real(node) if regime.scale is None else None
    if is_weight(node):
        largest = None if first_value is None else _largest(first_value)
        if largest is not None and first_value is not None and first_value.numel() == 1:
            distinct.copy_(first_value.detach())
        elif largest is not None:
            distinct.mul_(largest / _PEAK)
        elif values.dim() == 2:
            distinct.div_(values.shape[-1] ** 0.5)  # keep the products near one
        return
    scale = _magnitude(node) / _PEAK if regime.scale is None else regime.scale
    if regime.degenerate and distinct.dim() > 1:
        distinct.select(-2, 0).zero_()
        if distinct.shape[-2] > 1:
            row = distinct.select(-2, 1)
            row.copy_(row[..., :1].sign())
    if (scale, regime.offset) != (1.0, 0.0):
        distinct.mul_(scale).add_(regime.offset)


STANDS_FOR = "stands_for"
"""In a node's ``meta``: the node of the captured graph that it is a smaller form of."""

_PEAK = 4.0
"""About the largest of some thousand unit normals."""

_LARGE = 16.0
"""How large the activations of the regime of large ones are at least."""


def is_weight(node: fx.Node) -> bool:
    """Whether a node is taken for a weight: a parameter, or a matrix or vector of known sizes."""
    t = facts.tensor(node)
    if t is None or isinstance(t, nn.Parameter):
        return t is not None
    return t.dim() <= 2 and all(type(s) is int for s in t.shape)


def _magnitude(node: fx.Node) -> float:
    """How large an activation may be: as the largest input of its graph at the first call."""
    node = node.meta.get(STANDS_FOR, node)
    real = facts.real(node)
    placeholders = [] if real is not None else node.graph.find_nodes(op="placeholder")
    tensors = [real, *(facts.real(n) for n in placeholders if not is_weight(n))]
    magnitudes = (_largest(t) for t in tensors if t is not None)
    largest = max((x for x in magnitudes if x is not None), default=0.0)
    dtype = facts.dtype(node) or torch.float32
    return min(max(largest, _LARGE), torch.finfo(dtype).max / 4)


def _largest(t: Tensor) -> float | None:
    # The largest absolute value of ``t``, rounded up to a power of two; None if there is none. A
    # value near the dtype's limit means infinity: a mask says nothing of how large activations are.
    # One host synchronisation, at the first call only.
    if not t.is_floating_point() or not t.numel() or t.dtype.itemsize < 2 or t.is_meta:
        return None
    low, high = torch.aminmax(t.detach())
    largest = float(torch.maximum(-low, high))
    if not 0 < largest < torch.finfo(t.dtype).max / 2:
        return None
    return float(2.0 ** math.ceil(math.log2(largest)))


def draws(inputs: Sequence[Any]) -> tuple[int, ...]:
    """How many draws are judged together after a single one has too large an error."""
    # The fewer elements a result has, the more its largest error is a matter of luck: where the
    # first number of draws finds that too large, the next one decides. Large ones would only need
    # memory.
    elements = sum(t.numel() for t in inputs if isinstance(t, Tensor))
    if elements > 1 << 20:
        return (4,)
    return (16, 64) if elements <= 1 << 16 else (16,)


def is_static(t: Tensor) -> bool:
    """Whether ``t`` is a matrix, or more, whose sizes are all known: a weight."""
    return t.dim() > 1 and all(type(s) is int for s in t.shape)


class Sizes:
    """Gives each symbolic size of a graph one number: a small one, or its hint."""

    def __init__(self, small: bool, even: bool = False) -> None:
        self.small = small
        self.numbers = _EVEN if even else _SIZES
        self.chosen: dict[Any, int] = {}
        self.by_hint: dict[Any, int] = {}

    def of(self, s: Any) -> Any:
        """The number for a SymInt (or an expression of them, or a tuple); constants stay."""
        if isinstance(s, (tuple, list)):
            return type(s)(self.of(item) for item in s)
        if not isinstance(s, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return s
        if not self.small:
            return s.node.hint
        env = s.node.shape_env
        # torch 2.13 renamed the attribute
        hints = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
        expression = env.simplify(s.node.expr)
        for symbol in sorted(expression.free_symbols, key=str):
            # sizes with one hint are one size: rows of x and of the labels must agree
            hint = hints.get(symbol, symbol)
            if hint not in self.by_hint:
                self.by_hint[hint] = self.numbers[len(self.by_hint) % len(self.numbers)]
            self.chosen[symbol] = self.by_hint[hint]
        value = expression.subs(self.chosen)
        return int(value) if isinstance(s, torch.SymInt) else float(value)


def tokens(inputs: Sequence[Any], fixed: Container[tuple[int, ...]] = ()) -> int:
    """How many rows the sampled inputs had: the largest product of leading sizes.

    ``fixed`` are the shapes of weights, which have no tokens.
    """
    activations = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
    activations = [t for t in activations if tuple(t.shape) not in fixed]
    rows = [t.shape[0] * t.shape[-2] for t in activations if t.dim() > 2]
    return max(rows or [len(t) for t in activations if t.dim() == 2], default=1)
