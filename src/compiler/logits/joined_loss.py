"""A fused loss and the logits that it is of, as autograd sees them in eager mode.

The loss is made of the rows and the head, and its logits never exist. But somebody may hook them,
ask for their gradient, or use them in another loss; so the history is the one of eager mode:

    rows, head ──▶ logits ──▶ loss

What flows from the loss to the logits is lazy, too. Where it arrives as it was sent, the gradients
of rows and head are those that the fused loss has found. Where a hook has changed it, or it was
added to another gradient, its values are computed, and sent back through the projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.loss import head_op as op
from ...kernels.loss.linear_cross_entropy import linear_cross_entropy
from ...kernels.second_order import differentiable, gradients
from ...sharding import in_zero3
from .endings import ENDINGS
from .fingerprints import WeightsChanged, fingerprint
from .head_call import HeadCall, Plan, aliases, called_model, storage
from .lazy_gradient import LazyGradient
from .lazy_logits import Buffer, LazyLogits
from .sharded import call_name


def _logits_double_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if grad is None:
        return (None,) * count
    inputs, ctx.unpacked = _unpacked(ctx), None

    def formula(*own: Any) -> Tensor:
        with ctx.join.mode(True):
            logits: Tensor = ctx.join.logits(*own)
        return logits

    if isinstance(grad, LazyGradient):
        grad = grad.values()
    return (None,) * _FIRST + gradients(formula, inputs, ctx.needs_input_grad[_FIRST:], (grad,))


_FIRST = 1 + op.OPERANDS
"""Where the inputs of the logits begin among the arguments of ``_Logits``."""


class _Logits(torch.autograd.Function):
    """The logits; ``fused`` are the loss's operands, which its gradients are sent to."""

    @staticmethod
    def forward(ctx: Any, join: HeadCall, *tensors: Any) -> Tensor:
        """``tensors`` are the fused loss's operands and the inputs of the logits."""
        inputs = tensors[op.OPERANDS :]
        ctx.join, ctx.unpacked = join, None
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        keep, late_inputs = any(ctx.needs_input_grad[_FIRST:]), aliases(inputs)
        return _lazy(join, late_inputs, keep) if join.plan.lazy else join.compute(late_inputs, keep)

    @staticmethod
    @differentiable(_logits_double_backward, always=True)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        for reference in ctx.join.detached:  # an optimizer's step comes next
            if (kept := reference()) is not None and not kept.requires_grad:
                with contextlib.suppress(WeightsChanged):  # its reader gets it
                    kept.fill()
        if grad is None:
            return (None,) * len(needs)
        if isinstance(grad, LazyGradient):
            if grad.is_direct:
                return None, *grad.direct(len(needs) - 1)
            grad = grad.values()
        if ctx.join.made is None:
            return _logits_double_backward(ctx, grad)
        leaves, edge = ctx.join.made
        indices = [i for i, need in enumerate(needs[_FIRST:]) if need]
        grads = torch.autograd.grad(
            edge, [leaves[i] for i in indices], grad, retain_graph=True, allow_unused=True
        )
        pairs = dict(zip(indices, grads, strict=True))
        return (None,) * _FIRST + tuple(pairs.get(i) for i in range(len(needs) - _FIRST))


def _unpacked(logits: Any) -> tuple[Any, ...]:
    """What the node of the logits has saved, for itself and for the node of the loss."""
    # a checkpoint gives it once in each backward pass; the node of the logits comes after the other
    if logits.unpacked is None:
        logits.unpacked = logits.saved_tensors
    inputs: tuple[Any, ...] = logits.unpacked
    return inputs


def _loss_double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    inputs = _unpacked(ctx.next_functions[0][0])
    others = ctx.saved_tensors[_FIRST : _FIRST + ctx.others]
    grad_logits = ctx.join.gradient(inputs, others, grad, torch.is_grad_enabled())
    return None, grad_logits, *(None for _ in ctx.needs_input_grad[2:])


class _Loss(torch.autograd.Function):
    """The fused loss of logits that need not exist."""

    @staticmethod
    def forward(
        ctx: Any, join: HeadCall, logits: Tensor, needed: list[bool], operands: tuple[Any, ...],
        settings: op.Settings, inputs: tuple[Any, ...], *others: Any,
    ) -> Tensor:  # fmt: skip
        """``operands`` are those of ``op.found``; ``others`` the inputs of ``join.loss``."""
        # ``inputs``, of the logits, are saved without versions: in eager mode the loss does not
        # need them, and ``join.gradient`` looks at their bytes
        *given, labels = operands
        loss, fused = op.found(given, labels, settings, needed)
        ctx.set_materialize_grads(False)
        ctx.join, ctx.needed, ctx.settings = join, needed, settings
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in given]
        ctx.others = len(others)
        ctx.save_for_backward(*fused, *others, *map(_without_version, inputs))
        return loss

    @staticmethod
    @differentiable(_loss_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        fused, (others, inputs) = saved[:_FIRST], _split(saved[_FIRST:], ctx.others)
        join, like, needs, settings = ctx.join, ctx.like, ctx.needed, ctx.settings

        def values() -> Tensor:
            result: Tensor = join.gradient(inputs, others, grad, False)
            return result

        def part() -> list[Any]:
            grads = op.scaled(fused, grad, like, needs, settings.logit_scale)
            return [*grads, *(None for _ in range(join.plan.inputs))]

        shape, dtype = join.shape, join.plan.dtype
        logits = torch.empty((), dtype=dtype, device=join.device).expand(shape)
        lazy = LazyGradient.of(logits, values, [part])
        return None, lazy, *(None for _ in ctx.needs_input_grad[2:])


def _split(values: Sequence[Any], count: int) -> tuple[Any, Any]:
    return values[:count], values[count:]


def _make_join(
    logits: fx.GraphModule, loss: Any, rows: Tensor, head: Tensor, inputs: Any
) -> HeadCall:
    device = rows.device
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    shape = (*rows.shape[:-1], head.shape[0])
    plan: Plan = logits.meta["plan"]
    model = called_model(plan)
    call = call_name(model())
    return HeadCall(
        plan, logits, loss, shape, device, autocast, fingerprint(inputs),
        [storage(t) for t in inputs], model, call,
    )  # fmt: skip


def _without_version(t: Any) -> Any:
    return t.data if isinstance(t, Tensor) and not in_zero3(t) else t


def _needs_history(tensors: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        t.requires_grad for t in tensors if isinstance(t, Tensor)
    )


def _without_history(join: HeadCall, rows: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """The logits of a call that needs no gradient."""
    if not join.plan.lazy:
        return join.compute(inputs, False)
    # the caller may write to rows that no backward pass needs
    return _lazy(join, aliases(tuple(t.clone() if t is rows else t for t in inputs)))


def logits_alone(logits: fx.GraphModule, rows: Tensor, head: Tensor, *inputs: Any) -> Tensor:
    """Lazy logits that no loss is computed from; see ``loss_and_logits``."""
    join = _make_join(logits, None, rows, head, inputs)
    if not _needs_history(inputs):
        return _without_history(join, rows, inputs)
    nothing = (None,) * op.OPERANDS
    result: Tensor = _Logits.apply(join, *nothing, *inputs)  # type: ignore[no-untyped-call]
    return result


def loss_and_logits(
    logits: fx.GraphModule, loss: fx.GraphModule, rows: Tensor, head: Tensor, *values: Any
) -> tuple[Tensor, Tensor]:
    """The fused loss, and the logits that it is of.

    ``logits`` computes the logits and has the plan in its ``meta``; ``loss`` computes the loss from
    them. ``rows``: (..., H), give shape and device; ``head``: (V, H). ``values`` are the inputs of
    ``logits``, the other inputs of ``loss``, and the arguments of ``linear_cross_entropy``.
    """
    plan: Plan = logits.meta["plan"]
    inputs, rest = _split(values, plan.inputs)
    others, arguments = _split(rest, plan.others)
    join = _make_join(logits, loss, rows, head, inputs)
    if not _needs_history((*inputs, *arguments)):
        fused = linear_cross_entropy(*arguments)
        return fused, _without_history(join, rows, inputs)
    settings = op.settings(*arguments[4:9])
    operands = op.operands(*arguments[:3], *arguments[9:])
    returned: Tensor = _Logits.apply(join, *operands, *inputs)  # type: ignore[no-untyped-call]
    needs = [t is not None and t.requires_grad for t in operands]
    bare = (*(t if t is None else t.detach() for t in operands), arguments[3])
    with torch.autocast(rows.device.type, enabled=False):
        result: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            join, returned, needs, bare, settings, inputs, *others
        )
    return result, returned


def _lazy(call: HeadCall, inputs: tuple[Any, ...], keep: bool = False) -> LazyLogits:
    """The logits, computed when they are read; with a history to ``keep`` if possible."""
    return LazyLogits.of(Buffer(call, inputs, call.shape, call.plan.dtype, ENDINGS, keep))
