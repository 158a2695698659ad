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


def differentiable(
    differentiable_backward: Backward, always: bool = False
) -> Callable[[Backward], Backward]:
    """Decorate the ``backward`` of an autograd function with its differentiable form.

    ``differentiable_backward`` takes and returns what ``backward`` does, and is made of
    ``gradients`` as a rule. Where none of the outputs has a gradient, because a function behind
    them gives none, the inputs have none, as in eager mode: that needs
    ``ctx.set_materialize_grads(False)`` in ``forward``. With ``always`` both forms are called
    there, too.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Gradients:
            if not always and all(g is None for g in grads):
                return (None,) * len(ctx.needs_input_grad)
            # a compiler traces the pass itself, and refuses to differentiate what it has made
            fast = is_traced_here() or not (torch.is_grad_enabled() or _batched(grads))
            function = backward if fast else differentiable_backward
            if not torch._C._is_any_autocast_enabled():
                return function(ctx, *grads)
            device = next((g.device.type for g in grads if g is not None), "cpu")
            if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
                return function(ctx, *grads)
            with torch.autocast(device, enabled=False):  # forward has cast what is to be cast
                return function(ctx, *grads)

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

    ``function`` is plain PyTorch and returns a tensor or several; ``grads`` are those of its
    outputs, None where there is none. ``inputs`` are tensors, as ``ctx.saved_tensors`` gives them,
    or anything else. There is one result for each entry of ``needed``, None where it is not needed
    or zero.
    """
    # aliases: a parameter that other inputs come from as well is a separate value here
    with torch.enable_grad():
        aliases = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
        result = function(*aliases)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    indices = [i for i, t in enumerate(aliases) if needed[i] and isinstance(t, Tensor)]
    results: list[Any] = [None] * len(needed)
    if pairs and indices:
        outs, ups = zip(*pairs, strict=True)
        grads_of_inputs = torch.autograd.grad(
            outs,
            [aliases[i] for i in indices],
            ups,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        for i, grad in zip(indices, grads_of_inputs, strict=True):
            results[i] = grad
    return tuple(results)


def double_backward(reference: Callable[..., Any], inputs: int) -> Backward:
    """The differentiable form of a backward pass: the gradients of ``reference``.

    ``reference`` takes the first ``inputs`` tensors that forward has saved, then ``ctx.options``.
    """

    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        def formula(*tensors: Any) -> Any:
            return reference(*tensors, *ctx.options)

        return gradients(formula, ctx.saved_tensors[:inputs], ctx.needs_input_grad, grads)

    return backward


def absent(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in place of an input that is not kept: no gradient depends on its values."""
    zero = torch.zeros((), dtype=dtype or like.dtype, device=like.device)
    return zero.expand(tuple(shape)).requires_grad_()


def require_saved(saved: bool, name: str, why: str) -> None:
    """Raise NotImplementedError if op ``name`` has not kept what its second derivative needs."""
    if not saved:
        raise NotImplementedError(
            f"the backward pass of fusewright's {name} cannot be differentiated here: {why}. For "
            "gradients of gradients (create_graph=True), call fusewright.restore(model) first."
        )
