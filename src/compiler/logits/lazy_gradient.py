"""Gradients of lazy logits, and recorded operations in autograd's graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.second_order import differentiable, gradients
from .deferred import Change
from .lazy_logits import LazyLogits

Part = Callable[[], list[Any]]
"""A part of the gradients of operands and inputs; None in it where there is nothing to add."""


class LazyGradient(LazyLogits):
    """The gradient of logits; what it makes of the gradients before it is known without values.

    Attributes:
        parts: give these, as long as nobody has written to the values: for each operand of the
            fused loss, then for each input of the logits. They are to be added up.
        addends: the gradients that this is the sum of, if it is one.
    """

    parts: list[Part]
    addends: list[LazyGradient]

    @staticmethod
    def of(like: Tensor, compute: Callable[[], Tensor], parts: list[Part]) -> LazyGradient:
        """The gradient of ``like``; ``compute`` gives its values."""
        gradient = LazyGradient(compute, tuple(like.shape), like.dtype, like.device)
        assert isinstance(gradient, LazyGradient)
        gradient.parts, gradient.addends = parts, []
        return gradient

    def plus(self, other: Any) -> Any:
        """The sum, if it is lazy as well; else NotImplemented."""
        if not isinstance(other, LazyGradient) or self.is_written or other.is_written:
            return NotImplemented
        if self.shape != other.shape or self.dtype != other.dtype:
            return NotImplemented
        addends = [*(self.addends or [self]), *(other.addends or [other])]

        def compute() -> Tensor:
            total = addends[0].values().clone()
            for addend in addends[1:]:
                total += addend.values()
            return total

        total = LazyGradient.of(self, compute, [*self.parts, *other.parts])
        total.addends = addends
        return total

    def direct(self, count: int) -> list[Any]:
        """The gradients of ``count`` operands and inputs, added up in fp32."""
        parts = _joined(self.parts)
        if len(parts) == 1:
            return parts[0]()
        totals: list[Any] = [None] * count
        dtypes: list[Any] = [None] * count
        for part in parts:
            for i, grad in enumerate(part()):
                if grad is None:
                    continue
                if totals[i] is None:
                    totals[i], dtypes[i] = _wide_copy(grad), grad.dtype
                else:
                    totals[i] += grad
        return [t if t is None else t.to(d) for t, d in zip(totals, dtypes, strict=True)]


def _joined(parts: list[Part]) -> list[Part]:
    """The parts, where those that have a ``key`` in common are made ``together``."""
    groups: dict[Any, list[Any]] = {}
    for part in parts:
        groups.setdefault(getattr(part, "key", id(part)), []).append(part)
    return [g[0] if len(g) == 1 else functools.partial(g[0].together, g) for g in groups.values()]


def _wide_copy(t: Tensor) -> Tensor:
    return t.clone() if t.dtype in (torch.float32, torch.float64) else t.float()


def apply_change(change: Change, z: LazyLogits, *others: LazyLogits) -> LazyLogits:
    """What an operation makes of ``z`` and ``others``: lazy as well, with a history."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (z, *others)):
        result: LazyLogits = _Changed.apply(change, z, *others)  # type: ignore[no-untyped-call]
    else:
        result = z.changed(change, *others)
    if change.is_view:
        z.share(result, change.function)
    return result


def _double_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(needs)
    require_unwritten(ctx.inputs, ctx.writes)
    real = [z.materialize() if isinstance(z, LazyLogits) else z for z in (grad, *ctx.inputs)]
    return None, *gradients(ctx.change.function, real[1:], needs[1:], real[:1])


class _Changed(torch.autograd.Function):
    """A recorded operation. A lazy gradient passes through it as it is."""

    @staticmethod
    def forward(ctx: Any, change: Change, z: LazyLogits, *others: LazyLogits) -> LazyLogits:
        result = z.changed(change, *others)
        ctx.change, ctx.inputs, ctx.made = change, (z, *others), result.snapshot()
        ctx.likes = [like(t) for t in ctx.inputs]
        ctx.values = [t.snapshot() for t in ctx.inputs]
        ctx.writes = [t.writes for t in ctx.inputs]
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        indices = [i for i, need in enumerate(needs[1:]) if need]
        grads: list[Any] = [None] * len(needs)
        for i in indices:
            function = functools.partial(_gradient, ctx, i)
            if isinstance(grad, LazyGradient) and not grad.is_written:
                # one of them has the whole: so it is there once, as long as both are lazy
                parts = grad.parts if i == indices[0] else []
                compute = functools.partial(_gradient_of, function, grad)
                grads[i + 1] = LazyGradient.of(ctx.likes[i], compute, parts)
            else:
                grads[i + 1] = function(grad.values() if isinstance(grad, LazyLogits) else grad)
        return tuple(grads)


def _gradient_of(function: Callable[[Tensor], Tensor], grad: LazyGradient) -> Tensor:
    return function(grad.values())


def _gradient(ctx: Any, i: int, grad: Tensor) -> Tensor:
    """The gradient of the input ``i`` of a recorded operation, computed."""
    change: Change = ctx.change
    if change.backward is not None:
        return change.backward(grad, ctx.made.values())
    if change.is_linear:
        inputs = [t.detach() for t in ctx.likes]
    else:
        inputs = [t.values().detach() for t in ctx.values]
    needs = [j == i for j in range(len(inputs))]
    with torch.no_grad():
        grads = gradients(change.function, [t.requires_grad_() for t in inputs], needs, (grad,))
    result: Tensor = grads[i]
    return result


def like(z: Tensor) -> Tensor:
    """Zeros of the shape of ``z``, which take no memory."""
    return torch.zeros((), dtype=z.dtype, device=z.device).expand(z.shape)


def require_unwritten(tensors: Sequence[Any], writes: Sequence[int]) -> None:
    """Raise RuntimeError if logits under a second derivative were written to since ``writes``."""
    for z, before in zip(tensors, writes, strict=True):
        if not isinstance(z, LazyLogits) or z.writes != before:
            raise RuntimeError(
                "the gradient of a gradient of these logits cannot be computed: they were written "
                "to since. "
                "Write to logits.clone(), or use fusewright.optimize(model, logits='always')."
            )
