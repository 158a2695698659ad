"""The loss of models that cannot be told how many tokens a step trains in all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss


def causal_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Any = None,
    smoother: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The loss over the trained tokens of all processes, for a model that cannot be told of them.

    Args:
        outputs: of the model, with ``logits`` (B, T, V).
        labels: (B, T), -100 where nothing is trained.
        num_items_in_batch: trained tokens of the step, of all processes.
        smoother: transformers' ``LabelSmoother``; None: labels are not smoothed.
    """
    if smoother is not None:
        return smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
    logits = outputs["logits"]
    loss: Tensor = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
    )
    return loss
