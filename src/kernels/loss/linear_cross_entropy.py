"""The head and the loss in one: ``cross_entropy(softcap(scale·(x·Wᵀ + b)), labels)``.

The logits are the largest tensor of a training step (rows x vocabulary), yet only one number and
the gradient of x come out of them. Here they exist one tile of rows at a time, and are multiplied
once: the forward pass turns each tile into its own gradient in place and multiplies it back at
once, so backward only scales what forward found. Rows whose label is ignored are never multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ..captured import capturable
from ..op import Maker, Op
from ..second_order import differentiable, gradients
from .linear_cross_entropy_parts import (
    OPERANDS,
    Settings,
    found,
    misfits,
    operands,
    scaled,
    settings,
)

# ------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What causal LMs of transformers compute, cast for cast: the loss of fp32 logits."""
    logits = linear(x, weight, bias)
    if narrow is not None and lora_b is not None:
        logits = (logits + linear(narrow, lora_b)).to(logits.dtype)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.dtype is not torch.float64:
        logits = logits.float()
    return cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


# -------------------------------------------------------------------------------- cpu and triton

# ``linear_cross_entropy_parts.py``.

# -------------------------------------------------------------------------------------- autograd


def _again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *given, labels = ctx.saved_tensors[OPERANDS + 1 :]
    ignore_index, reduction, smoothing, softcap, scale = ctx.chosen
    config = ignore_index, reduction, smoothing, softcap or None, scale

    def formula(x: Tensor, weight: Tensor, bias: Any, narrow: Any, lora_b: Any) -> Tensor:
        return reference(x, weight, bias, labels, *config, narrow, lora_b)

    return gradients(formula, given, ctx.needs_input_grad, (grad,))


@capturable
class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients of the *sum*; backward multiplies them, out of place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None,
        lora_b: Tensor | None, labels: Tensor, chosen: tuple[Any, ...], recording: bool,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        needs = [recording and needed for needed in ctx.needs_input_grad[:OPERANDS]]
        given = (x, weight, bias, narrow, lora_b)
        loss, saved = found(given, labels, Settings(*chosen), needs)
        # the operands and labels for a second derivative alone
        ctx.save_for_backward(*saved, *given, labels)
        ctx.chosen = chosen
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in given]
        return loss

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors[: OPERANDS + 1], ctx.needs_input_grad[:OPERANDS]
        return *scaled(saved, grad, ctx.like, needed, ctx.chosen[-1]), None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the cross entropy of ``softcap·tanh(logit_scale·(x·Wᵀ + b + h·Bᵀ) / softcap)``.

    Logits, scale and softcap are rounded to x's dtype where the model rounds them, so the loss is
    eager's; the softmax and everything after run in fp32. Without gradients (no_grad, or none
    required) only the loss is computed. Gradients of the head are summed over the tiles in fp32.
    Backward may run more than once over a retained graph. Under autocast the operands are cast
    first, as autocast casts a linear layer's. ``torch.compile`` sees one opaque op.

    Args:
        x: (..., hidden), the rows that are multiplied.
        weight: (vocabulary, hidden), in x's dtype; frozen, trainable, or tied to the embedding.
        bias: (vocabulary,) or None.
        labels: (...), int64, already shifted; each a class or ``ignore_index``.
        ignore_index: the label of rows that do not count.
        reduction: ``"mean"`` over the rows that count (nan if none does), or ``"sum"``.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        softcap: bound of the logits (Gemma 2), or None.
        logit_scale: factor on the logits, before the softcap.
        narrow: (..., r), h of an adapter of the head, ``scale·A·x``; or None.
        lora_b: (vocabulary, r), its B, in the dtype of ``narrow``, which may be wider than x's.

    Returns:
        A scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: another reduction, a smoothing outside [0, 1], or a softcap that is not above 0.
        IndexError: on the CPU, a label that is no class. On a GPU, where looking would stall the
            stream, the loss is nan instead; in fp64, which no kernel takes, it is PyTorch's own
            assertion on the device.
    """
    options = settings(ignore_index, reduction, label_smoothing, softcap, logit_scale)
    given = operands(x, weight, bias, narrow, lora_b)
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            *given,
            labels,
            tuple(options),
            torch.is_grad_enabled(),  # within forward it is always off
        )
    return loss


# ---------------------------------------------------------------------------------------------- OP


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Say why the op cannot take these arguments, those of ``linear_cross_entropy``."""
    reasons = misfits(x, weight, bias, labels, "labels")
    if narrow is not None and lora_b is not None:
        if operands(x, narrow)[1].dtype is not operands(x, lora_b)[1].dtype:
            reasons.append(f"B is {lora_b.dtype}, its input {narrow.dtype}")
        fits = (weight.shape[0], narrow.shape[-1]) == tuple(lora_b.shape)
        if not fits or narrow.shape[:-1] != x.shape[:-1]:
            reasons.append(f"B is {tuple(lora_b.shape)}, its input {tuple(narrow.shape)}")
    elif narrow is not None or lora_b is not None:
        reasons.append("a part of the adapter is missing")
    if reduction not in ("mean", "sum"):
        reasons.append(f"the reduction {reduction!r} keeps one loss per row")
    return reasons


def _example(m: Maker) -> tuple[Any, ...]:
    return m.x(m.sizes.hidden), m.weight(m.sizes.vocabulary, m.sizes.hidden), None, m.labels()


def _example_with_update(m: Maker) -> tuple[Any, ...]:
    x, head, _, labels = _example(m)
    narrow = m.x(m.sizes.rank).detach().to(m.adapters).requires_grad_()
    lora_b = m.adapter(m.sizes.vocabulary, m.sizes.rank)
    return x, head, None, labels, -100, "mean", 0.0, None, 1.0, narrow, lora_b


def _smooth_example(m: Maker) -> tuple[Any, ...]:
    x, head, _, labels = _example(m)
    bias = m.weight(m.sizes.vocabulary, mean=0.0)
    return x, head, bias, labels, -100, "mean", 0.1, 30.0, 0.5


OP = Op(
    "linear_cross_entropy",
    reference,
    linear_cross_entropy,
    unsupported,
    example=_example,
    variants={"smooth-softcap": _smooth_example, "adapted": _example_with_update},
)
