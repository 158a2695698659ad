"""Random inputs for verification: a formula's dtypes and layouts, at small sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .graph import facts
from .match.apply import Candidate

_SIZES = (5, 7, 3, 2, 11)
"""What the symbolic sizes of a graph become, in the order in which they are met."""


def sample(c: Candidate, sizes: Sizes, draw: int = 0) -> list[Any]:
    """Random inputs for the candidate: its dtypes, its layouts, its sizes as ``sizes`` says."""
    inputs: list[Any] = []
    for i, node in enumerate(c.inputs):
        example = facts.value(node)
        if isinstance(example, Tensor):
            generator = torch.Generator().manual_seed(1000 * draw + i + 1)
            shape = tuple(sizes.of(s) for s in example.shape)
            special = c.rule.sample(c.match, node, generator, shape)
            made = _random(example, shape, generator) if special is None else special
            inputs.append(made.to(example.device))
        else:
            inputs.append(sizes.of(example))
    return inputs


def _random(example: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if example.dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if example.is_complex():
        parts = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
        return torch.view_as_complex(parts).to(example.dtype)
    if not example.is_floating_point():
        return torch.randint(0, 2, shape, generator=generator, dtype=example.dtype)
    # the layout: the same order of strides, and the same broadcast dimensions
    strides = [hint(s) for s in example.stride()]
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    dense = [1 if strides[d] == 0 else shape[d] for d in order]
    values = torch.randn(dense, generator=generator, dtype=torch.float32)
    if len(shape) == 2 and all(type(s) is int for s in example.shape):
        values /= shape[-1] ** 0.5  # a weight: keep the products near one
    inverse = [order.index(d) for d in range(len(shape))]
    return values.to(example.dtype).permute(inverse).expand(shape)


def draws(inputs: Sequence[Any]) -> int:
    """How many draws judge together what a single one of such ``inputs`` has found too large.

    The fewer elements a result has, the more its largest error is a matter of luck; large ones
    would only need the memory.
    """
    return 16 if sum(t.numel() for t in inputs if isinstance(t, Tensor)) <= 1 << 20 else 4


def is_static(t: Tensor) -> bool:
    """Whether ``t`` is a matrix, or more, whose sizes are all known: a weight."""
    return t.dim() > 1 and all(type(s) is int for s in t.shape)


def hint(s: Any) -> int:
    """The number with which a symbolic size was met."""
    return s if type(s) is int else int(getattr(s.node, "hint", None) or 1)


class Sizes:
    """Gives each symbolic size of a graph one number: a small one, or the one it was met with."""

    def __init__(self, small: bool) -> None:
        self.small = small
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
            # what was met with one size is one size: rows of x and of the labels must agree
            hint = hints.get(symbol, symbol)
            if hint not in self.by_hint:
                self.by_hint[hint] = _SIZES[len(self.by_hint) % len(_SIZES)]
            self.chosen[symbol] = self.by_hint[hint]
        value = expression.subs(self.chosen)
        return int(value) if isinstance(s, torch.SymInt) else float(value)


def tokens(inputs: list[Any]) -> int:
    """How many rows the sampled inputs had: the largest product of leading sizes."""
    rows = 1
    for t in inputs:
        if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 3:
            rows = max(rows, t.shape[0] * (t.shape[1] if t.dim() == 3 else t.shape[-2]))
    return rows
