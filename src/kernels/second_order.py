"""Derivatives of derivatives: what the autograd functions of all ops share.

A backward pass is written for speed: in place, in tiles, in opaque kernels. Autograd cannot see
into it. Where somebody differentiates through it (``create_graph=True``, for gradient penalties,
Hessians, meta-learning), or calls it with a batch of gradients (``is_grads_batched=True``), the
gradients of the op's reference take its place. They are made from what forward has kept; where
that is not all they need, there is an error, never a wrong value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .direct import is_traced_here

Gradients = tuple[Any, ...]
Backward = Callable[..., Gradients]


def differentiable(again: Backward, always: bool = False) -> Callable[[Backward], Backward]:
    """Decorate the ``backward`` of an autograd function: ``again`` is its differentiable form.

    Where none of the outputs has a gradient, because a function behind them gives none, the inputs
    have none, as in eager mode: that needs ``ctx.set_materialize_grads(False)`` in ``forward``.

    Args:
        again: takes and returns what ``backward`` does; made of ``gradients``, as a rule.
        always: whether they are called where no gradient comes in, too.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Gradients:
            if not always and all(g is None for g in grads):
                return (None,) * len(ctx.needs_input_grad)
            # a compiler traces the pass itself, and refuses to differentiate what it has made
            fast = is_traced_here() or not (torch.is_grad_enabled() or _batched(grads))
            chosen = backward if fast else again
            if not torch._C._is_any_autocast_enabled():
                return chosen(ctx, *grads)
            device = next((g.device.type for g in grads if g is not None), "cpu")
            if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
                return chosen(ctx, *grads)
            with torch.autocast(device, enabled=False):  # forward has cast what is to be cast
                return chosen(ctx, *grads)

        return run

    return decorate


def _has_autocast(device: str) -> bool:
    # PyTorch 2.11's compiler cannot trace the question: it is asked of rare devices only
    return device in ("cpu", "cuda") or bool(torch.amp.is_autocast_available(device))


def _batched(grads: Sequence[Any]) -> bool:
    """Whether backward runs under vmap, where nothing may be written in place."""
    if torch._C._are_functorch_transforms_active():
        return True
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return any([g is not None and is_batched(g) for g in grads])


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> Gradients:
    """The gradients of ``function``, with a history that leads to its inputs and to ``grads``.

    Args:
        function: plain PyTorch, of ``inputs``; returns a tensor or several.
        inputs: tensors, as ``ctx.saved_tensors`` gives them, or anything else.
        needed: whether the gradient of each input is wanted; may have more entries.
        grads: those of the outputs, None where there is none.

    Returns:
        One for each entry of ``needed``, None where it is not wanted or zero.
    """
    # aliases: a parameter that the inputs come from as well is a value of its own here
    with torch.enable_grad():
        own = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
        made = function(*own)
    outputs = made if isinstance(made, (tuple, list)) else (made,)
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    wanted = [i for i, t in enumerate(own) if needed[i] and isinstance(t, Tensor)]
    found: list[Any] = [None] * len(needed)
    if pairs and wanted:
        outs, ups = zip(*pairs, strict=True)
        given = torch.autograd.grad(
            outs,
            [own[i] for i in wanted],
            ups,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        for i, grad in zip(wanted, given, strict=True):
            found[i] = grad
    return tuple(found)


def double_backward(reference: Callable[..., Any], inputs: int) -> Backward:
    """The differentiable form of a backward pass: the gradients of ``reference``.

    Args:
        reference: of the op's tensors, and after them of ``ctx.options``.
        inputs: how many tensors these are; forward saves them first, in their order.
    """

    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        def formula(*tensors: Any) -> Any:
            return reference(*tensors, *ctx.options)

        return gradients(formula, ctx.saved_tensors[:inputs], ctx.needs_input_grad, grads)

    return backward


def absent(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What stands for an input that is not kept, because no gradient depends on its values.

    Args:
        shape: of the input.
        like: a tensor on its device.
        dtype: of the input; ``like``'s if None.
    """
    zero = torch.zeros((), dtype=dtype or like.dtype, device=like.device)
    return zero.expand(tuple(shape)).requires_grad_()


def require_kept(kept: bool, name: str, why: str) -> None:
    """Raise where an op has not kept what its second derivative depends on.

    Args:
        kept: whether it has.
        name: of the op.
        why: what is not kept, and for which reason.

    Raises:
        NotImplementedError: ``kept`` is false.
    """
    if not kept:
        raise NotImplementedError(
            f"the backward pass of fusewright's {name} cannot be differentiated here: {why}. For "
            "gradients of gradients (create_graph=True), call fusewright.restore(model) first."
        )
