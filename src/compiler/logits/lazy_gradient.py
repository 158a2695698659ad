"""Gradients of lazy logits, and recorded operations in autograd's graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.second_order import differentiable, gradients
from .deferred import Change
from .lazy_logits import LazyLogits


class LazyGradient(LazyLogits):
    """The gradient of logits; what it makes of the gradients before it is known without values.

    Attributes:
        direct: gives these, as long as nobody has written to the values: for each operand of the
            fused loss, then for each input of the logits; None where there are none.
    """

    direct: Callable[[], list[Any] | None]

    def passed_on(
        self, function: Callable[[Tensor], Tensor], like: Tensor, with_direct: bool
    ) -> LazyGradient:
        """The gradient of ``like``, of which the tensor was made that this is the gradient of."""
        made = LazyGradient(
            lambda: function(self.values()), tuple(like.shape), like.dtype, like.device
        )
        made.direct = self.direct if with_direct else lambda: None
        return made  # type: ignore[return-value]  # 2026-11-27: __new__ gives its class

    def plus(self, other: Any) -> Any:
        """The sum, if it is lazy as well; else NotImplemented."""
        if not isinstance(other, LazyGradient) or self.is_written or other.is_written:
            return NotImplemented
        if self.shape != other.shape or self.dtype != other.dtype:
            return NotImplemented
        total = LazyGradient(
            lambda: self.values() + other.values(), tuple(self.shape), self.dtype, self.device
        )
        total.direct = lambda: _sums(self.direct(), other.direct())
        return total


def _sums(one: list[Any] | None, other: list[Any] | None) -> list[Any] | None:
    if one is None or other is None:
        return one or other
    pairs = zip(one, other, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]


def apply_change(change: Change, z: LazyLogits, *others: LazyLogits) -> LazyLogits:
    """What an operation makes of ``z`` and ``others``: lazy as well, with a history."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (z, *others)):
        made: LazyLogits = _Changed.apply(change, z, *others)  # type: ignore[no-untyped-call]
    else:
        made = z.changed(change, *others)
    if change.is_view:
        z.share(made, change.function)
    return made


def _double_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(needed)
    _require_unwritten(ctx)
    real = [z.materialize() if isinstance(z, LazyLogits) else z for z in (grad, *ctx.inputs)]
    return None, *gradients(ctx.change.function, real[1:], needed[1:], real[:1])


class _Changed(torch.autograd.Function):
    """A recorded operation. A lazy gradient passes through it as it is."""

    @staticmethod
    def forward(ctx: Any, change: Change, z: LazyLogits, *others: LazyLogits) -> LazyLogits:
        made = z.changed(change, *others)
        ctx.change, ctx.inputs, ctx.made = change, (z, *others), made._source
        ctx.writes = [t._family.writes for t in ctx.inputs]
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needed)
        wanted = [i for i, need in enumerate(needed[1:]) if need]
        found: list[Any] = [None] * len(needed)
        for i in wanted:
            function = functools.partial(_gradient, ctx, i)
            if isinstance(grad, LazyGradient) and not grad.is_written:
                # one of them has the whole: so it is there once, as long as both are lazy
                found[i + 1] = grad.passed_on(function, ctx.inputs[i], i == wanted[0])
            else:
                found[i + 1] = function(grad.values() if isinstance(grad, LazyLogits) else grad)
        return tuple(found)


def _gradient(ctx: Any, i: int, grad: Tensor) -> Tensor:
    """The gradient of the input ``i`` of a recorded operation, computed."""
    change: Change = ctx.change
    if change.backward is not None:
        return change.backward(grad, ctx.made.values())
    if change.is_linear:
        own = [torch.zeros((), dtype=z.dtype, device=z.device).expand(z.shape) for z in ctx.inputs]
    else:
        _require_unwritten(ctx)
        own = [z.values().detach() for z in ctx.inputs]
    wanted = [j == i for j in range(len(own))]
    with torch.no_grad():
        found = gradients(change.function, [t.requires_grad_() for t in own], wanted, (grad,))
    result: Tensor = found[i]
    return result


def _require_unwritten(ctx: Any) -> None:
    for z, writes in zip(ctx.inputs, ctx.writes, strict=True):
        if not isinstance(z, LazyLogits) or z._family.writes != writes:
            raise RuntimeError(
                "the gradient of these logits cannot be computed: they were written to since. "
                "Write to logits.clone(), or use fusewright.optimize(model, logits='always')."
            )
