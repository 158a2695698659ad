"""What is computed of lazy logits in tiles, as autograd sees it in eager mode.

The operation's result is made of rows and head, and its history is eager mode's: it leads to the
lazy logits that were asked. What flows back is a ``LazyGradient``. Where that arrives as it was
sent, rows and head get the gradients of the tiled operation; where somebody has changed it, or
wants to see it, its values are those of the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....kernels.second_order import differentiable, gradients
from ..changes import remembered, unchanged
from ..head_parts import Operands, as_leaf
from ..lazy_gradient import LazyGradient, like, require_unwritten
from ..lazy_logits import LazyLogits
from .arguments import WrongArguments
from .rows import HeadRows, rows_of
from .together import LatePart, Measures


@dataclass(frozen=True, eq=False)
class Tiled:
    """Something that is computed of logits, or of what was recorded of them."""

    name: str
    # computes it from the operands of the head; flat, in fp32 (fp64 for fp64)
    compute: Callable[[Operands], Tensor]
    formula: Callable[[Tensor], Tensor]  # computes the same from the values
    measures: Measures | None = None  # what it is a sum of, or None
    # the caller's tensors that ``formula`` and ``measures`` read, such as targets
    given: tuple[Tensor, ...] = ()


def compute(z: LazyLogits, tiled: Tiled, rows: HeadRows | None = None) -> Tensor:
    """The result of ``tiled`` of ``rows``, by default z's, with a history that leads to ``z``.

    Raises:
        WrongArguments: it cannot be computed from the operands of the head now.
    """
    rows = rows_of(z) if rows is None else rows
    if rows.factor <= 0 or not rows.call.can_end_in_tiles(rows.inputs):
        raise WrongArguments
    rows.call.plan.reads.note_tiles(tiled.name)
    rows.call.is_done = True
    if torch.is_grad_enabled() and z.requires_grad:
        result: Tensor = _Ended.apply(tiled, rows, z)  # type: ignore[no-untyped-call]
        return result
    with rows.call.mode(False):
        return tiled.compute(_operands(rows, rows.inputs))


def _operands(rows: HeadRows, inputs: Any) -> Operands:
    head = rows.call.plan.head
    assert head is not None
    return head.of(inputs, rows.index, rows.factor)


def _double_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    require_unwritten([ctx.z], [ctx.writes])
    _require_unchanged(ctx)
    with ctx.autocast():
        return None, None, *gradients(ctx.tiled.formula, (ctx.z.materialize(),), (True,), (grad,))


class _Ended(torch.autograd.Function):
    """The tiled operation. Its own history, from the operands on, is kept for backward."""

    @staticmethod
    def forward(ctx: Any, tiled: Tiled, rows: HeadRows, z: LazyLogits) -> Tensor:
        head = rows.call.plan.head
        assert head is not None
        is_late = tiled.measures is not None and rows.inputs[head.weight].requires_grad
        leaves = rows.inputs if is_late else [as_leaf(t) for t in rows.inputs]
        with rows.call.mode(not is_late):
            result = tiled.compute(_operands(rows, leaves))
        ctx.is_late = is_late
        ctx.tiled, ctx.rows, ctx.z, ctx.leaves = tiled, rows, z, leaves
        ctx.made, ctx.autocast = result, _autocast(z.device.type)
        ctx.values, ctx.like = z.snapshot(), like(z)
        ctx.writes, ctx.given = z.writes, [remembered(t) for t in tiled.given]
        ctx.set_materialize_grads(False)
        return result.detach()

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None
        _require_unchanged(ctx)
        z, result = ctx.like, ctx.made

        def values() -> Tensor:
            with torch.no_grad(), ctx.autocast():
                leaf = ctx.values.values().detach().requires_grad_()
                gradient: Tensor = gradients(ctx.tiled.formula, (leaf,), (True,), (grad,))[0]
            return gradient

        def part() -> list[Any]:
            indices = [
                i for i, t in enumerate(ctx.leaves)
                if isinstance(t, Tensor) and t.requires_grad
            ]  # fmt: skip
            inputs = [ctx.leaves[i] for i in indices]
            grads = torch.autograd.grad(result, inputs, grad, retain_graph=True, allow_unused=True)
            pairs = dict(zip(indices, grads, strict=True))
            return [None] * 3 + [pairs.get(i) for i in range(len(ctx.leaves))]

        if ctx.is_late:
            late = LatePart(ctx.rows, ctx.tiled.measures, grad, len(ctx.leaves))
            return None, None, LazyGradient.of(z, values, [late])
        return None, None, LazyGradient.of(z, values, [part])


def _require_unchanged(ctx: Any) -> None:
    for saved in ctx.given:
        unchanged(saved)


def _autocast(device: str) -> Callable[[], Any]:
    """The autocast at hand, to be entered again."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    @contextmanager
    def again() -> Iterator[None]:
        with torch.autocast(device, dtype, enabled):
            yield

    return again
