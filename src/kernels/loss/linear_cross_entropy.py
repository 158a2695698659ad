"""The head and the cross entropy: ``cross_entropy(softcap(scale·(x·Wᵀ + b + h·Bᵀ)), labels)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..op import Maker, Op
from . import head
from .head_op import misfits, operands, settings

# ------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute what causal LMs of transformers compute, cast for cast: the loss of fp32 logits."""
    chosen = settings(ignore_index, reduction, label_smoothing, softcap, logit_scale)
    loss: Tensor = head.reference(x, weight, bias, narrow, lora_b, None, labels, chosen)
    return loss


# ------------------------------------------------------------------------ cpu, triton and autograd

# ``head.py``.


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
    chosen = settings(ignore_index, reduction, label_smoothing, softcap, logit_scale)
    loss: Tensor = head.head(operands(x, weight, bias, narrow, lora_b), None, labels, chosen)
    return loss


# ---------------------------------------------------------------------------------------------- OP


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Return why the op cannot take these arguments of ``linear_cross_entropy``."""
    reasons = misfits(x, weight, bias, labels, "labels", narrow, lora_b)
    if reduction not in ("mean", "sum"):
        reasons.append(f"the reduction {reduction!r} keeps one loss per row")
    return reasons


def _example(m: Maker) -> tuple[Any, ...]:
    return m.x(m.sizes.hidden), m.weight(m.sizes.vocabulary, m.sizes.hidden), None, m.labels()


def _example_with_update(m: Maker) -> tuple[Any, ...]:
    x, weight, _, labels = _example(m)
    narrow = m.x(m.sizes.rank).detach().to(m.adapters).requires_grad_()
    lora_b = m.adapter(m.sizes.vocabulary, m.sizes.rank)
    return x, weight, None, labels, -100, "mean", 0.0, None, 1.0, narrow, lora_b


def _smooth_example(m: Maker) -> tuple[Any, ...]:
    x, weight, _, labels = _example(m)
    bias = m.weight(m.sizes.vocabulary, mean=0.0)
    return x, weight, bias, labels, -100, "mean", 0.1, 30.0, 0.5


OP = Op(
    "linear_cross_entropy",
    reference,
    linear_cross_entropy,
    unsupported,
    example=_example,
    variants={"smooth-softcap": _smooth_example, "adapted": _example_with_update},
)
