"""A formula at smaller weights, for verification.

A head of 100,000 classes shows nothing that one of 1,000 does not, and random ones, in fp64 too,
would take a multiple of its memory in the first step of a run. So a large static size becomes a
small one wherever it stands: in the shapes of the inputs and in the constants of the formula and of
the match. A gated unit cuts its input in two: sizes that depend on each other in this way keep
their ratio (``in_ratio``). Of many experts a few are left. Where something else depends on a size,
the smaller formula fails to run, and the real sizes are taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from .engine import Candidate
from .rule import Match
from .sample_inputs import STANDS_FOR, layout
from .verify_exact import packed

LARGE = 1 << 20
"""Elements of a weight from which on it is made smaller."""

_TOO_LARGE = 1 << 21
"""Elements of all weights above which they are not drawn where smaller ones will do."""

_SMALL = 1024
"""About what a large size becomes, and the least size that is large."""

_ALIGNED = 128
"""Powers of two, up to this one, by which the real size can be divided divide the small one too."""

_EXPERTS = 9
"""About how many matrices are left of a weight that holds more: of each expert one."""

_RATIOS = (2, 3)
"""A projection is cut into two parts, or three."""


def smaller(c: Candidate) -> Candidate | None:
    """``c`` with small sizes in place of the large ones; None where there is nothing to gain."""
    return _with_sizes(c, _chosen)


def in_ratio(c: Candidate) -> Candidate | None:
    """``smaller`` in sizes that keep their ratios; None where that makes no difference."""
    return (
        None
        if _sizes(c, _chosen) == _sizes(c, _chosen_in_ratio)
        else _with_sizes(c, _chosen_in_ratio)
    )


def is_large(c: Candidate) -> bool:
    """Whether the weights are too large to be drawn, and copied in fp64, during a run."""
    return sum(t.numel() for t in _weights(c)) > _TOO_LARGE


def enlargement(c: Candidate) -> dict[int, float]:
    """Small size -> how many times as large the real one is; empty for a formula in real sizes."""
    factors: dict[int, float] = {}
    for node in (*c.inputs, *c.interior):
        small, real = facts.tensor(node), facts.tensor(node.meta.get(STANDS_FOR))
        if small is not None and real is not None:
            pairs = zip(small.shape, real.shape, strict=True)
            factors |= {a: b / a for a, b in pairs if type(a) is type(b) is int and a != b}
    return factors


def _with_sizes(c: Candidate, choose: _Choice) -> Candidate | None:
    sizes = _sizes(c, choose)
    has_gaps = any(layout(t).parts or layout(t).apart for t in _weights(c))
    if not sizes or has_gaps or packed(c.interior):
        return None
    return _rebuilt(c, sizes)


def _sizes(c: Candidate, choose: _Choice) -> dict[int, int]:
    return choose([tuple(t.shape) for t in _weights(c)], _known(c))


def _weights(c: Candidate) -> list[Tensor]:
    return [t for n in c.inputs if (t := facts.tensor(n)) is not None and _is_fixed(t)]


def _is_fixed(t: Tensor) -> bool:
    return t.dim() > 0 and all(type(s) is int for s in t.shape)


def _known(c: Candidate) -> set[int]:
    tensors = (facts.tensor(n) for n in (*c.inputs, *c.interior))
    return {s for t in tensors if t is not None for s in t.shape if type(s) is int}


def _chosen(shapes: list[tuple[int, ...]], known: set[int]) -> dict[int, int]:
    """Real size -> small size, the largest first, until no weight is large or none can be."""
    sizes = _few_experts(shapes, known)
    while remaining := _left(shapes, sizes):
        size = max(remaining)
        sizes[size] = _small(size, known | set(sizes.values()))
    return sizes


def _chosen_in_ratio(shapes: list[tuple[int, ...]], known: set[int]) -> dict[int, int]:
    """The same, where with a size those become smaller that are a half or a third of it."""
    sizes = _few_experts(shapes, known)
    while remaining := _left(shapes, sizes):
        size = max(remaining)
        used = known | set(sizes.values())
        related = _related(size, known - sizes.keys())
        sizes |= (len(related) > 1 and _scaled(related, used)) or {size: _small(size, used)}
    return sizes


_Choice = Callable[[list[tuple[int, ...]], set[int]], dict[int, int]]


def _left(shapes: list[tuple[int, ...]], sizes: Mapping[int, int]) -> set[int]:
    now = [[(s, sizes.get(s, s)) for s in shape] for shape in shapes]
    large = [shape for shape in now if math.prod(n for _, n in shape) > LARGE]
    return {s for shape in large for s, n in shape if s == n and s > _SMALL}


def _few_experts(shapes: list[tuple[int, ...]], known: set[int]) -> dict[int, int]:
    # Real number of experts -> a few; the number of the last one changes with it. A number of
    # experts that is a number of features, too, stays.
    sizes: dict[int, int] = {}
    large = [s for s in shapes if len(s) == 3 and math.prod(s) > LARGE]
    features = {s for shape in shapes for s in shape[1:]}
    for experts in sorted({shape[0] for shape in large} - features):
        used = known | set(sizes.values())
        few = next(n for n in itertools.count(_EXPERTS) if n not in used)
        if few < experts <= _SMALL:
            last = {experts - 1: few - 1} if experts - 1 not in known else {}
            sizes |= {experts: few, **last}
    return sizes


def _related(size: int, known: set[int]) -> set[int]:
    """``size`` and the ``known`` ones that are a few times as large as another, or a part of it."""
    sizes, edge = {size}, [size]
    while edge:
        one = edge.pop()
        near = {k for k in known - sizes if any(max(k, one) == r * min(k, one) for r in _RATIOS)}
        near = {k for k in near if k >= _SMALL // 2}
        sizes |= near
        edge += near
    return sizes


def _scaled(sizes: set[int], occupied: set[int]) -> dict[int, int]:
    """Small sizes in the ratios of ``sizes``, the least of them about 500; empty if none do."""
    divisor = math.gcd(*sizes)
    step = min(divisor & -divisor, _ALIGNED)
    most = _SMALL // 2 * divisor // min(sizes)
    for part in range(step * ((most // step - 1) | 1), divisor, 2 * step):
        scaled = {s: s // divisor * part for s in sizes}
        if part > 0 and not occupied & set(scaled.values()):
            return scaled
    return {}


def _small(size: int, occupied: set[int]) -> int:
    # Aligned as ``size`` is, odd otherwise, and not that of something else: an op may take another
    # implementation for sizes that are not aligned.
    step = min(size & -size, _ALIGNED)
    small = step * ((_SMALL // step - 1) | 1)
    while small in occupied:
        small += 2 * step
    return small


def _rebuilt(c: Candidate, sizes: Mapping[int, int]) -> Candidate:
    graph = fx.Graph()
    graph.owning_module = c.interior[0].graph.owning_module
    env: dict[fx.Node, fx.Node] = {}

    def change(value: Any) -> Any:
        def leaf(v: Any) -> Any:
            if isinstance(v, fx.Node):
                return env.get(v, v)
            return sizes.get(v, v) if type(v) is int else v

        return fx.node.map_aggregate(value, leaf)

    for node in c.inputs:
        env[node] = graph.placeholder(node.name)
    for node in c.interior:
        args, kwargs = change(node.args), change(node.kwargs)
        env[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
    for old, new in env.items():
        example = _example(facts.value(old), sizes)
        new.meta = {**old.meta, "example_value": example, STANDS_FOR: old}
    m = c.match
    match = Match(
        env.get(m.root, m.root),
        m.spelling,
        {k: change(v) for k, v in m.captures.items()},
        tuple(env.get(n, n) for n in m.nodes),
        tuple(env[n] for n in m.outputs),
        tuple({k: change(v) for k, v in user.items()} for user in m.users),
    )
    inputs, interior = (tuple(env[n] for n in nodes) for nodes in (c.inputs, c.interior))
    outputs = tuple(env[n] for n in c.outputs)
    return Candidate(c.rule, match, inputs, interior, outputs, c.table, c.autocast)


def _example(value: Any, sizes: Mapping[int, int]) -> Any:
    # An example value in small sizes, of the same dtype, device, order of strides and broadcast. It
    # holds no memory; making it installs no guard on the sizes that the graph does not know.
    if not isinstance(value, Tensor) or not any(s in sizes for s in value.shape if type(s) is int):
        return value
    shape = [sizes.get(s, s) if type(s) is int else s for s in value.shape]
    its, strides, step = layout(value), [0] * len(shape), 1
    for d in reversed(its.order):
        if d not in its.broadcast:
            strides[d], step = step, step * shape[d]
    mode: Any = getattr(value, "fake_mode", None)
    env = getattr(mode, "shape_env", None)
    with mode or nullcontext(), env.suppress_guards() if env is not None else nullcontext():
        device = value.device if mode is not None else "meta"
        example = torch.empty_strided(shape, strides, dtype=value.dtype, device=device)
    return example.requires_grad_(value.requires_grad)
